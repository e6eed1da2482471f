"""Updates of the two optimisers; that of the inner one can be differentiated everywhere."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from adalfl_jax.hypergradient.closures import hoist_closure
from adalfl_jax.types import PyTree

LONG = 1e4  # a gradient whose clipping to 1 leaves Adam a square, and a thousandth of it, that is no zero


def differentiable_update(
    optimizer: optax.GradientTransformation, gradient: PyTree, opt_state: optax.OptState, params: PyTree
) -> tuple[PyTree, optax.OptState]:
    """`optimizer.update` with a derivative that is finite where the gradient vanishes.

    Norms and square roots inside an optimiser (clipping, Adam with `eps_root=0`) have a derivative 0 * inf = nan at
    a gradient of exactly zero, which dead units and constant pixels produce all the time, and at parameters of zero
    that stay there. The values here are those of `optimizer.update`, bit for bit; the derivative is taken a hair away
    from zero, where it is the limit.
    """
    try:
        plain_update, *closed_over = hoist_closure(optimizer.update, gradient, opt_state, params)
    except TypeError as error:
        _explain(error, "inner", "gradient, state and parameters")
        raise
    update = jax.custom_jvp(plain_update)

    @update.defjvp
    def update_jvp(primals, tangents):  # pyright: ignore[reportUnusedFunction]
        gradient, opt_state, params, *others = primals
        moved = _away_from_zero(gradient)

        # By the rest at the parameters as they are: an optimiser may go by whether they are zero, as LARS does.
        def of_rest(gradient: PyTree, opt_state: PyTree, *others: PyTree) -> PyTree:
            return plain_update(gradient, opt_state, params, *others)

        def of_params(params: PyTree) -> PyTree:
            return plain_update(moved, opt_state, params, *others)

        _, by_rest = jax.jvp(of_rest, (moved, opt_state, *others), (*tangents[:2], *tangents[3:]))
        _, by_params = jax.jvp(of_params, (_away_from_zero(params),), (tangents[2],))
        return update(*primals), jax.tree.map(_sum_of_tangents, by_rest, by_params)

    return update(gradient, opt_state, params, *closed_over)


def outer_update(
    optimizer: optax.GradientTransformation,
    gradient: PyTree,
    opt_state: optax.OptState,
    params: PyTree,
    value: jax.Array,
) -> tuple[PyTree, optax.OptState]:
    """`optimizer.update`, told the value of the loss where it takes one."""
    try:
        return optax.with_extra_args_support(optimizer).update(gradient, opt_state, params, value=value)
    except TypeError as error:
        _explain(error, "outer", "gradient, state, parameters and value of the loss")
        raise


def _explain(error: TypeError, which: str, given: str) -> None:
    """Raises ValueError where an optimiser takes other arguments."""
    said = str(error).splitlines()[0]
    if "required keyword-only" in said or "keyword argument 'value'" in said:
        raise ValueError(f"the {which} optimiser gets {given} and no more, unlike a line search; {said}") from error


def _sum_of_tangents(one: jax.Array, other: jax.Array) -> jax.Array:
    return one if one.dtype == jax.dtypes.float0 else one + other  # what is no float has none


def _away_from_zero(tree: PyTree) -> PyTree:
    """Gradients or parameters with entries near zero a hair away from it; of long ones, which may be clipped, more."""
    length = jax.lax.stop_gradient(optax.tree.norm(tree))
    scale = jnp.where(jnp.isfinite(length), jnp.maximum(1.0, length / LONG), 1.0)

    def move(leaf: jax.Array) -> jax.Array:
        # Its square must not underflow, nor that square's power -3/2 overflow: 7e-13 in float32 and bfloat16.
        floor = (float(jnp.finfo(leaf.dtype).tiny) ** 0.32 * scale).astype(leaf.dtype)
        return jnp.where(jnp.abs(leaf) < floor, floor, leaf)

    return jax.tree.map(move, tree)
