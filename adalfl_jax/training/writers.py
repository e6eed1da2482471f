"""Scalars and pictures of a run: as JSON lines, as TensorBoard events and, where wanted, in Weights & Biases."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tensorboardX import SummaryWriter

from adalfl_jax.training import workdir as layout
from adalfl_jax.training.config import TrainConfig
from adalfl_jax.training.weights_and_biases import WandbRun


class MetricWriters:
    """Writes every record to `metrics.jsonl` and to one TensorBoard run a method and seed; a context manager."""

    def __init__(self, workdir: Path, config: TrainConfig):
        self._open = contextlib.ExitStack()
        self._wandb = self._open.enter_context(WandbRun(workdir, config)) if config.wandb_project else None
        self._lines = self._open.enter_context((workdir / layout.METRICS).open("w"))
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
            events = self._events_of(method, seed)
            for name, value in values.items():
                events.add_scalar(f"{phase}/{name}", value, step)
        self._lines.flush()
        if self._wandb is not None:
            self._wandb.write(method, phase, step, scalars)

    def write_picture(self, method: str, phase: str, step: int, seed: int, picture: np.ndarray) -> None:
        """Writes pixels, `[H, W, 3]` bytes: the learned loss of a seed after `step` steps of a phase."""
        self._events_of(method, seed).add_image(f"{phase}/learned_loss", picture, step, dataformats="HWC")
        if self._wandb is not None:
            self._wandb.write_picture(method, phase, step, picture)

    def _events_of(self, method: str, seed: int) -> SummaryWriter:
        run = f"{method}/seed_{seed}"
        if run not in self._events:
            self._events[run] = SummaryWriter(str(self._tensorboard / run), flush_secs=10)
            self._open.callback(self._events[run].close)
        return self._events[run]

    def __enter__(self) -> MetricWriters:
        return self

    def __exit__(self, *error) -> None:
        self._open.__exit__(*error)
