"""What a run keeps of its learned losses."""

import jax
import numpy as np
import pytest

from adalfl_jax.learned_losses import load_learned_loss
from adalfl_jax.training import DivergenceError, outputs
from adalfl_jax.training.initial import init_training, make_seed_keys
from adalfl_jax.training.results import MethodResult
from adalfl_jax.training.setup import make_setup
from adalfl_jax.training.summary import summarize
from tests.training.tiny import tiny_config


def test_the_loss_that_is_kept_is_chosen_by_validation_and_has_the_test_metric_of_its_seed(tmp_path):
    setup = make_setup(tiny_config(num_seeds=2))
    state = init_training(setup, "adalfl", make_seed_keys(setup.config.seeds))
    result = MethodResult("adalfl", 0.1, state, np.array([0.5, 0.3]), np.array([0.1, 0.2]), 1.0, [], [], None)
    origin = outputs._save_learned_loss(tmp_path, setup, [result])
    assert origin["seed"] == 0
    assert (origin["valid/error_rate"], origin["test/error_rate"]) == pytest.approx((0.1, 0.5))
    kept = load_learned_loss(tmp_path / "learned_loss.safetensors")
    jax.tree.map(np.testing.assert_array_equal, kept.params, jax.tree.map(lambda leaf: leaf[0], state.phi.params))


def test_without_adalfl_the_last_method_is_compared_with_those_before_it():
    errors = {"task_loss": [0.5, 0.3], "ml3": [0.4, 0.1]}
    results = [
        MethodResult(method, 0.1, None, np.array(test), np.array([0.2, 0.2]), 1.0, [], [], None)
        for method, test in errors.items()
    ]
    (row,) = summarize(make_setup(tiny_config(num_seeds=2)), results)["comparisons"]
    assert (row["method"], row["against"], row["mean_difference"]) == ("ml3", "task_loss", pytest.approx(-0.15))


def test_a_run_that_diverges_keeps_the_learned_loss_of_the_seed_that_did(tmp_path, monkeypatch):
    monkeypatch.setattr(outputs, "save_state", lambda folder, state: None)
    setup = make_setup(tiny_config(seed=3, num_seeds=2))
    state = init_training(setup, "adalfl", make_seed_keys(setup.config.seeds))
    outputs._save_last_finite_state(tmp_path, setup, DivergenceError("adalfl", "phi", 6, 4, state, 5, "nothing"))
    kept = load_learned_loss(tmp_path / "learned_loss.safetensors")
    assert kept.metadata["seed"] == 4
    jax.tree.map(np.testing.assert_array_equal, kept.params, jax.tree.map(lambda leaf: leaf[1], state.phi.params))
