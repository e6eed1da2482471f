"""Steps that remember earlier ones, where theta has been moved by other steps meanwhile."""

import functools

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import adalfl_jax
from adalfl_jax.hypergradient import PersistentEvolutionStrategies, Truncated
from adalfl_jax.hypergradient.carry import is_where_left, landmarks
from adalfl_jax.task_losses import softmax_cross_entropy
from tests.problems import make_batch, make_problem

pytestmark = pytest.mark.usefixtures("float64")

REMEMBERING = {
    "truncated": {"hypergradient": Truncated(3)},
    "persistent_evolution_strategies": {"hypergradient": PersistentEvolutionStrategies(num_pairs=2)},
    "pipelined": {"pipelined": True},
}


@functools.cache
def three_steps(name):
    """theta and phi after three steps, the step, and one on the task loss."""
    with jax.enable_x64(True):
        model, optimizer, loss, theta, phi_params = make_problem()
        outer = optax.sgd(0.05)
        functions = (model.apply, loss.apply, softmax_cross_entropy, optimizer, outer)
        step = jax.jit(adalfl_jax.make_bilevel_step(*functions, **REMEMBERING[name]))
        phi = adalfl_jax.Phi.create(phi_params, outer)
        for key in jax.random.split(jax.random.key(2), 3):
            theta, phi, _ = step(theta, phi, make_batch(key))
        return theta, phi, step, adalfl_jax.make_task_step(model.apply, softmax_cross_entropy, optimizer)


@pytest.mark.parametrize("name", REMEMBERING)
@pytest.mark.parametrize("is_moved", [False, True])
def test_what_was_remembered_counts_where_theta_is_as_it_was_left_alone(name, is_moved):
    theta, phi, step, task_step = three_steps(name)
    if is_moved:
        theta, _ = task_step(theta, make_batch(jax.random.key(3)).inner)
    batch = make_batch(jax.random.key(4))
    (_, after, _), (_, afresh, _) = (step(theta, start, batch) for start in (phi, phi._replace(carry=())))
    difference = optax.tree.norm(optax.tree.sub(after.params, afresh.params))
    assert difference == 0 if is_moved else difference > 1e-6 * optax.tree.norm(phi.params)
    if is_moved:  # and what comes next is remembered again
        chex.assert_trees_all_equal(after, afresh._replace(carry=after.carry))


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "complex64"])
def test_a_rounding_is_no_move(dtype):
    params = {"kernel": jax.random.normal(jax.random.key(0), (100, 3)).astype(dtype), "scale": jnp.ones((), dtype)}
    left = landmarks(params)
    assert all(leaf.size <= 16 * 3 for leaf in jax.tree.leaves(left))
    rounded = jax.tree.map(lambda leaf: leaf * (1 + jnp.finfo(dtype).eps).astype(dtype), params)
    moved = params | {"kernel": params["kernel"] * (1 - 16 * jnp.finfo(dtype).eps).astype(dtype)}
    assert is_where_left(params, left)
    assert is_where_left(rounded, left)
    assert not is_where_left(moved, left)
    assert not is_where_left(params | {"scale": jnp.full((), jnp.nan, dtype)}, left)
