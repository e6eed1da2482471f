"""The step whose outer batch is the inner batch of the next, so that one forward pass serves both losses."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from adalfl_jax.hypergradient.carry import as_array, is_same, require_carry, to_keep
from adalfl_jax.hypergradient.one_step import (
    Linearization,
    OneStep,
    linearize,
    loss_gradient_of,
    update_theta,
)
from adalfl_jax.hypergradient.problem import BilevelProblem, inner_and_outer_keys, require_examples
from adalfl_jax.norms import norm
from adalfl_jax.types import BilevelBatch, BilevelMetrics, Phi, PyTree, Theta


class LastStep(NamedTuple):
    """Turns dL/dtheta of the current step into dL/dphi of the step before. A pytree."""

    point: Linearization  # of the base model, without what the estimator does not use
    targets: PyTree
    progress: jax.Array | None
    to_direction: Callable[[PyTree], tuple[PyTree]]  # dL/dtheta' -> w


class PrimedCarry(NamedTuple):
    """The arrays of a `LastStep`. Its functions are the same at every step, and so made from those of this one."""

    is_taken: jax.Array  # [] bool
    params_after: list[jax.Array]  # `_smaller` of the parameters after it
    arrays: list[jax.Array]


def make_pipelined_step(
    problem: BilevelProblem, estimator: OneStep, update_phi: Callable[[Phi, PyTree, jax.Array, PyTree], Phi]
) -> Callable[[Theta, Phi, BilevelBatch], tuple[Theta, Phi, BilevelMetrics]]:
    """Makes a step that updates phi for the step before it, then theta: 7 forward passes with `Forward`, not 8.

    Where theta is not what the step before made of it, moved by another step or replaced, phi waits for the next. That
    is seen by all but the largest of its arrays.

    Args:
      problem: without a meta batch.
      estimator: what forms J_f w.
      update_phi: `(phi, gradient, outer_loss, carry) -> phi`, by the outer optimiser.
    """
    # What a pullback keeps is not the same without a trace as in one, and a carry is handed from the one to the other.
    linearize_theta = jax.jit(functools.partial(linearize, problem), inline=True)
    move_theta = jax.jit(functools.partial(update_theta, problem), inline=True)

    def pipelined_step(theta: Theta, phi: Phi, batch: BilevelBatch) -> tuple[Theta, Phi, BilevelMetrics]:
        progress = as_array(batch.progress)
        now = problem.at_progress(progress)
        rng_key, _ = inner_and_outer_keys(batch.rng_key)
        require_examples("batch.inner", batch.inner)
        estimator.require_product(problem, theta, batch.inner, rng_key)
        point, model_state = linearize_theta(theta, batch.inner, rng_key)
        targets = batch.inner[1]
        outer_loss, task_gradient = jax.value_and_grad(problem.task_loss_fn, argnums=1)(targets, point.outputs)
        outer_loss = problem.mean(outer_loss)

        def finish(phi: Phi) -> tuple[LastStep, Theta, jax.Array]:
            inner_loss, gradient, _ = loss_gradient_of(now, phi.params, targets, point.outputs)
            gradient, inner_loss = problem.mean((point.pullback(gradient)[0], inner_loss))
            theta_next, to_direction = move_theta(theta, model_state, gradient)
            return LastStep(estimator.keep(point), targets, progress, to_direction), theta_next, inner_loss

        length = jnp.zeros_like(outer_loss)
        if phi.carry:
            like, *_ = jax.eval_shape(finish, phi)
            last = _restored(phi.carry, theta.params, like)
            (direction,) = last.to_direction(problem.mean(point.pullback(task_gradient)[0]))
            outputs_tangent = estimator.jacobian_product(last.point, problem.own(direction))
            before = problem.at_progress(last.progress)
            *_, to_phi = loss_gradient_of(before, phi.params, last.targets, last.point.outputs)
            (gradient,) = problem.mean(to_phi(outputs_tangent))
            updated = update_phi(phi, gradient, outer_loss, ())
            is_taken = phi.carry.is_taken & is_same(_smaller(theta.params), phi.carry.params_after)
            phi = optax.tree.where(is_taken, updated, phi._replace(carry=()))
            length = jnp.where(is_taken, norm(gradient), length)
        last, theta_next, inner_loss = finish(phi)
        carry = PrimedCarry(jnp.array(True), *to_keep((_smaller(theta_next.params), jax.tree.leaves(last))))
        return theta_next, phi._replace(carry=carry), BilevelMetrics(inner_loss, outer_loss, length)

    return pipelined_step


def _restored(carry: PrimedCarry, params: PyTree, like: LastStep) -> LastStep:
    """Rebuilds the step before: its functions are those of this trace, and its arrays those of the carry."""
    arrays, functions = jax.tree.flatten(like)
    require_carry("pipelined", carry, PrimedCarry(jnp.array(True), _smaller(params), arrays))
    return jax.tree.unflatten(functions, carry.arrays)


def _smaller(params: PyTree) -> list[jax.Array]:
    """The smaller arrays, up to a sixteenth of all numbers and at least one. What moves theta moves them too, and to
    keep and compare all would take a good part of what this step saves."""
    leaves = sorted(map(jnp.asarray, jax.tree.leaves(params)), key=jnp.size)
    sizes = list(itertools.accumulate(map(jnp.size, leaves)))
    return [leaf for leaf, size in zip(leaves, sizes, strict=True) if 16 * size <= sizes[-1]] or leaves[:1]
