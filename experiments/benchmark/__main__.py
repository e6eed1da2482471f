"""Measures what a step costs, as ratios within one run.

    .venv/bin/python -m experiments.benchmark --suite=peers
    .venv/bin/python -m experiments.benchmark --suite=step --suite=seeds --config=configs/digits_mlp.py

Suites with problems of their own, on noise:

  peers       a step here, and in PyTorch: alone, with higher and with TorchOpt (needs the extra [bench])
  thrift      what a cheaper meta-gradient saves, and its bias with batch norm
  estimators  time, arithmetic and memory of every estimator of the meta-gradient, for one inner step and for K
  parts       where the time of a bilevel step goes
  scaling     batch size, width and number of outputs

Suites that time the program `experiments.train` runs for a --config:

  step        one AdaLFL step by every estimator against one step on the task loss
  seeds       1 to 32 seeds in one program, for the task loss and for AdaLFL
  checkpoints what checkpoints cost a whole run, with its evaluations and what it writes
"""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from adalfl_jax.training import TrainConfig
from adalfl_jax.training.machine import describe_machine
from experiments import page
from experiments.benchmark import checkpoints, estimators, parts, peers, scaling, thrift, training_program
from experiments.benchmark.idle import BusyMachineError, busy_cores, wait_until_idle
from experiments.benchmark.problems import PROBLEMS
from experiments.benchmark.timing import Ratio
from experiments.launch import CONFIG, command_line, parse_flags, told_in_a_line
from experiments.tables import Row, Table

OF_PROBLEMS = {
    "peers": tuple(PROBLEMS),
    "estimators": ("mlp", "lenet5"),
    "thrift": ("mlp", "resnet18"),
    "parts": ("logistic", "mlp", "lenet5"),
}  # suite -> the problems it takes by itself
OF_A_CONFIG = ("step", "seeds", "checkpoints")
NAMES = (*OF_PROBLEMS, "scaling", *OF_A_CONFIG)
PACKAGES = ("jax", "jaxlib", "flax", "optax")
QUIET = 0.2  # busy cores below which a machine is taken to be idle
PICTURE = "images/inner_steps.png"  # beside the page

_SUITES = flags.DEFINE_multi_enum("suite", ["step", "seeds"], NAMES, "What to measure; may be repeated.")
_PROBLEMS = flags.DEFINE_multi_enum(
    "problem",
    None,
    list(PROBLEMS),
    "Problem to time in the suites peers, parts, estimators and thrift, in place of their own; may be repeated.",
)
_RANDOM_DATA = flags.DEFINE_bool(
    "random_data",
    False,
    "Whether the suites that take a --config run on noise in the shapes of its dataset, which then need not be there.",
)
_STEPS = flags.DEFINE_integer("steps", None, "Steps of one timed run, in place of the suite's own.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 9, "Timed runs of every program.", lower_bound=3)
_JSON = flags.DEFINE_string("json", None, "File that the figures are also written to.")


class UsageError(Exception):
    """Flags that do not go together."""


def main(argv: list[str]) -> None:
    """Runs the suites, prints their tables and writes them where they are wanted."""
    del argv
    with told_in_a_line(UsageError, BusyMachineError, peers.MissingPeerError, peers.GradientMismatchError):
        _check_flags()
        _benchmark(command_line("benchmark"))


def _check_flags() -> None:
    suites = _SUITES.value
    of_a_config = [suite for suite in suites if suite in OF_A_CONFIG]
    if of_a_config and CONFIG.value is None:
        raise UsageError(
            f"suite {of_a_config[0]!r} times the training of a configuration; add --config=configs/digits_mlp.py, say, "
            f"or choose another --suite: {', '.join(name for name in NAMES if name not in OF_A_CONFIG)}"
        )
    if not of_a_config and (CONFIG.value is not None or _RANDOM_DATA.value):
        raise UsageError(f"--config and --random_data are of the suites {', '.join(OF_A_CONFIG)}; leave them out")
    if _PROBLEMS.value and not set(suites) & set(OF_PROBLEMS):
        raise UsageError(f"--problem is of the suites {', '.join(OF_PROBLEMS)}; leave it out")
    if "peers" in suites:
        peers.require_peers()
    path = Path(_JSON.value or "")
    if _JSON.value and (path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK)):
        raise UsageError(  # before the measurements, not after
            f"--json={path} must be a file in a folder that is there and may be written to; make that first, or name "
            "another"
        )
    for suite in suites if page.WRITE.value else ():
        _require_section(suite)


def _benchmark(command: str) -> None:
    results = {}
    for suite in _SUITES.value:
        state = {"busy cores before": f"{_busy_cores():.1f}"}
        packages = peers.PACKAGES if suite == "peers" else PACKAGES
        machine = describe_machine(packages) | state | (peers.facts() if suite == "peers" else {})
        tables = _run(suite)
        print(page.render_section(command, machine, tables), end="\n\n")
        if page.WRITE.value:
            pictures = {tables[-1].title: _draw(tables)} if suite == "estimators" else {}
            _write_section(suite, page.render_section(command, machine, tables, pictures))
        results[_section(suite)] = {
            "machine": machine,
            "tables": {table.title: _as_json(table) for table in tables},
        }
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps({"command": command, "suites": results}, indent=2) + "\n")


def _busy_cores() -> float:
    """Cores that other programs keep busy before a suite; a page gets figures of an idle machine alone."""
    busy = busy_cores()
    if busy > QUIET:
        print(
            f"{busy:.1f} cores of this machine are at work; PyTorch's figures suffer most from that.", file=sys.stderr
        )
    if busy > QUIET and page.WRITE.value:
        print("The suite waits until the machine is idle.", file=sys.stderr)
        return wait_until_idle(QUIET)
    return busy


def _run(suite: str) -> list[Table]:
    amount = (_STEPS.value, _ROUNDS.value)
    if suite == "scaling":
        return scaling.scaling_suite(*amount)
    if suite in OF_PROBLEMS:
        run_suite = {
            "peers": peers.peers_suite,
            "estimators": estimators.estimators_suite,
            "thrift": thrift.thrift_suite,
            "parts": parts.parts_suite,
        }[suite]
        return run_suite(list(_PROBLEMS.value or OF_PROBLEMS[suite]), *amount)
    config = TrainConfig.from_mapping(CONFIG.value)
    dataset = training_program.dataset_of(config, _RANDOM_DATA.value)
    run_suite = {
        "step": training_program.step_suite,
        "seeds": training_program.seeds_suite,
        "checkpoints": checkpoints.checkpoints_suite,
    }[suite]
    return run_suite(config, dataset, *amount)


def _as_json(table: Table) -> list[Row]:
    """The rows, with names for the parts of ratios."""
    return [
        {key: value._asdict() if isinstance(value, Ratio) else value for key, value in row.items()}
        for row in table.rows
    ]


def _section(suite: str) -> str:
    """The name of a suite's section; of one that times a configuration there is one for each."""
    if suite not in OF_A_CONFIG:
        return suite
    return f"{suite} {Path(config_flags.get_config_filename(flags.FLAGS['config'])).stem}"


def _require_section(suite: str) -> None:
    try:
        page.require_section(_section(suite))
    except (OSError, ValueError) as error:
        raise UsageError(f"--write={page.WRITE.value}: {error}") from error


def _write_section(suite: str, content: str) -> None:
    page.renew(_page(), page.replace_section, _section(suite), content)


def _page() -> Path:
    return Path(page.WRITE.value or "")


def _draw(tables: list[Table]) -> str:
    estimators.draw_growth(tables, _page().parent / PICTURE)
    return PICTURE


if __name__ == "__main__":
    app.run(main, flags_parser=functools.partial(parse_flags, unused=("workdir",)))
