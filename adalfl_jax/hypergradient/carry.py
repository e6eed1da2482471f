"""What an estimator remembers from one step to the next, and whether it is of this step and of this theta."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from adalfl_jax.types import PyTree

PER_AXIS = 8  # landmarks of an array, at least, where it is so long


def as_array(progress: jax.Array | float | None) -> jax.Array | None:
    """A progress to remember: never weakly typed, nor an integer."""
    return None if progress is None else jnp.asarray(progress, float)


def landmarks(params: PyTree) -> PyTree:
    """Some numbers of each parameter, evenly spaced, by which the next step knows them again."""

    def spaced(leaf: jax.Array) -> jax.Array:
        return jnp.asarray(leaf)[tuple(slice(None, None, max(1, length // PER_AXIS)) for length in jnp.shape(leaf))]

    return jax.tree.map(spaced, params)


def is_where_left(params: PyTree, left: PyTree) -> jax.Array:
    """Whether parameters are those whose landmarks a step left, `[]`, or were moved by others or replaced meanwhile.

    They may be off by their rounding: a compiler that computes parameters twice need not round them alike.
    """

    def is_same(now: jax.Array, then: jax.Array) -> jax.Array:
        rounding = 2 * jnp.finfo(then.dtype).eps * jnp.abs(then).max(initial=0)
        return (jnp.abs(now - then) <= rounding).all()

    return jnp.stack(jax.tree.leaves(jax.tree.map(is_same, landmarks(params), left))).all()


def require_carry(name: str, carry: PyTree, like: PyTree) -> None:
    """Raises ValueError where a carry is not of the structure and shapes that an estimator would give it here."""
    given, expected = (jax.tree.flatten(tree) for tree in (carry, like))
    shapes, wanted = ([(leaf.shape, leaf.dtype) for leaf in leaves] for leaves in (given[0], expected[0]))
    if type(carry) is not type(like) or len(shapes) != len(wanted):
        difference = f"a {type(carry).__name__} of {len(shapes)} arrays for a {type(like).__name__} of {len(wanted)}"
    else:
        difference = next((f"{a} for {b}" for a, b in zip(shapes, wanted, strict=True) if a != b), "")
    if difference:
        raise ValueError(
            f"phi.carry is not that of this step, which is {name}: {difference}. It belongs to one step and one size "
            "of batch; begin anew with Phi.create, or adalfl_jax.prime of this very step and batch"
        )
