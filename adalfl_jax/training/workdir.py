"""The folder of a run: what is in it, and when it may be written to."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from adalfl_jax.training.config import TrainConfig, differing_keys

CONFIG = "config.json"
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
SHAPES = "loss_shapes.npz"
LEARNED_LOSS = "learned_loss.safetensors"
STATES = "states"
SUMMARY = "summary.json"
FIGURES = "figures"
REPORT = "report.html"
_RESULTS = (METRICS, TENSORBOARD, SHAPES, LEARNED_LOSS, STATES, SUMMARY, FIGURES, REPORT)


class WorkdirError(OSError):
    """A folder that cannot take this run; the text says why and what to do."""


def open_workdir(path: str | os.PathLike[str], config: TrainConfig, command: str) -> Path:
    """Makes the folder ready for a run and writes `config.json`.

    A folder that holds an unfinished run of the same config starts over; anything else in it is left as it is.

    Args:
      path: of the folder; made where it does not exist.
      config: of the run.
      command: "train" or "compare", part of what a run is.

    Raises:
      WorkdirError: it cannot be written, holds other files, or holds a run of another config. Nothing is changed.
    """
    workdir = Path(path).expanduser().resolve()
    wanted = {"command": command, **config.to_dict()}
    try:
        if (workdir / CONFIG).exists():
            _check_same_run(workdir, wanted)
            for name in _RESULTS:
                _remove(workdir / name)
        elif workdir.is_dir() and any(workdir.iterdir()):
            raise WorkdirError(f"{workdir} is not empty and holds no {CONFIG}; choose a new folder")
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(workdir / CONFIG, wanted)
    except WorkdirError:
        raise
    except OSError as error:
        raise WorkdirError(f"cannot write to workdir {workdir}: {error}") from error
    return workdir


def finished_summary(path: str | os.PathLike[str], config: TrainConfig, command: str) -> dict[str, Any] | None:
    """The summary of a finished run of exactly this config in the folder, or None.

    Raises:
      WorkdirError: a finished run of another config, or files that cannot be read.
    """
    workdir = Path(path).expanduser().resolve()
    if not ((workdir / CONFIG).is_file() and (workdir / SUMMARY).is_file()):
        return None
    _check_same_run(workdir, {"command": command, **config.to_dict()})
    try:
        return dict(json.loads((workdir / SUMMARY).read_text()))
    except (ValueError, TypeError, OSError) as error:
        raise WorkdirError(f"{workdir / SUMMARY} cannot be read ({error}); choose a new folder") from error


def write_json(path: Path, value: Any) -> None:
    """Writes JSON in one move, so that a reader never sees half a file."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
    partial.replace(path)


def _check_same_run(workdir: Path, wanted: dict[str, Any]) -> None:
    try:
        found = dict(json.loads((workdir / CONFIG).read_text()))
    except (ValueError, TypeError, OSError) as error:
        raise WorkdirError(f"{workdir / CONFIG} cannot be read ({error}); choose a new folder") from error
    if lines := differing_keys(found, wanted):
        raise WorkdirError(
            f"{workdir} holds a run of another config; choose a new folder, or set these keys back "
            "(there -> here):\n  " + "\n  ".join(lines)
        )


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
