"""What the phases of a run produce."""

from __future__ import annotations

import dataclasses

import numpy as np

from adalfl_jax.training.state import RunState

Scalars = dict[str, np.ndarray]  # name -> [S]
Observation = tuple[int, Scalars]  # after so many steps


@dataclasses.dataclass
class History:
    """One stage of a run while it advances: a method, a rate of its search, or the offline phase."""

    state: RunState  # the latest one, finite
    step: int = 0  # that it was reached at
    observed: list[Observation] = dataclasses.field(default_factory=list)
    shape_steps: list[int] = dataclasses.field(default_factory=list)  # [T]
    shapes: list[np.ndarray] = dataclasses.field(default_factory=list)  # T times [S, 2, P]
    seconds: float = 0.0  # in all processes that worked on it
    num_back_offs: int = 0  # how many times eta was halved

    @property
    def scalars(self) -> Scalars:
        """The latest measures."""
        return self.observed[-1][1] if self.observed else {}


@dataclasses.dataclass(frozen=True)
class MethodResult:
    """One method at its end, all seeds."""

    method: str
    learning_rate: float  # alpha; with inner.first_step_rate the median of those of the seeds
    state: RunState
    test: np.ndarray  # [S] metric of the last iterate
    valid: np.ndarray  # [S]
    seconds: float  # of training, compilation and evaluation included
    shape_steps: list[int]
    shapes: list[np.ndarray]
    predictions: np.ndarray | None  # [P]
    offline_seconds: float = 0.0
    tuning: dict[str, float | None] | None = None  # learning rate -> mean validation metric, None: diverged
    learning_rates: list[float] | None = None  # [S] with inner.first_step_rate
