"""What a run carries from step to step, and what a step is."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax

from adalfl_jax.types import BilevelBatch, Phi, Theta


class RunState(NamedTuple):
    """What a run carries from step to step, for every seed."""

    theta: Theta | None  # None in the offline phase, which keeps no theta
    phi: Phi | None  # None where the loss is the task loss
    rate_factor: jax.Array | None = None  # [] what alpha is multiplied by, with inner.first_step_rate; else None


# of one seed; with the new state come its metrics, [] each, by name
Step = Callable[[RunState, BilevelBatch], tuple[RunState, dict[str, jax.Array]]]


def learning_rate_of(state: RunState, learning_rate: jax.Array | float) -> jax.Array | float:
    """The rate a state is trained at, where alpha is the one of all seeds."""
    return learning_rate if state.rate_factor is None else learning_rate * state.rate_factor


def without_carry(state: RunState) -> RunState:
    """The state without what a step remembers of the steps before: what there is to keep of a run."""
    return state if state.phi is None else state._replace(phi=state.phi._replace(carry=()))
