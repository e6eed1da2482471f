"""The memory of compiled programs, on a deep model whose activations outweigh its parameters."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

import adalfl_jax
from adalfl_jax.hypergradient import ESTIMATORS, BilevelProblem
from adalfl_jax.models import make_model
from adalfl_jax.task_losses import softmax_cross_entropy

BATCH_SIZE, WIDTH, DEPTH = 1024, 32, 8
ACTIVATIONS = 4 * BATCH_SIZE * WIDTH * DEPTH  # bytes one pass keeps


@functools.cache
def temporary_bytes(name, num_inner_steps=None):
    model = make_model("mlp", (WIDTH,), 3, hidden_sizes=(WIDTH,) * DEPTH)
    loss, optimizer = adalfl_jax.LossNetwork(hidden_sizes=(4,)), optax.sgd(0.1)
    problem = BilevelProblem(model.apply, loss.apply, softmax_cross_entropy, optimizer)

    def batch(*lead):
        return jnp.zeros((*lead, BATCH_SIZE, WIDTH)), jnp.zeros((*lead, BATCH_SIZE), jnp.int32)

    lead = () if num_inner_steps is None else (num_inner_steps,)
    batches = adalfl_jax.BilevelBatch(batch(*lead), batch(), jax.random.key(0))
    theta = adalfl_jax.Theta.create(*model.init(jax.random.key(0)), optimizer)
    program = jax.jit(lambda *state: ESTIMATORS[name](problem, *state))
    compiled = program.lower(theta, loss.init(jax.random.key(1)), batches).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("name", ["recompute", "finite_difference"])
def test_nothing_of_the_first_pass_is_kept(name):
    assert temporary_bytes("forward") - temporary_bytes(name) > 0.7 * ACTIVATIONS


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [pytest.param("unrolled", 5, 8, marks=pytest.mark.slow), ("checkpointed", 1, 3.2), ("mixed_mode", 1, 2)],
)
def test_memory_grows_with_the_steps_or_with_their_root_or_with_theta_alone(name, least, most):
    """From K = 4 to 32, eight times as many."""
    assert least < temporary_bytes(name, 32) / temporary_bytes(name, 4) < most
