"""Ways of doing one thing, each tuned on some seeds and judged on others, for programs that bring their own loop."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import joblib
import matplotlib
import numpy as np
from matplotlib.figure import Figure

import adalfl_jax
from adalfl_jax.analysis.figures import STYLE
from adalfl_jax.analysis.statistics import adjust_p_values, describe, paired_difference
from adalfl_jax.training.machine import describe_machine
from experiments import page
from experiments.launch import command_line, studies_folder, told_in_a_line
from experiments.tables import Row, Table, show_difference, show_mean, show_number, show_p_value, show_point

Point = Mapping[str, float]
FORGETFUL = joblib.Memory(None)
PACKAGES = ("adalfl_jax", "jax", "jaxlib", "flax", "optax", "scikit-learn")  # that trials depend on
WORST = 1e30  # what JSON can hold


class TrialDivergedError(Exception):
    """A trial went well on the seeds it was tuned with, and does not on the others."""


class Curves(NamedTuple):
    """What a trial measured, seed by seed."""

    valid: np.ndarray  # [S], what trials are tuned by
    scores: np.ndarray  # [S], what they are judged by
    values: np.ndarray  # [S, T] through training
    notes: str = ""  # for the table, of what was learned


class Trial(NamedTuple):
    """One way, with the points it is tuned over."""

    title: str
    run: Callable[[Point, Sequence[int]], Curves]
    grid: tuple[Point, ...]


def publish_trials(
    name: str,
    compare: Callable[[joblib.Memory], dict[str, Any]],
    *,
    title: str,
    measure: str,
    scale: float = 1.0,
    xlabel: str,
    ylabel: str,
    every: int = 1,
) -> None:
    """Runs the program `experiments.NAME`: its numbers as JSON, a table and a picture, on a page too if `--write` says.

    Args:
      name: of the program, of its files and of its section.
      compare: `compare_trials` of the program's trials, with the memory it is given.
      title: of the table and of the picture.
      measure: what the scores are, a heading.
      scale: of the scores in the table.
      xlabel: of the picture.
      ylabel: of the picture.
      every: steps between the values of a curve.
    """
    command = command_line(name)
    with told_in_a_line(ValueError):  # before what takes time, not after
        workdir = studies_folder()
        page.require_section(name)
        workdir.mkdir(parents=True, exist_ok=True)
    with told_in_a_line(TrialDivergedError):
        found = {"command": command, **compare(joblib.Memory(workdir / name, verbose=0))}
        path = page.path_of_numbers(name, workdir)
        with page.publishing(path):
            numbers = page.write_numbers(path, found)
            page.publish(
                name,
                command,
                numbers["machine"],
                trials_table(numbers, title, measure, scale),
                lambda path: draw_trials(numbers, path, title=title, xlabel=xlabel, ylabel=ylabel, every=every),
                workdir,
            )


def compare_trials(
    trials: Mapping[str, Trial],
    reference: str,
    *,
    tuning_seeds: range,
    seeds: range,
    largest_is_best: bool,
    settings: Mapping[str, Any] | None = None,
    packages: tuple[str, ...] = PACKAGES,
    memory: joblib.Memory = FORGETFUL,
) -> dict[str, Any]:
    """Runs the point of each grid that is best on the tuning seeds on the others.

    Args:
      trials: what is compared.
      reference: the name of that which others are compared with.
      tuning_seeds: which a point is chosen by.
      seeds: which trials are judged on.
      largest_is_best: whether it is, of the values that trials are tuned by.
      settings: what curves depend on beside trial, point, seeds, the program's own text, that of the library and
        versions.
      packages: whose versions curves depend on.
      memory: where curves are kept, so that a program that was stopped goes on where it was.

    Returns:
      all numbers, as JSON has them.

    Raises:
      TrialDivergedError: a trial whose scores are not finite, at the point that was chosen.
    """
    kept: Any = memory.cache(_curves, ignore=["trial"])
    versions = {package: importlib.metadata.version(package) for package in packages}
    library = digest_of_sources(Path(adalfl_jax.__file__).parent)
    machines: list[Mapping[str, Any]] = []
    found: dict[str, Any] = {}
    for name, trial in trials.items():
        program = inspect.getsource(inspect.getmodule(trial.run) or trial.run)
        key = (name, program, library, settings, versions)
        run = functools.partial(_told_curves, kept, trial, key, packages, machines)
        found[name] = _judge(trial, run, tuning_seeds, seeds, largest_is_best)
    scores = {name: row["score"]["per_seed"] for name, row in found.items()}
    tests = {name: paired_difference(scores[name], scores[reference]) for name in found if name != reference}
    adjust_p_values([*tests.values()])
    return {
        "machine": page.join_machines(machines),
        "reference": reference,
        "seeds": list(seeds),
        "tuning_seeds": list(tuning_seeds),
        "trials": found,
        "differences": tests,
    }


def _told_curves(
    kept: Any,
    trial: Trial,
    key: Any,
    packages: tuple[str, ...],
    machines: list[Mapping[str, Any]],
    point: Point,
    seeds: range,
) -> Curves:
    """`_curves` as memory keeps them, told on the terminal; `machines` gets the one they were computed on."""
    told = (trial.title, show_point(point, []), f"seeds {seeds[0]} to {seeds[-1]}")
    print(", ".join(filter(None, told)), file=sys.stderr)
    curves, machine = kept(trial, key, dict(point), list(seeds), packages)
    machines.append(machine)
    return curves


def _judge(
    trial: Trial, run: Callable[[Point, range], Curves], tuning_seeds: range, seeds: range, largest_is_best: bool
) -> dict[str, Any]:
    """The numbers of a trial, at the point of its grid that is best on the tuning seeds."""
    reached = [_mean_valid(run(point, tuning_seeds), largest_is_best) for point in trial.grid]
    best = trial.grid[int(np.argmax(reached) if largest_is_best else np.argmin(reached))]
    curves = run(best, seeds)
    lost = [seed for seed, score in zip(seeds, curves.scores, strict=True) if not np.isfinite(score)]
    if lost:
        raise TrialDivergedError(
            f"{trial.title}: {show_point(best, [])} was best with seeds {tuning_seeds[0]} to "
            f"{tuning_seeds[-1]}, and diverges with {', '.join(map(str, lost))}; tune with more seeds, or leave "
            "such points out of the grid; what has been computed is kept"
        )
    return {
        "title": trial.title,
        "chosen": dict(best),
        "tuning": [{"point": dict(point), "valid": value} for point, value in zip(trial.grid, reached, strict=True)],
        "score": describe(curves.scores.tolist()),
        "curve": curves.values.tolist(),
        "notes": curves.notes,
    }


def digest_of_sources(folder: Path) -> str:
    """Hexadecimal digits that any change of a module below a folder changes."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _curves(
    trial: Trial, key: Any, point: Point, seeds: list[int], packages: tuple[str, ...]
) -> tuple[Curves, dict[str, Any]]:
    """What a trial measured, and on what; `key` tells it from those of other programs and settings."""
    del key
    return trial.run(point, seeds), describe_machine(packages)


def _mean_valid(curves: Curves, largest_is_best: bool) -> float:
    """A point that diverges is the worst there is."""
    valid = float(np.mean(curves.valid))
    return valid if np.isfinite(valid) else (-WORST if largest_is_best else WORST)


def trials_table(numbers: Mapping[str, Any], title: str, measure: str, scale: float = 1.0) -> Table:
    """One row a trial, with its difference from the reference."""
    reference = numbers["trials"][numbers["reference"]]["title"]
    rows = [{**row, "difference": numbers["differences"].get(name)} for name, row in numbers["trials"].items()]
    seeds, tuned = numbers["seeds"], numbers["tuning_seeds"]
    note = f"Seeds {seeds[0]} to {seeds[-1]}; tuned with seeds {tuned[0]} to {tuned[-1]}."
    columns: dict[str, Callable[[Row], str]] = {
        "way": lambda row: row["title"],
        "tuned": lambda row: show_point(row["chosen"], row["tuning"]),
        measure: lambda row: show_mean(row["score"], scale),
        f"{reference} minus it": lambda row: show_difference(row["difference"], scale),
        "p": lambda row: show_p_value(row["difference"]),
        "effect": lambda row: show_number((row["difference"] or {}).get("effect_size"), "+.1f"),
    }
    if any(row["notes"] for row in rows):
        columns["learned"] = lambda row: row["notes"]
    return Table(title, columns, rows, (note,))


def draw_trials(
    numbers: Mapping[str, Any], path: Path, *, title: str, xlabel: str, ylabel: str, every: int = 1
) -> None:
    """The mean over seeds of every trial through training, with its standard error."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 4.0), layout="constrained")
        axes = figure.subplots()
        for index, row in enumerate(numbers["trials"].values()):
            values = np.asarray(row["curve"])
            steps, mean = every * np.arange(1, values.shape[1] + 1), values.mean(axis=0)
            error = values.std(axis=0, ddof=1) / np.sqrt(len(values))
            color = matplotlib.colormaps["tab10"](index % 10)
            axes.plot(steps, mean, label=row["title"], color=color, linewidth=1.6)
            axes.fill_between(steps, mean - error, mean + error, color=color, alpha=0.15, linewidth=0)
        axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
        figure.legend(loc="outside right center", fontsize=8)
        figure.savefig(path, bbox_inches="tight")
