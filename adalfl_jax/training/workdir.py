"""The folder of a run: what is in it, and when it may be written to."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from adalfl_jax.learned_losses import configurable_families
from adalfl_jax.models import MODELS
from adalfl_jax.training.config import WITHOUT_EFFECT, TrainConfig
from adalfl_jax.training.fields import differing_keys
from adalfl_jax.training.files import WorkdirError, read_json, reading, resolve_folder, write_json, writing

CONFIG = "config.json"
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
SHAPES = "loss_shapes.npz"
LEARNED_LOSS = "learned_loss.safetensors"
STATES = "states"
PREPROCESSING = "preprocessing.json"
SUMMARY = "summary.json"
FIGURES = "figures"
REPORT = "report.html"
PROFILES = "profiles"
DIVERGENCE = "diverged.txt"  # why the run ended, of one that did not finish
WANDB_ID = "wandb_run.json"
CHECKPOINTS = "checkpoints"  # of an unfinished run; all results are made of them again
LAYOUT = 4  # to be raised whenever checkpoints change, or what a run makes of the same settings, its examples say
_LAYOUT_FILE = "layout.json"
_RESULTS = (METRICS, TENSORBOARD, SHAPES, LEARNED_LOSS, STATES, PREPROCESSING, DIVERGENCE, SUMMARY, FIGURES, REPORT)


def open_workdir(path: str | os.PathLike[str], config: TrainConfig, command: str, data: str = "") -> Path:
    """Makes the folder ready for a run and writes `config.json`.

    Of an unfinished run of the same config the checkpoints stay, and its other results are removed: they are made of
    the checkpoints again. Anything else in the folder is left as it is.

    Args:
      path: of the folder; made where it does not exist.
      config: of the run.
      command: "train" or "compare", part of what a run is.
      data: digest of the data it is trained on.

    Raises:
      WorkdirError: it cannot be written, holds other files, or holds a run of another config, on other data or of
        another version of this package. Nothing is changed.
    """
    workdir = resolve_folder(path)
    wanted = {"command": command, **config.to_dict()}
    with writing(workdir):
        if (workdir / CONFIG).exists():
            _check_same_run(workdir, wanted)
            _check_checkpoints(workdir / CHECKPOINTS, data)
        require_own(workdir, CONFIG)
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(workdir / CONFIG, wanted)  # first: without it the folder is not known as a run's
        (workdir / CHECKPOINTS).mkdir(exist_ok=True)
        made_by = {"layout": LAYOUT, "versions": _versions(), "data": data}
        write_json(workdir / CHECKPOINTS / _LAYOUT_FILE, made_by)
        for name in _RESULTS:  # last: a folder that cannot be written to keeps them
            _remove(workdir / name)
        for partial in workdir.glob("*.[0-9]*.[0-9]*.partial"):  # of a run that was killed while it wrote
            _remove(partial)
    return workdir


def require_own(folder: Path, mark: str) -> None:
    """Raises WorkdirError for a folder that holds files, but not the one that says what run they are of."""
    is_known = (folder / mark).exists() or not folder.is_dir()
    if not is_known and any(not path.name.startswith(mark) for path in folder.iterdir()):
        raise WorkdirError(f"{folder} is not empty and holds no {mark}; choose a new folder")


def finished_summary(path: str | os.PathLike[str], config: TrainConfig, command: str) -> dict[str, Any] | None:
    """The summary of a finished run of exactly this config in the folder, or None.

    Raises:
      WorkdirError: a finished run of another config, or files that cannot be read.
    """
    workdir = resolve_folder(path)
    if not ((workdir / CONFIG).is_file() and (workdir / SUMMARY).is_file()):
        return None
    _check_same_run(workdir, {"command": command, **config.to_dict()})
    return read_summary(workdir)


def require_run(workdir: Path) -> None:
    """Raises WorkdirError for a folder that holds no run, over or not."""
    if not (workdir / CONFIG).is_file():
        raise WorkdirError(f"{workdir} holds no run: it has no {CONFIG}")


def read_config(workdir: Path) -> tuple[str, TrainConfig]:
    """The command and the configuration of a run, over or not.

    Raises:
      WorkdirError: no run in the folder, or a file that cannot be read or holds something else.
    """
    require_run(workdir)
    settings = read_json(workdir / CONFIG, "command")
    for kind, section, field, known, register in (
        ("model", "model", "name", MODELS, "adalfl_jax.models.register_model"),
        ("learned loss", "learned_loss", "family", configurable_families(), "adalfl_jax.register_learned_loss"),
    ):
        name = settings[section].get(field) if isinstance(settings.get(section), dict) else None
        if isinstance(name, str) and name not in known:
            raise WorkdirError(
                f"{workdir} holds a run of the {kind} {name!r}, which is not known here; register it first "
                f"({register}), or give --config=FILE, the file that does, with the settings of the run"
            )
    with reading(workdir / CONFIG):
        return settings.pop("command"), TrainConfig.from_mapping(settings)


def read_summary(workdir: Path) -> dict[str, Any]:
    """The summary of a finished run.

    Raises:
      WorkdirError: its file cannot be read, or holds something else.
    """
    summary = read_json(workdir / SUMMARY, "dataset", "data", "metric", "num_steps", "seeds", "methods")
    with reading(workdir / SUMMARY):
        for method, info in summary["methods"].items():
            is_whole = info.keys() >= {"title", "learning_rate", "test", "valid", "seconds"}
            if not (is_whole and all(info[name].keys() >= {"per_seed", "mean", "std"} for name in ("test", "valid"))):
                raise ValueError(
                    f"{method} must have title, learning_rate, seconds, and per_seed, mean and std of test and valid"
                )
    return summary


def remove_checkpoints(path: str | os.PathLike[str]) -> None:
    """Removes from a workdir what only an unfinished run needs."""
    _remove(resolve_folder(path) / CHECKPOINTS)


def read_records(path: Path, lines: Iterable[str]) -> list[dict[str, Any]]:
    """The records in lines of a file of metrics.

    Raises:
      WorkdirError: one of them is none.
    """
    with reading(path):
        return [_read_record(number, line) for number, line in enumerate(lines, 1)]


def _read_record(number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        record = None
    if isinstance(record, dict) and record.keys() >= {"method", "phase", "seed", "step"}:
        return record
    raise ValueError(f"line {number} must be an object with method, phase, seed and step; got {line.strip()[:80]!r}")


def _check_same_run(workdir: Path, wanted: dict[str, Any]) -> None:
    found = read_json(workdir / CONFIG, "command")
    if found["command"] != wanted["command"]:
        raise WorkdirError(
            f"{workdir} holds a run of experiments.{found['command']}, and this is experiments.{wanted['command']}; "
            "choose a new folder"
        )
    found, wanted = map(settings_with_effect, (found, wanted))
    if lines := differing_keys(found, wanted):
        raise WorkdirError(
            f"{workdir} holds a run of another config; choose a new folder, or set these keys back "
            "(there -> here):\n  " + "\n  ".join(lines)
        )


def settings_with_effect(values: dict[str, Any]) -> dict[str, Any]:
    """The settings that results depend on; a learned loss to start from goes by its content, not by its path."""
    kept = {name: value for name, value in values.items() if name not in WITHOUT_EFFECT}
    learned_loss = dict(kept.get("learned_loss") or {})
    if "start" in learned_loss:
        learned_loss["start"] = str(learned_loss["start"]).rpartition("#")[2]
    return {**kept, "learned_loss": learned_loss}


def _check_checkpoints(folder: Path, data: str) -> None:
    """Raises WorkdirError for checkpoints this run cannot go on from, and warns of another version of JAX."""
    path = folder / _LAYOUT_FILE
    are_there = folder.is_dir() and any(entry.is_dir() for entry in folder.iterdir())
    if not path.exists():
        if are_there:
            raise WorkdirError(
                f"{folder} holds checkpoints of an unknown layout: it has no {_LAYOUT_FILE}; choose a new folder, or "
                f"remove {folder} to start the run over"
            )
        return
    found = read_json(path, "layout", "versions", "data")
    with reading(path):
        layout, versions, theirs = int(found["layout"]), dict(found["versions"]), found["versions"]["adalfl_jax"]
    ours = _versions()
    if layout != LAYOUT or theirs != ours["adalfl_jax"]:
        raise WorkdirError(
            f"{folder} was written by adalfl_jax {theirs} in layout {layout}, and this is {ours['adalfl_jax']} with "
            f"layout {LAYOUT}; install that version to go on, or choose a new folder"
        )
    if are_there:
        require_same_data(folder, found["data"], data)
    if lines := differing_keys(versions, ours):
        warnings.warn(
            f"{folder} goes on with other versions, which may round differently: {'; '.join(lines)}", stacklevel=3
        )


def require_same_data(folder: Path, then: str, now: str) -> None:
    """Raises WorkdirError where checkpoints were made on data of another digest than those a run goes on with."""
    if then != now:
        raise WorkdirError(
            f"the checkpoints in {folder} were made on other data than config.dataset names now ({then} -> {now}); "
            "bring those back, or choose a new folder"
        )


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("adalfl_jax", "jax", "jaxlib")}


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists() or path.is_symlink():  # `unlink` of what is not there fails on a disk that is only read
        path.unlink(missing_ok=True)
