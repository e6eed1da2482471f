"""Scalars and pictures of a run: as JSON lines, as TensorBoard events and, where wanted, in Weights & Biases."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.summary import image, scalar

from adalfl_jax.training import workdir as layout
from adalfl_jax.training.config import TrainConfig
from adalfl_jax.training.weights_and_biases import WandbRun

FLUSH_SECONDS = 2.0  # that TensorBoard's files wait at most, if anything is written then


class MetricWriters:
    """Writes every record to `metrics.jsonl` and to one TensorBoard run a method and seed; a context manager."""

    def __init__(self, workdir: Path, config: TrainConfig):
        with contextlib.ExitStack() as opened:  # which closes the first where the second fails
            self._lines = opened.enter_context((workdir / layout.METRICS).open("w"))
            self._wandb = opened.enter_context(WandbRun(workdir, config)) if config.wandb_project else None
            self._open = opened.pop_all()
        self._tensorboard = workdir / layout.TENSORBOARD
        self._events: dict[str, EventsWriter] = {}
        self._unflushed: set[EventsWriter] = set()
        self._next_flush = 0.0

    def write(
        self, method: str, phase: str, step: int, seeds: tuple[int, ...], scalars: Mapping[str, np.ndarray]
    ) -> None:
        """Writes scalars `[S]`, one of each for every seed, measured after `step` steps of a phase."""
        for index, seed in enumerate(seeds):
            values = {name: float(value[index]) for name, value in scalars.items()}
            record = {"method": method, "phase": phase, "seed": seed, "step": step, **values}
            self._lines.write(json.dumps(record, allow_nan=False) + "\n")
            for name, value in values.items():
                self._write_event(method, seed, step, scalar(f"{phase}/{name}", value))
        self._lines.flush()
        if (now := time.monotonic()) > self._next_flush:
            self._next_flush = now + FLUSH_SECONDS
            while self._unflushed:
                self._unflushed.pop().flush()
        if self._wandb is not None:
            self._wandb.write(method, phase, step, scalars)

    def write_picture(self, method: str, phase: str, step: int, seed: int, picture: np.ndarray) -> None:
        """Writes pixels, `[H, W, 3]` bytes: the learned loss of a seed after `step` steps of a phase."""
        self._write_event(method, seed, step, image(f"{phase}/learned_loss", picture, dataformats="HWC")).flush()
        if self._wandb is not None:
            self._wandb.write_picture(method, phase, step, picture)

    def _write_event(self, method: str, seed: int, step: int, summary: Any) -> EventsWriter:
        """Writes for TensorBoard, in this thread: that of a `SummaryWriter` ends silently on a full disk."""
        if (run := f"{method}/seed_{seed}") not in self._events:
            folder = self._tensorboard / run
            folder.mkdir(parents=True, exist_ok=True)
            self._events[run] = EventsWriter(str(folder / "events"))
            self._open.callback(self._events[run].close)
        events = self._events[run]
        events.write_event(Event(step=step, wall_time=time.time(), summary=summary))
        self._unflushed.add(events)
        return events

    def __enter__(self) -> MetricWriters:
        return self

    def __exit__(self, *error) -> None:
        self._open.__exit__(*error)
