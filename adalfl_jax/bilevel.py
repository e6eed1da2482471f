"""Steps of training: on a loss that is learned meanwhile (Algorithm 2's body), and on a fixed one."""

from __future__ import annotations

from collections.abc import Callable

import jax
import optax

from adalfl_jax.hypergradient import ESTIMATORS, BilevelProblem, descend, reads_params
from adalfl_jax.registry import lookup
from adalfl_jax.types import (
    ApplyFn,
    Batch,
    BilevelBatch,
    BilevelMetrics,
    LearnedLossFn,
    LossFn,
    Phi,
    TaskMetrics,
    Theta,
)

BilevelStep = Callable[[Theta, Phi, BilevelBatch], tuple[Theta, Phi, BilevelMetrics]]


def make_bilevel_step(
    apply_fn: ApplyFn,
    learned_loss_fn: LearnedLossFn,
    task_loss_fn: LossFn,
    inner_optimizer: optax.GradientTransformation,
    outer_optimizer: optax.GradientTransformation,
    *,
    hypergradient: str = "forward",
) -> BilevelStep:
    r"""Makes the step that trains the base model and its loss together.

    .. math::
      \theta_{t+1} = \theta_t + u(\nabla_\theta M_{\phi_t}(y, f_{\theta_t}(x))), \qquad
      \phi_{t+1} = \phi_t + v(\nabla_\phi L(y', f_{\theta_{t+1}(\phi_t)}(x')))

    with `u` and `v` the updates of the inner and the outer optimiser, `(x, y)` the inner and `(x', y')` the outer
    batch. The step is pure: put it under `jax.jit`, `jax.lax.scan`, `jax.vmap` or a sharding as it is.

    Args:
      apply_fn: the base model, `(params, model_state, inputs, *, train, rng_key) -> (outputs [B, C], model_state)`.
        It is called with `train=True` on both batches. The inner pass updates `model_state`; the outer pass
        normalises by its own batch and what it would record is dropped.
      learned_loss_fn: M_phi, `(phi_params, targets, outputs) -> scalar`. If it has a keyword-only argument `params` it
        reads theta and receives it there.
      task_loss_fn: L, `(targets, outputs) -> scalar`.
      inner_optimizer: any optax transformation that needs gradient, state and parameters alone (a line search needs
        more); the paper's is `optax.sgd`.
      outer_optimizer: any optax transformation; the paper's is `optax.adam`.
      hypergradient: a key of `adalfl_jax.hypergradient.ESTIMATORS`: "forward" (exact, one inner step) or
        "unrolled" (exact, any number of inner steps, any learned loss).

    Returns:
      `bilevel_step(theta, phi, batch) -> (theta, phi, metrics)`.

    Raises:
      ValueError: an unknown hypergradient, or one that does not fit the learned loss; by the returned step, shapes
        that do not fit together.

    Example:
      >>> import jax, optax, adalfl_jax
      >>> def apply_fn(params, model_state, inputs, *, train, rng_key):
      ...   return inputs @ params, model_state
      >>> loss = adalfl_jax.LossNetwork()
      >>> inner, outer = optax.sgd(0.1), optax.adam(1e-3)
      >>> step = adalfl_jax.make_bilevel_step(
      ...   apply_fn, loss.apply, adalfl_jax.task_losses.softmax_cross_entropy, inner, outer)
      >>> theta = adalfl_jax.Theta.create(jax.numpy.zeros((4, 3)), (), inner)
      >>> phi = adalfl_jax.Phi.create(loss.init(jax.random.key(0)), outer)
      >>> x, y = jax.numpy.ones((8, 4)), jax.numpy.arange(8) % 3
      >>> theta, phi, metrics = jax.jit(step)(theta, phi, adalfl_jax.BilevelBatch((x, y), (x, y)))
      >>> theta.params.shape
      (4, 3)

    References:
      Algorithm 2 of Raymond et al., "Meta-Learning Adaptive Loss Functions", arXiv 2301.13247.
    """
    estimate = lookup("hypergradient", ESTIMATORS, hypergradient)
    if hypergradient == "forward" and reads_params(learned_loss_fn):
        raise ValueError(
            'hypergradient="forward" needs a learned loss that depends on theta only through the outputs, and this one '
            'reads it (keyword argument `params`); build the step with hypergradient="unrolled"'
        )
    problem = BilevelProblem(apply_fn, learned_loss_fn, task_loss_fn, inner_optimizer)

    def bilevel_step(theta: Theta, phi: Phi, batch: BilevelBatch) -> tuple[Theta, Phi, BilevelMetrics]:
        result = estimate(problem, theta, phi.params, batch)
        updates, opt_state = outer_optimizer.update(result.gradient, phi.opt_state, phi.params)
        phi = Phi(optax.apply_updates(phi.params, updates), opt_state)
        norm = optax.tree.norm(result.gradient)
        return result.theta, phi, BilevelMetrics(result.inner_loss, result.outer_loss, norm)

    return bilevel_step


def make_task_step(
    apply_fn: ApplyFn, loss_fn: LossFn, optimizer: optax.GradientTransformation
) -> Callable[..., tuple[Theta, TaskMetrics]]:
    """Makes the step that trains the base model on a loss that does not change.

    The loss is a task loss (the baseline), a learned loss read from a file, or ML3's frozen
    `lambda targets, outputs: loss.apply(phi_params, targets, outputs)`.

    Args:
      apply_fn: the base model, as in `make_bilevel_step`.
      loss_fn: `(targets, outputs) -> scalar`.
      optimizer: any optax transformation.

    Returns:
      `task_step(theta, batch, rng_key=None) -> (theta, metrics)`, where `batch` is `(inputs, targets)`.
    """

    def task_step(
        theta: Theta, batch: Batch | tuple[jax.Array, jax.Array], rng_key: jax.Array | None = None
    ) -> tuple[Theta, TaskMetrics]:
        def loss(targets: jax.Array, outputs: jax.Array, _) -> jax.Array:
            return loss_fn(targets, outputs)

        theta, value = descend(apply_fn, loss, optimizer, theta, batch, rng_key)
        return theta, TaskMetrics(value)

    return task_step
