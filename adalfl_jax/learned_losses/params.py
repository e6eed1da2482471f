"""What phi must look like to be that of a learned loss."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from adalfl_jax.types import LearnedLoss, PyTree


def require_params(loss: LearnedLoss, init: Callable[..., PyTree], phi_params: PyTree) -> None:
    """Raises ValueError unless phi has the arrays that `init(loss, rng_key)` draws, by name and shape."""
    found = jax.tree.map(jnp.shape, phi_params)
    if found != (expected := _shapes(loss, init)):
        raise ValueError(f"phi is not of {loss}: expected arrays of the shapes {expected}; got {found}")


@functools.cache
def _shapes(loss: LearnedLoss, init: Callable[..., PyTree]) -> PyTree:
    return jax.tree.map(jnp.shape, jax.eval_shape(functools.partial(init, loss), jax.random.key(0)))
