"""What a step does about numbers that are not finite."""

from __future__ import annotations

import functools
import operator

import jax
import jax.numpy as jnp
import optax

from adalfl_jax.axes import zeros_like
from adalfl_jax.training.state import RunState, Step
from adalfl_jax.types import BilevelBatch, PyTree

SKIPPED = "skipped_steps"  # the metric of `skip_nonfinite`


def skip_nonfinite(step: Step) -> Step:
    """Makes the step that leaves theta and phi as they were where a metric, the new theta or the new phi is not finite.

    What a step remembers is forgotten there, as after `prime`: where it is to blame, every later step would be skipped
    too. The schedule of a learning rate goes on, to end with training. The metric `skipped_steps` is added, 1 for such
    a step and 0 elsewhere; the others of such a step are 0. Under `jax.vmap` each seed is left or taken by itself. A
    pipelined step behind it has nothing to update phi by, so the schedule of eta ends that many updates early.
    """

    def guarded_step(state: RunState, batch: BilevelBatch) -> tuple[RunState, dict[str, jax.Array]]:
        after, metrics = step(state, batch)
        phi = None if after.phi is None else (after.phi.params, after.phi.opt_state)  # not what the step remembers
        is_finite = all_finite((after.theta, phi, metrics))
        before = state
        if state.phi is not None:
            before = state._replace(phi=state.phi._replace(carry=jax.tree.map(zeros_like, state.phi.carry)))
        after = jax.tree.map(functools.partial(_select, is_finite), after, before, is_leaf=_is_schedule)
        metrics = {name: jnp.where(is_finite, value, jnp.zeros_like(value)) for name, value in metrics.items()}
        return after, metrics | {SKIPPED: 1 - is_finite.astype(jnp.int32)}

    return guarded_step


def _is_schedule(node: PyTree) -> bool:
    return isinstance(node, optax.ScaleByScheduleState)


def _select(is_finite: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    return new if _is_schedule(new) else jnp.where(is_finite, new, old)


def all_finite(tree: PyTree) -> jax.Array:
    """Whether every number of a pytree is, `[]` bool."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return functools.reduce(operator.and_, (jnp.isfinite(leaf).all() for leaf in leaves), jnp.array(True))
