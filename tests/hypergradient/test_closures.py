"""Values of a trace that an optimiser, a model or a loss closes over, whatever their type."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adalfl_jax
from adalfl_jax.hypergradient import ESTIMATORS, ONE_INNER_STEP, ConjugateGradient
from adalfl_jax.hypergradient.closures import hoist_closure
from adalfl_jax.task_losses import softmax_cross_entropy
from tests.problems import make_batch, make_problem

KEYS = jax.random.split(jax.random.key(7), 2)
CLOSED_OVER = {
    "optimizer": jnp.array([2, 5]),  # steps of a warm-up
    "model": jnp.array([[True, True, False], [False, True, True]]),  # outputs that are masked
    "loss": KEYS,  # of random weights
}
DAMPED = {"conjugate_gradient": ConjugateGradient(damping=10.0)}  # or what it makes of a saddle is rounding enlarged
FAST = [("checkpointed", "optimizer"), ("mixed_mode", "model"), ("mixed_mode", "loss")]


def gradient_norm(where, estimator, value):
    model, optimizer, loss, theta, phi_params = make_problem(loss=adalfl_jax.LossNetwork((4,)))
    apply_fn, learned_loss_fn = model.apply, loss.apply
    if where == "optimizer":
        optimizer = optax.sgd(lambda count: 0.1 * jnp.minimum(1, (count + 1) / value))
        theta = adalfl_jax.Theta.create(theta.params, theta.model_state, optimizer)
    elif where == "model":

        def apply_fn(*arguments, **keywords):
            outputs, model_state = model.apply(*arguments, **keywords)
            return jnp.where(value, outputs, 0.0), model_state

    else:

        def learned_loss_fn(phi_params, targets, outputs):
            return jax.random.uniform(value) * loss.apply(phi_params, targets, outputs)

    outer = optax.sgd(0.1)
    step = adalfl_jax.make_bilevel_step(
        apply_fn,
        learned_loss_fn,
        softmax_cross_entropy,
        optimizer,
        outer,
        hypergradient=DAMPED.get(estimator, estimator),
    )
    batch = make_batch(jax.random.key(1), None if estimator in ONE_INNER_STEP else 3)
    return step(theta, adalfl_jax.Phi.create(phi_params, outer), batch)[2].hypergradient_norm


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("estimator", "where"),
    [
        pytest.param(*pair, marks=[] if pair in FAST else pytest.mark.slow)
        for pair in itertools.product(ESTIMATORS, CLOSED_OVER)
    ],
)
def test_a_step_within_a_trace_closes_over_its_values(estimator, where):
    values = CLOSED_OVER[where]
    traced = jax.jit(jax.vmap(lambda value: gradient_norm(where, estimator, value)))(values)
    constant = jax.jit(lambda: gradient_norm(where, estimator, values[0]))()
    np.testing.assert_allclose(traced[0], constant, rtol=1e-6)
    assert abs(traced[0] / traced[1] - 1) > 1e-3


def test_values_of_a_trace_alone_become_arguments():
    constant = np.arange(3.0)

    @jax.jit
    def outer(rate, mask, key):
        def inner(point, others):
            noise = jax.random.normal(key, (3,))
            return {"moved": point - rate * jnp.where(mask, others["shift"], 0) + constant, "noise": noise}

        arguments = jnp.ones(3), {"shift": jnp.full(3, 2.0)}
        hoisted, inexact, others = hoist_closure(inner, *arguments)
        assert [value.dtype for value in inexact] == [rate.dtype]
        assert {value.dtype for value in others} == {mask.dtype, key.dtype}
        return hoisted(*arguments, inexact, others), hoisted(*arguments, [2 * rate], others), inner(*arguments)

    same, doubled, expected = outer(jnp.array(0.5), jnp.array([True, False, True]), KEYS[0])
    jax.tree.map(np.testing.assert_array_equal, same, expected)
    np.testing.assert_array_equal(doubled["moved"], [-1, 2, 1])
