"""Task losses L and metrics, each `(targets, outputs) -> scalar`, the mean over the batch.

Outputs are what the base model returns: logits `[B, C]` of a classification, values `[B, C]` of a regression. Losses
come from optax where it has them; what is added is the mean and the check that targets fit the outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from adalfl_jax.arguments import is_number
from adalfl_jax.registry import lookup
from adalfl_jax.types import LossFn

ROUNDING = 0.01  # that is let through, more than that of bfloat16 at 1


def is_labels(targets: jax.Array, outputs: jax.Array) -> bool:
    """Whether targets are integer labels `[B]` (True) or shaped like the outputs, `[B, C]` (False).

    Raises:
      ValueError: neither, or labels out of range; the text names both shapes.
    """
    _require_arrays(targets, outputs)
    if outputs.ndim == 2 and targets.shape == outputs.shape:
        return False
    if outputs.ndim == 2 and targets.shape == outputs.shape[:1] and jnp.issubdtype(targets.dtype, jnp.integer):
        _check_range(targets, outputs)
        return True
    raise ValueError(
        "targets must be integer labels [B], as targets.astype(int) makes, or an array [B, C] like the outputs; got "
        f"outputs [B, C] = {outputs.shape} and targets {targets.shape} of {targets.dtype}"
    )


def _require_arrays(targets: jax.Array, outputs: jax.Array) -> None:
    if not (hasattr(targets, "ndim") and hasattr(outputs, "ndim")):
        raise ValueError(
            "this loss takes one array of targets and one of outputs; of pytrees choose them in a function around it. "
            f"Got targets {jax.tree.map(jnp.shape, targets)} and outputs {jax.tree.map(jnp.shape, outputs)}"
        )


def _check_range(labels: jax.Array, outputs: jax.Array) -> None:
    """Refuses labels out of range; under a trace, where they have no values, it makes their losses nan."""
    num_classes = max(2, outputs.shape[1])
    if isinstance(labels, Tracer) or not labels.size:
        return
    values = np.asarray(labels)  # also inside a trace that only closes over the labels
    if values.min() < 0 or values.max() >= num_classes:
        raise ValueError(
            f"labels must be from 0 to {num_classes - 1} for outputs [B, C] = {outputs.shape}; got labels from "
            f"{values.min()} to {values.max()}"
        )


def _has_class(labels: jax.Array, outputs: jax.Array) -> jax.Array:
    """Whether there is a class for each label, `[B]`, so that none is trained on silently where there is not."""
    labels = jnp.asarray(labels, jnp.int32)  # of fewer bits they might not be compared with C
    return (labels >= 0) & (labels < max(2, outputs.shape[1]))


def to_dense(targets: jax.Array, outputs: jax.Array) -> jax.Array:
    """Targets as `[B, C]` in the outputs' type: labels become one-hot, or 0 and 1 for a single output.

    A label out of range raises ValueError or, under `jax.jit` where it cannot, becomes nan.
    """
    is_dense = not is_labels(targets, outputs)
    outputs = jnp.asarray(outputs)  # NumPy's of 64 bits become what JAX computes in, without a warning
    if is_dense:
        return jnp.asarray(targets, outputs.dtype)
    if outputs.shape[1] == 1:
        dense = targets[:, None].astype(outputs.dtype)
    else:
        dense = jax.nn.one_hot(jnp.asarray(targets, jnp.int32), outputs.shape[1], dtype=outputs.dtype)
    return jnp.where(_has_class(targets, outputs)[:, None], dense, jnp.nan)


def softmax_cross_entropy(targets: jax.Array, outputs: jax.Array) -> jax.Array:
    """Cross-entropy, in nats, between labels `[B]` or distributions `[B, C]` and softmax of the logits `[B, C]`.

    That distributions sum to 1 is not checked. A target below 0, as of a regression, raises ValueError or, under
    `jax.jit`, makes the loss nan.
    """
    return example_cross_entropy(targets, outputs).mean()


def example_cross_entropy(targets: jax.Array, outputs: jax.Array) -> jax.Array:
    """`softmax_cross_entropy` of each example, `[B]`, in nats."""
    _require_classes(outputs)
    if is_labels(targets, outputs):
        losses = optax.softmax_cross_entropy_with_integer_labels(outputs, targets)
        return losses * jnp.where(_has_class(targets, outputs), 1, jnp.nan).astype(losses.dtype)  # and its gradient
    targets = within(targets.astype(outputs.dtype), math.inf)
    return -_weighted(targets, jax.nn.log_softmax(outputs)).sum(axis=-1)


def _weighted(shares: jax.Array, log_probabilities: jax.Array) -> jax.Array:
    """t log p; unlike optax's it is 0, and not 0 * inf, where t and p are 0, as for a logit of -inf."""
    is_out = (shares == 0) & jnp.isneginf(log_probabilities)
    return shares * jnp.where(is_out, 0, log_probabilities)


def within(targets: jax.Array, most: float, hint: str = "") -> jax.Array:
    """Targets from 0 to `most`; what is outside by rounding, as where two were mixed, is put on the bound.

    Others raise ValueError or, under a trace where they have no value, become nan.
    """
    if not isinstance(targets, Tracer) and targets.size:
        values = np.asarray(targets)
        if values.min() < -ROUNDING or values.max() > most + ROUNDING:
            span = "0 or more" if most == math.inf else f"from 0 to {most:g}"
            raise ValueError(f"targets must be {span}; got some from {values.min()} to {values.max()}{hint}")
    is_target = (targets >= -ROUNDING) & (targets <= most + ROUNDING)
    return jnp.where(is_target, jnp.clip(targets, 0, most), jnp.nan)


def bits_per_character(targets: jax.Array, outputs: jax.Array) -> jax.Array:
    """`softmax_cross_entropy` in bits, as predictions of text are measured."""
    return softmax_cross_entropy(targets, outputs) / math.log(2)


def smoothed_cross_entropy(targets: jax.Array, outputs: jax.Array, *, smoothing: float = 0.1) -> jax.Array:
    """Cross-entropy, in nats, of targets of which the share `smoothing` is spread evenly over the C classes.

    Raises:
      ValueError: smoothing not in [0, 1].

    References:
      "Label smoothing": Szegedy et al., "Rethinking the Inception Architecture", arXiv 1512.00567.
    """
    _require("smoothing", smoothing, lambda share: 0 <= share <= 1, "a number in [0, 1]")
    return softmax_cross_entropy(optax.smooth_labels(to_dense(targets, outputs), smoothing), outputs)


def generalized_cross_entropy(targets: jax.Array, outputs: jax.Array, *, q: float = 0.7) -> jax.Array:
    r"""Between cross-entropy (q towards 0) and 1 - p_y (q = 1), which labels that are wrong pull less.

    .. math:: L_q = \sum_c t_c \frac{1 - p_c^q}{q}, \qquad p = \operatorname{softmax}(f)

    Args:
      targets: labels `[B]` or distributions `[B, C]`.
      outputs: logits `[B, C]`.
      q: in (0, 1].

    Raises:
      ValueError: q out of its range.

    References:
      Zhang and Sabuncu, "Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels", arXiv
      1805.07836.
    """
    _require("q", q, lambda power: 0 < power <= 1, "a number in (0, 1]")
    _require_classes(outputs)
    dense = within(to_dense(targets, outputs), math.inf)
    # Of the logarithm: p^q and its slope vanish where p does, and 1 - p^q keeps its digits where p is nearly 1.
    values = -jnp.expm1(q * jax.nn.log_softmax(outputs)) / q
    return (dense * values).sum(axis=-1).mean()


def symmetric_cross_entropy(
    targets: jax.Array, outputs: jax.Array, *, alpha: float = 0.1, beta: float = 1.0, log_zero: float = -4.0
) -> jax.Array:
    r"""Cross-entropy and its reverse, with the roles of target and prediction exchanged.

    .. math:: \alpha \Big(-\sum_c t_c \log p_c\Big) + \beta \Big(-\sum_c p_c \log t_c\Big),
      \qquad \log 0 = A

    Of a label y the reverse is -A (1 - p_y), which a wrong label can raise to -A at most.

    Args:
      targets: labels `[B]` or distributions `[B, C]`.
      outputs: logits `[B, C]`.
      alpha: weight of the cross-entropy, at least 0.
      beta: weight of the reverse, at least 0.
      log_zero: A, below 0; no log t is taken to be less.

    Raises:
      ValueError: a setting out of its range.

    References:
      Wang et al., "Symmetric Cross Entropy for Robust Learning with Noisy Labels", arXiv 1908.06112.
    """
    for name, weight in (("alpha", alpha), ("beta", beta)):
        _require(name, weight, lambda weight: weight >= 0, "a number of at least 0")
    _require("log_zero", log_zero, lambda number: number < 0, "a number below 0")
    forward = softmax_cross_entropy(targets, outputs)
    dense = to_dense(targets, outputs)
    is_some = dense > 0
    log_targets = jnp.where(is_some, jnp.maximum(jnp.log(jnp.where(is_some, dense, 1)), log_zero), log_zero)
    reverse = -(jax.nn.softmax(outputs) * log_targets).sum(axis=-1).mean()
    return alpha * forward + beta * reverse


def _require(name: str, value: Any, is_valid: Callable[[Any], bool], wanted: str) -> None:
    """Refuses a setting out of its range; an array, which may itself be learned, is taken as it is."""
    if not isinstance(value, jax.Array) and not (is_number(value) and is_valid(value)):
        raise ValueError(f"{name} must be {wanted}; got {value!r}")


def _require_classes(outputs: jax.Array) -> None:
    if getattr(outputs, "ndim", 0) == 2 and outputs.shape[1] < 2:
        raise ValueError(
            f"softmax of a single output is constant; use sigmoid_cross_entropy for outputs [B, C] = {outputs.shape}"
        )


def sigmoid_cross_entropy(targets: jax.Array, outputs: jax.Array) -> jax.Array:
    """Binary cross-entropy, in nats, of each of C independent logits, mean over batch and outputs.

    Targets are labels or, for each output, the probability of 1. A target outside of 0 to 1, as -1 for a class, would
    have a loss without a lower bound: if not by rounding, it raises ValueError or, under `jax.jit`, makes the loss nan.
    """
    dense, outputs = within(to_dense(targets, outputs), 1), jnp.asarray(outputs)
    of_ones, of_zeros = jax.nn.log_sigmoid(outputs), jax.nn.log_sigmoid(-outputs)
    return -(_weighted(dense, of_ones) + _weighted(1 - dense, of_zeros)).mean()


def squared_error(targets: jax.Array, outputs: jax.Array) -> jax.Array:
    """Mean squared error over batch and outputs, in squared units of the target."""
    return optax.squared_error(outputs, _dense(targets, outputs)).mean()


def absolute_error(targets: jax.Array, outputs: jax.Array) -> jax.Array:
    """Mean absolute error over batch and outputs, in units of the target."""
    return jnp.abs(outputs - _dense(targets, outputs)).mean()


def huber(targets: jax.Array, outputs: jax.Array, *, delta: float = 1.0) -> jax.Array:
    """Huber loss, quadratic within `delta` of the target and linear beyond, mean over batch and outputs.

    Raises:
      ValueError: delta not above 0.
    """
    _require("delta", delta, lambda width: width > 0, "a number above 0")
    return optax.huber_loss(outputs, _dense(targets, outputs), delta=delta).mean()


def error_rate(targets: jax.Array, outputs: jax.Array) -> jax.Array:
    """Share of examples whose largest output is not the target class, in [0, 1]; a single output is cut at 0."""
    return top_k_error_rate(targets, outputs, k=1)


def top_k_error_rate(targets: jax.Array, outputs: jax.Array, *, k: int = 5) -> jax.Array:
    """Share of examples whose target class is not among the `k` largest outputs, in [0, 1].

    It is nan if an output is or, under `jax.jit`, if a label has no class.

    Raises:
      ValueError: `k` is not between 1 and C.
    """
    dense, num_outputs = to_dense(targets, outputs), outputs.shape[-1]
    if not 1 <= k <= num_outputs:
        raise ValueError(f"top-k error needs 1 <= k <= C; got k = {k} and outputs [B, C] = {outputs.shape}")
    if num_outputs == 1:
        is_wrong = ((outputs > 0) != (dense > 0.5))[:, 0]
    else:
        _, largest = jax.lax.top_k(outputs, k)  # [B, k]
        is_wrong = (largest != dense.argmax(axis=-1)[:, None]).all(axis=-1)
    is_nan = jnp.isnan(outputs).any(axis=-1) | jnp.isnan(dense).any(axis=-1)  # of nan nothing is the largest
    return jnp.where(is_nan, jnp.nan, is_wrong).mean()


def _dense(targets: jax.Array, outputs: jax.Array) -> jax.Array:
    _require_arrays(targets, outputs)
    if targets.shape != outputs.shape:
        raise ValueError(
            "a regression needs targets [B, C] shaped like the outputs [B, C]; got outputs "
            f"{outputs.shape} and targets {targets.shape}"
        )
    if not jnp.issubdtype(outputs.dtype, jnp.inexact):
        raise ValueError(f"outputs of a regression must be floats; got {outputs.dtype}")
    return targets.astype(outputs.dtype)


CLASSIFICATION_LOSSES: dict[str, LossFn] = {
    "softmax_cross_entropy": softmax_cross_entropy,
    "sigmoid_cross_entropy": sigmoid_cross_entropy,
    "smoothed_cross_entropy": smoothed_cross_entropy,
    "generalized_cross_entropy": generalized_cross_entropy,
    "symmetric_cross_entropy": symmetric_cross_entropy,
}
REGRESSION_LOSSES: dict[str, LossFn] = {
    "squared_error": squared_error,
    "absolute_error": absolute_error,
    "huber": huber,
}
TASK_LOSSES = CLASSIFICATION_LOSSES | REGRESSION_LOSSES

CLASSIFICATION_METRICS: dict[str, LossFn] = {
    "error_rate": error_rate,
    "top_5_error_rate": top_k_error_rate,
    "bits_per_character": bits_per_character,
}
REGRESSION_METRICS: dict[str, LossFn] = {
    "mean_squared_error": squared_error,
    "mean_absolute_error": absolute_error,
}
METRICS = CLASSIFICATION_METRICS | REGRESSION_METRICS

FOR_LABELS = CLASSIFICATION_LOSSES.keys() | CLASSIFICATION_METRICS.keys()


def find_task_loss(loss: str | LossFn) -> LossFn:
    """A task loss by name or, given a function, that.

    Raises:
      ValueError: a name that is no key of `TASK_LOSSES`.
    """
    return loss if callable(loss) else lookup("task loss", TASK_LOSSES, loss)
