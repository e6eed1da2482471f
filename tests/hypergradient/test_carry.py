"""Steps that remember earlier ones, where theta has been moved by other steps meanwhile."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import adalfl_jax
from adalfl_jax.hypergradient import PersistentEvolutionStrategies, Truncated
from adalfl_jax.hypergradient.carry import is_same
from adalfl_jax.task_losses import softmax_cross_entropy
from tests.problems import make_batch, make_problem

REMEMBERING = {
    "truncated": {"hypergradient": Truncated(2)},
    "persistent_evolution_strategies": {"hypergradient": PersistentEvolutionStrategies(num_pairs=2)},
    "pipelined": {"pipelined": True},
}
OPTIONS = list(REMEMBERING.values())


def make(options, dtype, optimizer):
    """A step, one on the task loss, theta and phi."""
    model, _, loss, theta, phi_params = make_problem()
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), theta.params)
    outer = optax.sgd(0.05)
    functions = (model.apply, loss.apply, softmax_cross_entropy, optimizer, outer)
    theta = adalfl_jax.Theta.create(params, theta.model_state, optimizer)
    task_step = adalfl_jax.make_task_step(model.apply, softmax_cross_entropy, optimizer)
    step = adalfl_jax.make_bilevel_step(*functions, **options)
    return step, task_step, theta, adalfl_jax.Phi.create(phi_params, outer)


@pytest.mark.parametrize(
    ("name", "dtype", "optimizer"),
    [
        ("truncated", "float32", "sgd"),
        pytest.param("truncated", "bfloat16", "adam", marks=pytest.mark.slow),
        ("pipelined", "bfloat16", "adam"),
        pytest.param("pipelined", "float32", "adam", marks=pytest.mark.slow),
        pytest.param("pipelined", "bfloat16", "sgd", marks=pytest.mark.slow),
        ("persistent_evolution_strategies", "float32", "sgd"),
    ],
)
def test_what_was_remembered_counts_where_theta_is_as_it_was_left_alone(name, dtype, optimizer):
    optimizer = {"sgd": optax.sgd(0.3), "adam": optax.adam(3e-3)}[optimizer]
    step, task_step, theta, phi = make(REMEMBERING[name], dtype, optimizer)
    step, task_step = jax.jit(step), jax.jit(task_step)
    for key in jax.random.split(jax.random.key(2), 3):
        theta, phi, _ = step(theta, phi, make_batch(key))
    batch = make_batch(jax.random.key(4))
    moved, _ = task_step(theta, make_batch(jax.random.key(3)).inner)
    for start, counts in ((theta, True), (moved, False)):
        _, after, _ = step(start, phi, batch)
        _, afresh, _ = step(start, phi._replace(carry=()), batch)
        difference = optax.tree.norm(optax.tree.sub(after.params, afresh.params))
        if counts:
            assert difference > 1e-6 * optax.tree.norm(phi.params)
        else:
            assert difference < 1e-7 * optax.tree.norm(phi.params)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "pipelined" else pytest.mark.slow) for name in REMEMBERING]
)
def test_what_a_step_without_jit_remembers_is_no_array_that_another_may_be_given_to_keep(name):
    """Of a linear model, whose step compiles few operations one by one."""
    inner, outer, loss = optax.sgd(0.3), optax.sgd(0.05), adalfl_jax.LossNetwork((3,))
    batch = make_batch(jax.random.key(1))

    def apply_fn(params, model_state, inputs, *, train, rng_key):
        return inputs @ params, model_state

    functions = (apply_fn, loss.apply, softmax_cross_entropy, inner, outer)
    step = adalfl_jax.make_bilevel_step(*functions, **REMEMBERING[name])
    task_step = adalfl_jax.make_task_step(apply_fn, softmax_cross_entropy, inner)
    theta = adalfl_jax.Theta.create(jnp.ones((batch.inner.inputs.shape[-1], 3)), (), inner)
    phi = adalfl_jax.Phi.create(loss.init(jax.random.key(0)), outer)
    theta, phi, _ = step(theta, phi, batch)
    theta, _ = jax.jit(task_step, donate_argnums=0)(theta, batch.inner)
    _, after, _ = jax.jit(step, donate_argnums=(0, 1))(theta, phi, batch)
    chex.assert_tree_all_finite(after.params)


def test_parameters_are_the_same_if_every_number_is():
    params = {"kernel": jnp.ones((100, 3)).at[0, 0].set(1e6), "scale": jnp.ones(()), "none": jnp.ones((0, 3))}
    assert is_same(params, params)
    assert is_same({}, {})
    assert not is_same(params, params | {"scale": jnp.array(jnp.nan)})
    assert not is_same(params, params | {"kernel": params["kernel"].at[77].multiply(1 + 2e-7)})
