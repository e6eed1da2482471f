"""What a run carries from step to step."""

from __future__ import annotations

from typing import NamedTuple

from adalfl_jax.types import Phi, Theta


class RunState(NamedTuple):
    """What a run carries from step to step, for every seed."""

    theta: Theta | None  # None in the offline phase, which keeps no theta
    phi: Phi | None  # None where the loss is the task loss


def without_carry(state: RunState) -> RunState:
    """What there is to keep of a state: theta and phi, without what a step remembers of the steps before."""
    return state if state.phi is None else state._replace(phi=state.phi._replace(carry=()))
