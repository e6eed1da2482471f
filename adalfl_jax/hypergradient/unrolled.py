"""Meta-gradients by reverse-mode differentiation through K >= 1 inner steps, exact for any learned loss."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import optax

from adalfl_jax.hypergradient.closures import hoist_closure
from adalfl_jax.hypergradient.problem import (
    AnyBatch,
    BilevelProblem,
    Hypergradient,
    bind_learned_loss,
    inner_and_outer_keys,
    inner_step,
    keys_of_steps,
    num_inner_steps,
    outer_objective,
    require_forward_mode,
)
from adalfl_jax.hypergradient.update import differentiable_update
from adalfl_jax.types import Batch, BilevelBatch, PyTree, Theta

InnerStep = Callable[
    [BilevelProblem, Theta, PyTree, AnyBatch, jax.Array | None], tuple[Theta, jax.Array]
]  # as `inner_step`
Scan = Callable[..., tuple[Any, Any]]  # as `jax.lax.scan`


@dataclasses.dataclass(frozen=True)
class Unrolled:
    """Exact, through all K steps at once ("unrolled differentiation"). Memory grows with K.

    References:
      Algorithms 1 and 2 of Raymond et al., "Meta-Learning Adaptive Loss Functions", arXiv 2301.13247.
    """

    name: ClassVar[str] = "unrolled"
    _step: ClassVar[InnerStep] = staticmethod(inner_step)
    _scan: ClassVar[Scan] = staticmethod(jax.lax.scan)

    def __call__(
        self, problem: BilevelProblem, theta: Theta, phi_params: PyTree, batch: BilevelBatch, carry: PyTree = (), /
    ) -> Hypergradient:
        """The estimate, with the signature of every estimator."""
        inner_key, outer_key = inner_and_outer_keys(batch.rng_key)

        def objective(phi_params: PyTree) -> tuple[jax.Array, tuple[Theta, jax.Array]]:
            theta_next, inner_loss = run_inner_steps(
                problem, theta, phi_params, batch, inner_key, self._step, self._scan
            )
            outer_loss = outer_objective(problem, theta_next.params, theta_next.model_state, batch.outer, outer_key)
            return outer_loss, (theta_next, inner_loss)

        differentiate = jax.value_and_grad(objective, has_aux=True)
        (outer_loss, (theta_next, inner_loss)), gradient = differentiate(problem.own(phi_params))
        outer_loss, gradient = problem.mean((outer_loss, gradient))
        return Hypergradient(theta_next, gradient, inner_loss, outer_loss, carry)


def run_inner_steps(
    problem: BilevelProblem,
    theta: Theta,
    phi_params: PyTree,
    batch: BilevelBatch,
    rng_key: jax.Array | None,
    step: InnerStep = inner_step,
    scan: Scan = jax.lax.scan,
) -> tuple[Theta, jax.Array]:
    """theta after the K inner steps of a batch, and the mean of M_phi before each."""
    num_steps = num_inner_steps(batch)
    if num_steps is None:
        return step(problem, theta, phi_params, batch.inner, rng_key)
    keys = keys_of_steps(rng_key, num_steps)

    def body(theta: Theta, item: tuple[Batch, jax.Array | None]) -> tuple[Theta, jax.Array]:
        return step(problem, theta, phi_params, *item)

    theta, losses = scan(body, theta, (Batch(*batch.inner), keys))
    return theta, losses.mean()


def _scan_in_segments(body: Callable, start: Theta, items: PyTree) -> tuple[Theta, jax.Array]:
    """`jax.lax.scan` that keeps the carry every sqrt(K) steps for the backward pass, and nothing else."""
    num_steps = len(jax.tree.leaves(items)[0])
    length = math.isqrt(num_steps)
    num_whole = num_steps - num_steps % length
    segment = jax.checkpoint(functools.partial(jax.lax.scan, body))
    whole = jax.tree.map(lambda leaf: leaf[:num_whole].reshape(-1, length, *leaf.shape[1:]), items)
    carry, losses = jax.lax.scan(segment, start, whole)
    losses = losses.reshape(-1)
    if num_whole < num_steps:
        carry, rest = segment(carry, jax.tree.map(lambda leaf: leaf[num_whole:], items))
        losses = jax.numpy.concatenate([losses, rest])
    return carry, losses


@dataclasses.dataclass(frozen=True)
class Checkpointed(Unrolled):
    """Exact, as `Unrolled`, with theta kept every sqrt(K) steps and the steps between computed anew.

    Memory grows with sqrt(K), for about a third more work.

    References:
      Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174.
    """

    name: ClassVar[str] = "checkpointed"
    _scan: ClassVar[Scan] = staticmethod(_scan_in_segments)


def _mixed_mode_step(
    problem: BilevelProblem, theta: Theta, phi_params: PyTree, batch: AnyBatch, rng_key: jax.Array | None
) -> tuple[Theta, jax.Array]:
    inputs, targets = batch
    params, phi_params = problem.own(theta.params), problem.own(phi_params)
    given = (theta.model_state, inputs, targets, rng_key)

    def written(given: tuple, params: PyTree, phi_params: PyTree) -> tuple[jax.Array, tuple[jax.Array, PyTree]]:
        model_state, inputs, targets, rng_key = given
        outputs, model_state = problem.apply_fn(params, model_state, inputs, train=True, rng_key=rng_key)
        loss = bind_learned_loss(problem.learned_loss_fn, phi_params)(targets, outputs, params)
        return loss, (loss, model_state)

    objective, inexact, others = hoist_closure(written, given, params, phi_params)
    plain_gradient = jax.grad(objective, argnums=1, has_aux=True)
    gradient_fn = jax.custom_vjp(plain_gradient)

    def backward(point: tuple, cotangents: tuple) -> tuple:
        given, params, *moved, others = point
        direction, _ = cotangents

        def gradients(params: PyTree) -> tuple[PyTree, ...]:
            return jax.grad(objective, argnums=(1, 2, 3), has_aux=True)(given, params, *moved, others)[0]

        require_forward_mode(MixedMode.name, gradients, params)
        return None, *jax.jvp(gradients, (params,), (direction,))[1], None

    gradient_fn.defvjp(lambda *point: (plain_gradient(*point), point), backward)
    gradient, (loss, model_state) = problem.mean(gradient_fn(given, params, phi_params, inexact, others))
    updates, opt_state = differentiable_update(problem.inner_optimizer, gradient, theta.opt_state, theta.params)
    return Theta(optax.apply_updates(theta.params, updates), model_state, opt_state), loss


@dataclasses.dataclass(frozen=True)
class MixedMode(Unrolled):
    """Exact, with the second derivatives of M_phi taken forward over reverse.

    Going back through a step needs w^T d(grad M_phi)/d(theta, phi). The Hessian of M_phi in (theta, phi) being
    symmetric, this is the derivative of its gradient along (w, 0), one forward-mode product that stores no pass. Of
    each step theta is kept, and what the inner optimiser's update needs to be differentiated: nothing more for SGD,
    five times as much for Adam. Derivatives through `model_state` are dropped: those of batch norm's running statistics
    are zero in train mode.

    Raises:
      NotImplementedError: when differentiated, a model whose gradient has no forward-mode derivative.

    References:
      Kemaev et al., "Scalable Meta-Learning via Mixed-Mode Differentiation" (MixFlow-MG), arXiv 2505.00793.
    """

    name: ClassVar[str] = "mixed_mode"
    _step: ClassVar[InnerStep] = staticmethod(_mixed_mode_step)
