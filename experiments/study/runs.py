"""Runs of a study, each trained once: they are kept under a digest of their configuration."""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from adalfl_jax.analysis.measures import flat_share
from adalfl_jax.analysis.record import RunRecord
from adalfl_jax.training import DivergenceError, TrainConfig, train
from adalfl_jax.training.digest import digest_of
from adalfl_jax.training.files import read_json, write_json
from adalfl_jax.training.outputs import read_record

RUNS = "runs"
OFFLINE = "offline"  # phases that several runs begin with


class Diverged(NamedTuple):
    """A run that ended in a number that is not finite."""

    reason: str


def folder_of(config: TrainConfig, workdir: Path) -> Path:
    """Where a run is kept."""
    return workdir / RUNS / digest_of(config)


@functools.cache  # a study looks at its runs again whenever it has waited for other processes
def run(config: TrainConfig, workdir: Path) -> RunRecord | Diverged:
    """The record of a run; it is trained if the study does not have it.

    Raises:
      BusyError: another process trains it.
    """
    folder = folder_of(config, workdir)
    failure = folder.with_suffix(".diverged.json")
    if failure.exists():
        return Diverged(read_json(failure, "reason")["reason"])
    try:
        train(config, folder, offline_dir=workdir / OFFLINE, wait=False)  # there may be something else to train
    except DivergenceError as error:  # a finding about this arm, not the end of the study
        reason = str(error).replace(f"{folder.resolve()}{os.sep}", "")  # it is published, where paths say nothing
        write_json(failure, {"reason": reason, "config": config.to_dict()})
        return Diverged(reason)
    return read_record(folder)


def started(config: TrainConfig, source: TrainConfig, workdir: Path) -> TrainConfig | Diverged:
    """The configuration with phi starting where another run ended, which is trained if the study does not have it."""
    found = run(source, workdir)
    if isinstance(found, Diverged):
        return Diverged(f"what it starts from: {found.reason}")
    start = str(folder_of(source, workdir))
    return dataclasses.replace(config, learned_loss=dataclasses.replace(config.learned_loss, start=start))


class Outcome(NamedTuple):
    """What an arm reached, seed by seed."""

    test: np.ndarray  # [S]
    valid: np.ndarray  # [S]
    steps: np.ndarray  # [T]
    curve: np.ndarray  # [S, T] test metric at these steps
    seconds: dict[str, float]  # of all seeds together: "training" and "offline"


def outcome_of(record: RunRecord, *, early_stopping: bool) -> Outcome:
    """Reads an outcome from a record, at the end of training or at each seed's best validation metric."""
    (method, info), metric = *record.summary["methods"].items(), record.summary["metric"]
    test, valid = (record.series(method, f"{split}/{metric}") for split in ("test", "valid"))
    assert test is not None
    assert valid is not None
    last = len(valid.steps) - 1
    chosen = valid.values.argmin(axis=1) if early_stopping else np.full(len(valid.values), last)
    rows = np.arange(len(chosen))
    seconds: dict[str, Any] = info["seconds"]
    return Outcome(test.values[rows, chosen], valid.values[rows, chosen], test.steps, test.values, seconds)


def flat_share_of(record: RunRecord) -> float | None:
    """The mean over seeds of the share of the loss's range in which it is flat at the end; None without a network."""
    method = next(iter(record.summary["methods"]))
    values = record.shapes.get(f"{method}/values")
    return None if values is None else float(flat_share(values[:, -1]).mean())
