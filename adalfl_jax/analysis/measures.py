"""What a learned loss does, in numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.interpolate

from adalfl_jax.learned_losses import LossNetwork
from adalfl_jax.norms import unit_and_squares, widen
from adalfl_jax.task_losses import to_dense
from adalfl_jax.types import ApplyFn, Batch, LossFn, PyTree, Theta
from adalfl_jax.validation import require_loss, require_model

NUM_POINTS = 101  # of the range of predictions that a shape is drawn at
FLAT = 0.01  # a slope of this share of the steepest one hardly trains


class GradientComparison(NamedTuple):
    r"""The gradient of one loss beside that of the task loss, at one theta on one batch.

    References:
      "Implicit learning rate tuning" in arXiv 2301.13247.
    """

    gradient_scale: jax.Array  # [] |grad M| / |grad L|; 1 where both vanish
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
    task_batch: Batch | None = None,
    rng_key: jax.Array | None = None,
) -> GradientComparison:
    """Compares the gradients of `loss_fn` and `task_loss_fn` with respect to theta, the model in train mode.

    That is the mode of the step whose direction and length they are: batch norm normalises by the statistics of each
    batch, as running ones are of no use to a fresh model, and what it would record is dropped. Dropout draws the same
    for both losses on one batch, from `rng_key`; a model without random streams needs none.

    Where a gradient vanishes the ratios are 0 rather than nan, but for the scale where both do, which is 1. Both losses
    are means over examples. With a `batch_size`, which must divide the number of examples, the gradients are means over
    batches of that many, taken one after the other: the same values in less memory, but for batch norm and dropout.

    With a `task_batch` the task loss is taken on those examples, at once where they are fewer than `batch_size`. Where
    labels of `batch` are wrong, and those of `task_batch` right, the cosine says whether a step on M serves the task.

    Raises:
      ValueError: functions that cannot be called so, no examples, a `batch_size` that does not divide their number, or
        no key for a model of this package with dropout.
    """
    require_model(apply_fn)
    require_loss("loss_fn", loss_fn, "targets", "outputs")
    require_loss("task_loss_fn", task_loss_fn, "targets", "outputs")

    def gradient(loss_fn: LossFn, examples: Batch, size: int | None) -> PyTree:
        num_examples = len(examples[1])
        size = num_examples if size is None else size
        if size < 1 or num_examples % size:
            raise ValueError(f"batch_size must divide the number of examples, {num_examples}, at least 1; got {size}")
        num_batches = num_examples // size
        batches = jax.tree.map(lambda array: array.reshape(num_batches, -1, *array.shape[1:]), tuple(examples))

        def objective(params: PyTree, batch: Batch, rng_key: jax.Array | None) -> jax.Array:
            outputs, _ = apply_fn(params, theta.model_state, batch.inputs, train=True, rng_key=rng_key)
            return loss_fn(batch.targets, outputs)

        if num_batches == 1:  # outside of jit a scan would be compiled at every call
            return jax.grad(objective)(theta.params, Batch(*examples), rng_key)

        def add(total: PyTree, drawn: tuple[Batch, jax.Array | None]) -> tuple[PyTree, None]:
            return optax.tree.add(total, jax.grad(objective)(theta.params, *drawn)), None

        keys = None if rng_key is None else jax.random.split(rng_key, num_batches)
        total, _ = jax.lax.scan(add, optax.tree.zeros_like(theta.params), (Batch(*batches), keys))
        return optax.tree.scale(1 / num_batches, total)

    learned = gradient(loss_fn, batch, batch_size)
    if task_batch is None:
        task = gradient(task_loss_fn, batch, batch_size)
    else:
        size = len(task_batch[1])
        task = gradient(task_loss_fn, task_batch, size if batch_size is None else min(batch_size, size))
    (learned_norm, learned_direction), (task_norm, task_direction) = map(_norm_and_direction, (learned, task))
    scale = jnp.where(jnp.maximum(learned_norm, task_norm) == 0, 1.0, _ratio(learned_norm, task_norm))
    cosine = jnp.clip(jnp.asarray(optax.tree.vdot(learned_direction, task_direction)), -1, 1)
    return GradientComparison(scale, cosine, learning_rate * scale * cosine)


def _norm_and_direction(tree: PyTree) -> tuple[jax.Array, PyTree]:
    """The length of a gradient, and the gradient in lengths; 0 both where it vanishes.

    Squares of entries below 1e-19 would vanish in float32.
    """
    unit, squares = unit_and_squares(tree)
    norm = jnp.sqrt(squares)
    return unit * norm, jax.tree.map(lambda leaf: leaf / unit / jnp.where(norm == 0, 1, norm), widen(tree))


def make_loss_shape(loss: LossNetwork, *, num_points: int = NUM_POINTS) -> tuple[jax.Array, Callable[..., jax.Array]]:
    """The range of predictions a loss network is drawn over, and the function that evaluates it there.

    Probabilities run over [0, 1], log-probabilities over [-8, 0] nats, and raw predictions over [-3, 3].

    Returns:
      predictions `[P]`, and `(phi_params, progress=0.0) -> l_phi [2, P]` for target 0 and target 1. Only differences
      along a curve mean anything, since a constant has no gradient, so each curve has its mean removed.

    Raises:
      ValueError: another family of losses, whose losses are no function of one prediction.
    """
    if not isinstance(loss, LossNetwork):
        raise ValueError(
            f"make_loss_shape draws a LossNetwork, the `loss` inside a RescaledLoss; got {loss!r}. `along_true_class` "
            "takes any loss"
        )
    predictions = _range_of(loss, num_points=num_points)

    def evaluate(phi_params: PyTree, progress: jax.Array | float = 0.0) -> jax.Array:
        targets = jnp.repeat(jnp.array([[0.0], [1.0]]), num_points, axis=1)
        values = loss.elementwise(phi_params, targets, jnp.stack([predictions, predictions]), progress=progress)
        return values - values.mean(axis=1, keepdims=True)

    return predictions, evaluate


def along_true_class(loss_fn: LossFn, probabilities: jax.Array, num_outputs: int) -> tuple[jax.Array, jax.Array]:
    r"""A loss of one example by the probability of its class, the other classes sharing the rest evenly.

    .. math:: M(p) = M\big(y, f\big), \quad r(p) = -\frac{\partial M(y, f)}{\partial f_y},
      \qquad \operatorname{softmax}(f) = \Big(p, \tfrac{1 - p}{C - 1}, \dots\Big)

    Args:
      loss_fn: M, of labels.
      probabilities: p `[P]`, inside (0, 1).
      num_outputs: C, two or more.

    Returns:
      M `[P]`, and the pull r `[P]` on the output of the true class: 1 - p for cross-entropy, next to nothing at a small
      p for a loss that leaves alone what it takes for a wrong label, 0 where M(p) is least.
    """

    def at(probability: jax.Array) -> tuple[jax.Array, jax.Array]:
        rest = jnp.log1p(-probability) - jnp.log(num_outputs - 1.0)
        outputs = jnp.full((1, num_outputs), rest).at[0, 0].set(jnp.log(probability))
        value, gradient = jax.value_and_grad(loss_fn, argnums=1)(jnp.zeros(1, jnp.int32), outputs)
        return value, -gradient[0, 0]

    return jax.vmap(at)(probabilities)


def _range_of(loss: LossNetwork, *, num_points: int) -> jax.Array:
    low, high = {"log_probabilities": (-8.0, 0.0), "raw": (-3.0, 3.0)}.get(loss.predictions, (0.0, 1.0))
    return jnp.linspace(low, high, num_points)


def flat_share(values: np.ndarray) -> np.ndarray:
    """The share of the range of predictions in which a loss gives next to no gradient.

    That is a slope of at most a hundredth (`FLAT`) of the steepest one of the two curves.

    Args:
      values: of l_phi `[..., 2, P]` at evenly spaced predictions for target 0 and 1, as from `make_loss_shape`.

    Returns:
      `[...]`, from 0 to 1; 1 for a loss that is constant, nan for one that is nan anywhere.
    """
    slopes = np.abs(np.diff(values, axis=-1))
    steepest = slopes.max(axis=(-2, -1), keepdims=True)
    shares = (slopes <= FLAT * steepest).mean(axis=(-2, -1))
    return np.where(np.isnan(steepest[..., 0, 0]), np.nan, shares)


def flat_share_of_outputs(
    loss: LossNetwork,
    phi_params: PyTree,
    targets: jax.Array,
    outputs: jax.Array,
    *,
    progress: jax.Array | float = 0.0,
    threshold: float = FLAT,
) -> jax.Array:
    r"""The share of the outputs that occur in which a loss gives next to no gradient: `flat_share` where it counts.

    .. math:: \frac{1}{BC} \#\big\{(b, c) : |\ell'_\phi(y_{bc}, p_{bc})| \le \tau \max_{y, p} |\ell'_\phi(y, p)|\big\}

    with the derivative by the prediction, and the largest one over the range of `make_loss_shape`.

    Args:
      loss: the family of l_phi.
      phi_params: phi.
      targets: labels `[B]` or `[B, C]`.
      outputs: of the base model, `[B, C]`.
      progress: share of training that is done, `[]` in [0, 1].
      threshold: tau.

    Returns:
      A scalar from 0 to 1; near 1 the loss has stopped training whatever the task loss says (implicit early stopping).
      It is nan where a slope is.
    """

    def slopes(targets: jax.Array, predictions: jax.Array) -> jax.Array:
        def values(predictions: jax.Array) -> jax.Array:
            return loss.elementwise(phi_params, targets, predictions, progress=progress)

        return jnp.abs(jax.jvp(values, (predictions,), (jnp.ones_like(predictions),))[1])

    dense, predictions = to_dense(targets, outputs), loss.predictions_of(outputs)
    grid = jnp.broadcast_to(_range_of(loss, num_points=NUM_POINTS), (2, NUM_POINTS))
    steepest = slopes(jnp.broadcast_to(jnp.array([[0.0], [1.0]]), grid.shape), grid).max()
    occurring = slopes(dense, predictions)
    is_nan = jnp.isnan(steepest) | jnp.isnan(occurring).any()
    return jnp.where(is_nan, jnp.nan, (occurring <= threshold * steepest).mean())


def implied_smoothing(
    predictions: np.ndarray, values: np.ndarray, num_outputs: int, *, of_logarithms: bool = False
) -> np.ndarray:
    r"""The label smoothing whose cross-entropy is least where a learned loss is least.

    Along outputs that give the true class p and all others the same, M(p) = l(1, p) + (C - 1) l(0, (1 - p) / (C - 1)).
    Cross-entropy of labels smoothed by s is least at p = 1 - s + s / C there, so a loss that is least at p* implies

    .. math:: s = (1 - p^*) \, C / (C - 1)

    It is where training comes to rest. (The share of smoothed cross-entropy in a least-squares fit, in contrast,
    depends on how outputs are weighted, and leaves [0, 1].)

    Args:
      predictions: `[P]` evenly spaced, over all of [0, 1] or of the logarithms.
      values: of l_phi `[..., 2, P]` at them, for target 0 and 1, as from `make_loss_shape`.
      num_outputs: C, two or more.
      of_logarithms: whether predictions are log-probabilities; those below the range are taken as its end.

    Returns:
      s `[...]`: 0 for a loss that falls up to p = 1, up to C / (C - 1); nan where a value is not finite.
    """
    probabilities = np.linspace(0, 1, 2001)
    rest = (1 - probabilities) / (num_outputs - 1)
    at_one, at_zero = probabilities, rest
    if of_logarithms:
        lowest = np.exp(predictions[0])
        at_one, at_zero = (np.log(np.maximum(array, lowest)) for array in (probabilities, rest))
    curves = scipy.interpolate.CubicSpline(predictions, np.where(np.isfinite(values), values, 0), axis=-1)
    total = curves(at_one)[..., 1, :] + (num_outputs - 1) * curves(at_zero)[..., 0, :]
    smoothing = (1 - probabilities[total.argmin(axis=-1)]) * num_outputs / (num_outputs - 1)
    return np.where(np.isfinite(values).all(axis=(-2, -1)), smoothing, np.nan)


def _ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """0 where the denominator is, and at most the largest finite number; nan stays nan."""
    is_zero = denominator == 0
    ratio = numerator / jnp.where(is_zero, 1, denominator)
    return jnp.where(is_zero, 0, jnp.minimum(ratio, jnp.finfo(ratio.dtype).max))
