"""A learned loss that starts as the task loss."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from adalfl_jax.arguments import (
    refuse_model_or_loss,
    require_count,
    require_flag,
    require_number,
)
from adalfl_jax.learned_losses import at_progress, require_family
from adalfl_jax.types import LearnedLoss, LossFn, PyTree
from adalfl_jax.validation import require_floats, require_key, require_loss, returning_scalar

SCALES = (0.1, 5.0)  # of the outputs it is fitted on, from those of a fresh model to those of a confident one


def fit_to_task_loss(
    loss: LearnedLoss,
    phi_params: PyTree,
    task_loss_fn: LossFn,
    rng_key: jax.Array,
    *,
    num_outputs: int,
    is_classification: bool = True,
    num_steps: int = 2000,
    batch_size: int = 256,
    learning_rate: float = 1e-2,
) -> PyTree:
    r"""Moves phi until the gradient of M_phi by the outputs is that of the task loss, as far as M_phi can.

    Adam, at a rate that falls to 0 along a cosine, minimises over drawn outputs f and targets y

    .. math:: \sum_b |\nabla_{f_b} M_\phi(y, f) - \nabla_{f_b} L(y, f)|^2

    in units of the gradient of one example. Training sees nothing of a loss but gradients; values may
    differ by a constant.

    Args:
      loss: M.
      phi_params: where phi starts, from `loss.init`.
      task_loss_fn: L, a mean over examples.
      rng_key: of the drawn outputs, normal with a deviation between .1 and 5, and targets.
      num_outputs: C.
      is_classification: whether targets are labels, uniform over the classes (0 and 1 for a single output); else they
        are standard normal, `[B, C]`.
      num_steps: of Adam.
      batch_size: drawn examples a step.
      learning_rate: of the first step.

    Returns:
      phi.

    Raises:
      ValueError: no learned loss, no parameters, a task loss of other arguments or that is not one float, no key, a
        setting out of its range, or a loss without a gradient for such targets, which under `jax.jit` nobody can tell.
    """
    require_family(loss)
    refuse_model_or_loss("phi_params", phi_params, made_by="loss.init")
    require_floats("phi_params", phi_params)
    require_loss("task_loss_fn", task_loss_fn, "targets", "outputs")
    task_loss_fn = returning_scalar("task_loss_fn", task_loss_fn)
    require_key("rng_key", rng_key)
    for name, count in (("num_outputs", num_outputs), ("num_steps", num_steps), ("batch_size", batch_size)):
        require_count(name, count)
    require_flag("is_classification", is_classification)
    require_number("learning_rate", learning_rate)
    draw = functools.partial(draw_targets_and_outputs, is_classification=is_classification)
    if not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((phi_params, rng_key))):
        _require_gradients(loss, phi_params, task_loss_fn, *draw(rng_key, batch_size, num_outputs))
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps))

    def mismatch(phi_params: PyTree, targets: jax.Array, outputs: jax.Array) -> jax.Array:
        learned, wanted = _gradients(loss, phi_params, task_loss_fn, targets, outputs)
        return batch_size * jnp.sum((learned - wanted) ** 2)

    def step(state: tuple[PyTree, optax.OptState], rng_key: jax.Array):
        phi_params, opt_state = state
        gradient = jax.grad(mismatch)(phi_params, *draw(rng_key, batch_size, num_outputs))
        updates, opt_state = optimizer.update(gradient, opt_state, phi_params)
        return (optax.apply_updates(phi_params, updates), opt_state), None

    state = (phi_params, optimizer.init(phi_params))
    (phi_params, _), _ = jax.lax.scan(step, state, jax.random.split(rng_key, num_steps))
    return phi_params


def _require_gradients(
    loss: LearnedLoss, phi_params: PyTree, task_loss_fn: LossFn, targets: jax.Array, outputs: jax.Array
) -> None:
    """Raises ValueError where a loss does not take drawn targets or has no gradient for them, outside of a trace."""
    about = (
        f"(targets, outputs) of {jax.typeof(targets)} and {jax.typeof(outputs)}; is_classification says whether "
        "targets are labels, or numbers like the outputs"
    )
    try:
        learned, wanted = _gradients(loss, phi_params, task_loss_fn, targets, outputs)
    except (TypeError, ValueError) as error:
        raise ValueError(f"a loss does not take {about}: {error}") from error
    for name, gradient in (("loss", learned), ("task_loss_fn", wanted)):
        if not jnp.isfinite(gradient).all():
            raise ValueError(f"{name} has no finite gradient by {about}")
    if not wanted.any():
        raise ValueError(f"task_loss_fn has a gradient of 0 by {about}; there is nothing to fit")


def relative_mismatch(
    loss: LearnedLoss, phi_params: PyTree, task_loss_fn: LossFn, targets: jax.Array, outputs: jax.Array
) -> jax.Array:
    """How far M_phi's gradient by the outputs is from that of the task loss, as a share of its length; `[]`."""
    learned, wanted = _gradients(loss, phi_params, task_loss_fn, targets, outputs)
    return jnp.linalg.norm(learned - wanted) / jnp.linalg.norm(wanted)


def _gradients(
    loss: LearnedLoss, phi_params: PyTree, task_loss_fn: LossFn, targets: jax.Array, outputs: jax.Array
) -> tuple[jax.Array, jax.Array]:
    apply = at_progress(loss.apply, 0.0)  # where weights of progress are zero at the start, they stay so
    learned = jax.grad(lambda f: apply(phi_params, targets, f))(outputs)
    return learned, jax.grad(lambda f: task_loss_fn(targets, f))(outputs)


def draw_targets_and_outputs(
    rng_key: jax.Array, batch_size: int, num_outputs: int, *, is_classification: bool
) -> tuple[jax.Array, jax.Array]:
    """Targets `[B]` or `[B, C]`, and outputs `[B, C]` of models from fresh to confident."""
    target_key, scale_key, output_key = jax.random.split(rng_key, 3)
    shape = (batch_size, num_outputs)
    low, high = jnp.log(jnp.array(SCALES))
    scales = jnp.exp(jax.random.uniform(scale_key, (batch_size, 1), minval=low, maxval=high))
    outputs = scales * jax.random.normal(output_key, shape)
    if is_classification:
        return jax.random.randint(target_key, (batch_size,), 0, max(2, num_outputs)), outputs
    return jax.random.normal(target_key, shape), outputs
