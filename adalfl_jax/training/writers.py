"""Scalars of a run, as JSON lines and as TensorBoard events."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tensorboardX import SummaryWriter

from adalfl_jax.training import workdir as layout


class MetricWriters:
    """Writes every record to `metrics.jsonl` and to one TensorBoard run a method and seed; a context manager."""

    def __init__(self, workdir: Path):
        self._lines = (workdir / layout.METRICS).open("w")
        self._tensorboard = workdir / layout.TENSORBOARD
        self._events: dict[str, SummaryWriter] = {}

    def write(
        self, method: str, phase: str, step: int, seeds: tuple[int, ...], scalars: Mapping[str, np.ndarray]
    ) -> None:
        """Writes scalars `[S]`, one of each for every seed, measured after `step` steps of a phase."""
        for index, seed in enumerate(seeds):
            values = {name: float(value[index]) for name, value in scalars.items()}
            record = {"method": method, "phase": phase, "seed": seed, "step": step, **values}
            self._lines.write(json.dumps(record, allow_nan=False) + "\n")
            events = self._events_of(f"{method}/seed_{seed}")
            for name, value in values.items():
                events.add_scalar(f"{phase}/{name}", value, step)
        self._lines.flush()

    def _events_of(self, run: str) -> SummaryWriter:
        if run not in self._events:
            self._events[run] = SummaryWriter(str(self._tensorboard / run), flush_secs=10)
        return self._events[run]

    def __enter__(self) -> MetricWriters:
        return self

    def __exit__(self, *_) -> None:
        self._lines.close()
        for events in self._events.values():
            events.close()
