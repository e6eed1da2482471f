"""A learned loss in a file: what goes in comes out, and nothing else does."""

import concurrent.futures
import json
import pickle
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

import adalfl_jax
from adalfl_jax.learned_losses.persistence import FORMAT
from tests.problems import make_batch, make_problem

LOSSES = {
    "network": adalfl_jax.LossNetwork(hidden_sizes=(7, 3), beta=4.0, use_bias=True, predictions="log_probabilities"),
    "scaled": adalfl_jax.ScaledTaskLoss("softmax_cross_entropy"),
    "weights": adalfl_jax.WeightNetwork(hidden_size=5),
    "rescaled": adalfl_jax.RescaledLoss(adalfl_jax.LossNetwork(hidden_sizes=(3,)), floor=0.5),
    "numbers of numpy": adalfl_jax.RescaledLoss(adalfl_jax.WeightNetwork(np.int64(2)), floor=np.float32(0.3)),
}


@pytest.fixture
def saved(tmp_path):
    path, loss = tmp_path / "loss.safetensors", LOSSES["network"]
    adalfl_jax.save_learned_loss(path, loss, loss.init(jax.random.key(0)))
    return path


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_saved_is_what_is_loaded(tmp_path, name):
    loss = LOSSES[name]
    params = jax.tree.map(lambda leaf: leaf + 0.25, loss.init(jax.random.key(0)))
    metadata = {"dataset": "digits", "seed": 3, "scores": [0.1, None]}
    adalfl_jax.save_learned_loss(tmp_path / "loss.safetensors", loss, params, metadata)
    frozen = adalfl_jax.load_learned_loss(tmp_path / "loss.safetensors")
    assert frozen.loss == loss
    assert frozen.metadata == metadata
    chex.assert_trees_all_equal(frozen.params, params)
    targets, outputs = jnp.array([0, 1]), jnp.array([[0.2, -0.1], [1.0, 0.0]])
    assert frozen(targets, outputs) == loss.apply(params, targets, outputs)
    assert [path.name for path in tmp_path.iterdir()] == ["loss.safetensors"]


@pytest.mark.parametrize("lay", [np.asfortranarray, lambda array: np.stack([0 * array, array], axis=-1)[..., 1]])
def test_parameters_are_saved_however_they_lie_in_memory(tmp_path, lay):
    loss = LOSSES["network"]
    params = jax.tree.map(np.asarray, loss.init(jax.random.key(0)))
    adalfl_jax.save_learned_loss(tmp_path / "loss.safetensors", loss, jax.tree.map(lay, params))
    chex.assert_trees_all_equal(adalfl_jax.load_learned_loss(tmp_path / "loss.safetensors").params, params)


def test_a_loaded_loss_drops_into_grad_jit_and_a_task_step(saved):
    frozen = adalfl_jax.load_learned_loss(saved)
    model, inner, _, theta, _ = make_problem()
    batch = make_batch(jax.random.key(1)).inner

    def objective(params):
        return frozen(batch.targets, model.apply(params, {}, batch.inputs, train=True, rng_key=None)[0])

    by_hand = optax.apply_updates(theta.params, optax.tree.scale(-0.3, jax.jit(jax.grad(objective))(theta.params)))
    stepped, _ = jax.jit(adalfl_jax.make_task_step(model.apply, frozen, inner))(theta, batch)
    chex.assert_trees_all_close(by_hand, stepped.params, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", LOSSES)
def test_frozen_losses_are_arguments_of_jit_and_side_by_side_of_vmap(name):
    loss, metadata = LOSSES[name], {"dataset": "digits", "scores": [0.1, None]}
    targets, outputs = jnp.array([0, 1]), jnp.array([[0.2, -0.1], [1.0, 0.0]])
    several = jax.tree.map(
        lambda *leaves: jnp.stack(leaves),
        *(
            adalfl_jax.FrozenLoss(loss, loss.init(jax.random.key(seed)), metadata | {"seed": np.int64(seed)})
            for seed in range(3)
        ),
    )
    values = jax.jit(jax.vmap(lambda frozen: frozen(targets, outputs)))(several)
    one = jax.tree.map(lambda leaf: leaf[1], several)
    assert (one.loss, one.metadata) == (loss, metadata | {"seed": 0})  # of the first
    np.testing.assert_allclose(values[1], loss.apply(one.params, targets, outputs), rtol=1e-5)


def test_a_loaded_loss_is_still_there_after_a_step_that_donates_what_was_learned_further(saved):
    frozen = adalfl_jax.load_learned_loss(saved)
    model, inner, _, theta, _ = make_problem()
    outer, batch = optax.adam(1e-2), make_batch(jax.random.key(1))
    step = adalfl_jax.make_bilevel_step(
        model.apply, frozen.loss.apply, adalfl_jax.task_losses.softmax_cross_entropy, inner, outer
    )
    phi = adalfl_jax.Phi.create(frozen.params, outer)
    _, phi, _ = jax.jit(step, donate_argnums=1)(theta, phi, batch)
    loss = frozen(batch.inner.targets, jnp.zeros((len(batch.inner.targets), 3)))
    assert jnp.isfinite(loss)
    moved = jax.tree.map(lambda now, before: jnp.abs(now - before).max(), phi.params, frozen.params)
    assert max(jax.tree.leaves(moved)) > 1e-4


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*/nowhere to save loss.safetensors in; make it"):
        adalfl_jax.save_learned_loss(
            tmp_path / "nowhere" / "loss.safetensors", LOSSES["scaled"], {"log_scale": np.float32(0)}
        )


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    name = "x" * 250  # which a file that is moved into place later exceeds
    with pytest.raises(OSError, match=rf"a learned loss cannot be saved \(File name too long\): '.*/{name}'"):
        adalfl_jax.save_learned_loss(tmp_path / name, LOSSES["scaled"], {"log_scale": np.float32(0)})


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        adalfl_jax.load_learned_loss(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[:-9], lambda raw: raw[:20], lambda raw: b"", lambda raw: b"\xff" * 99]
)
def test_a_damaged_file_is_refused(saved, damage):
    saved.write_bytes(damage(saved.read_bytes()))
    with pytest.raises(ValueError, match=r"loss.safetensors is damaged or is not a safetensors file"):
        adalfl_jax.load_learned_loss(saved)


def test_a_pickle_is_refused_and_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    path = tmp_path / "loss.safetensors"
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="not a safetensors file"):
        adalfl_jax.load_learned_loss(path)
    assert not (tmp_path / "sprung").exists()


def test_somebody_elses_safetensors_file_is_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    path.write_bytes(safetensors.numpy.save({"weight": np.zeros(3, np.float32)}))
    with pytest.raises(ValueError, match="holds no learned loss"):
        adalfl_jax.load_learned_loss(path)


def rewrite(path, edit_header=lambda header: header, edit_arrays=lambda arrays: arrays):
    with safetensors.safe_open(path, framework="numpy") as file:
        header = json.loads(file.metadata()[FORMAT])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a mapping
    text = json.dumps(edit_header(header))
    path.write_bytes(safetensors.numpy.save(edit_arrays(arrays), metadata={FORMAT: text}))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda header: header | {"version": 99}, "format version 99"),
        (lambda header: header | {"version": 0}, "format version 0"),
        (lambda header: header | {"family": "os.system"}, r"unknown family of learned losses 'os.system'.*LossNetwork"),
        (lambda header: header | {"settings": {"beta": -1.0}}, "beta must be a number above 0"),
        (lambda header: header | {"settings": {"surprise": 1}}, "surprise"),
        (lambda header: header | {"family": "RescaledLoss", "settings": {"loss": "x"}}, "must be a learned loss.*'x'"),
        (lambda header: [header], "header cannot be read"),
        (lambda header: {"version": 1}, "header cannot be read"),
    ],
)
def test_a_header_that_makes_no_sense_is_refused(saved, edit, message):
    rewrite(saved, edit_header=edit)
    with pytest.raises(ValueError, match=message):
        adalfl_jax.load_learned_loss(saved)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda arrays: dict(list(arrays.items())[:-1]), r"is damaged.*has parameters"),
        (lambda arrays: {name: array[..., :1] for name, array in arrays.items()}, r"is damaged.*has parameters"),
        (
            lambda arrays: {name: array.astype(np.int32) for name, array in arrays.items()},
            "must be of bfloat16, float16, float32, float64; got",
        ),
        (lambda arrays: {name: array * np.nan for name, array in arrays.items()}, r"is damaged: not finite: layer_0"),
        (
            lambda arrays: {name: np.where(array == array.max(), np.nan, array) for name, array in arrays.items()},
            r"is damaged: not finite: layer_0",
        ),
    ],
)
def test_parameters_that_do_not_fit_are_refused(saved, edit, message):
    rewrite(saved, edit_arrays=edit)
    with pytest.raises(ValueError, match=message):
        adalfl_jax.load_learned_loss(saved)


@pytest.mark.parametrize(
    ("loss", "params", "metadata", "message"),
    [
        (object(), {}, {}, "only LossNetwork, RescaledLoss, ScaledTaskLoss, WeightNetwork.* can be saved; got object"),
        (LOSSES["scaled"], {"log_scale": np.zeros(3)}, {}, r"cannot save ScaledTaskLoss.*has parameters"),
        (LOSSES["scaled"], {"log_scale": np.float32(np.inf)}, {}, "not finite: log_scale"),
        (
            LOSSES["scaled"],
            {"log_scale": jnp.zeros((), jnp.float8_e5m2)},
            {},
            r"must be of .*; got log_scale of float8",
        ),
        (LOSSES["scaled"], {"log_scale": np.float32(0)}, {"when": object()}, "metadata must be JSON"),
        (LOSSES["scaled"], {"log_scale": np.float32(0)}, {"score": float("nan")}, "metadata must be JSON"),
        (LOSSES["scaled"], {"log_scale": np.float32(0)}, [1, 2], "metadata must be JSON, a dict"),
    ],
)
def test_what_cannot_be_kept_is_refused_and_the_old_file_stays(saved, loss, params, metadata, message):
    before = saved.read_bytes()
    with pytest.raises(ValueError, match=message):
        adalfl_jax.save_learned_loss(saved, loss, params, metadata)
    assert saved.read_bytes() == before


def test_parameters_of_a_type_that_numpy_does_not_have_are_refused(saved):
    with safetensors.safe_open(saved, framework="numpy") as file:
        metadata, names = file.metadata(), list(file.keys())
    small = {name: np.zeros((2, 4), jnp.float8_e5m2) for name in names}
    saved.write_bytes(safetensors.numpy.save(small, metadata=metadata))
    with pytest.raises(ValueError, match=r"is damaged or is not a safetensors file: .*float8_e5m2"):
        adalfl_jax.load_learned_loss(saved)


def test_a_loss_that_was_loaded_is_written_in_a_line(saved):
    shown = repr(adalfl_jax.load_learned_loss(saved))
    assert re.match(r"FrozenLoss\(LossNetwork\(.*\), params of \{'layer_0': .*\}\)$", shown)
    assert len(shown) < 500


def test_two_may_save_to_one_path_at_once(saved):
    loss = adalfl_jax.LossNetwork(hidden_sizes=(4,))
    params = [jax.device_get(loss.init(jax.random.key(seed))) for seed in range(2)]

    def save(one):
        for _ in range(20):
            adalfl_jax.save_learned_loss(saved, loss, one)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(save, params))  # for its errors
    loaded = adalfl_jax.load_learned_loss(saved).params
    assert any(jax.tree.all(jax.tree.map(np.array_equal, loaded, one)) for one in params)
    assert list(saved.parent.iterdir()) == [saved]


def test_a_save_that_fails_leaves_nothing(saved, monkeypatch):
    def fail(handle):
        raise OSError(28, "No space left on device")

    before = saved.read_bytes()
    monkeypatch.setattr("os.fsync", fail)
    loss = adalfl_jax.LossNetwork(hidden_sizes=(4,))
    with pytest.raises(OSError, match="No space left"):
        adalfl_jax.save_learned_loss(saved, loss, loss.init(jax.random.key(0)))
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_a_folder_is_no_file_to_save_in_and_stays_alone(tmp_path):
    loss = adalfl_jax.LossNetwork(hidden_sizes=(4,))
    folder = tmp_path / "losses"
    folder.mkdir()
    with pytest.raises(IsADirectoryError, match=r"losses is a folder; name a file in it"):
        adalfl_jax.save_learned_loss(folder, loss, loss.init(jax.random.key(0)))
    assert list(tmp_path.iterdir()) == [folder]
    with pytest.raises(IsADirectoryError, match=r"losses is a folder; name a file in it"):
        adalfl_jax.load_learned_loss(folder)
