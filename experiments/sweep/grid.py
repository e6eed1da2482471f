"""The runs of a sweep: every combination of the values that are varied."""

from __future__ import annotations

import ast
import contextlib
import copy
import functools
import hashlib
import itertools
import operator
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from adalfl_jax.training import ConfigError, TrainConfig
from adalfl_jax.training.fields import require_path
from adalfl_jax.training.files import is_locked
from adalfl_jax.training.start import pin_start
from adalfl_jax.training.workdir import finished_summary

LONGEST_NAME = 200  # bytes; most file systems take 255, and names of files beside a run's folder are longer


class Point(NamedTuple):
    """One run of a sweep."""

    overrides: Mapping[str, str]  # field -> value, as they were given
    config: TrainConfig
    file: str  # of the configuration, as it was given
    program: str  # "train" or "compare"
    workdir: Path

    @property
    def log(self) -> Path:
        """What its processes print, one after another."""
        return self.workdir.with_name("logs") / f"{self.workdir.name}.log"

    def summary(self) -> dict[str, Any] | None:
        """What it has reached, None where it is not finished."""
        return finished_summary(self.workdir, self.config, self.program)

    def is_running(self) -> bool:
        """Whether a process works on it, started by this command before or by another."""
        return self.workdir.is_dir() and is_locked(self.workdir)


def parse_grid(texts: Sequence[str]) -> dict[str, list[str]]:
    """Field -> its values, from texts FIELD=VALUE,VALUE,...

    Raises:
      ConfigError: no text, a field that is none or is varied twice, or no value.
    """
    if not texts:
        raise ConfigError("--vary=FIELD=VALUE,VALUE,... must be given; experiments.train trains a single configuration")
    grid: dict[str, list[str]] = {}
    for text in texts:
        field, _, listed = text.partition("=")
        try:
            require_path(TrainConfig, field)
        except ValueError as error:
            raise ConfigError(f"--vary={text}: {error}") from error
        values = re.findall(r"((?:\([^)]*\)|\[[^]]*\]|[^,([])*),", f"{listed},")
        if field in grid or values == [""] or ",".join(values) != listed:
            raise ConfigError(f"--vary={text} must be FIELD=VALUE,VALUE,..., each field once")
        grid[field] = values
    return grid


def make_points(
    grid: Mapping[str, Sequence[str]], values: Mapping[str, Any], file: str, program: str, root: Path
) -> list[Point]:
    """Every combination of the values of a grid, checked.

    Args:
      grid: field -> its values.
      values: of the configuration's other fields.
      file: that of the configuration.
      program: what each run is, "train" or "compare".
      root: in which each has a folder.

    Raises:
      ConfigError: a value that its field does not take, or two runs that are the same or of one name.
      DatasetError: an unknown dataset.
    """
    combinations = [dict(zip(grid, each, strict=True)) for each in itertools.product(*grid.values())]
    points = []
    for overrides in combinations:
        name = ",".join(f"{field}={text}" for field, text in overrides.items())
        try:
            config = _make_config(overrides, values)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
        points.append(Point(overrides, config, file, program, root / _folder_name(name)))
    names = [point.workdir.name for point in points]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"several runs would be called {', '.join(repeated)}; give each value once")
    for one, other in itertools.combinations(points, 2):
        if one.config == other.config:
            raise ConfigError(
                f"the runs {one.workdir.name} and {other.workdir.name} are the same; give each value once"
            )
    for dataset in {point.config.dataset for point in points}:
        dataset.spec()  # for its errors
    return points


def _folder_name(name: str) -> str:
    """The name of a run without what file systems take amiss; the end of a long one gives way to a digest of it."""
    plain = re.sub(r"[^\w.=,+-]+", "_", name)
    if len(plain.encode()) <= LONGEST_NAME:
        return plain
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{plain.encode()[: LONGEST_NAME - 9].decode(errors='ignore')}_{digest}"


def _make_config(overrides: Mapping[str, str], values: Mapping[str, Any]) -> TrainConfig:
    values = copy.deepcopy(dict(values))
    for field, text in overrides.items():
        *sections, name = field.split(".")
        section = functools.reduce(operator.getitem, sections, values)
        if name not in section:
            raise ConfigError(
                f"config.{field} is an option that the file has to set first; write config.{field} = ... there"
            )
        value = _parse(text, section[name])
        if sections[-1:] == ["options"] and not _are_of_a_kind(section[name], value):
            raise ConfigError(f"config.{field} must be of the kind that the file sets, {section[name]!r}; got {text}")
        section[name] = value
    return pin_start(TrainConfig.from_mapping(values))


def _parse(text: str, given: Any) -> Any:
    """What the command line makes of a text for a field that has some value."""
    if isinstance(given, str):
        return text
    if isinstance(given, bool):
        with contextlib.suppress(ValueError):
            return flags.BooleanParser().parse(text)
    return literal(text)


def _are_of_a_kind(option: Any, value: Any) -> bool:
    """Whether the command line takes a value in place of that of a file."""
    option = option.item() if isinstance(option, np.generic) else option
    return type(option) is type(value) or (isinstance(option, float) and type(value) is int)


def literal(text: str) -> Any:
    """The Python value of a text, or the text itself where it has none."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
