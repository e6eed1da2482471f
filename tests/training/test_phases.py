"""The programs of a run at their real size: seeds under vmap, keys, batches."""

import chex
import jax
import jax.numpy as jnp
import pytest

from adalfl_jax.training import TrainConfig
from adalfl_jax.training.batches import splits_of
from adalfl_jax.training.initial import init_phi, init_training, make_seed_keys
from adalfl_jax.training.phases import RunState, make_offline_program, make_training_program
from adalfl_jax.training.setup import make_setup
from configs import digits_mlp
from tests.training.tiny import tiny_config

NUM_SEEDS, NUM_STEPS = 10, 25


@pytest.mark.parametrize("method", ["ml3", "adalfl"])
def test_the_outer_optimiser_begins_anew_behind_the_offline_phase(method):
    setup = make_setup(tiny_config())
    keys = make_seed_keys(setup.config.seeds)
    phi = init_phi(setup, keys)
    phi = phi._replace(opt_state=jax.tree.map(jnp.ones_like, phi.opt_state))
    start = init_training(setup, method, keys, phi)
    chex.assert_trees_all_equal(start.phi.params, phi.params)
    chex.assert_trees_all_equal(start.phi.opt_state, jax.tree.map(jnp.zeros_like, start.phi.opt_state))


def run(first_seed, num_seeds, method):
    """Both phases of the digits MLP, shortened, in float32."""
    config = digits_mlp.get_config()
    config.update({"seed": first_seed, "num_seeds": num_seeds})
    setup = make_setup(TrainConfig.from_mapping(config))
    keys, splits, rate = make_seed_keys(setup.config.seeds), splits_of(setup), setup.config.inner.learning_rate
    phi = None
    if method != "task_loss":
        offline = make_offline_program(setup).advance
        start = RunState(None, init_phi(setup, keys))
        state, _ = offline(start, keys, splits, rate, 0, num_steps=NUM_STEPS)
        phi = state.phi
    start = init_training(setup, method, keys, phi)
    return make_training_program(setup, method).advance(start, keys, splits, rate, 0, num_steps=NUM_STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["task_loss", "ml3", "adalfl"])
def test_ten_vmapped_seeds_of_the_digits_mlp_equal_ten_single_runs(method):
    together = run(0, NUM_SEEDS, method)
    for seed in range(NUM_SEEDS):
        alone = run(seed, 1, method)
        chex.assert_trees_all_close(
            jax.tree.map(lambda leaf, s=seed: leaf[s : s + 1], together), alone, rtol=1e-5, atol=1e-5
        )
