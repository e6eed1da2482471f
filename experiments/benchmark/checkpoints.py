"""The suite `checkpoints`: what checkpoints cost a run of AdaLFL, with its measures and everything it writes."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import shutil
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

from adalfl_jax.data import Dataset
from adalfl_jax.training import TrainConfig
from adalfl_jax.training.evaluation import Evaluation
from adalfl_jax.training.initial import init_training, make_seed_keys
from adalfl_jax.training.phases import make_training_program
from adalfl_jax.training.preemption import Preemption
from adalfl_jax.training.setup import make_setup
from adalfl_jax.training.stage import Stage, StageRunner
from adalfl_jax.training.writers import MetricWriters
from experiments.benchmark.timing import Program, median, ratio, time_in_turn
from experiments.benchmark.training_program import title_of
from experiments.tables import Row, Table

NONE, BY_TIME, ALWAYS = "none", "by time", "after every evaluation"
COLUMNS: dict[str, Callable[[Row], str]] = {
    "checkpoints": lambda row: row["checkpoints"],
    "s a run": lambda row: f"{row['seconds']:.2f}",
    "in runs without": lambda row: str(row["ratio"]),
}


def checkpoints_suite(config: TrainConfig, dataset: Dataset, num_steps: int | None, num_rounds: int) -> list[Table]:
    """Runs without checkpoints, with those of the config, and with one after every evaluation, in turn."""
    num_steps = num_steps or config.num_steps
    config = dataclasses.replace(
        config, method="adalfl", num_steps=num_steps, num_loss_figures=0, profile_steps=(), wandb_project=""
    )
    seconds, keep = config.checkpoint.every_seconds, max(config.checkpoint.keep, 1)
    kinds = {
        NONE: dataclasses.replace(config.checkpoint, keep=0),
        BY_TIME: dataclasses.replace(config.checkpoint, keep=keep),
        ALWAYS: dataclasses.replace(config.checkpoint, every_steps=config.eval_every, keep=keep),
    }
    with tempfile.TemporaryDirectory() as folder:
        run_stage = _make_runner(config, dataset)

        def program(kind: str) -> Program:
            chosen = dataclasses.replace(config, checkpoint=kinds[kind])
            return Program(lambda: _emptied(Path(folder)), lambda workdir: run_stage(chosen, workdir), num_steps)

        times = time_in_turn({kind: program(kind) for kind in kinds}, num_rounds)
    rows = [
        {"checkpoints": kind, "seconds": median(times, kind) * num_steps / 1e3, "ratio": ratio(times, kind, NONE)}
        for kind in kinds
    ]
    rows[1]["checkpoints"] = f"every {seconds:g} s and at the end"
    num_saves = -(-num_steps // config.eval_every)
    excess = [1e-3 * num_steps * (often - never) for often, never in zip(times[ALWAYS], times[NONE], strict=True)]
    a_save = statistics.median(excess) / num_saves
    rows[2] |= {"num_saves": num_saves, "seconds_a_save": a_save}
    title = f"{title_of(config)}, {config.num_seeds} seeds, {num_steps} steps"
    return [Table(title, COLUMNS, rows, (_note(rows[2], seconds),))]


def _note(row: Row, seconds: float) -> str:
    if row["seconds_a_save"] <= 0:
        return f"What the {row['num_saves']} checkpoints after every evaluation take is lost in the spread of the runs."
    share = f", {100 * row['seconds_a_save'] / seconds:.2g} % of the {seconds:g} seconds between two" if seconds else ""
    return (
        f"The {row['num_saves']} checkpoints after every evaluation make a run longer by "
        f"{1e3 * row['seconds_a_save']:.1f} ms each (the median over the rounds){share}."
    )


def _make_runner(config: TrainConfig, dataset: Dataset) -> Callable[[TrainConfig, Path], None]:
    """A function that trains a config, which may differ in its checkpoints, into a workdir; compiled once."""
    setup = make_setup(config, dataset)
    keys, evaluation, program = make_seed_keys(config.seeds), Evaluation(setup), make_training_program(setup, "adalfl")
    start = init_training(setup, "adalfl", keys)
    rate = config.inner.learning_rate

    def run(chosen: TrainConfig, workdir: Path) -> None:
        with MetricWriters(workdir, chosen) as writers, contextlib.redirect_stderr(io.StringIO()):

            def observe(step: int, scalars, shapes) -> None:
                writers.write("adalfl", "training", step, chosen.seeds, scalars)

            changed = dataclasses.replace(setup, config=chosen)
            runner = StageRunner(changed, keys, evaluation, workdir, Preemption())
            runner.advance(Stage("adalfl", program, start, chosen.num_steps, rate, observe))

    return run


def _emptied(folder: Path) -> Path:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder
