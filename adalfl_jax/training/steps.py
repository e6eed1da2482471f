"""The step of every method of training: a function of a `RunState` and a batch, for one seed.

Where the outer split is a clean set theta may train on outer batches too: in the methods "fine_tuned" and "reweighting"
in a way of their own and, with `outer.joint_share`, in any other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from adalfl_jax.bilevel import BilevelStep, make_bilevel_step, make_task_step
from adalfl_jax.hypergradient import descend
from adalfl_jax.learned_losses import at_progress
from adalfl_jax.reweighting import make_reweighting_step
from adalfl_jax.task_losses import TASK_LOSSES
from adalfl_jax.training.config import first_of_the_last
from adalfl_jax.training.optimizers import make_outer_optimizer
from adalfl_jax.training.setup import Setup
from adalfl_jax.training.sharding import on_parts
from adalfl_jax.training.state import RunState, Step
from adalfl_jax.types import ApplyFn, Batch, BilevelBatch, LearnedLossFn, LossFn, Phi

StepFactory = Callable[[Setup, optax.GradientTransformation], Step]


def make_online_bilevel_step(setup: Setup, inner_optimizer: optax.GradientTransformation) -> BilevelStep:
    """Algorithm 2's step as the config wants it."""
    config, outer = setup.config, setup.config.outer
    return make_bilevel_step(
        *inner_arguments(setup, inner_optimizer),
        make_outer_optimizer(config),
        hypergradient=config.estimator.make(config.hypergradient),
        meta_batch_fraction=(outer.inner_fraction, outer.outer_fraction),
        outer_every=outer.every,
        pipelined=outer.pipelined,
    )


def inner_arguments(
    setup: Setup, inner_optimizer: optax.GradientTransformation
) -> tuple[ApplyFn, LearnedLossFn, LossFn, optax.GradientTransformation]:
    """The first four arguments of `make_bilevel_step`."""
    learned_loss_fn = on_parts(setup.mesh, setup.learned_loss)
    return setup.model.apply, learned_loss_fn, setup.task_loss_fn, inner_optimizer


def _online_step(setup: Setup, inner_optimizer: optax.GradientTransformation) -> Step:
    """Moves theta on M_phi, and phi with it (Algorithm 2)."""
    bilevel_step = make_online_bilevel_step(setup, inner_optimizer)

    def step(state: RunState, batch: BilevelBatch):
        assert state.theta is not None
        assert state.phi is not None
        theta, phi, metrics = bilevel_step(state.theta, state.phi, batch)
        return RunState(theta, phi), metrics._asdict() | phi_metrics(state.phi, phi)

    return _then_joint(setup, inner_optimizer, step)


def phi_metrics(before: Phi, after: Phi) -> dict[str, jax.Array]:
    """`phi_update_ratio`, the length of an update of phi over the length of phi, `[]`; 0 where phi is 0."""
    norm = optax.tree.norm(before.params)
    change = optax.tree.norm(optax.tree.sub(after.params, before.params))
    return {"phi_update_ratio": jnp.where(norm > 0, change / jnp.where(norm > 0, norm, 1), 0)}


def _fixed_step(setup: Setup, inner_optimizer: optax.GradientTransformation) -> Step:
    """Moves theta on the loss of the baseline or, where there is a phi, on M_phi as it is."""

    def step(state: RunState, batch: BilevelBatch):
        task_step = make_task_step(setup.model.apply, _fixed_loss(setup, state.phi), inner_optimizer)
        theta, metrics = task_step(state.theta, batch.inner, batch.rng_key, batch.progress)
        return RunState(theta, state.phi), {"inner_loss": metrics.loss}

    return _then_joint(setup, inner_optimizer, step)


def _then_joint(setup: Setup, inner_optimizer: optax.GradientTransformation, step: Step) -> Step:
    """From `first_joint_step` on moves theta alone, on its loss plus the task loss of the outer batch."""
    first, size = setup.config.first_joint_step, setup.config.batch_size
    if first == setup.config.num_steps:
        return step

    def joint_step(state: RunState, batch: BilevelBatch):
        assert state.theta is not None
        loss_fn = at_progress(_fixed_loss(setup, state.phi), batch.progress)

        def losses(targets: jax.Array, outputs: jax.Array) -> tuple[jax.Array, jax.Array]:
            return loss_fn(targets[:size], outputs[:size]), setup.task_loss_fn(targets[size:], outputs[size:])

        def joint_loss(targets: jax.Array, outputs: jax.Array, _) -> jax.Array:
            inner_loss, outer_loss = losses(targets, outputs)
            return inner_loss + outer_loss

        both = Batch(*(jnp.concatenate(parts) for parts in zip(batch.inner, batch.outer, strict=True)))
        theta, _, outputs = descend(setup.model.apply, joint_loss, inner_optimizer, state.theta, both, batch.rng_key)
        measured = dict(zip(("inner_loss", "outer_loss"), losses(both.targets, outputs), strict=True))
        _, like = jax.eval_shape(step, state, batch)  # phi stays as it is, so what measures it is 0
        metrics = {name: jnp.asarray(measured.get(name, 0), value.dtype) for name, value in like.items()}
        return state._replace(theta=theta), metrics

    def step_of_either_kind(state: RunState, batch: BilevelBatch):
        assert batch.step is not None
        return jax.lax.cond(batch.step < first, step, joint_step, state, batch)

    return step_of_either_kind


def _fine_tuned_step(setup: Setup, inner_optimizer: optax.GradientTransformation) -> Step:
    """Moves theta on the baseline's loss of inner batches and, in the last steps, on the task loss of outer ones."""
    config = setup.config
    first = first_of_the_last(config.num_steps, config.baseline.fine_tuning)
    train = make_task_step(setup.model.apply, _fixed_loss(setup), inner_optimizer)
    fine_tune = make_task_step(setup.model.apply, setup.task_loss_fn, inner_optimizer)

    def step(state: RunState, batch: BilevelBatch):
        assert batch.step is not None
        theta, metrics = jax.lax.cond(
            batch.step < first,
            lambda theta: train(theta, batch.inner, batch.rng_key),
            lambda theta: fine_tune(theta, batch.outer, batch.rng_key),
            state.theta,
        )
        return RunState(theta, None), {"inner_loss": metrics.loss}

    return step


def _reweighting_step(setup: Setup, inner_optimizer: optax.GradientTransformation) -> Step:
    """Moves theta on the baseline's loss of the inner batch, its examples weighted by the outer one."""
    example_loss_fn = jax.vmap(lambda target, output: _fixed_loss(setup)(target[None], output[None]))
    reweighting_step = make_reweighting_step(setup.model.apply, example_loss_fn, setup.task_loss_fn, inner_optimizer)

    def step(state: RunState, batch: BilevelBatch):
        assert state.theta is not None
        theta, metrics = reweighting_step(state.theta, batch)
        return RunState(theta, None), metrics._asdict()

    return step


STEPS: dict[str, StepFactory] = {
    "task_loss": _fixed_step,
    "tuned_task_loss": _fixed_step,
    "fine_tuned": _fine_tuned_step,
    "reweighting": _reweighting_step,
    "ml3": _fixed_step,
    "adalfl": _online_step,
}  # method -> what makes its step; those of one factory share a program


def _fixed_loss(setup: Setup, phi: Phi | None = None) -> LossFn:
    if phi is not None:
        return functools.partial(setup.learned_loss.apply, phi.params)
    name = setup.config.baseline.loss
    return TASK_LOSSES[name] if name else setup.task_loss_fn
