"""Learning to Reweight: at every step, a weight for each example of the batch, from its effect on a clean one."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from adalfl_jax.arguments import require_optimizer
from adalfl_jax.hypergradient import BilevelProblem, descend, make_estimator
from adalfl_jax.hypergradient.problem import inner_and_outer_keys, num_inner_steps
from adalfl_jax.norms import power_of_two
from adalfl_jax.types import ApplyFn, BilevelBatch, LossFn, PyTree, Theta
from adalfl_jax.validation import (
    require_bilevel_batch,
    require_loss,
    require_model,
    require_theta,
    returning_scalar,
    returning_state,
)

ExampleLossFn = Callable[[jax.Array, jax.Array], jax.Array]  # (targets, outputs [B, C]) -> [B]


class ReweightingMetrics(NamedTuple):
    """Scalars measured by one reweighted step."""

    inner_loss: jax.Array  # [] sum of the weighted losses of the inner batch at theta_t
    outer_loss: jax.Array  # [] task loss of the outer batch at theta_t
    zero_share: jax.Array  # [] share of the examples that weigh nothing, in [0, 1]
    effective_size: jax.Array  # [] 1 / sum of squared weights: B if they are equal, 0 if all are zero


def make_reweighting_step(
    apply_fn: ApplyFn,
    example_loss_fn: ExampleLossFn,
    task_loss_fn: LossFn,
    inner_optimizer: optax.GradientTransformation,
) -> Callable[[Theta, BilevelBatch], tuple[Theta, ReweightingMetrics]]:
    r"""Makes the step that weights the examples of the inner batch by what they do for the outer one.

    .. math::
      \tilde w_i = \max\Big(0,\, -\frac{\partial}{\partial \epsilon_i}
        L\big(\theta - \alpha \nabla_\theta \textstyle\sum_j \epsilon_j \ell_j\big)\Big|_{\epsilon = 0}\Big), \qquad
      w = \tilde w \big/ \textstyle\sum_j \tilde w_j

    which is the positive part of alpha times the product of the gradients of l_i and L; alpha cancels. Then theta takes
    the inner optimiser's step on the sum of w_i l_i. Where no example helps all weights stay 0. Nothing is remembered
    from step to step; a step costs a backward pass more than `make_bilevel_step`'s. Weights are shares of the whole
    batch: on several devices put it under `jax.jit` with shardings, not inside `jax.pmap` or `jax.shard_map`.

    Args:
      apply_fn: the base model, as in `make_bilevel_step`: in train mode on both batches, and the inner pass updates
        `model_state`.
      example_loss_fn: `(targets, outputs) -> [B]`, `adalfl_jax.task_losses.example_cross_entropy` say.
      task_loss_fn: L, `(targets, outputs) -> scalar`, taken on the outer batch.
      inner_optimizer: any optax transformation. The step that weights are found by is plain SGD in any case.

    Returns:
      `reweighting_step(theta, batch) -> (theta, metrics)`, pure.

    Raises:
      ValueError: what is no optimiser, or no function of such arguments; by the returned step, a theta of another
        optimiser, shapes that do not fit together or losses that are not one an example.

    Example:
      >>> import jax, optax, adalfl_jax
      >>> def apply_fn(params, model_state, inputs, *, train, rng_key):
      ...   return inputs @ params, model_state
      >>> losses, inner = adalfl_jax.task_losses, optax.sgd(0.1)
      >>> step = adalfl_jax.make_reweighting_step(
      ...   apply_fn, losses.example_cross_entropy, losses.softmax_cross_entropy, inner)
      >>> theta = adalfl_jax.Theta.create(jax.numpy.zeros((1, 2)), (), inner)
      >>> x, noisy, clean = jax.numpy.ones((4, 1)), jax.numpy.array([0, 1, 1, 1]), jax.numpy.array([1, 1, 1, 1])
      >>> theta, metrics = jax.jit(step)(theta, adalfl_jax.BilevelBatch((x, noisy), (x, clean)))
      >>> float(metrics.zero_share), round(float(metrics.effective_size), 3)
      (0.25, 3.0)

    References:
      Algorithm 1 of Ren et al., "Learning to Reweight Examples for Robust Deep Learning", arXiv 1803.09050.
    """
    require_model(apply_fn)
    require_loss("example_loss_fn", example_loss_fn, "targets", "outputs")
    require_loss("task_loss_fn", task_loss_fn, "targets", "outputs")
    require_optimizer("inner_optimizer", inner_optimizer)
    apply_fn = returning_state(apply_fn)
    task_loss_fn = returning_scalar("task_loss_fn", task_loss_fn)

    def weighted_loss(weights: PyTree, targets: jax.Array, outputs: jax.Array) -> jax.Array:
        losses = example_loss_fn(targets, outputs)
        if losses.shape != weights.shape:
            raise ValueError(
                f"example_loss_fn must return one loss an example, [B] = {weights.shape}; got {losses.shape}"
            )
        return (weights.astype(losses.dtype) * losses).sum()

    lookahead, estimate = optax.sgd(1.0), make_estimator("forward")
    problem = BilevelProblem(apply_fn, weighted_loss, task_loss_fn, lookahead)

    def reweighting_step(theta: Theta, batch: BilevelBatch) -> tuple[Theta, ReweightingMetrics]:
        require_theta(theta, "inner_optimizer", inner_optimizer)
        require_bilevel_batch(batch, ("inner", "outer"))
        if (num_steps := num_inner_steps(batch)) is not None:
            raise ValueError(
                f"a reweighting step takes one inner batch, and batch.inner carries a leading axis K = {num_steps}; "
                "drop that axis"
            )
        nothing = jnp.zeros(jnp.shape(jax.tree.leaves(batch.inner[1])[0])[:1])
        ahead = estimate(problem, theta._replace(opt_state=lookahead.init(theta.params)), nothing, batch)
        weights = _normalize(jnp.maximum(-ahead.gradient, 0))
        theta, loss, _ = descend(
            apply_fn,
            lambda targets, outputs, _: weighted_loss(weights, targets, outputs),
            inner_optimizer,
            theta,
            batch.inner,
            inner_and_outer_keys(batch.rng_key)[0],
        )
        squares = (weights**2).sum()
        is_zero = squares == 0  # and nan is not: what is measured of such weights is nan
        size = jnp.where(is_zero, 0, 1 / jnp.where(is_zero, 1, squares))
        zero_share = jnp.where(jnp.isnan(squares), jnp.nan, (weights == 0).mean())
        return theta, ReweightingMetrics(loss, ahead.outer_loss, zero_share, size)

    return reweighting_step


def _normalize(weights: jax.Array) -> jax.Array:
    """Weights that add up to 1, or stay 0."""
    weights = weights / power_of_two(weights.max(initial=0.0))  # in units of which their sum does not overflow
    total = weights.sum()
    return weights / jnp.where(total > 0, total, 1)
