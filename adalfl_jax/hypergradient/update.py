"""An optimiser's update as a function that can be differentiated everywhere."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from adalfl_jax.hypergradient.closures import hoist_closure
from adalfl_jax.types import PyTree


def differentiable_update(
    optimizer: optax.GradientTransformation, gradient: PyTree, opt_state: optax.OptState, params: PyTree
) -> tuple[PyTree, optax.OptState]:
    """`optimizer.update` with a derivative that is finite where the gradient vanishes.

    Norms and square roots inside an optimiser (clipping, Adam with `eps_root=0`) have a derivative 0 * inf = nan at
    a gradient of exactly zero, which dead units and constant pixels produce all the time. The values here are those
    of `optimizer.update`, bit for bit; the derivative is taken a hair away from zero, where it is the limit.
    """
    try:
        plain_update, *closed_over = hoist_closure(optimizer.update, gradient, opt_state, params)
    except TypeError as error:
        if "keyword-only" not in str(error):
            raise
        raise ValueError(
            "the inner optimiser must need no more than gradient, state and parameters, unlike a line search or a "
            f"reduction on a plateau; {str(error).splitlines()[0]}"
        ) from error
    update = jax.custom_jvp(plain_update)

    @update.defjvp
    def update_jvp(primals, tangents):  # pyright: ignore[reportUnusedFunction]
        gradient, *others = primals
        _, tangents_out = jax.jvp(plain_update, (jax.tree.map(_away_from_zero, gradient), *others), tangents)
        return update(*primals), tangents_out

    return update(gradient, opt_state, params, *closed_over)


def _away_from_zero(gradient: jax.Array) -> jax.Array:
    # Its square must not underflow, nor that square's power -3/2 overflow: 7e-13 in float32 and bfloat16.
    floor = float(jnp.finfo(gradient.dtype).tiny) ** 0.32
    return jnp.where(jnp.abs(gradient) < floor, jnp.asarray(floor, gradient.dtype), gradient)
