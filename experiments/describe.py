"""Says what a configuration would cost: parameters, arithmetic of a step, memory of the device. Needs no data.

    python -m experiments.describe --config=configs/cifar10_resnet18.py

FLOPs are those of one step of one seed as XLA counts them before it optimises; memory is what XLA reports of the
compiled program that trains all seeds of the configuration, on the kind of device this runs on.
"""

from __future__ import annotations

import sys
from typing import Any

import jax
from absl import app, flags, logging
from rich.console import Console
from rich.table import Table

from adalfl_jax import data
from adalfl_jax.data import DatasetError
from adalfl_jax.data.streaming import exceeds_device
from adalfl_jax.models import count_params
from adalfl_jax.training import ConfigError, TrainConfig
from adalfl_jax.training.config import METHODS
from adalfl_jax.training.phases import (
    RunState,
    init_phi,
    init_theta,
    make_seed_keys,
    make_training_phase,
    restart_outer_optimizer,
)
from adalfl_jax.training.setup import Setup, make_setup
from experiments.launch import CONFIG, parse_flags

MEGABYTE = 1e6


def main(argv: list[str]) -> None:
    """Prints a summary and a table with a row for each kind of step."""
    del argv
    logging.set_verbosity(logging.WARNING)
    try:
        config = TrainConfig.from_mapping(CONFIG.value)
        spec = data.load_spec(
            config.dataset.name, data_dir=config.dataset.data_dir, image_size=config.dataset.image_size
        )
        dataset = data.random_dataset(config.dataset.name, spec, config.batch_size)
        setup = make_setup(config, dataset)
    except (ConfigError, DatasetError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    console = Console(width=100)
    console.print(_summary(setup, spec), soft_wrap=True, highlight=False)
    rows = {method: measure(setup, spec, method) for method in ("task_loss", "adalfl")}
    console.print(_table(rows, config.num_seeds))


def measure(setup: Setup, spec: data.Spec, method: str) -> dict[str, float]:
    """FLOPs of a step of one seed, and bytes of the compiled program of all seeds.

    Returns:
      flops; arguments (states of all seeds, and the data where they live on the device), temporary and output bytes.
    """
    config = setup.config
    resident = spec._replace(num_train=10 * config.batch_size, num_test=0) if is_streamed(config, spec) else spec
    train, valid = data.abstract_splits(resident, config.dataset.valid_fraction)
    splits = (train, valid if config.outer.split == "valid" else None)

    def make_state() -> RunState:
        keys = make_seed_keys(config.seeds)
        phi = restart_outer_optimizer(init_phi(setup, keys)) if method == "adalfl" else None
        return RunState(init_theta(setup, keys), phi)

    keys = jax.eval_shape(lambda: make_seed_keys(config.seeds))
    phase: Any = make_training_phase(setup, method)
    lowered = phase.lower(
        jax.eval_shape(make_state), keys, splits, config.inner.learning_rate, 0, num_steps=config.eval_every
    )
    memory = lowered.compile().memory_analysis()
    return {
        "flops": lowered.cost_analysis()["flops"] / config.num_seeds,
        "arguments": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "output": memory.output_size_in_bytes - memory.alias_size_in_bytes,
    }


def is_streamed(config: TrainConfig, spec: data.Spec) -> bool:
    """Whether the data would stay on the host."""
    streaming = config.dataset.streaming
    return streaming == "always" or (streaming == "auto" and exceeds_device(spec.num_bytes))


def _summary(setup: Setup, spec: data.Spec) -> str:
    config = setup.config
    params, model_state = jax.eval_shape(setup.model.init, jax.random.key(0))
    phi = jax.eval_shape(setup.learned_loss.init, jax.random.key(0))
    shape = "x".join(map(str, spec.input_shape))
    sizes = f"{spec.num_train:,} training examples" if spec.num_train else "a number of examples not known before"
    place = ", streamed from the host" if is_streamed(config, spec) else ""
    lines = {
        "dataset": f"{config.dataset.name}: {sizes} of {shape}, {spec.num_outputs} outputs{place}",
        "model": f"{config.model.name}: {count_params(params):,} parameters, {count_params(model_state):,} statistics",
        "loss": f"{config.learned_loss.family}: {count_params(phi):,} parameters",
        "steps": f"{config.num_steps:,} of {config.batch_size} examples, {_count(config.num_seeds, 'seed')} at once",
        "computes in": config.model.compute_dtype,
        "device": jax.devices()[0].device_kind,
    }
    return "\n".join(f"{name:<12}{text}" for name, text in lines.items())


def _table(rows: dict[str, dict[str, float]], num_seeds: int) -> Table:
    table = Table(title=f"One step of one seed, and the memory of {_count(num_seeds, 'seed')} on a device")
    for column in ("loss", "GFLOP", "ratio", "state and data MB", "temporary MB", "new state MB", "in all MB"):
        table.add_column(column, justify="left" if column == "loss" else "right", no_wrap=True)
    for method, row in rows.items():
        sizes = [row[kind] / MEGABYTE for kind in ("arguments", "temporary", "output")]
        cells = [f"{size:,.0f}" for size in (*sizes, sum(sizes))]
        ratio = row["flops"] / rows["task_loss"]["flops"]
        table.add_row(METHODS[method], f"{row['flops'] / 1e9:,.2f}", f"{ratio:.2f}", *cells)
    return table


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=parse_flags)
