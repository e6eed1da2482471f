"""Where phi starts: at the task loss, in a finished run, at a saved loss."""

import dataclasses
import json
import shutil
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest

import adalfl_jax
from adalfl_jax.task_losses import TASK_LOSSES
from adalfl_jax.training import ConfigError, WorkdirError, train
from adalfl_jax.training.initial import init_phi, make_seed_keys, warn_of_poor_fit
from adalfl_jax.training.setup import make_setup
from adalfl_jax.training.start import load_start, pin_start, read_learned_losses
from adalfl_jax.types import Phi
from tests.training.tiny import DIABETES, final_state, tiny_config

pytestmark = pytest.mark.usefixtures("without_figures")

BRIEF = {"model.name": "logistic", "num_steps": 2, "eval_every": 2, "offline.num_steps": 2}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A finished run of AdaLFL: its config and its workdir."""
    config = tiny_config(BRIEF, num_seeds=3)
    folder = tmp_path_factory.mktemp("source") / "run"
    train(config, folder)
    return config, folder


def from_there(start, overrides=None, **more):
    """A config that starts from a path and has no offline phase."""
    return tiny_config({**BRIEF, "offline.num_steps": 0, "learned_loss.start": str(start), **(overrides or {})}, **more)


def first_params(config):
    return init_phi(make_setup(config), make_seed_keys(config.seeds)).params


def assert_same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.mark.slow
@pytest.mark.parametrize("start", ["task_loss", "generalized_cross_entropy"])
def test_a_start_at_a_loss_has_its_gradients(start):
    setup = make_setup(tiny_config({"learned_loss.start": start}, num_seeds=1))
    loss = TASK_LOSSES.get(start, setup.task_loss_fn)
    params = jax.tree.map(lambda leaf: leaf[0], init_phi(setup, make_seed_keys((0,))).params)
    targets, outputs = np.arange(10), np.array(jax.random.normal(jax.random.key(0), (10, 10)))
    learned = jax.grad(lambda f: setup.learned_loss.apply(params, targets, f))(outputs)
    wanted = jax.grad(lambda f: loss(targets, f))(outputs)
    assert np.linalg.norm(learned - wanted) < 0.4 * np.linalg.norm(wanted)


def test_a_start_far_from_the_loss_it_was_fitted_to_is_told(tmp_path):
    """Of a network of one unit; and not of one that is large enough."""
    start = {**BRIEF, **DIABETES, "learned_loss.start": "task_loss", "method": "ml3", "offline.num_steps": 0}
    with pytest.warns(UserWarning, match=r"fitted to 'task_loss' lacks \d+% of its gradient, at most 55% .*larger"):
        train(tiny_config(start | {"learned_loss.hidden_sizes": (1,)}, num_seeds=1), tmp_path / "run")
    setup = make_setup(tiny_config(start | {"learned_loss.hidden_sizes": (40, 40)}, num_seeds=1))
    warn_of_poor_fit(setup, init_phi(setup, make_seed_keys((0,))))


def test_a_fitted_loss_that_is_no_number_is_told():
    setup = make_setup(tiny_config({"learned_loss.start": "task_loss"}, num_seeds=1))
    params = jax.vmap(setup.learned_loss.init)(make_seed_keys((0,)).phi)
    with pytest.warns(UserWarning, match="lacks nan% of its gradient"):
        warn_of_poor_fit(setup, Phi(jax.tree.map(lambda leaf: leaf * np.nan, params), ()))


def test_a_saved_loss_of_other_settings_is_refused(tmp_path):
    path, config = tmp_path / "loss.safetensors", tiny_config()
    loss = dataclasses.replace(config.learned_loss.network(), gamma=0.5)
    adalfl_jax.save_learned_loss(path, loss, loss.init(jax.random.key(0)))
    with pytest.raises(ConfigError, match=r"holds a loss with other settings than the config; .*\n  gamma: 0\.5 -> "):
        load_start(from_there(path))


def test_every_seed_starts_from_its_own_loss_of_a_finished_run(source):
    ours, folder = source
    learned = final_state(ours, folder, "adalfl").phi.params
    assert_same(read_learned_losses(folder).params, learned)
    assert_same(first_params(from_there(folder, num_seeds=3)), learned)
    later = first_params(from_there(folder, seed=1, num_seeds=2))
    assert_same(later, jax.tree.map(lambda leaf: leaf[1:], learned))


def test_one_saved_loss_starts_all_seeds(source):
    _, folder = source
    path = folder / "learned_loss.safetensors"
    params = first_params(from_there(path, seed=7, num_seeds=2))
    for row in range(2):
        assert_same(jax.tree.map(lambda leaf, row=row: leaf[row], params), adalfl_jax.load_learned_loss(path).params)


def test_a_frozen_loss_stays_as_it_was_and_a_run_is_known_by_it(source, tmp_path):
    path = tmp_path / "loss.safetensors"
    shutil.copy(source[1] / "learned_loss.safetensors", path)
    frozen = adalfl_jax.load_learned_loss(path)
    config = from_there(path, method="ml3", num_seeds=1)
    pinned = pin_start(config)
    assert pin_start(pinned) == pinned
    train(config, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == {"command": "train", **pinned.to_dict()}
    assert_same(jax.tree.map(lambda leaf: leaf[0], read_learned_losses(tmp_path / "run").params), frozen.params)
    shutil.copy(path, moved := tmp_path / "moved.safetensors")
    train(from_there(moved, method="ml3", num_seeds=1), tmp_path / "run")  # the same run

    adalfl_jax.save_learned_loss(path, frozen.loss, jax.tree.map(lambda leaf: 2 * leaf, frozen.params))
    with pytest.raises(WorkdirError, match=r"learned_loss\.start: '[0-9a-f]{12}' -> '[0-9a-f]{12}'"):
        train(config, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"holds [0-9a-f]{12} by now, and [0-9a-f]{12} is wanted"):
        pin_start(pinned)


@pytest.mark.parametrize(
    ("start", "changes", "message"),
    [
        ("nowhere", {}, r"one of random, task_loss, softmax_cross_entropy.* the workdir .* nothing at 'nowhere'"),
        ("squared_error", {}, r"start must be one of softmax.* whose targets are labels; got 'squared_error'"),
        ("task_los", {}, r"did you mean 'task_loss'\? there is nothing at 'task_los'"),
        ("{source}", {"seed": 2}, r"has the seeds 0 to 2, and not 3; .*learned_loss\.safetensors"),
        ("{source}", {"learned_loss.hidden_sizes": (4,)}, r"hidden_sizes: \(8,\) -> \(4,\)"),
        ("{source}", {"learned_loss.reduction": "mean"}, r"reduction: 'sum' -> 'mean'"),
        ("{source}", {"learned_loss.family": "scaled_task_loss"}, r"family: 'LossNetwork' -> 'ScaledTaskLoss'"),
        ("{source}/config.json", {}, r"damaged or is not a safetensors file"),
        ("{source}/states", {}, r"holds no finished run"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(start, changes, message, source, tmp_path):
    config = from_there(start.format(source=source[1]), changes)
    with pytest.raises(ConfigError, match=message):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_source_without_learned_losses_or_with_damaged_ones_is_told(source, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(source[1], copy)
    shutil.rmtree(copy / "states")
    with pytest.raises(ConfigError, match=r"states/adalfl cannot be read as a trained state \(.*not found"):
        pin_start(from_there(copy))
    (copy / "learned_loss.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"the learned losses of .* cannot be read: .* is damaged"):
        pin_start(from_there(copy))
    summary = json.loads((copy / "summary.json").read_text())
    summary["methods"]["task_loss"] = summary["methods"].pop("adalfl")
    del summary["learned_loss"]
    (copy / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(ConfigError, match=r"holds no learned loss: its methods are task_loss"):
        pin_start(from_there(copy))


def test_a_saved_loss_that_may_not_be_read_is_not_taken_for_missing(source, monkeypatch):
    def refuse(self, mode):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)  # as root finds no file that it may not read
    with pytest.raises(ConfigError, match=r"config\.learned_loss\.start: .*Permission denied: .*learned_loss"):
        pin_start(from_there(source[1] / "learned_loss.safetensors"))


def test_a_config_that_starts_nowhere_else_is_left_alone():
    config = tiny_config()
    assert pin_start(config) is config
    with pytest.raises(
        ConfigError, match=r"config\.learned_loss\.start must be one of random, task_loss, .*, or a path"
    ):
        dataclasses.replace(config.learned_loss, start="")


@pytest.mark.usefixtures("without_figures")
def test_a_loss_that_nothing_teaches_is_told(tmp_path):
    brief = {**BRIEF, "offline.num_steps": 0, "method": "ml3", "num_seeds": 1}
    with pytest.warns(UserWarning, match=r"config\.offline\.num_steps is 0, so it trains on one as it was drawn"):
        train(tiny_config(brief), tmp_path / "random")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(tiny_config(brief | {"learned_loss.family": "scaled_task_loss"}), tmp_path / "scaled")
