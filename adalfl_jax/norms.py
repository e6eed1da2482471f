"""Lengths of gradients of few bits, and of those whose squares would vanish or overflow."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from adalfl_jax.types import PyTree


def widen(tree: PyTree) -> PyTree:
    """Floats of 16 bits in float32, in which sums keep more than eight bits; others as they are."""

    def convert(leaf: jax.Array) -> jax.Array:
        is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) if is_float else leaf

    return jax.tree.map(convert, tree)


def norm(tree: PyTree) -> jax.Array:
    """The length of a gradient, `[]`."""
    unit, squares = unit_and_squares(tree)
    return unit * jnp.sqrt(squares)


def unit_and_squares(tree: PyTree) -> tuple[jax.Array, jax.Array]:
    """About the largest entry, and the sum of squares in its units, which neither vanishes nor overflows.

    Derivatives take the unit for a constant.
    """
    wide = jax.tree.leaves(widen(tree))
    unit = power_of_two(functools.reduce(jnp.maximum, (jnp.abs(leaf).max(initial=0.0) for leaf in wide), jnp.zeros(())))
    return unit, sum((jnp.sum((leaf / unit) ** 2) for leaf in wide), jnp.zeros(()))


def power_of_two(largest: jax.Array) -> jax.Array:
    """A unit for numbers of at most this size, `[]`: a division by it rounds nothing, nor does its reciprocal vanish.

    It is 1 for 0 and for what is no finite number.
    """
    limits = jnp.finfo(largest.dtype)
    _, exponent = jnp.frexp(jnp.where(jnp.isfinite(largest), largest, 0))
    exponent = jnp.clip(exponent, limits.minexp + 1, limits.maxexp - 3)
    return jax.lax.stop_gradient(jnp.ldexp(jnp.ones_like(largest), exponent))
