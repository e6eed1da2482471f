"""What a step averages where every device has a part of the batch: inside `jax.pmap` and `jax.shard_map`.

Each device differentiates with respect to a copy of the parameters of its own, and the gradients are averaged once,
when they are whole. Where averages are differentiated, the derivative of a mean over devices sends each of them the
mean of what came back, so that the order of the two does not matter. Outside of such functions, with no name of an
axis, nothing here does anything.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from adalfl_jax.types import ApplyFn, PyTree


def mean_over(axis_name: str | None, tree: PyTree) -> PyTree:
    """The mean over devices of the inexact arrays of a pytree; the others are taken to be equal on all."""
    if axis_name is None:
        return tree
    return jax.tree.map(
        lambda leaf: jax.lax.pmean(leaf, axis_name) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf, tree
    )


def own_copy(axis_name: str | None, tree: PyTree) -> PyTree:
    """Marks arrays that are equal on all devices as device-varying, so that a gradient to them is each device's own.

    `jax.shard_map` with `check_vma` would add up the devices' gradients to what is known to be equal on all.
    """
    return tree if axis_name is None else jax.tree.map(lambda leaf: _vary(leaf, frozenset({axis_name})), tree)


def with_own_keys(axis_name: str | None, apply_fn: ApplyFn) -> ApplyFn:
    """The model with random numbers (dropout) that differ from device to device, though the key does not."""
    if axis_name is None:
        return apply_fn

    def apply(
        params: PyTree, model_state: PyTree, inputs: jax.Array, /, *, train: bool, rng_key: jax.Array | None
    ) -> tuple[jax.Array, PyTree]:
        own_key = None if rng_key is None else jax.random.fold_in(rng_key, jax.lax.axis_index(axis_name))
        return apply_fn(params, model_state, inputs, train=train, rng_key=own_key)

    return apply


def vary_alike(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Arrays that vary over the same axes, those over which one of them does."""
    wanted = frozenset[str]().union(*map(varying_axes, arrays))
    return tuple(_vary(array, wanted) for array in arrays)


def zeros_like(leaf: Any) -> jax.Array:
    """Zeros of a shape and type, also of the axes it varies over."""
    return _vary(jax.lax.full(leaf.shape, 0, leaf.dtype), varying_axes(leaf))


def varying_axes(leaf: Any) -> frozenset[str]:
    """The axes of a `jax.shard_map` with `check_vma` over which an array, or a shape, differs from device to device."""
    kind = leaf if hasattr(leaf, "manual_axis_type") else jax.typeof(leaf)
    return getattr(getattr(kind, "manual_axis_type", None), "varying", frozenset())


def _vary(leaf: jax.Array, axes: frozenset[str]) -> jax.Array:
    tracked = frozenset(jax.sharding.get_abstract_mesh().manual_axes)  # not that of a jax.vmap in their place
    missing = tuple(sorted((axes & tracked) - varying_axes(leaf)))
    return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf
