r"""Trains a configuration at every point of a grid, each in a folder of its own, on this machine or through SLURM.

.venv/bin/python -m experiments.sweep --config=configs/digits_mlp.py --workdir=runs/sweep \
    --vary=inner.learning_rate=0.01,0.1 --vary=outer.learning_rate=1e-4,3e-4 --executor=slurm \
    --resource=timeout_min=240 --resource=gpus_per_node=1 --resource=slurm_partition=gpu

`submitit` (the extra [sweep]) starts the runs, as one job array on SLURM, or here, `--parallel` of them at once.
Finished runs are not repeated, and one that a process works on is left to it. Others resume by themselves after a time
limit or a preemption, and after anything else when you give the same command again. The program ends with a table,
which `sweep.json` and `sweep.csv` in the workdir also have, and with status 1 if a run failed. Ctrl-C and SIGTERM let
local runs save and end.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import config_flags

from adalfl_jax.analysis.record import UNREAD, flatten
from adalfl_jax.training import ConfigError
from adalfl_jax.training.files import resolve_folder
from adalfl_jax.training.machine import num_cores
from adalfl_jax.training.workdir import require_own
from experiments.launch import CONFIG, WORKDIR, parse_flags, told_in_a_line
from experiments.sweep.grid import Point, literal, make_points, parse_grid
from experiments.sweep.jobs import FAILED, TrainingJob, run_jobs
from experiments.sweep.table import TABLE, begun_table, make_rows, require_whole_table, results_table, write_table
from experiments.tables import render_table

_VARY = flags.DEFINE_multi_string(
    "vary",
    [],
    "FIELD=VALUE,VALUE,...: values of a field of the configuration; tuples are FIELD=(4,),(8, 8), and nothing between "
    "commas is the empty text. May be repeated: all combinations are run.",
)
_PROGRAM = flags.DEFINE_enum("program", "train", ["train", "compare"], "The program that each run is.")
_EXECUTOR = flags.DEFINE_enum(
    "executor", "local", ["local", "slurm", "debug"], "Where: here, through SLURM, or within this process."
)
_PARALLEL = flags.DEFINE_integer(
    "parallel",
    max(1, num_cores() // 2),
    "How many runs of this machine go at once; by default one for every two cores, which share the GPUs.",
    lower_bound=1,
)
_RESOURCES = flags.DEFINE_multi_string(
    "resource",
    [],
    "NAME=VALUE, as submitit's AutoExecutor takes them: timeout_min (a day by default), cpus_per_task, gpus_per_node, "
    "mem_gb, slurm_partition, slurm_array_parallelism, slurm_signal_delay_s, ...; may be repeated.",
)
_SUBMIT = flags.DEFINE_bool(
    "submit", True, "Whether runs are started; --nosubmit only shows the table so far and writes nothing."
)


def main(argv: list[str]) -> None:
    """Runs what is not finished yet, waits, and shows the table."""
    del argv
    with told_in_a_line():
        root = resolve_folder(WORKDIR.value or "")
        require_own(root, TABLE)
        file = config_flags.get_config_filename(flags.FLAGS["config"])
        points = make_points(_given_grid(), CONFIG.value.to_dict(), file, _PROGRAM.value, root)
        if _SUBMIT.value:
            require_whole_table(root, points)
            if to_start := [point for point in points if not point.is_running() and point.summary() is None]:
                with begun_table(root, points):
                    _run(to_start, root)
        rows = make_rows(points)
        table = results_table(rows, list(points[0].overrides))
        print(render_table(table))
        if _SUBMIT.value:
            write_table(rows, root)
            print(f"Everything is in {root}", file=sys.stderr)
        if num_failed := sum(row["state"].startswith(FAILED) for row in rows):
            sys.exit(f"{num_failed} of {len(points)} runs failed; the same command starts them again")


def _given_grid() -> dict[str, list[str]]:
    """What `--vary` says, of fields that are read and not set too."""
    grid, program = parse_grid(_VARY.value), _PROGRAM.value
    if (unread := UNREAD[program]) in grid or _is_set(unread):
        raise ConfigError(f"config.{unread} has no effect on --program={program}; leave it out")
    for field, values in grid.items():
        if _is_set(field):
            text = f"--vary={field}={','.join(values)}"
            raise ConfigError(f"{text} and --config.{field} both set that field; leave one of them out")
    return grid


def _is_set(field: str) -> bool:
    """Whether a flag sets a field of the configuration."""
    return f"config.{field}" in flags.FLAGS and bool(flags.FLAGS[f"config.{field}"].present)


def _run(points: list[Point], root: Path) -> None:
    """Starts runs, with a day of time where `--resource` says no other, and waits for all of them."""
    resources: dict[str, Any] = {"timeout_min": 24 * 60}
    for text in _RESOURCES.value:
        name, _, value = text.partition("=")
        resources[name] = literal(value)
    jobs = [TrainingJob(_command_of(point), point.log) for point in points]
    run_jobs(jobs, _EXECUTOR.value, resources, root / "submitit", _PARALLEL.value)


def _command_of(point: Point) -> list[str]:
    """Trains a configuration: its file, which may register data, a model or a loss, with every field as it is now."""
    values = flatten(point.config.to_dict())
    del values[UNREAD[point.program]]
    fields = [f"--config.{name}={tuple(value) if isinstance(value, list) else value}" for name, value in values.items()]
    cache = flags.FLAGS["compilation_cache"].value
    kept = [] if cache is None else [f"--compilation_cache={cache}"]
    module = f"experiments.{point.program}"
    config, workdir = f"--config={os.path.abspath(point.file)}", f"--workdir={point.workdir}"
    return [sys.executable, "-m", module, config, workdir, *fields, *kept]


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=parse_flags)
