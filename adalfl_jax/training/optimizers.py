"""The optimisers of theta and of phi that a configuration describes."""

from __future__ import annotations

import jax
import optax

from adalfl_jax.training.config import TrainConfig


def learning_rate_schedule(config: TrainConfig) -> optax.Schedule:
    """The share of `inner.learning_rate` in force at a step, in [0, 1], as a function of the step's number from 0."""
    inner = config.inner
    if inner.schedule == "milestones":
        return optax.piecewise_constant_schedule(1.0, dict.fromkeys(inner.milestones, inner.milestone_factor))
    return _decay(inner.schedule, 1.0, config.num_steps)


def _decay(schedule: str, start: float, num_steps: int) -> optax.Schedule:
    """A rate that stays, or falls to 0."""
    return {
        "constant": optax.constant_schedule(start),
        "linear": optax.linear_schedule(start, 0.0, num_steps),
        "cosine": optax.cosine_decay_schedule(start, num_steps),
    }[schedule]


def make_outer_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Adam of phi while theta trains, as `config.outer` describes it; a schedule falls over the updates phi gets."""
    outer = config.outer
    num_updates = config.first_joint_step // outer.every - outer.pipelined  # whose first step has nothing to update by
    if outer.schedule == "constant":
        return optax.adam(outer.learning_rate)
    return optax.adam(_decay(outer.schedule, outer.learning_rate, max(num_updates, 1)))


def make_inner_optimizer(
    config: TrainConfig, learning_rate: jax.Array | float, rate_factor: jax.Array | None = None
) -> optax.GradientTransformation:
    """SGD as `config.inner` describes it.

    Args:
      config: of the run.
      learning_rate: alpha `[]`, which may be traced.
      rate_factor: `[]`, what `inner.first_step_rate` multiplies alpha by for the loss; weight decay goes at alpha.
    """
    inner, fraction, decay = config.inner, learning_rate_schedule(config), config.inner.weight_decay
    if rate_factor is not None:
        learning_rate, decay = learning_rate * rate_factor, decay / rate_factor
    rate = learning_rate if inner.schedule == "constant" else lambda count: learning_rate * fraction(count)
    return optax.chain(
        optax.clip_by_global_norm(inner.clip_norm) if inner.clip_norm else optax.identity(),
        optax.add_decayed_weights(decay) if inner.weight_decay else optax.identity(),
        optax.sgd(rate, momentum=inner.momentum or None, nesterov=inner.nesterov),
    )
