"""The paper's activation: its derivatives, its edges, and what they cost in a compiled program."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adalfl_jax import LossNetwork
from adalfl_jax.learned_losses import smooth_leaky_relu

SETTINGS = [(10.0, 0.01), (1.0, 0.0), (30.0, 0.25)]  # beta, gamma


def definition(x, beta, gamma):
    return (1 - gamma) / beta * jnp.log(jnp.exp(beta * x) + 1) + gamma * x


def derivatives(function, order):
    """The function and its derivatives up to an order, of one number each."""
    functions = [function]
    for _ in range(order):
        functions.append(jax.grad(functions[-1]))
    return [jax.vmap(derivative) for derivative in functions]


@pytest.mark.usefixtures("float64", "strict_dtypes")
@pytest.mark.parametrize(("beta", "gamma"), SETTINGS)
def test_values_and_four_derivatives_are_those_of_the_definition(beta, gamma):
    x = jnp.concatenate([jnp.linspace(-3, 3, 61), jnp.array([0.0, -0.0, 1e-9, -1e-9])]) * 4 / beta
    ours = derivatives(functools.partial(smooth_leaky_relu, beta=beta, gamma=gamma), 4)
    theirs = derivatives(functools.partial(definition, beta=beta, gamma=gamma), 4)
    for order, (function, expected) in enumerate(zip(ours, theirs, strict=True)):
        scale = beta ** (order - 1)
        np.testing.assert_allclose(jax.jit(function)(x) / scale, expected(x) / scale, rtol=1e-12, atol=1e-13)


@pytest.mark.usefixtures("float64")
def test_forward_over_reverse_and_reverse_over_reverse_agree():
    x = jnp.linspace(-1, 1, 21)

    def slope(x):
        return jax.grad(lambda x: smooth_leaky_relu(x).sum())(x)

    tangent = jax.jvp(slope, (x,), (jnp.cos(x),))[1]
    np.testing.assert_allclose(tangent, jax.vjp(slope, x)[1](jnp.cos(x))[0], rtol=1e-14)
    np.testing.assert_allclose(tangent, jax.linearize(slope, x)[1](jnp.cos(x)), rtol=1e-14)


@pytest.mark.usefixtures("strict_dtypes")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_far_from_zero_it_is_straight_and_keeps_its_type(dtype):
    x = jnp.array([-jnp.finfo(dtype).max / 100, -1e4, -100.0, 100.0, 1e4, jnp.finfo(dtype).max / 100], dtype)
    value, slope, curvature, third = (function(x) for function in derivatives(smooth_leaky_relu, 3))
    assert {array.dtype for array in (value, slope, curvature, third)} == {jnp.dtype(dtype)}
    tolerance = 4 * float(jnp.finfo(dtype).eps)
    expected = np.where(np.asarray(x, np.float64) < 0, 0.01, 1.0)
    np.testing.assert_allclose(slope.astype(jnp.float32), expected, rtol=tolerance)
    np.testing.assert_allclose(np.asarray(value, np.float64), expected * np.asarray(x, np.float64), rtol=tolerance)
    assert not curvature.any()
    assert not third.any()


def test_beta_and_gamma_can_be_differentiated_too():
    gradient = jax.grad(lambda beta, gamma: smooth_leaky_relu(0.1, beta=beta, gamma=gamma), argnums=(0, 1))(5.0, 0.1)
    expected = jax.grad(definition, argnums=(1, 2))(0.1, 5.0, 0.1)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


def test_a_meta_gradient_takes_one_exponential_and_one_logarithm_a_hidden_layer():
    loss = LossNetwork(hidden_sizes=(4, 3), predictions="raw")
    phi, outputs = loss.init(jax.random.key(0)), jnp.ones((2, 3))

    def everything(phi, outputs, direction):
        def slope(phi):
            value, gradient = jax.value_and_grad(loss.apply, argnums=2)(phi, jnp.zeros(2, jnp.int32), outputs)
            return (gradient * direction).sum(), value

        return jax.value_and_grad(slope, has_aux=True)(phi)

    with jax.default_device(jax.devices("cpu")[0]):  # a GPU's compiler computes again what is cheap for it
        program = jax.jit(everything).lower(phi, outputs, outputs).compile().as_text()
    found = re.findall(r"\b(exponential|exponential-minus-one|log|log-plus-one|logistic|tanh)\(", program)
    assert sorted(found) == 2 * ["exponential"] + 2 * ["log-plus-one"]
