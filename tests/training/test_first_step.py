"""The implicit learning rate of a run, and the length of its first step."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from adalfl_jax.learned_losses import load_learned_loss, save_learned_loss
from adalfl_jax.models import MODELS
from adalfl_jax.models.layers import batch_norm
from adalfl_jax.training import compare, outputs, train
from adalfl_jax.training.batches import splits_of
from adalfl_jax.training.initial import init_theta, init_training, make_seed_keys
from adalfl_jax.training.phases import make_training_program
from adalfl_jax.training.setup import make_setup
from tests.training.tiny import LINEAR, final_state, records, tiny_config


@pytest.fixture(scope="module")
def adjusted(tmp_path_factory):
    """Losses learned offline, and both methods behind them with a first step of a given length."""
    folder = tmp_path_factory.mktemp("adjusted")
    common = {"offline.num_steps": 300, "offline.learning_rate": 0.01, "num_seeds": 3}  # of two the median is the mean
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outputs, "write_figures", lambda *_: {})
        source = tiny_config(common | LINEAR, method="ml3", num_steps=1, eval_every=100)
        train(source, folder / "source")
        start = LINEAR | {"learned_loss.start": str(folder / "source"), "offline.num_steps": 0}
        config = tiny_config(start | {"inner.first_step_rate": 0.25, "methods": ("ml3", "adalfl"), "num_seeds": 3})
        return start, config, folder, compare(config, folder / "run")


@pytest.mark.usefixtures("without_figures")
def test_implicit_learning_rate_follows_the_schedule(adjusted, tmp_path):
    start, *_ = adjusted
    config = tiny_config(start | {"inner.schedule": "linear", "num_seeds": 1}, method="ml3")
    train(config, tmp_path / "run")
    rows = [row for row in records(tmp_path / "run") if row["method"] == "ml3"]
    rate = config.inner.learning_rate
    for row, expected in ((rows[0], rate), (rows[-1], rate / config.num_steps)):  # of the last step, and not 0
        assert row["implicit_learning_rate"] != 0
        assert row["implicit_learning_rate"] == pytest.approx(
            expected * row["gradient_scale"] * row["gradient_cosine"], rel=1e-4
        )


def test_the_first_step_has_the_length_that_is_asked_for(adjusted):
    _, _, folder, summary = adjusted
    scales = [row["gradient_scale"] for row in records(folder / "source") if row.get("phase") == "training"][:3]
    rows = [row for row in records(folder / "run") if row["step"] == 0]
    for method in ("ml3", "adalfl"):
        info = summary["methods"][method]
        assert info["learning_rates"] == pytest.approx([0.25 / scale for scale in scales], rel=1e-5)
        assert info["learning_rate"] == pytest.approx(np.median(info["learning_rates"]))
        expected = [0.25 * row["gradient_cosine"] for row in rows if row["method"] == method]
        assert [row["implicit_learning_rate"] for row in rows if row["method"] == method] == pytest.approx(
            expected, 1e-5
        )


@pytest.mark.usefixtures("without_figures")
@pytest.mark.parametrize(
    ("method", "seed"),
    [("adalfl", 1), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in (("adalfl", 0), ("ml3", 0), ("ml3", 1)))],
)
def test_the_length_of_the_first_step_changes_the_rate_of_each_seed_and_nothing_else(method, seed, adjusted, tmp_path):
    start, config, folder, summary = adjusted
    state, rate = final_state(config, folder / "run", method), summary["methods"][method]["learning_rates"][seed]
    alone = tiny_config(start, **{"inner.learning_rate": rate}, method=method)
    train(alone, tmp_path / "run")
    found = final_state(alone, tmp_path / "run", method)
    for one, other in ((found.theta, state.theta), (found.phi, state.phi)):
        of_seed = [jax.tree.map(lambda leaf: leaf[seed], tree.params) for tree in (one, other)]
        chex.assert_trees_all_close(*of_seed, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("without_figures")
@pytest.mark.parametrize("further", [{}, {"inner.momentum": 0.9, "inner.weight_decay": 0.01}])
@pytest.mark.parametrize(
    "remembering", [{"outer.pipelined": True}, {"hypergradient": "truncated", "estimator.window": 2}], ids=str
)
def test_what_a_step_remembers_is_what_the_first_was_made_for(remembering, further):
    common = LINEAR | {"inner.first_step_rate": 0.2, "offline.num_steps": 0}
    config = tiny_config({**common, **remembering, **further})
    setup, keys = make_setup(config), make_seed_keys(config.seeds)
    state, program = init_training(setup, "adalfl", keys), make_training_program(setup, "adalfl")

    def advance(state):
        return program.advance(state, keys, splits_of(setup), config.inner.learning_rate, 0, num_steps=2)[0]

    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(advance, state).phi.carry, state.phi.carry)


def test_a_loss_that_is_flat_keeps_its_rate(adjusted, tmp_path):
    start, _, folder, _ = adjusted
    saved = load_learned_loss(folder / "source" / "learned_loss.safetensors")
    saved.params["layer_1"]["kernel"] *= 0  # the last layer's
    save_learned_loss(tmp_path / "flat.safetensors", saved.loss, saved.params)
    overrides = start | {"learned_loss.start": str(tmp_path / "flat.safetensors"), "inner.first_step_rate": 0.25}
    with pytest.warns(UserWarning, match="is below a millionth of the task loss's"):
        summary = train(tiny_config(overrides, method="ml3"), tmp_path / "run")
    assert summary["methods"]["ml3"]["learning_rates"] == pytest.approx([0.1, 0.1])


class Normed(nnx.Module):
    """Two layers with batch norm between them."""

    def __init__(self, input_shape, num_outputs, *, rngs):
        self.first = nnx.Linear(*input_shape, 16, rngs=rngs)
        self.norm = batch_norm(16, rngs=rngs)
        self.last = nnx.Linear(16, num_outputs, rngs=rngs)

    def __call__(self, inputs):
        return self.last(jax.nn.relu(self.norm(4 * self.first(inputs))))


@pytest.mark.usefixtures("without_figures")
def test_with_batch_norm_the_first_step_is_as_long_as_one_on_the_task_loss_at_that_rate(tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, "normed", Normed)
    rng, splits = np.random.default_rng(0), {"": 12, "valid_": 4, "test_": 4}
    arrays = {f"{split}inputs": rng.normal(size=(size, 4)) for split, size in splits.items()}
    arrays |= {f"{split}targets": np.arange(size) % 4 for split, size in splits.items()}
    np.savez(tmp_path / "examples.npz", **arrays)
    loss = tiny_config().learned_loss.network()
    save_learned_loss(tmp_path / "random.safetensors", loss, loss.init(jax.random.key(3)))
    overrides = {"dataset.name": str(tmp_path / "examples.npz"), "batch_size": 12, "num_steps": 1, "eval_every": 1}
    overrides |= {"model.name": "normed", "num_seeds": 1, "learned_loss.start": str(tmp_path / "random.safetensors")}
    overrides |= {"offline.num_steps": 0, "inner.learning_rate": 0.3, "inner.first_step_rate": 0.3}
    config = tiny_config(overrides, methods=("task_loss", "ml3"))  # whose one batch is all examples
    compare(config, tmp_path / "run")
    theta = init_theta(make_setup(config), make_seed_keys(config.seeds))
    ends = (final_state(config, tmp_path / "run", method).theta for method in config.methods)
    on_task_loss, on_learned_loss = (float(optax.tree.norm(optax.tree.sub(end.params, theta.params))) for end in ends)
    assert on_learned_loss == pytest.approx(on_task_loss, rel=1e-3)


@pytest.mark.parametrize("factor", [0.5, 30.0])
def test_what_shortens_the_first_step_leaves_weight_decay_alone(factor):
    rate, decay, after = 0.1, 0.05, []
    overrides = LINEAR | {"inner.first_step_rate": 0.3, "num_seeds": 1}
    for weight_decay in (0.0, decay):
        config = tiny_config(overrides, **{"inner.weight_decay": weight_decay})
        setup, keys = make_setup(config), make_seed_keys(config.seeds)
        start = init_training(setup, "ml3", keys)._replace(rate_factor=jnp.full(1, factor))
        program = make_training_program(setup, "ml3")
        after.append(program.advance(start, keys, splits_of(setup), rate, 0, num_steps=1)[0].theta.params)
    decayed = optax.tree.sub(*after)
    chex.assert_trees_all_close(decayed, optax.tree.scale(rate * decay, start.theta.params), rtol=1e-3, atol=1e-6)
