"""The trained state of a run, kept with Orbax."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from adalfl_jax.training.config import LEARNING, TrainConfig
from adalfl_jax.training.phases import init_phi, init_theta, make_seed_keys, restart_outer_optimizer
from adalfl_jax.training.setup import make_setup
from adalfl_jax.training.state import RunState


def save_state(path: Path, state: RunState) -> None:
    """Writes theta and phi of all seeds to the folder `path`, which must not exist."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, state._asdict())


def load_state(path: str | os.PathLike[str], structure: RunState) -> RunState:
    """Reads what `save_state` wrote.

    Args:
      path: the folder.
      structure: a state of the same structure and shapes, from `state_structure`.
    """
    with ocp.StandardCheckpointer() as checkpointer:
        restored: Any = checkpointer.restore(Path(path).resolve(), structure._asdict())
    return RunState(**restored)


def state_structure(config: TrainConfig, method: str) -> RunState:
    """The structure and shapes of the state a method of a run ends in, without values."""
    setup = make_setup(config)

    def make() -> RunState:
        keys = make_seed_keys(config.seeds)
        phi = restart_outer_optimizer(init_phi(setup, keys)) if method in LEARNING else None
        return RunState(init_theta(setup, keys), phi)

    return jax.eval_shape(make)
