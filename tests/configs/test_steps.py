"""One AdaLFL step of every configuration, on noise in the shapes of its data."""

import chex
import jax
import jax.numpy as jnp
import pytest

from adalfl_jax.training.batches import splits_of
from adalfl_jax.training.initial import init_phi, init_theta, make_seed_keys
from adalfl_jax.training.phases import make_training_program
from adalfl_jax.training.state import RunState
from tests.configs.test_configs import NAMES, get_config, random_setup

SMALL_MODELS = ("logistic", "mlp", "lenet5")
REDUCED = {"model.hidden_sizes": (8,), "learned_loss.hidden_sizes": (8,), "batch_size": 4, "num_seeds": 1}
NARROW = {"model.width": 1, "model.depth": 10}  # of a wide ResNet


def set_up(name, changes):
    return random_setup(name, changes["batch_size"], changes)


def one_step(setup):
    """The state before and after one AdaLFL step, and what was measured."""
    keys = make_seed_keys(setup.config.seeds)
    start = RunState(init_theta(setup, keys), init_phi(setup, keys))
    advance = make_training_program(setup, "adalfl").advance
    state, metrics = advance(start, keys, splits_of(setup), setup.config.inner.learning_rate, 0, num_steps=1)
    return start, state, metrics


def assert_step_moved_everything(start, state, metrics):
    chex.assert_tree_all_finite((state, metrics))
    for before, after in ((start.theta.params, state.theta.params), (start.phi.params, state.phi.params)):
        moved = jax.tree.map(lambda old, new: not jnp.array_equal(old, new), before, after)
        assert all(jax.tree.leaves(moved))


def reduced(name):
    return REDUCED | (NARROW if get_config(name).model.name == "wide_resnet" else {})


LARGE = [name for name in NAMES if get_config(name).model.name not in SMALL_MODELS]
QUICK = ("mnist_lenet5", "california_mlp")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_config_takes_one_adalfl_step(name):
    assert_step_moved_everything(*one_step(set_up(name, reduced(name))))


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_a_step_of_a_large_model_is_traced(name):
    """All but its compilation, which takes most of a minute."""
    setup = set_up(name, reduced(name))
    start, state, metrics = jax.eval_shape(lambda: one_step(setup))
    assert jax.tree.map(jnp.shape, start) == jax.tree.map(jnp.shape, state)
    assert metrics["outer_loss"].shape == (1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_config_takes_one_adalfl_step_at_its_full_width(name):
    assert_step_moved_everything(*one_step(set_up(name, {"batch_size": 4, "num_seeds": 1})))
