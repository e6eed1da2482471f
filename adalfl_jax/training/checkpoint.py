"""The trained state of a run, kept with Orbax."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from adalfl_jax.training.phases import RunState


def save_state(path: Path, state: RunState) -> None:
    """Writes theta and phi of all seeds to the folder `path`, which must not exist."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, state._asdict())


def load_state(path: Path, like: RunState) -> RunState:
    """Reads what `save_state` wrote.

    Args:
      path: the folder.
      like: a state of the same structure and shapes; arrays or `jax.ShapeDtypeStruct`s.
    """
    with ocp.StandardCheckpointer() as checkpointer:
        restored: Any = checkpointer.restore(path.resolve(), like._asdict())
    return RunState(**restored)
