"""Lengths of gradients of few bits, and of those whose squares would vanish or overflow."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from adalfl_jax.types import PyTree


def widen(tree: PyTree) -> PyTree:
    """Arrays of 16 bits in float32, in which sums keep more than eight bits; others as they are."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), tree)


def norm(tree: PyTree) -> jax.Array:
    """The length of a gradient, `[]`."""
    unit, squares = unit_and_squares(tree)
    return unit * jnp.sqrt(squares)


def unit_and_squares(tree: PyTree) -> tuple[jax.Array, jax.Array]:
    """The largest entry and the sum of squares in its units, which neither vanishes nor overflows as they alone do.

    Where all is 0 the unit is 1. Derivatives take the unit for a constant.
    """
    wide = jax.tree.leaves(widen(tree))
    largest = functools.reduce(jnp.maximum, (jnp.abs(leaf).max(initial=0.0) for leaf in wide))
    unit = jax.lax.stop_gradient(jnp.where(largest == 0, 1, largest))
    return unit, jnp.asarray(sum(jnp.sum((leaf / unit) ** 2) for leaf in wide))
