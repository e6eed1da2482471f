"""Meta-gradients through a window of past steps that slides along with training."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adalfl_jax.arguments import require_count
from adalfl_jax.hypergradient.carry import as_array, is_same, require_carry, to_keep
from adalfl_jax.hypergradient.problem import (
    BilevelProblem,
    Hypergradient,
    inner_and_outer_keys,
    inner_step,
    outer_objective,
    require_one_step,
)
from adalfl_jax.hypergradient.unrolled import Unrolled
from adalfl_jax.types import Batch, BilevelBatch, PyTree, Theta


class PastSteps(NamedTuple):
    """What went into the steps of theta before this one, `[K - 1]` of each, the latest last."""

    theta: Theta
    phi_params: PyTree
    batch: Batch
    rng_key: jax.Array | None
    progress: jax.Array | None
    is_taken: jax.Array  # False for what stands for a step before the first


class PrimedWindow(NamedTuple):
    """The carry of `Truncated`, which a scan needs `prime` for; JAX says its name where that was forgotten."""

    steps: PastSteps
    params_after: PyTree  # the parameters after the latest


@dataclasses.dataclass(frozen=True)
class Truncated:
    r"""Truncated back-propagation: through the last K steps of theta, each with the phi it was taken with.

    .. math:: \sum_{s=t-K+1}^{t} \frac{\partial L(\theta_{t+1})}{\partial \phi_s}

    Every step updates phi, and replays the K - 1 before it, each from the theta it began at: what a replay rounds
    differently would otherwise grow with training, until the window is of another model. K = 1 is `Unrolled`. Where
    theta is not what the last of them made of it, moved by another step or replaced, the window begins anew.

    Attributes:
      window: K, the number of steps.

    Raises:
      ValueError: a window below 1; when called, a leading axis K of `batch.inner`.

    References:
      Williams and Peng, "An Efficient Gradient-Based Algorithm for On-Line Training of Recurrent Network Trajectories",
      Neural Computation 2(4), 1990.
    """

    name: ClassVar[str] = "truncated"
    is_of_one_inner_step: ClassVar[bool] = True
    remembers: ClassVar[bool] = True

    window: int = 5

    def __post_init__(self) -> None:
        require_count("window", self.window)

    def __call__(
        self, problem: BilevelProblem, theta: Theta, phi_params: PyTree, batch: BilevelBatch, carry: PyTree = (), /
    ) -> Hypergradient:
        """The estimate, with the signature of every estimator."""
        require_one_step(self.name, batch)
        if self.window == 1:
            return Unrolled()(problem, theta, phi_params, batch, carry)
        inner_key, outer_key = inner_and_outer_keys(batch.rng_key)
        now = PastSteps(theta, phi_params, Batch(*batch.inner), inner_key, as_array(batch.progress), jnp.array(True))
        empty = self._empty_window(now)
        if carry:
            require_carry(self.name, carry, empty)
        past = _past(carry or empty, now)

        def objective(past_phis: PyTree, phi_params: PyTree) -> tuple[jax.Array, tuple[Theta, jax.Array]]:
            here = _begun(theta, _replay(problem, past._replace(phi_params=past_phis)))
            theta_next, inner_loss = inner_step(problem, here, phi_params, batch.inner, inner_key)
            loss = outer_objective(problem, theta_next.params, theta_next.model_state, batch.outer, outer_key)
            return loss, (theta_next, inner_loss)

        differentiate = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
        phis = problem.own((past.phi_params, phi_params))
        (outer_loss, (theta_next, inner_loss)), gradients = differentiate(*phis)
        outer_loss, gradients = problem.mean((outer_loss, gradients))
        gradient = jax.tree.map(lambda before, last: _where(past.is_taken, before, 0).sum(axis=0) + last, *gradients)
        steps = jax.tree.map(lambda before, last: jnp.concatenate([before[1:], last[None]]), past, now)
        return Hypergradient(
            theta_next, gradient, inner_loss, outer_loss, PrimedWindow(steps, to_keep(theta_next.params))
        )

    def _empty_window(self, now: PastSteps) -> PrimedWindow:
        steps = jax.tree.map(lambda leaf: jnp.stack([leaf] * (self.window - 1)), now)
        return PrimedWindow(steps._replace(is_taken=jnp.zeros(self.window - 1, bool)), now.theta.params)


def _past(window: PrimedWindow, now: PastSteps) -> PastSteps:
    """Masks out the steps that do not lead to theta: all, where it was moved otherwise.

    A masked slot repeats the current step, since the zeros of a primed carry may have no derivatives.
    """
    taken = window.steps.is_taken & is_same(now.theta.params, window.params_after)
    steps = jax.tree.map(lambda past, this: _where(taken, past, this[None]), window.steps, now)
    return steps._replace(is_taken=taken)


def _where(rows: jax.Array, if_true: jax.Array, if_false: jax.Array | int) -> jax.Array:
    return jnp.where(rows.reshape(-1, *[1] * (if_true.ndim - 1)), if_true, if_false)


def _replay(problem: BilevelProblem, past: PastSteps) -> Theta:
    """theta after the past steps."""

    def step(theta: Theta, past: PastSteps) -> tuple[Theta, None]:
        here, at_past = _begun(past.theta, theta), problem.at_progress(past.progress)
        theta_next, _ = inner_step(at_past, here, past.phi_params, past.batch, past.rng_key)
        return optax.tree.where(past.is_taken, theta_next, here), None

    oldest, later = (jax.tree.map(lambda leaf, rows=rows: leaf[rows], past) for rows in (0, slice(1, None)))
    second, _ = step(oldest.theta, oldest)  # outside of the scan, which would differentiate by theta there too
    return jax.lax.scan(step, second, later)[0]


def _begun(theta: Theta, replayed: Theta) -> Theta:
    """The theta that a step began at, with the derivative of its replay, whose rounding no value has."""

    def value_and_derivative(value: jax.Array, derivative: jax.Array) -> jax.Array:
        return _differentiated_as(value, derivative) if jnp.issubdtype(value.dtype, jnp.inexact) else value

    return jax.tree.map(value_and_derivative, theta, replayed)


@jax.custom_jvp
def _differentiated_as(value: jax.Array, derivative: jax.Array) -> jax.Array:
    del derivative
    return value


@_differentiated_as.defjvp
def _tangent_of_the_second(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    return primals[0], tangents[1]
