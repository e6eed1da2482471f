"""What an estimator remembers from one step to the next, and whether it is of this step and of this theta."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.core import Tracer

from adalfl_jax.types import PyTree


def as_array(progress: jax.Array | float | None) -> jax.Array | None:
    """A progress to remember: never weakly typed, nor an integer."""
    return None if progress is None else jnp.asarray(progress, float)


def to_keep(tree: PyTree) -> PyTree:
    """JAX arrays that share no memory with arguments or results of a step, so that all may be donated to the next."""
    return jax.tree.map(lambda leaf: leaf if isinstance(leaf, Tracer) else jnp.array(leaf), tree)


def is_same(one: PyTree, other: PyTree) -> jax.Array:
    """Whether parameters are equal, `[]`, as those of a step are to what the last one left unless others moved them."""
    equal = jax.tree.map(lambda left, right: (left == right).all(), one, other)
    return jax.tree.reduce(jnp.logical_and, equal, jnp.array(True))


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
