"""What a run left behind, as plain data: all that figures and the report are made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Of a validation metric, where the summary of a method has "trains_on_valid".
TRAINED_ON = (
    "* measured on examples that the method trains on, and so no guide; outer.split_fraction below 1 holds some out"
)
UNREAD = {"train": "methods", "compare": "method"}  # by program, the field of the configuration it does not read


@dataclasses.dataclass(frozen=True)
class Series:
    """One scalar through one phase of one method, for every seed."""

    steps: np.ndarray  # [T]
    values: np.ndarray  # [S, T]


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """The files of a workdir, read.

    Attributes:
      config: `config.json`.
      summary: `summary.json`.
      scalars: the records of `metrics.jsonl`.
      shapes: `loss_shapes.npz`: "predictions" `[P]` and, for every method with a loss network, "METHOD/steps" `[T]`
        and "METHOD/values" `[S, T, 2, P]`.
    """

    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    scalars: Sequence[Mapping[str, Any]]
    shapes: Mapping[str, np.ndarray]

    def series(self, method: str, name: str) -> Series | None:
        """A scalar over the steps of a method, or None where it was not measured."""
        rows = [row for row in self.scalars if row["method"] == method and name in row]
        if not rows:
            return None
        seeds, steps = sorted({row["seed"] for row in rows}), sorted({row["step"] for row in rows})
        values = np.full((len(seeds), len(steps)), np.nan)
        for row in rows:
            values[seeds.index(row["seed"]), steps.index(row["step"])] = row[name]
        return Series(np.array(steps), values)


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a configuration by dotted name, in their order."""
    fields: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            fields |= {f"{name}.{below}": leaf for below, leaf in flatten(value).items()}
        else:
            fields[name] = value
    return fields
