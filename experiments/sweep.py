r"""Trains a configuration at every point of a grid, each in a folder of its own, on this machine or through SLURM.

.venv/bin/python -m experiments.sweep --config=configs/digits_mlp.py --workdir=runs/sweep \
    --vary=inner.learning_rate=0.01,0.1 --vary=outer.learning_rate=1e-4,3e-4 --executor=slurm \
    --resource=timeout_min=240 --resource=gpus_per_node=1 --resource=slurm_partition=gpu

`submitit` (the extra [sweep]) starts the runs, as one job array on SLURM. Finished runs are not repeated, and one that
a process works on is left to it. Others resume by themselves after a time limit or a preemption, and after anything
else when you give the same command again. The program ends with a table, which `sweep.json` and `sweep.csv` in the
workdir also have, and with status 1 if a run failed. Ctrl-C and SIGTERM let local runs save and end.
"""

from __future__ import annotations

import ast
import contextlib
import csv
import functools
import itertools
import json
import operator
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags
from ml_collections import config_flags

from adalfl_jax import data
from adalfl_jax.analysis.record import flatten
from adalfl_jax.analysis.statistics import adjust_p_values, paired_difference
from adalfl_jax.registry import require_known
from adalfl_jax.training import ConfigError, PreemptionError, TrainConfig
from adalfl_jax.training.fields import field_paths
from adalfl_jax.training.preemption import SIGNALS, Preemption
from adalfl_jax.training.sections import DatasetConfig
from adalfl_jax.training.start import pin_start
from adalfl_jax.training.workdir import (
    WorkdirError,
    find_folder,
    finished_summary,
    is_worked_on,
    reading,
    require_own,
    write_json,
    writing,
)
from experiments.launch import CONFIG, WORKDIR, parse_flags, told_in_a_line
from experiments.page import Row, Table, render_table

TABLE = "sweep.json"  # by which a folder is known as a sweep's
MAX_TIMEOUTS = 1000  # after so many time limits a run is not requeued
FAILED = "failed: "  # how the last line of a log begins where the run failed
INTERRUPTED = {code for number in SIGNALS for code in (128 + number, -number)}  # how trainings end that go on
CUT_SHORT = ("CANCELLED", "NODE_FAIL", "PREEMPTED", "TIMEOUT")  # states of SLURM in which a run has not failed
POLL = 0.1  # seconds

_VARY = flags.DEFINE_multi_string(
    "vary",
    [],
    "FIELD=VALUE,VALUE,...: values of a field of the configuration; tuples are FIELD=(4,),(8, 8). May be repeated: all "
    "combinations are run.",
)
_PROGRAM = flags.DEFINE_enum("program", "train", ["train", "compare"], "The program that each run is.")
_EXECUTOR = flags.DEFINE_enum(
    "executor", "local", ["local", "slurm", "debug"], "Where: here at once, through SLURM, or here one after another."
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


class Point(NamedTuple):
    """One run of a sweep."""

    overrides: Mapping[str, str]  # field -> value, as they were given
    file: str  # of the configuration, as it was given
    config: TrainConfig
    workdir: Path

    @property
    def log(self) -> Path:
        """What its processes print, one after another."""
        return self.workdir.with_name("logs") / f"{self.workdir.name}.log"


class TrainingJob:
    """A training in a process of its own, as submitit runs it and, when its time is over, requeues it."""

    def __init__(self, command: list[str], log: Path):
        self.command, self.log = command, log
        self._pid: int | None = None
        self._is_ending = False

    def __call__(self) -> None:
        """Runs the command to its end, or to where a signal ended it and it goes on.

        Raises:
          RuntimeError: it failed; with the last line that it printed.
        """
        is_local = os.environ.get("SUBMITIT_EXECUTOR") == "local"
        if is_local:  # SLURM itself signals all processes of a job
            for number in (signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                    signal.signal(number, self._end)
        # SLURM may send its warning to all processes of a job. It would end the training, which so inherits it blocked.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
        group = 0 if is_local else -1  # its own, or the signals of a terminal or of `timeout` would come beside ours
        with (
            self.log.open("a") as log,
            subprocess.Popen(self.command, stdout=log, stderr=log, process_group=group) as process,  # noqa: S603
        ):
            self._pid = process.pid
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            code = process.wait()
        if code and code not in INTERRUPTED:
            last = _last_line(self.log) or f"it ended with {code}"
            self.tell_failure(last)
            raise RuntimeError(last)

    def tell_failure(self, reason: str) -> None:
        """Ends the log with a line that marks the run as failed."""
        with self.log.open("a") as log:
            log.write(f"{FAILED}{reason}\n")

    def forget_failure(self) -> None:
        """Ends the log of a run that failed before with another line."""
        if _last_line(self.log).startswith(FAILED):
            with self.log.open("a") as log:
                log.write("started again\n")

    def _end(self, *_) -> None:
        """Tells the training to save and end; once, since a second signal ends it at once."""
        if self._pid is not None and not self._is_ending:
            self._is_ending = True
            with contextlib.suppress(ProcessLookupError):  # it may just have ended
                os.kill(self._pid, signal.SIGTERM)

    def checkpoint(self) -> Any:
        """Lets the training save and end, and tells submitit what to run in its place; called within a signal."""
        from submitit.helpers import DelayedSubmission

        if self._pid is not None:
            self._end()
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self._pid, 0)  # not `Popen.wait`, whose lock the interrupted call may hold
        return DelayedSubmission(TrainingJob(self.command, self.log))


def main(argv: list[str]) -> None:
    """Runs what is not finished yet, waits, and shows the table."""
    del argv
    with told_in_a_line():
        root = find_folder(WORKDIR.value or "")
        require_own(root, TABLE)
        points = make_points(root)
        if _SUBMIT.value:
            _require_whole_table(root, points)
        to_start = [point for point in points if not _is_running(point) and _summary_of(point) is None]
        if _SUBMIT.value and to_start:
            _run(to_start, root)
        trained_on: dict[DatasetConfig, tuple[str, str]] = {}
        rows = [row for point in points for row in _rows_of(point, trained_on)]
        add_differences(rows)
        print(render_table(results_table(rows, list(points[0].overrides))))
        if _SUBMIT.value:
            _write(rows, root)
        if num_failed := sum(row["state"].startswith(FAILED) for row in rows):
            sys.exit(f"{num_failed} of {len(points)} runs failed; the same command starts them again")


def make_points(root: Path) -> list[Point]:
    """Every combination of the values that are varied, checked.

    Raises:
      ConfigError: no field, one that is none, is varied twice or is set too, a value it does not take, or two runs that
        are the same or of one name.
      DatasetError: an unknown dataset.
    """
    grid: dict[str, list[str]] = {}
    if not _VARY.value:
        raise ConfigError("--vary=FIELD=VALUE,VALUE,... must be given; experiments.train trains a single configuration")
    for text in _VARY.value:
        field, _, listed = text.partition("=")
        try:
            require_known("field of the configuration", field_paths(TrainConfig), field)
        except ValueError as error:
            raise ConfigError(f"--vary={text}: {error}") from error
        values = re.findall(r"(?:\([^)]*\)|\[[^]]*\]|[^,([])+", listed)
        if field in grid or not values:
            raise ConfigError(f"--vary={text} must be FIELD=VALUE,VALUE,..., each field once")
        if f"config.{field}" in flags.FLAGS and flags.FLAGS[f"config.{field}"].present:
            raise ConfigError(f"--vary={text} and --config.{field} both set that field; leave one of them out")
        grid[field] = values
    points = [_make_point(root, dict(zip(grid, values, strict=True))) for values in itertools.product(*grid.values())]
    names = [point.workdir.name for point in points]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"several runs would be called {', '.join(repeated)}; give each value once")
    for one, other in itertools.combinations(points, 2):
        if one.config == other.config:
            raise ConfigError(
                f"the runs {one.workdir.name} and {other.workdir.name} are the same; give each value once"
            )
    datasets = [point.config.dataset for point in points]
    for name, data_dir, image_size in {(each.name, each.data_dir, each.image_size) for each in datasets}:
        data.load_spec(name, data_dir=data_dir, image_size=image_size)  # for its errors
    return points


def _require_whole_table(root: Path, points: Sequence[Point]) -> None:
    """Raises WorkdirError where the folder's table has runs that are not of this grid, which would be lost from it."""
    path = root / TABLE
    if not path.exists():
        return
    with reading(path):
        known = {row["run"] for row in json.loads(path.read_text())}
    if others := sorted(known - {point.workdir.name for point in points}):
        raise WorkdirError(
            f"{path} has runs of another grid, {', '.join(others[:3])}{', ...' if others[3:] else ''}; give all of the "
            "values, and what is finished is not repeated, or choose a new folder"
        )


def _make_point(root: Path, overrides: dict[str, str]) -> Point:
    values = CONFIG.value.to_dict()
    for field, text in overrides.items():
        *sections, name = field.split(".")
        section = functools.reduce(operator.getitem, sections, values)
        section[name] = text if isinstance(section[name], str) else _literal(text)
    folder = ",".join(f"{field}={text}" for field, text in overrides.items())
    try:
        config = pin_start(TrainConfig.from_mapping(values))
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from error
    file = config_flags.get_config_filename(flags.FLAGS["config"])
    return Point(overrides, file, config, root / re.sub(r"[^\w.=,+-]+", "_", folder))


def _literal(text: str) -> Any:
    """A Python value, or the text where it is none."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _run(points: list[Point], root: Path) -> None:
    """Starts runs and waits for all of them; one that fails says so in its row of the table."""
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
        if not (root / TABLE).exists():
            write_json(root / TABLE, [])  # first: without it the folder is not known as a sweep's
    executor = _make_executor(root / "submitit")
    points[0].log.parent.mkdir(exist_ok=True)
    trainings = [TrainingJob(_command_of(point), point.log) for point in points]
    for training in trainings:
        training.forget_failure()
    with Preemption() if _EXECUTOR.value == "local" else contextlib.nullcontext() as preemption:
        jobs = _submit(executor, trainings)
        print(f"runs started: {len(jobs)}; each writes to a file in {points[0].log.parent}", file=sys.stderr)
        if preemption is not None:
            _wait_here(jobs, preemption)
    for training, job in zip(trainings, jobs, strict=True):
        try:
            error = job.exception()
        except Exception as raised:  # of submitit, for a job that was cancelled, say
            error = raised
        if error is None or job.state.startswith(CUT_SHORT) or _last_line(training.log).startswith(FAILED):
            continue
        training.tell_failure(f"its job broke off; see {job.paths.stderr}")


def _submit(executor: Any, trainings: Sequence[TrainingJob]) -> list[Any]:
    """Hands runs to submitit, whose local processes inherit SIGINT blocked: a terminal's Ctrl-C is for this one."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with executor.batch():
            return [executor.submit(training) for training in trainings]
    except RuntimeError as error:  # of SLURM, for a partition it does not have, say
        raise ConfigError(f"--executor={_EXECUTOR.value} takes no jobs: {error}") from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _wait_here(jobs: Sequence[Any], preemption: Preemption) -> None:
    """Waits for processes of this machine, and at a signal for what they save.

    Raises:
      PreemptionError: a signal came.
    """
    while running := [job for job in jobs if not job.done()]:
        if preemption.signal is not None:
            for job in running:  # again and again, since one that only begins does not pass it on yet
                os.kill(int(job.job_id), signal.SIGTERM)
        time.sleep(POLL)
    if preemption.signal is not None:
        raise PreemptionError(preemption.signal, "the runs have saved and ended; the same command goes on from there")


def _make_executor(folder: Path) -> Any:
    try:
        import submitit
    except ImportError as error:
        raise ConfigError('a sweep needs the package submitit; pip install ".[sweep]"') from error
    resources: dict[str, Any] = {"timeout_min": 24 * 60}
    for text in _RESOURCES.value:
        name, _, value = text.partition("=")
        resources[name] = _literal(value)
    try:
        executor = submitit.AutoExecutor(folder, cluster=_EXECUTOR.value, slurm_max_num_timeout=MAX_TIMEOUTS)
        executor.update_parameters(**resources)
    except (AssertionError, NameError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"--executor={_EXECUTOR.value} with {resources}: {error}") from error
    return executor


def _command_of(point: Point) -> list[str]:
    """Trains a configuration: its file, which may register a dataset, with every field as it is here and now."""
    values = flatten(point.config.to_dict()).items()
    fields = [f"--config.{name}={tuple(value) if isinstance(value, list) else value}" for name, value in values]
    cache = flags.FLAGS["compilation_cache"].value
    kept = [] if cache is None else [f"--compilation_cache={cache}"]
    module = f"experiments.{_PROGRAM.value}"
    config, workdir = f"--config={os.path.abspath(point.file)}", f"--workdir={point.workdir}"
    return [sys.executable, "-m", module, config, workdir, *fields, *kept]


def _summary_of(point: Point) -> dict[str, Any] | None:
    return finished_summary(point.workdir, point.config, _PROGRAM.value)


def _is_running(point: Point) -> bool:
    """Whether a process works on it, started by this command before or by another."""
    return point.workdir.is_dir() and is_worked_on(point.workdir)


def _rows_of(point: Point, trained_on: dict[DatasetConfig, tuple[str, str]]) -> list[Row]:
    """What a run has reached, a row for each of its methods; one without numbers where it is not finished.

    Args:
      point: the run.
      trained_on: the first finished run on a dataset, with the digest of its data; a run on a new one is added.
    """
    row: Row = {"run": point.workdir.name, **point.overrides}
    is_running = _is_running(point)  # first: it may just be ending
    if (summary := _summary_of(point)) is None:
        last = _last_line(point.log)
        state = "running" if is_running else "unfinished" if last else "not begun"
        has_failed = last.startswith(FAILED) and not is_running
        return [row | {"state": last if has_failed else f"{state}: {last}".removesuffix(": ")}]
    state = "finished"
    if digest := summary.get("data"):  # older ones do not say
        first, expected = trained_on.setdefault(point.config.dataset, (point.workdir.name, digest))
        state = state if digest == expected else f"finished, on other data than {first}"
    numbers = {
        method: {f"{split}_{part}": info[split][part] for split in ("test", "valid") for part in ("mean", "std")}
        | {"seeds": summary["seeds"], "test_per_seed": info["test"]["per_seed"]}
        for method, info in summary["methods"].items()
    }
    rates = {method: info["learning_rate"] for method, info in summary["methods"].items()}
    return [
        row | {"state": state, "method": method, "metric": summary["metric"], "learning_rate": rates[method]} | found
        for method, found in numbers.items()
    ]


def add_differences(rows: Sequence[Row]) -> None:
    """Gives finished rows what they are less the first, in the test split, where metric, seeds and state are the same.

    A row gets its mean `difference` and the `p_value` of a paired t-test, adjusted for the number of rows (Benjamini
    and Hochberg), None where there is none.
    """
    first, *others = [row for row in rows if "test_per_seed" in row] or [{}]
    alike = [row for row in others if all(row[key] == first[key] for key in ("metric", "seeds", "state"))]
    tests = [paired_difference(first["test_per_seed"], row["test_per_seed"]) for row in alike]
    adjust_p_values(tests)
    for row, test in zip(alike, tests, strict=True):
        row |= {"difference": test["mean_difference"], "p_value": test.get("adjusted_p_value")}


def _last_line(log: Path) -> str:
    """What was printed last, "" where nothing was."""
    printed = log.read_text().splitlines() if log.exists() else []
    return printed[-1] if printed else ""


def results_table(rows: list[Row], fields: list[str]) -> Table:
    """The rows with the fields that vary."""
    columns = {field: functools.partial(_cell, field) for field in fields}
    columns |= {"method": functools.partial(_cell, "method")}
    columns |= {split: functools.partial(_spread, split) for split in ("test", "valid")}
    if any("difference" in row for row in rows):
        columns |= {"test, less the first": _difference, "p": _p_value}
    metric = next((row["metric"].replace("_", " ") for row in rows if "metric" in row), "no run is finished")
    return Table(f"{len(rows)} results: {metric}", {**columns, "state": lambda row: row["state"]}, rows)


def _cell(name: str, row: Row) -> str:
    return str(row.get(name, ""))


def _spread(split: str, row: Row) -> str:
    if f"{split}_mean" not in row:
        return ""
    std = row[f"{split}_std"]
    return f"{row[f'{split}_mean']:.4f}" + ("" if std is None else f" ± {std:.4f}")


def _difference(row: Row) -> str:
    return f"{row['difference']:+.4f}" if "difference" in row else ""


def _p_value(row: Row) -> str:
    return "" if row.get("p_value") is None else f"{row['p_value']:.1g}"


def _write(rows: list[Row], root: Path) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row if not isinstance(row[name], list)))
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
        write_json(root / TABLE, rows)
        with (root / "sweep.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, names, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
    print(f"Everything is in {root}", file=sys.stderr)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=functools.partial(parse_flags, unused="write"))
