"""Where phi starts if it was learned before: seed by seed in a finished run, or one saved loss for all seeds."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from adalfl_jax.data.cache import digest_of_arrays
from adalfl_jax.learned_losses import load_learned_loss
from adalfl_jax.registry import suggestion
from adalfl_jax.training import workdir as layout
from adalfl_jax.training.checkpoint import load_state
from adalfl_jax.training.config import TrainConfig
from adalfl_jax.training.fields import ConfigError, differing_keys
from adalfl_jax.training.files import WorkdirError
from adalfl_jax.training.sections import STARTS
from adalfl_jax.types import LearnedLoss, PyTree

_PINNED = re.compile(r"(?P<path>.+)#(?P<content>[0-9a-f]{12})")


class LearnedLosses(NamedTuple):
    """What a finished run learned."""

    loss: LearnedLoss
    params: PyTree  # [S, ...]
    seeds: tuple[int, ...]  # S


def read_learned_losses(workdir: Path) -> LearnedLosses:
    """The learned losses of all seeds of a finished run, at its end; of the last of its methods that learns one.

    Raises:
      WorkdirError: no finished run in the folder, none that learned a loss, or files that cannot be read.
    """
    if not (workdir / layout.SUMMARY).is_file():
        raise WorkdirError(f"{workdir} holds no finished run: it has no {layout.SUMMARY}")
    try:
        summary = layout.read_summary(workdir)
        if "learned_loss" not in summary:
            raise WorkdirError(f"{workdir} holds no learned loss: its methods are {', '.join(summary['methods'])}")
        loss, seeds = load_learned_loss(workdir / layout.LEARNED_LOSS).loss, tuple(summary["seeds"])
        params = jax.eval_shape(jax.vmap(loss.init), jax.random.split(jax.random.key(0), len(seeds)))
        folder = workdir / layout.STATES / summary["learned_loss"]["method"]
        state = load_state(folder, {"phi": {"params": params}})
    except WorkdirError:
        raise
    except Exception as error:  # whatever Orbax and its libraries raise on damaged files
        raise WorkdirError(f"the learned losses of {workdir} cannot be read: {error}") from error
    return LearnedLosses(loss, state["phi"]["params"], seeds)


def pin_start(config: TrainConfig) -> TrainConfig:
    """The config with the content of the learned losses it starts from beside their path, PATH#CONTENT.

    So a run is known by what it started from, and the path of a pinned config that holds something else by now is
    refused. A config that starts nowhere else is returned as it is.

    Raises:
      ConfigError: as in `load_start`.
    """
    start = config.learned_loss.start
    if start in STARTS:
        return config
    path, _ = _split(start)
    pinned = f"{path}#{_content(load_start(config))}"
    return dataclasses.replace(config, learned_loss=dataclasses.replace(config.learned_loss, start=pinned))


def load_start(config: TrainConfig) -> PyTree:
    """The parameters `[S, ...]` that `config.learned_loss.start` names, for the seeds of the config.

    Raises:
      ConfigError: nothing there, no learned loss, one with other settings, other seeds, or not what was pinned.
    """
    given, content = _split(config.learned_loss.start)
    path = Path(given).expanduser()
    if path.is_dir():
        try:
            found = read_learned_losses(path)
        except WorkdirError as error:
            raise ConfigError(f"config.learned_loss.start: {error}") from error
        _check_loss(config, found.loss)
        params = _of_seeds(config, path, found)
    elif path.exists():
        try:
            with jax.ensure_compile_time_eval():  # also where a run is traced alone, to describe it
                frozen = load_learned_loss(path)
        except (OSError, ValueError) as error:
            raise ConfigError(f"config.learned_loss.start: {error}") from error
        _check_loss(config, frozen.loss)
        params = jax.tree.map(lambda leaf: np.stack([leaf] * config.num_seeds), frozen.params)
    else:
        raise ConfigError(
            f"config.learned_loss.start must be one of {', '.join(STARTS)}, the workdir of a finished run or a "
            f"saved learned loss; {suggestion(given, STARTS)}there is nothing at {given!r}"
        )
    if content not in ("", now := _content(params)):
        raise ConfigError(
            f"config.learned_loss.start: {given} holds {now} by now, and {content} is wanted; bring that back, or "
            f"leave out '#{content}' to start from what is there"
        )
    return params


def _check_loss(config: TrainConfig, found: LearnedLoss) -> None:
    wanted = config.learned_loss.make(config.task_loss)
    ours, theirs = (
        {"family": type(loss).__name__} | dataclasses.asdict(loss)  # pyright: ignore[reportArgumentType]
        for loss in (wanted, found)
    )
    if lines := differing_keys(theirs, ours):
        raise ConfigError(
            f"config.learned_loss.start: {config.learned_loss.start} holds a loss with other settings than the config; "
            "set these to what is there (there -> here):\n  " + "\n  ".join(lines)
        )


def _of_seeds(config: TrainConfig, path: Path, found: LearnedLosses) -> PyTree:
    if missing := sorted(set(config.seeds) - set(found.seeds)):
        raise ConfigError(
            f"config.learned_loss.start: {path} has the seeds {found.seeds[0]} to {found.seeds[-1]}, and not "
            f"{', '.join(map(str, missing))}; take config.seed and config.num_seeds from among them, or start all "
            f"seeds from one loss, {path / layout.LEARNED_LOSS}"
        )
    rows = np.array([found.seeds.index(seed) for seed in config.seeds])
    return jax.tree.map(lambda leaf: leaf[rows], found.params)


def _split(start: str) -> tuple[str, str]:
    """The path, and the content it is pinned to or nothing."""
    found = _PINNED.fullmatch(start)
    return (found["path"], found["content"]) if found else (start, "")


def _content(params: PyTree) -> str:
    """Twelve hexadecimal digits that any bit of the parameters changes."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return digest_of_arrays({jax.tree_util.keystr(path): np.ascontiguousarray(leaf) for path, leaf in leaves})[:12]
