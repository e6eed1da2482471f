"""The suites `step` and `seeds`: the program `experiments.train` runs for a configuration.

That is a chunk of steps under `lax.scan` with seeds under `vmap`, batches drawn and prepared inside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from adalfl_jax import data
from adalfl_jax.data import Dataset
from adalfl_jax.hypergradient import ESTIMATORS
from adalfl_jax.training import TrainConfig
from adalfl_jax.training.batches import splits_of
from adalfl_jax.training.initial import init_training, make_seed_keys
from adalfl_jax.training.phases import make_training_program
from adalfl_jax.training.progress import tell
from adalfl_jax.training.setup import load_dataset, make_setup
from adalfl_jax.training.state import RunState
from experiments.benchmark.timing import Program, Times, median, ratio, time_in_turn
from experiments.tables import Row, Table

SEEDS = (1, 2, 4, 8, 10, 16, 32)
METHODS = {"task_loss": "task loss", "adalfl": "AdaLFL"}
COLUMNS: dict[str, Callable[[Row], str]] = {
    "program": lambda row: row["program"],
    "ms a step": lambda row: f"{row['ms']:.3f}",
    "ratio": lambda row: str(row["ratio"]),
    "to": lambda row: row["base"],
}


def dataset_of(config: TrainConfig, random_data: bool) -> Dataset:
    """The dataset of a configuration, or noise in its shapes and of its size."""
    if not random_data:
        return load_dataset(config.dataset)
    spec = config.dataset.spec()
    return data.random_dataset(config.dataset.name, spec, spec.num_train or 10 * config.batch_size)


def step_suite(config: TrainConfig, dataset: Dataset, num_steps: int | None, num_rounds: int) -> list[Table]:
    """One bilevel step by every estimator against one task-loss step, a single seed."""
    config = dataclasses.replace(config, num_seeds=1)
    base = METHODS["task_loss"]
    programs, refusals = {base: make_program(config, dataset, "task_loss", num_steps)}, []
    for estimator in ESTIMATORS:
        try:
            chosen = dataclasses.replace(config, hypergradient=estimator)
            programs[f"{METHODS['adalfl']}, {estimator}"] = make_program(chosen, dataset, "adalfl", num_steps)
        except ValueError as error:
            tell(f"{estimator} is left out: {error}")
            refusals.append(f"`{estimator}`")
    times = time_in_turn(programs, num_rounds)
    notes = (f"Left out, since they do not train this configuration: {', '.join(refusals)}.",) if refusals else ()
    return [Table(title_of(config), COLUMNS, [_row(times, name, base) for name in programs], notes)]


def seeds_suite(
    config: TrainConfig,
    dataset: Dataset,
    num_steps: int | None,
    num_rounds: int,
    counts: tuple[int, ...] = SEEDS,
) -> list[Table]:
    """Several seeds in one program against one seed."""
    programs, bases = {}, {}
    for method, method_title in METHODS.items():
        for num_seeds in counts:
            name = f"{method_title}, {num_seeds} seed{'s' if num_seeds > 1 else ''}"
            chosen = dataclasses.replace(config, num_seeds=num_seeds)
            programs[name] = make_program(chosen, dataset, method, num_steps)
            bases[name] = f"{method_title}, 1 seed"
    times = time_in_turn(programs, num_rounds)
    return [Table(title_of(config), COLUMNS, [_row(times, name, bases[name]) for name in programs])]


def make_program(config: TrainConfig, dataset: Dataset, method: str, num_steps: int | None) -> Program:
    """A run of training steps of a method, from the same start each time.

    Raises:
      ValueError: the configuration cannot be trained so.
    """
    num_steps = num_steps or config.eval_every  # the chunk that training runs
    setup = make_setup(config, dataset)
    keys = make_seed_keys(config.seeds)
    state, splits = init_training(setup, method, keys), splits_of(setup)
    advance = make_training_program(setup, method).advance

    def run(state: RunState) -> Any:
        return jax.block_until_ready(advance(state, keys, splits, config.inner.learning_rate, 0, num_steps=num_steps))

    run(state)
    return Program(lambda: state, run, num_steps)


def title_of(config: TrainConfig) -> str:
    """What is trained, and its batch size."""
    return f"{config.dataset.name}, {config.model.name}, batch {config.batch_size}"


def _row(times: Times, name: str, base: str) -> Row:
    return {"program": name, "ms": median(times, name), "base": base, "ratio": ratio(times, name, base)}
