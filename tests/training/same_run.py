"""Whether two workdirs hold the same run, bit for bit, all but what a clock says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tbparse import SummaryReader

from adalfl_jax.training import TrainConfig
from tests.training.tiny import final_state


def assert_same_run(left: Path, right: Path) -> None:
    """Compares every result of two finished runs of one config."""
    names = [sorted(path.name for path in folder.iterdir()) for folder in (left, right)]
    assert names[0] == names[1]
    assert "checkpoints" not in names[0]
    assert (left / "metrics.jsonl").read_bytes() == (right / "metrics.jsonl").read_bytes()
    assert without_seconds(read_json(left / "summary.json")) == without_seconds(read_json(right / "summary.json"))
    assert tensorboard(left) == tensorboard(right)
    settings = read_json(left / "config.json")
    settings.pop("command")
    config = TrainConfig.from_mapping(settings)
    for method in read_json(left / "summary.json")["methods"]:
        states = [final_state(config, folder, method) for folder in (left, right)]
        jax.tree.map(np.testing.assert_array_equal, *states)
    if (left / "learned_loss.safetensors").exists():
        assert (left / "learned_loss.safetensors").read_bytes() == (right / "learned_loss.safetensors").read_bytes()
        with np.load(left / "loss_shapes.npz") as ours, np.load(right / "loss_shapes.npz") as theirs:
            assert ours.files == theirs.files
            for name in ours.files:
                np.testing.assert_array_equal(ours[name], theirs[name])


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def without_seconds(value: Any) -> Any:
    """A summary without the entries named "seconds"."""
    if isinstance(value, dict):
        return {key: without_seconds(item) for key, item in value.items() if key != "seconds"}
    return value


def tensorboard(folder: Path) -> dict[str, list[tuple[Any, ...]]]:
    """Of every TensorBoard run its scalars, in the order of steps and names; none may come twice."""
    found = {}
    for run in sorted({path.parent for path in (folder / "tensorboard").rglob("events*")}):
        rows = [tuple(row) for row in SummaryReader(str(run)).scalars.itertuples(index=False)]
        assert len({row[:2] for row in rows}) == len(rows)
        found[str(run.relative_to(folder))] = sorted(rows)
    return found
