"""What a learned loss does, in numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adalfl_jax.learned_losses import LossNetwork
from adalfl_jax.types import ApplyFn, Batch, LossFn, PyTree, Theta


class GradientComparison(NamedTuple):
    r"""The gradient of one loss beside that of the task loss, at one theta on one batch.

    References:
      "Implicit learning rate tuning" in arXiv 2301.13247.
    """

    gradient_scale: jax.Array  # [] |grad M| / |grad L|
    gradient_cosine: jax.Array  # [] cosine of the angle between them, in [-1, 1]
    implicit_learning_rate: jax.Array  # [] alpha <grad M, grad L> / |grad L|^2: the task-loss rate M stands for


def compare_gradients(
    apply_fn: ApplyFn,
    loss_fn: LossFn,
    task_loss_fn: LossFn,
    theta: Theta,
    batch: Batch,
    learning_rate: jax.Array | float,
    *,
    batch_size: int | None = None,
) -> GradientComparison:
    """Compares the gradients of `loss_fn` and `task_loss_fn` with respect to theta, the model in eval mode.

    Where a gradient vanishes the ratios are 0 rather than nan. Both losses are means over examples. With a
    `batch_size`, which must divide the number of examples, the gradients are those means over batches of that many,
    taken one after the other: the same values in less memory.
    """
    num_batches = len(batch.inputs) // (batch_size or len(batch.inputs))
    batches = jax.tree.map(lambda array: array.reshape(num_batches, -1, *array.shape[1:]), batch)

    def gradient(loss_fn: LossFn) -> PyTree:
        def objective(params: PyTree, batch: Batch) -> jax.Array:
            outputs, _ = apply_fn(params, theta.model_state, batch.inputs, train=False, rng_key=None)
            return loss_fn(batch.targets, outputs)

        def add(total: PyTree, batch: Batch) -> tuple[PyTree, None]:
            return optax.tree.add(total, jax.grad(objective)(theta.params, batch)), None

        total, _ = jax.lax.scan(add, optax.tree.zeros_like(theta.params), Batch(*batches))
        return optax.tree.scale(1 / num_batches, total)

    learned, task = gradient(loss_fn), gradient(task_loss_fn)
    product = optax.tree.vdot(learned, task)
    learned_norm, task_norm = jnp.asarray(optax.tree.norm(learned)), jnp.asarray(optax.tree.norm(task))
    return GradientComparison(
        gradient_scale=_ratio(learned_norm, task_norm),
        gradient_cosine=_ratio(product, learned_norm * task_norm),
        implicit_learning_rate=learning_rate * _ratio(product, task_norm**2),
    )


def make_loss_shape(loss: LossNetwork, *, num_points: int = 101) -> tuple[jax.Array, Callable[[PyTree], jax.Array]]:
    """The range of predictions a loss network is drawn over, and the function that evaluates it there.

    Probabilities run over [0, 1], log-probabilities over [-8, 0] nats, and raw predictions over [-3, 3].

    Returns:
      predictions `[P]`, and `phi_params -> l_phi [2, P]` for target 0 and target 1. Only differences along a curve
      mean anything, since a constant has no gradient, so each curve has its mean removed.
    """
    low, high = {"probabilities": (0.0, 1.0), "log_probabilities": (-8.0, 0.0), "raw": (-3.0, 3.0)}[loss.predictions]
    predictions = jnp.linspace(low, high, num_points)

    def evaluate(phi_params: PyTree) -> jax.Array:
        targets = jnp.repeat(jnp.array([[0.0], [1.0]]), num_points, axis=1)
        values = loss.elementwise(phi_params, targets, jnp.stack([predictions, predictions]))
        return values - values.mean(axis=1, keepdims=True)

    return predictions, evaluate


def flat_share(values: np.ndarray, threshold: float = 0.01) -> np.ndarray:
    """The share of the range of predictions in which a loss gives next to no gradient.

    Args:
      values: of l_phi `[..., 2, P]` at evenly spaced predictions for target 0 and 1, as from `make_loss_shape`.
      threshold: a slope below this share of the steepest one of the two curves counts as flat.

    Returns:
      `[...]`, from 0 to 1; 1 for a loss that is constant.
    """
    slopes = np.abs(np.diff(values, axis=-1))
    steepest = slopes.max(axis=(-2, -1), keepdims=True)
    return (slopes <= threshold * steepest).mean(axis=(-2, -1))


def _ratio(numerator: jax.typing.ArrayLike, denominator: jax.Array) -> jax.Array:
    positive = denominator > 1e-30  # below it the quotient may overflow in float32
    return jnp.where(positive, numerator / jnp.where(positive, denominator, 1.0), 0.0)
