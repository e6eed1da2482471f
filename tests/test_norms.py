"""Lengths of gradients that are very small, very large or not there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adalfl_jax.norms import norm, power_of_two, unit_and_squares


@pytest.mark.parametrize(
    "run", [lambda function: function, jax.jit, lambda function: lambda x: jax.vmap(function)(x[None])[0]]
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("scale", [1e-37, 1e-20, 1.0, 1e20, 3e37])
def test_a_length_neither_vanishes_nor_overflows(scale, dtype, run):
    tree = jnp.array([3.0, 4.0, 0.0], dtype) * jnp.asarray(scale, dtype)
    np.testing.assert_allclose(run(norm)(tree), 5 * scale, rtol=1e-2 if dtype == jnp.bfloat16 else 1e-6)


def test_what_is_no_finite_number_has_no_finite_length():
    assert norm(jnp.array([jnp.inf, 1.0])) == jnp.inf
    assert np.isnan(norm(jnp.array([jnp.nan, 1.0])))


@pytest.mark.parametrize("tree", [{}, jnp.zeros(3), jnp.zeros(0)], ids=["nothing", "zeros", "no numbers"])
def test_the_length_of_nothing_is_0(tree):
    assert norm(tree) == 0
    assert unit_and_squares(tree)[0] == 1


@pytest.mark.parametrize("largest", [1e-44, 1e-38, 0.3, 1.0, 7.0, 1e38, 3.4e38])
def test_a_unit_is_a_power_of_two_whose_reciprocal_is_a_number(largest):
    unit = float(power_of_two(jnp.float32(largest)))
    assert np.frexp(unit)[0] == 0.5
    assert np.finfo(np.float32).tiny <= 1 / unit <= np.finfo(np.float32).max
    assert largest / unit <= 8
