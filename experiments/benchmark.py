"""Measures what a step costs, as ratios within one run.

    python -m experiments.benchmark --config=configs/digits_mlp.py

Programs that are compared run in turn, A B A B ..., so that a machine whose speed drifts slows both; the ratio is the
median over the pairs. What is timed is the program `experiments.train` runs: a chunk of steps under `lax.scan`, batches
drawn and gathered inside, compiled beforehand. Suites:

  step   one AdaLFL step, by estimator, against one step on the task loss
  seeds  ten vmapped seeds against one, for the task loss and for AdaLFL
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
from absl import app, flags, logging
from rich.console import Console
from rich.table import Table

from adalfl_jax.data import DatasetError
from adalfl_jax.hypergradient import ESTIMATORS
from adalfl_jax.training import ConfigError, TrainConfig
from adalfl_jax.training.phases import (
    init_phi,
    init_training,
    make_seed_keys,
    make_training_phase,
    restart_outer_optimizer,
    splits_of,
)
from adalfl_jax.training.setup import make_setup
from experiments.launch import CONFIG, parse_flags

_SUITES = flags.DEFINE_multi_enum("suite", ["step", "seeds"], ["step", "seeds"], "What to measure; may be repeated.")
_STEPS = flags.DEFINE_integer("steps", 100, "Steps of one timed run.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 15, "Timed runs of every program.", lower_bound=3)
_JSON = flags.DEFINE_string("json", None, "Also write the figures to this file.")

Program = Callable[[], Any]


def main(argv: list[str]) -> None:
    """Runs the suites and prints a table of each."""
    del argv
    logging.set_verbosity(logging.WARNING)
    try:
        _benchmark(TrainConfig.from_mapping(CONFIG.value))
    except (ConfigError, DatasetError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


def _benchmark(config: TrainConfig) -> None:
    machine = _describe_machine()
    console = Console(width=100)
    console.print(", ".join(f"{key} {value}" for key, value in machine.items()), soft_wrap=True)
    results: dict[str, Any] = {"machine": machine, "config": config.to_dict()}
    for suite in _SUITES.value:
        rows = {"step": step_suite, "seeds": seeds_suite}[suite](config)
        results[suite] = rows
        console.print(_table(f"{suite}: {config.dataset.name}, {config.model.name}, batch {config.batch_size}", rows))
    if _JSON.value:
        pathlib.Path(_JSON.value).write_text(json.dumps(results, indent=2) + "\n")


def step_suite(config: TrainConfig) -> list[dict[str, Any]]:
    """One bilevel step against one task-loss step, a single seed."""
    config = dataclasses.replace(config, num_seeds=1)
    base = "task loss"
    programs = {base: make_program(config, "task_loss")}
    for estimator in ESTIMATORS:
        programs[f"AdaLFL, {estimator}"] = make_program(dataclasses.replace(config, hypergradient=estimator), "adalfl")
    return measure(programs, dict.fromkeys(programs, base))


def seeds_suite(config: TrainConfig) -> list[dict[str, Any]]:
    """Ten seeds in one program against one seed."""
    programs, bases = {}, {}
    for method, title in (("task_loss", "task loss"), ("adalfl", "AdaLFL")):
        for num_seeds in (1, 10):
            name = f"{title}, {num_seeds} seed{'s' if num_seeds > 1 else ''}"
            programs[name] = make_program(dataclasses.replace(config, num_seeds=num_seeds), method)
            bases[name] = f"{title}, 1 seed"
    return measure(programs, bases)


def make_program(config: TrainConfig, method: str) -> Program:
    """A compiled run of `--steps` training steps of a method, from the same start each time."""
    setup = make_setup(config)
    keys = make_seed_keys(config.seeds)
    phi = None if method == "task_loss" else restart_outer_optimizer(init_phi(setup, keys))
    state, splits = init_training(setup, method, keys, phi), splits_of(setup)
    advance = make_training_phase(setup, method).advance

    def run() -> Any:
        rate = config.inner.learning_rate
        return jax.block_until_ready(advance(state, keys, splits, rate, 0, num_steps=_STEPS.value))

    run()
    return run


def measure(programs: dict[str, Program], bases: dict[str, str]) -> list[dict[str, Any]]:
    """Times programs in turn; the ratio of each is to its base, pair by pair."""
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(_ROUNDS.value):
        for name, program in programs.items():
            start = time.perf_counter()
            program()
            times[name].append(1e3 * (time.perf_counter() - start) / _STEPS.value)
    rows = []
    for name, values in times.items():
        ratios = [value / base for value, base in zip(values, times[bases[name]], strict=True)]
        spread = {"ratio_min": min(ratios), "ratio": statistics.median(ratios), "ratio_max": max(ratios)}
        rows.append({"program": name, "base": bases[name], "ms_per_step": statistics.median(values), **spread})
    return rows


def _describe_machine() -> dict[str, Any]:
    return {
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title)
    for column in ("program", "ms a step", "ratio to", "median ratio", "min to max"):
        table.add_column(column, no_wrap=True, justify="left" if column in ("program", "ratio to") else "right")
    for row in rows:
        spread = f"{row['ratio_min']:.2f} to {row['ratio_max']:.2f}"
        table.add_row(row["program"], f"{row['ms_per_step']:.3f}", row["base"], f"{row['ratio']:.2f}", spread)
    return table


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=parse_flags)
