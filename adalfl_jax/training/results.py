"""What the phases of a run produce."""

from __future__ import annotations

import dataclasses

import numpy as np

from adalfl_jax.training.methods import phase_of
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


class DivergenceError(RuntimeError):
    """A number that is not finite ended a run.

    Attributes:
      method: which method, or "offline" for the offline phase.
      phase: "offline" or "training".
      metric: the first quantity that is not finite: a metric of the step, "theta" or "phi".
      step: the step, counted from 1, at which it was found.
      seed: of the model it happened to.
      state: the last finite state, of all seeds.
      state_step: the step that state was reached at.
      seconds: that the stage took till then, in all processes that worked on it.

    Its message has a remedy: the settings of the config that may help.
    """

    def __init__(
        self, method: str, metric: str, step: int, seed: int, state: RunState, state_step: int, remedy: str
    ) -> None:
        phase = phase_of(method)
        super().__init__(
            f"{method} diverged: {metric} is not finite at {phase} step {step} (seed {seed}); {remedy}"
            + (f". The last finite state is that of step {state_step}" if step else "")
        )
        self.method, self.phase, self.metric = method, phase, metric
        self.step, self.seed = step, seed
        self.state, self.state_step = state, state_step
        self.seconds = 0.0
