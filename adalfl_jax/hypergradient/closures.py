"""What a function closes over, as arguments of it."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.core import Tracer, eval_jaxpr

from adalfl_jax.types import PyTree


def hoist_closure(
    function: Callable[..., PyTree], *arguments: PyTree
) -> tuple[Callable[..., PyTree], list[jax.Array], list[jax.Array]]:
    """A function of all it depends on, as `jax.custom_jvp` and `jax.custom_vjp` need it.

    `jax.closure_convert` hoists floats alone. An integer, a mask or a random key of a trace would stay behind, and be
    of no use to a rule that runs in another.

    Args:
      function: of pytrees; it may close over values of the traces around it, a learning rate say.
      *arguments: of the shapes it is going to be called with.

    Returns:
      `hoisted(*arguments, inexact, others)`, the values that have derivatives, those that have none.
    """
    program, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    traced = [index for index, value in enumerate(program.consts) if isinstance(value, Tracer)]
    inexact = [index for index in traced if jnp.issubdtype(program.consts[index].dtype, jnp.inexact)]
    others = [index for index in traced if index not in inexact]

    def hoisted(*arguments_and_values: PyTree) -> PyTree:
        *arguments, of_inexact, of_others = arguments_and_values
        consts = list(program.consts)
        for index, value in zip((*inexact, *others), (*of_inexact, *of_others), strict=True):
            consts[index] = value
        outputs = eval_jaxpr(program.jaxpr, consts, *jax.tree.leaves(arguments))
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    return hoisted, [program.consts[index] for index in inexact], [program.consts[index] for index in others]
