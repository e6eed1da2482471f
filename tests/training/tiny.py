"""Configurations and runs small enough for a test."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from adalfl_jax.training import TrainConfig
from adalfl_jax.training.checkpoint import load_state
from adalfl_jax.training.initial import init_phi, init_rate_factor, init_theta, make_seed_keys
from adalfl_jax.training.methods import METHODS
from adalfl_jax.training.optimizers import make_outer_optimizer
from adalfl_jax.training.setup import make_setup
from adalfl_jax.training.state import RunState
from adalfl_jax.types import Phi
from configs import default

ROOT = Path(__file__).parents[2]


SETTINGS = {
    "model.hidden_sizes": (8,),
    "learned_loss.hidden_sizes": (8,),
    "batch_size": 50,
    "num_seeds": 2,
    "num_steps": 20,
    "eval_every": 10,
    "offline.num_steps": 10,
    "inner.learning_rate": 0.1,
    "num_loss_figures": 0,  # each takes as long as all else
}
LINEAR = {"model.name": "logistic"}  # compiles fastest
DIABETES = {
    "dataset.name": "diabetes",
    "task_loss": "squared_error",
    "metric": "mean_squared_error",
    "learned_loss.predictions": "raw",
}


def default_values() -> dict[str, Any]:
    """The default configuration as nested plain dictionaries, which take a value of any type."""
    return default.get_config().to_dict()


def with_value(path: str, value: Any) -> dict[str, Any]:
    """The default configuration with one field, "inner.momentum" say, set or added."""
    values = default_values()
    *parents, leaf = path.split(".")
    node = values
    for parent in parents:
        node = node[parent]
    node[leaf] = value
    return values


def tiny_config(overrides: Mapping[str, Any] | None = None, /, **more: Any) -> TrainConfig:
    """The default configuration, tiny, with overrides by dotted name."""
    config = default.get_config()
    config.update_from_flattened_dict({**SETTINGS, **(overrides or {}), **more})
    return TrainConfig.from_mapping(config)


def final_state(config: TrainConfig, workdir: Path, method: str) -> RunState:
    """The trained state of a method, of all seeds, as the run left it."""
    setup, keys = make_setup(config), make_seed_keys(config.seeds)

    def make() -> RunState:
        if not METHODS[method].has_learned_loss:
            return RunState(init_theta(setup, keys), None)
        create = jax.vmap(lambda params: Phi.create(params, make_outer_optimizer(config)))
        return RunState(init_theta(setup, keys), create(init_phi(setup, keys).params), init_rate_factor(setup))

    return load_state(workdir / "states" / method, jax.eval_shape(make))


def records(workdir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Name -> content and time of change of every file below a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
