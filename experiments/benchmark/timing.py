"""Times programs in turn, A B A B ..., so that a machine whose speed drifts slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from adalfl_jax.training.progress import tell


class Program(NamedTuple):
    """Some steps of training, always the same ones."""

    restart: Callable[[], Any]  # makes the state the steps start from; not timed
    run: Callable[[Any], Any]  # takes the steps and waits for the result; timed
    num_steps: int
    temporary_bytes: int = 0  # what the compiled program needs beside its arguments and results, where that is known
    flops: Callable[[], float] = lambda: 0.0  # counts those of a step


Times = dict[str, list[float]]  # program -> milliseconds a step, of every round


class Ratio(NamedTuple):
    """How many times as long one program takes as another, over the rounds."""

    median: float
    least: float
    most: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f} to {self.most:.2f})"


def time_in_turn(programs: Mapping[str, Program], num_rounds: int) -> Times:
    """Runs every program once in each round, after a run of each that is not timed."""
    tell(f"Timing, {num_rounds} rounds: {', '.join(programs)}")
    for program in programs.values():
        program.run(program.restart())
    times: Times = {name: [] for name in programs}
    for _ in range(num_rounds):
        for name, program in programs.items():
            state = program.restart()
            start = time.perf_counter()
            program.run(state)
            times[name].append(1e3 * (time.perf_counter() - start) / program.num_steps)
    return times


def median(times: Times, name: str) -> float:
    """Milliseconds a step."""
    return statistics.median(times[name])


def ratio(times: Times, name: str, base: str) -> Ratio:
    """The time of one program over that of another in the same round."""
    ratios = [value / reference for value, reference in zip(times[name], times[base], strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))
