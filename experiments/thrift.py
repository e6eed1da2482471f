"""Asks whether thrift costs accuracy: AdaLFL with a cheaper meta-gradient, seed for seed against the full one.

    python -m experiments.thrift --config=configs/mnist_logistic.py --workdir=runs/thrift

Each variant is a run of its own in a folder of `--workdir`; finished ones are not repeated. All of them start from the
same phi, theta and batches. `thrift.json` has the figures; `experiments.benchmark` has what each variant costs.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

from absl import flags
from rich.console import Console
from rich.table import Table

from adalfl_jax.analysis.statistics import paired_difference
from adalfl_jax.training import TrainConfig, WorkdirError, train
from experiments.launch import launch

FULL: dict[str, Any] = {"every": 1, "inner_fraction": 1.0, "outer_fraction": 1.0, "pipelined": False}
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "quarter": {"inner_fraction": 0.25, "outer_fraction": 0.25},
    "eighth": {"inner_fraction": 0.125, "outer_fraction": 0.125},
    "every_4th": {"every": 4},
    "pipelined": {"pipelined": True},
}  # name -> what differs from FULL in `outer`; the first is what the others are compared with

_VARIANTS = flags.DEFINE_multi_enum(
    "variant", list(VARIANTS), list(VARIANTS), 'What to run beside "full"; may be repeated.'
)


def run_variants(config: TrainConfig, workdir: str) -> dict[str, Any]:
    """Trains every variant for all seeds of the config.

    Returns:
      The summary of the first, with `methods` keyed by variant, and `comparisons`, the paired tests against "full".
    """
    root = pathlib.Path(workdir).expanduser()
    if (root / "config.json").exists():
        raise WorkdirError(f"{root} holds a run; give the study a folder of its own")
    names = ["full", *(name for name in _VARIANTS.value if name != "full")]
    outers = {name: dataclasses.replace(config.outer, **{**FULL, **VARIANTS[name]}) for name in names}
    variants = {name: dataclasses.replace(config, method="adalfl", outer=outer) for name, outer in outers.items()}
    summaries = {name: train(variant, root / name) for name, variant in variants.items()}
    methods = {name: {**summary["methods"]["adalfl"], "title": name} for name, summary in summaries.items()}
    full = methods["full"]["test"]["per_seed"]
    comparisons = {name: paired_difference(full, methods[name]["test"]["per_seed"]) for name in names[1:]}
    summary = {**summaries["full"], "methods": methods, "comparisons": comparisons}
    (root / "thrift.json").write_text(json.dumps(summary, indent=2) + "\n")
    Console().print(_table(comparisons))
    return summary


def _table(comparisons: dict[str, dict[str, Any]]) -> Table:
    table = Table(title='test metric less that of "full", paired over seeds')
    for column in ("variant", "difference", "95 % interval", "p"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for name, test in comparisons.items():
        low, high = test["interval"] or (None, None)
        interval = "" if low is None else f"{low:+.4f} to {high:+.4f}"
        p_value = "" if test["p_value"] is None else f"{test['p_value']:.2g}"
        table.add_row(name, f"{test['mean_difference']:+.4f}", interval, p_value)
    return table


if __name__ == "__main__":
    launch(run_variants)
