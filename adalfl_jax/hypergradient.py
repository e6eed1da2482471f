"""Gradients of the outer task loss with respect to phi, through the inner update of theta.

One bilevel problem, with the task loss L, the learned loss M_phi and the inner optimiser's update u:

    theta'(phi) = theta + u(g(phi)),    g(phi) = d M_phi(y, f_theta(x)) / d theta,    find  d L(theta'(phi)) / d phi.

Every estimator has the signature of `forward` below and returns theta' together with the gradient, so a step pays
for the inner update once. Costs are counted in forward passes of the base model; training on a fixed loss costs 3.

| name         | exact for      | cost               | keeps in memory                              |
|--------------|----------------|--------------------|----------------------------------------------|
| `"forward"`  | one inner step | 8                  | one linearisation of the base model          |
| `"unrolled"` | K >= 1 steps   | 8, and more with K | the K inner steps with their backward passes |
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from adalfl_jax.types import ApplyFn, Batch, BilevelBatch, LearnedLossFn, LossFn, PyTree, Theta


class BilevelProblem(NamedTuple):
    """The functions that define the inner update and the outer objective."""

    apply_fn: ApplyFn
    learned_loss_fn: LearnedLossFn
    task_loss_fn: LossFn
    inner_optimizer: optax.GradientTransformation


class Hypergradient(NamedTuple):
    """What an estimator returns."""

    theta: Theta  # theta_{t+1}, K steps later in a K-step unroll
    gradient: PyTree  # d outer_loss / d phi, the shape of phi
    inner_loss: jax.Array  # [] M_phi before the update, mean over the K steps
    outer_loss: jax.Array  # [] task loss at theta_{t+1} on the outer batch


Estimator = Callable[[BilevelProblem, Theta, PyTree, BilevelBatch], Hypergradient]


def forward(problem: BilevelProblem, theta: Theta, phi_params: PyTree, batch: BilevelBatch) -> Hypergradient:
    """Exact gradient through one inner step, without a second backward pass through the base model.

    M_phi depends on theta only through the outputs f = f_theta(x). With w = (du/dg)^T dL/dtheta' the chain rule is

        dL/dphi = d/dphi <g(phi), w> = d/dphi <dM_phi/df, J_f w>,

    one forward-mode product J_f w with the base model, then the gradient of a scalar through the small loss network
    alone. The pullback c -> J_f^T c that gave g is linear, and its transpose is the product: J_f w costs two passes and
    no second evaluation of f. Transposing the pullback, rather than `jax.jvp`, keeps the memory layouts of the backward
    pass, in which matrix products with w are faster on a CPU.

    Raises:
      ValueError: `batch.inner` has a leading axis K (see `num_inner_steps`).
    """
    if num_inner_steps(batch) is not None:
        raise ValueError(
            'hypergradient="forward" differentiates through exactly one inner step, and batch.inner carries a '
            f"leading axis K = {num_inner_steps(batch)}; "
            'drop that axis, or build the step with hypergradient="unrolled"'
        )
    inner_key, outer_key = _split(batch.rng_key)
    inputs, targets = batch.inner

    def model(params: PyTree) -> tuple[jax.Array, PyTree]:
        return problem.apply_fn(params, theta.model_state, inputs, train=True, rng_key=inner_key)

    outputs, pullback, model_state = jax.vjp(model, theta.params, has_aux=True)

    def loss_gradient(phi_params: PyTree) -> tuple[jax.Array, jax.Array]:  # dM_phi/df as a function of phi
        loss, gradient = jax.value_and_grad(lambda f: problem.learned_loss_fn(phi_params, targets, f))(outputs)
        return gradient, loss

    outputs_gradient, loss_gradient_transpose, inner_loss = jax.vjp(loss_gradient, phi_params, has_aux=True)
    (gradient,) = pullback(outputs_gradient)

    def optimizer(gradient: PyTree) -> tuple[PyTree, optax.OptState]:
        return differentiable_update(problem.inner_optimizer, gradient, theta.opt_state, theta.params)

    updates, update_transpose, opt_state = jax.vjp(optimizer, gradient, has_aux=True)
    theta_next = Theta(optax.apply_updates(theta.params, updates), model_state, opt_state)

    outer_loss, task_gradient = jax.value_and_grad(outer_objective, argnums=1)(
        problem, theta_next.params, model_state, batch.outer, outer_key
    )
    (direction,) = update_transpose(task_gradient)  # w
    (outputs_tangent,) = jax.linear_transpose(lambda c: pullback(c)[0], outputs)(direction)  # J_f w, [B, C]
    (phi_gradient,) = loss_gradient_transpose(outputs_tangent)  # d/dphi <dM_phi/df, J_f w>
    return Hypergradient(theta_next, phi_gradient, inner_loss, outer_loss)


def unrolled(problem: BilevelProblem, theta: Theta, phi_params: PyTree, batch: BilevelBatch) -> Hypergradient:
    """Exact gradient by reverse-mode differentiation through K >= 1 inner steps ("unrolled differentiation").

    The one to use for K > 1 and for a learned loss that reads theta. Memory grows linearly in K.

    References:
      Algorithms 1 and 2 of Raymond et al., "Meta-Learning Adaptive Loss Functions", arXiv 2301.13247.
    """
    num_steps = num_inner_steps(batch)
    inner_key, outer_key = _split(batch.rng_key)

    def objective(phi_params: PyTree) -> tuple[jax.Array, tuple[Theta, jax.Array]]:
        def inner_step(theta: Theta, item: tuple[Batch, jax.Array | None]) -> tuple[Theta, jax.Array]:
            inner_batch, rng_key = item
            loss_fn = _bind_learned_loss(problem.learned_loss_fn, phi_params)
            return descend(problem.apply_fn, loss_fn, problem.inner_optimizer, theta, inner_batch, rng_key)

        if num_steps is None:
            theta_next, inner_loss = inner_step(theta, (Batch(*batch.inner), inner_key))
        else:
            keys = None if inner_key is None else jax.random.split(inner_key, num_steps)
            theta_next, inner_losses = jax.lax.scan(inner_step, theta, (Batch(*batch.inner), keys))
            inner_loss = inner_losses.mean()
        outer_loss = outer_objective(problem, theta_next.params, theta_next.model_state, batch.outer, outer_key)
        return outer_loss, (theta_next, inner_loss)

    (outer_loss, (theta_next, inner_loss)), gradient = jax.value_and_grad(objective, has_aux=True)(phi_params)
    return Hypergradient(theta_next, gradient, inner_loss, outer_loss)


ESTIMATORS: dict[str, Estimator] = {"forward": forward, "unrolled": unrolled}


def descend(
    apply_fn: ApplyFn,
    loss_fn: Callable[[jax.Array, jax.Array, PyTree], jax.Array],
    optimizer: optax.GradientTransformation,
    theta: Theta,
    batch: Batch | tuple[jax.Array, jax.Array],
    rng_key: jax.Array | None,
) -> tuple[Theta, jax.Array]:
    """One differentiable optimiser step of theta on `loss_fn(targets, outputs, params)`; returns the loss before it."""
    inputs, targets = batch

    def objective(params: PyTree) -> tuple[jax.Array, PyTree]:
        outputs, model_state = apply_fn(params, theta.model_state, inputs, train=True, rng_key=rng_key)
        return loss_fn(targets, outputs, params), model_state

    (loss, model_state), gradient = jax.value_and_grad(objective, has_aux=True)(theta.params)
    updates, opt_state = differentiable_update(optimizer, gradient, theta.opt_state, theta.params)
    return Theta(optax.apply_updates(theta.params, updates), model_state, opt_state), loss


def outer_objective(
    problem: BilevelProblem,
    params: PyTree,
    model_state: PyTree,
    batch: Batch | tuple[jax.Array, jax.Array],
    rng_key: jax.Array | None,
) -> jax.Array:
    """Task loss on the outer batch. Batch norm normalises by that batch; the statistics it would record are dropped."""
    inputs, targets = batch
    outputs, _ = problem.apply_fn(params, model_state, inputs, train=True, rng_key=rng_key)
    return problem.task_loss_fn(targets, outputs)


def differentiable_update(
    optimizer: optax.GradientTransformation, gradient: PyTree, opt_state: optax.OptState, params: PyTree
) -> tuple[PyTree, optax.OptState]:
    """`optimizer.update` with a derivative that is finite where the gradient vanishes.

    Norms and square roots inside an optimiser (clipping, Adam with `eps_root=0`) have a derivative 0 * inf = nan at
    a gradient of exactly zero, which dead units and constant pixels produce all the time. The values here are those
    of `optimizer.update`, bit for bit; the derivative is taken a hair away from zero, where it is the limit.
    """

    # What the optimiser closes over, a traced learning rate say, becomes an argument and can be differentiated too.
    plain_update, closed_over = jax.closure_convert(optimizer.update, gradient, opt_state, params)
    update = jax.custom_jvp(plain_update)

    @update.defjvp
    def update_jvp(primals, tangents):  # pyright: ignore[reportUnusedFunction]
        gradient, *others = primals
        _, tangents_out = jax.jvp(plain_update, (jax.tree.map(_away_from_zero, gradient), *others), tangents)
        return update(*primals), tangents_out

    return update(gradient, opt_state, params, *closed_over)


def num_inner_steps(batch: BilevelBatch) -> int | None:
    """K when `batch.inner` carries a leading axis of inner steps, None when it is one plain batch.

    The inner batch is unrolled when its inputs have one axis more than the outer batch's.

    Raises:
      ValueError: leading axes of inputs and targets or ranks of inner and outer inputs differ, or a batch is empty.
    """
    (inner_inputs, inner_targets), (outer_inputs, outer_targets) = batch.inner, batch.outer
    extra_axes = inner_inputs.ndim - outer_inputs.ndim
    if extra_axes not in (0, 1):
        raise ValueError(
            "batch.inner inputs must be shaped like batch.outer inputs, or have one leading axis K more; got "
            f"inner {inner_inputs.shape} and outer {outer_inputs.shape}"
        )
    for name, inputs, targets, axes in (
        ("inner", inner_inputs, inner_targets, 1 + extra_axes),
        ("outer", outer_inputs, outer_targets, 1),
    ):
        if inputs.shape[:axes] != targets.shape[:axes] or inputs.ndim < axes:
            letters = "[K, B]" if axes == 2 else "[B]"
            raise ValueError(
                f"batch.{name}: inputs and targets must share their leading axes {letters}; got inputs "
                f"{inputs.shape} and targets {targets.shape}"
            )
    if 0 in outer_targets.shape[:1] + inner_targets.shape[: 1 + extra_axes]:
        raise ValueError(f"batches are empty; got inner {inner_inputs.shape} and outer {outer_inputs.shape}")
    return inner_inputs.shape[0] if extra_axes else None


def reads_params(learned_loss_fn: LearnedLossFn) -> bool:
    """Whether a learned loss declares the keyword-only argument `params`, by which it reads theta directly."""
    try:
        parameter = inspect.signature(learned_loss_fn).parameters.get("params")
    except (TypeError, ValueError):  # a callable without an inspectable signature cannot ask for it
        return False
    return parameter is not None and parameter.kind is inspect.Parameter.KEYWORD_ONLY


def _bind_learned_loss(
    learned_loss_fn: LearnedLossFn, phi_params: PyTree
) -> Callable[[jax.Array, jax.Array, PyTree], jax.Array]:
    if reads_params(learned_loss_fn):
        return lambda targets, outputs, params: learned_loss_fn(phi_params, targets, outputs, params=params)  # pyright: ignore[reportCallIssue]
    return lambda targets, outputs, _: learned_loss_fn(phi_params, targets, outputs)


def _split(rng_key: jax.Array | None) -> tuple[jax.Array | None, jax.Array | None]:
    if rng_key is None:
        return None, None
    inner_key, outer_key = jax.random.split(rng_key)
    return inner_key, outer_key


def _away_from_zero(gradient: jax.Array) -> jax.Array:
    if gradient.dtype == jnp.float16:
        raise ValueError("float16 has too little range for meta-gradients; keep parameters in float32 or bfloat16")
    # Its square must not underflow, nor that square's power -3/2 overflow: 7e-13 in float32 and bfloat16.
    floor = float(jnp.finfo(gradient.dtype).tiny) ** 0.32
    return jnp.where(jnp.abs(gradient) < floor, jnp.asarray(floor, gradient.dtype), gradient)
