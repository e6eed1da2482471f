"""Runs that meet a number that is not finite, and what they leave."""

import chex
import jax
import numpy as np
import pytest

import adalfl_jax
from adalfl_jax.training import DivergenceError, compare, run, train
from adalfl_jax.training.checkpoint import load_state
from tests.training.tiny import DIABETES, final_state, tiny_config

TOO_FAST = 1e30  # a learning rate at which the second step is not finite


def test_tuning_in_which_every_rate_diverges_ends_the_run(tmp_path):
    config = tiny_config(DIABETES, method="tuned_task_loss", **{"tuning.learning_rates": (TOO_FAST, 1e35)})
    with pytest.raises(DivergenceError, match="tuned_task_loss diverged"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.usefixtures("without_figures")
def test_tuning_survives_a_rate_whose_metric_overflows_before_its_state(tmp_path):
    overrides = DIABETES | {"tuning.learning_rates": (0.01, TOO_FAST), "num_steps": 1}
    summary = train(tiny_config(overrides, method="tuned_task_loss"), tmp_path / "run")
    assert summary["methods"]["tuned_task_loss"]["learning_rate"] == 0.01


@pytest.mark.parametrize("eval_every", [10, 1])
def test_diverged_training_names_the_step_and_keeps_the_last_finite_state(eval_every, tmp_path):
    overrides = DIABETES | {"inner.learning_rate": TOO_FAST, "eval_every": eval_every}
    config = tiny_config(overrides, method="task_loss")
    with pytest.raises(DivergenceError, match=r"task_loss diverged: .* is not finite at training step \d") as caught:
        train(config, tmp_path / "run")
    error = caught.value
    assert (error.method, error.phase, error.seed) == ("task_loss", "training", 0)
    assert error.metric in str(error)
    assert f"step {error.step} " in str(error)
    assert error.state_step % eval_every == 0
    assert error.state_step < error.step <= error.state_step + eval_every
    folder = tmp_path / "run" / "states" / "task_loss_last_finite"
    assert str(folder) in str(error)
    kept = load_state(folder, error.state)
    chex.assert_tree_all_finite(kept.theta.params)
    chex.assert_trees_all_equal(kept.theta.params, error.state.theta.params)
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_start_that_is_not_finite_leaves_no_state(tmp_path, monkeypatch):
    init_training = run.init_training

    def spoiled(*arguments):
        return jax.tree.map(lambda leaf: leaf * np.nan, init_training(*arguments))

    monkeypatch.setattr(run, "init_training", spoiled)
    with pytest.raises(
        DivergenceError,
        match=r"at training step 0 \(seed 0\); theta, phi or .* before the first step: look at the data",
    ):
        train(tiny_config({"num_seeds": 1}, method="task_loss"), tmp_path / "run")
    assert not (tmp_path / "run" / "states").exists()


@pytest.mark.filterwarnings("ignore:adalfl. the first step is as long")
@pytest.mark.parametrize(("offline_steps", "method", "phase"), [(0, "adalfl", "training"), (10, "offline", "offline")])
def test_diverged_learned_loss_is_kept_as_it_last_was(offline_steps, method, phase, tmp_path):
    overrides = DIABETES | {"inner.learning_rate": TOO_FAST, "offline.num_steps": offline_steps}
    with pytest.raises(DivergenceError) as caught:
        train(tiny_config(overrides, method="adalfl"), tmp_path / "run")
    error = caught.value
    assert (error.method, error.phase) == (method, phase)
    frozen = adalfl_jax.load_learned_loss(tmp_path / "run" / "learned_loss.safetensors")
    chex.assert_tree_all_finite(frozen.params)
    origin = {key: frozen.metadata[key] for key in ("method", "seed", "step", "diverged_at")}
    assert origin == {"method": method, "seed": error.seed, "step": error.state_step, "diverged_at": error.step}
    kept = load_state(tmp_path / "run" / "states" / f"{method}_last_finite", error.state)
    chex.assert_tree_all_finite(kept.phi.params)
    assert not (tmp_path / "run" / "summary.json").exists()


def test_diverged_run_can_start_over(tmp_path):
    config = tiny_config(DIABETES | {"inner.learning_rate": TOO_FAST}, method="task_loss")
    messages = []
    for _ in range(2):
        with pytest.raises(DivergenceError) as caught:
            train(config, tmp_path / "run")
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_methods_that_finished_are_kept_when_a_later_one_diverges(tmp_path):
    overrides = DIABETES | {"methods": ("task_loss", "tuned_task_loss"), "tuning.learning_rates": (TOO_FAST,)}
    config = tiny_config(overrides, **{"inner.learning_rate": 0.01})
    with pytest.raises(DivergenceError):
        compare(config, tmp_path / "run")
    kept = final_state(config, tmp_path / "run", "task_loss")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(kept.theta.params))
