"""Says what a configuration would cost: parameters, arithmetic of a step, memory of the device.

    .venv/bin/python -m experiments.describe --config=configs/cifar10_resnet18.py

No data are needed but those of a file or a registered dataset. FLOPs are those of one step of one seed on a GPU as XLA
counts them before it optimises, batches drawn beforehand; memory is what XLA reports of the compiled program that
trains all seeds of the configuration, on the kind of device this runs on. What evaluation and the offline phase add is
not counted.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from rich.console import Console
from rich.table import Table

from adalfl_jax import data
from adalfl_jax.data.streaming import block_length, stays_on_host
from adalfl_jax.models import count_params
from adalfl_jax.training import TrainConfig
from adalfl_jax.training.batches import StepSource
from adalfl_jax.training.initial import init_training, make_seed_keys
from adalfl_jax.training.methods import METHODS
from adalfl_jax.training.phases import make_training_program
from adalfl_jax.training.sections import OuterConfig
from adalfl_jax.training.setup import (
    Setup,
    check_batch_size,
    check_predictions,
    examples_for_a_batch,
    make_setup,
    num_outer_examples,
)
from adalfl_jax.training.start import pin_start
from adalfl_jax.training.state import RunState
from adalfl_jax.types import Batch
from experiments.benchmark.flops import on_a_cpu
from experiments.launch import CONFIG, parse_flags, told_in_a_line

MEGABYTE = 1e6


def main(argv: list[str]) -> None:
    """Prints a summary and a table with a row for each kind of step."""
    del argv
    with told_in_a_line():
        config = pin_start(TrainConfig.from_mapping(CONFIG.value))
        spec = config.dataset.spec()
        if spec.num_train:
            check_batch_size(config, *_splits(config, spec))
        setup = make_setup(config, data.random_dataset(config.dataset.name, spec, examples_for_a_batch(config)))
        methods = ("task_loss", "adalfl")
        check_predictions(config, methods, setup.dataset)
        console = Console(width=100)
        console.print(_summary(setup, spec), soft_wrap=True, highlight=False)
        rows = {method: measure(setup, spec, method) for method in methods}
        console.print(_table(rows, config.num_seeds))


def measure(setup: Setup, spec: data.Spec, method: str) -> dict[str, float]:
    """FLOPs of a step of one seed, and bytes of the compiled program of all seeds.

    Returns:
      flops; bytes of arguments (states of all seeds with the data where they live on the device, or else with the block
      of batches at work and the one that follows it), of temporaries and of outputs.
    """
    config = setup.config
    train, outer = _splits(config, spec)
    state, keys = jax.eval_shape(lambda: _start(setup, method))
    program: Any = make_training_program(setup, method)
    rate, step = config.inner.learning_rate, _sources(config, train, num_steps=1)
    chunk_length = min(config.eval_every, config.num_steps)
    # One seed, and as on a GPU: for a CPU convolutions become products with zeros among their factors, and those of
    # several seeds a loop, whose body is counted once.
    alone = dataclasses.replace(
        setup, mesh=None, config=dataclasses.replace(config, num_seeds=1, outer=_before_joint_steps(config))
    )
    of_one_seed: Any = make_training_program(alone, method)
    with on_a_cpu():
        state_alone, _ = jax.eval_shape(lambda: _start(alone, method))
        traced = of_one_seed.advance_block.trace(state_alone, _sources(alone.config, train, num_steps=1), rate)
        one_step = traced.lower(lowering_platforms=("cuda",))
    if spec.num_train and not is_streamed(config, spec):
        splits, waiting = (train, outer), 0
        chunk = program.advance.lower(state, keys, splits, rate, 0, num_steps=chunk_length)
    else:
        sources = _sources(config, train, block_length(chunk_length, _bytes((step.inner, step.outer))))
        waiting = _bytes((sources.inner, sources.outer))
        chunk = program.advance_block.lower(state, sources, rate)
    memory = chunk.compile().memory_analysis()
    return {
        "flops": one_step.cost_analysis()["flops"],
        "arguments": memory.argument_size_in_bytes + waiting,
        "temporary": memory.temp_size_in_bytes,
        "output": memory.output_size_in_bytes - memory.alias_size_in_bytes,
    }


def _before_joint_steps(config: TrainConfig) -> OuterConfig:
    """Without the last steps, on both splits: XLA counts the more expensive of two branches."""
    has_others = config.first_joint_step > 0
    return dataclasses.replace(config.outer, joint_share=0.0) if has_others else config.outer


def is_streamed(config: TrainConfig, spec: data.Spec) -> bool:
    """Whether the data would stay on the host."""
    return stays_on_host(config.dataset.streaming, spec.num_bytes)


def _splits(config: TrainConfig, spec: data.Spec) -> tuple[Batch, Batch | None]:
    """Shapes of the training split and of what outer batches come from, None for the same."""
    settings = config.dataset
    train, valid = data.abstract_splits(spec, settings.valid_fraction, settings.valid_examples, settings.corruption())
    if config.outer.split == "train":
        return train, None
    num_outer = num_outer_examples(config, valid.inputs.shape[0])
    return train, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((num_outer, *leaf.shape[1:]), leaf.dtype), valid)


def _start(setup: Setup, method: str) -> tuple[RunState, Any]:
    keys = make_seed_keys(setup.config.seeds)
    return init_training(setup, method, keys), keys


def _sources(config: TrainConfig, split: Batch, num_steps: int) -> StepSource:
    """Shapes of the batches of some steps of all seeds."""
    lead = (num_steps, config.num_seeds)
    shapes = [jax.ShapeDtypeStruct((*lead, config.batch_size, *leaf.shape[1:]), leaf.dtype) for leaf in split]
    batch = Batch(*shapes)  # pyright: ignore[reportArgumentType]
    keys: Any = jax.eval_shape(lambda: jnp.broadcast_to(jax.random.key(0), lead))
    return StepSource(batch, batch, keys, keys, jax.ShapeDtypeStruct((num_steps,), jnp.int32))  # pyright: ignore[reportArgumentType]


def _bytes(shapes: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def _summary(setup: Setup, spec: data.Spec) -> str:
    config = setup.config
    params, model_state = jax.eval_shape(setup.model.init, jax.random.key(0))
    phi = jax.eval_shape(setup.learned_loss.init, jax.random.key(0))
    shape = "x".join(map(str, spec.input_shape))
    sizes = "not prepared, examples"
    if spec.num_train:
        about = "about " if config.dataset.imbalance > 1 else ""  # how large each class is takes the data
        sizes = f"{about}{_splits(config, spec)[0].inputs.shape[0]:,} training examples"
    place = ", streamed from the host" if is_streamed(config, spec) else ""
    lines = {
        "dataset": f"{config.dataset.name}: {sizes} of {shape}, {_count(spec.num_outputs, 'output')}{place}",
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
        ratio = row["flops"] / rows["task_loss"]["flops"]
        cells = [_figure(size) for size in (*sizes, sum(sizes))]
        table.add_row(METHODS[method].title, _figure(row["flops"] / 1e9), f"{ratio:.2f}", *cells)
    return table


def _figure(value: float) -> str:
    """Three digits that count."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=functools.partial(parse_flags, unused=("workdir",)))
