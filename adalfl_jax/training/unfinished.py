"""What there is to report of a run that is not over: from its metrics and its checkpoints."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from adalfl_jax.analysis.measures import make_loss_shape
from adalfl_jax.analysis.record import RunRecord
from adalfl_jax.training import workdir as layout
from adalfl_jax.training.checkpoint import read_loss_shapes
from adalfl_jax.training.config import TrainConfig
from adalfl_jax.training.files import is_locked, reading
from adalfl_jax.training.methods import METHODS, OFFLINE
from adalfl_jax.training.summary import method_entry

Rows = list[dict[str, Any]]


def read_unfinished(workdir: Path) -> RunRecord:
    """The record of a run so far; its summary has `progress`, `is_running` and `diverged` beside the usual entries.

    A process may be writing to the folder meanwhile. The loss shapes are those of the newest checkpoints.

    Raises:
      WorkdirError: a file cannot be read, or holds something else.
    """
    command, config = layout.read_config(workdir)
    methods = config.methods if command == "compare" else (config.method,)
    rows = _whole_rows(workdir, config.num_seeds)
    begun = [method for method in methods if _steps_of(rows, method)]
    shapes = _shapes(workdir, config, methods)
    summary = {
        "dataset": config.dataset.name,
        "metric": config.metric,
        "num_steps": config.num_steps,
        "seeds": list(config.seeds),
        "methods": {method: _summary_of(rows, method, config) for method in begun},
        "comparisons": [],
        "environment": {},
        "progress": _progress(workdir, config, methods, rows),
        "is_running": is_locked(workdir),
        "diverged": _divergence(workdir),
    }
    if drawn := [method for method in begun if f"{method}/values" in shapes]:
        valid = summary["methods"][drawn[-1]]["valid"]["per_seed"]
        summary["learned_loss"] = {"method": drawn[-1], "seed": config.seeds[int(np.argmin(valid))]}
    return RunRecord({"command": command, **config.to_dict()}, summary, rows, shapes)


def _divergence(workdir: Path) -> str | None:
    """Why the run ended, if it diverged and has not been started again."""
    path = workdir / layout.DIVERGENCE
    with reading(path):
        return path.read_text() if path.exists() else None


def _whole_rows(workdir: Path, num_seeds: int) -> Rows:
    """The records of those steps that every seed has one of; the last may be half written."""
    path = workdir / layout.METRICS
    with reading(path):
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = layout.read_records(path, [line for line in lines if line.endswith("\n")])
    counts = Counter(_place(row) for row in rows)
    return [row for row in rows if counts[_place(row)] == num_seeds]


def _place(row: dict[str, Any]) -> tuple[str, str, int]:
    return row["method"], row["phase"], row["step"]


def _steps_of(rows: Rows, method: str) -> list[int]:
    return [row["step"] for row in rows if row["method"] == method]


def _summary_of(rows: Rows, method: str, config: TrainConfig) -> dict[str, Any]:
    """The entry of a method in a summary, as of its last evaluation; what is known at the end alone is None."""
    step = max(_steps_of(rows, method))
    last = sorted((row for row in rows if row["method"] == method and row["step"] == step), key=lambda row: row["seed"])
    is_found = METHODS[method].is_tuned or (METHODS[method].has_learned_loss and config.inner.first_step_rate > 0)
    test, valid = ([row[f"{split}/{config.metric}"] for row in last] for split in ("test", "valid"))
    rate, seconds = None if is_found else config.inner.learning_rate, {"training": None, "offline": None}
    return method_entry(config, method, learning_rate=rate, test=test, valid=valid, seconds=seconds, step=step)


def _progress(workdir: Path, config: TrainConfig, methods: tuple[str, ...], rows: Rows) -> list[dict[str, Any]]:
    """How far each part of a run is, in the order they come in."""
    first_learning = next((method for method in methods if METHODS[method].has_learned_loss), None)
    progress = []
    for method in methods:
        if method == first_learning:
            done = max(_steps_of(rows, OFFLINE), default=0)
            progress.append({"title": "offline phase", "done": done, "of": config.offline.num_steps})
        steps, num_steps = _steps_of(rows, method), config.num_steps
        done = max(steps, default=0)
        if METHODS[method].is_tuned:  # its metrics come at the end of its search, its checkpoints before
            num_steps *= len(config.tuning.learning_rates)
            done = num_steps if steps else _steps_searched(workdir, method)
        progress.append({"title": METHODS[method].title, "done": done, "of": num_steps})
    return progress


def _steps_searched(workdir: Path, method: str) -> int:
    """Steps at all rates of a search, by the newest checkpoints."""
    folders = (workdir / layout.CHECKPOINTS).glob(f"{method}_*")
    return sum(max(_steps_kept(folder), default=0) for folder in folders)


def _steps_kept(folder: Path) -> list[int]:
    try:
        return [int(path.name) for path in folder.iterdir() if path.name.isdecimal()]
    except FileNotFoundError:  # the search has just ended
        return []


def _shapes(workdir: Path, config: TrainConfig, methods: tuple[str, ...]) -> dict[str, np.ndarray]:
    """What `loss_shapes.npz` will hold, so far."""
    if config.learned_loss.family != "network":
        return {}
    found = {method: read_loss_shapes(workdir / layout.CHECKPOINTS / method) for method in methods}
    shapes = {"predictions": np.asarray(make_loss_shape(config.learned_loss.network())[0])}
    for method, so_far in found.items():
        if so_far is not None:
            steps, values = so_far
            shapes |= {f"{method}/steps": np.array(steps), f"{method}/values": values}
    return shapes
