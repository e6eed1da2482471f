"""The measures and pictures of a run in Weights & Biases, for those who want them there."""

from __future__ import annotations

import importlib.util
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from adalfl_jax.training import workdir as layout
from adalfl_jax.training.config import TrainConfig
from adalfl_jax.training.fields import ConfigError
from adalfl_jax.training.files import read_json, write_json


def require_wandb(config: TrainConfig) -> None:
    """Raises ConfigError if a config asks for Weights & Biases and its package is not installed."""
    if config.wandb_project and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"config.wandb_project is {config.wandb_project!r}, and the package wandb is not installed; "
            'pip install "adalfl_jax[wandb]", or leave the project empty'
        )


class WandbRun:
    """One run of Weights & Biases for a workdir: means over seeds, and pictures; a context manager.

    A resumed run logs its first steps again, so measures are numbered, and those that were sent already are left out.

    Raises:
      ConfigError: it cannot be started.
    """

    def __init__(self, workdir: Path, config: TrainConfig):
        import wandb  # pyright: ignore[reportMissingImports]

        try:
            self._run: Any = wandb.init(
                project=config.wandb_project,
                id=_run_id(workdir),
                name=workdir.name,
                dir=str(workdir),
                config=config.to_dict(),
                resume="allow",
            )
        except Exception as error:  # of the service, the network or the account
            raise ConfigError(
                f"Weights & Biases did not start ({error}); `wandb login`, set WANDB_MODE=offline, or leave "
                "config.wandb_project empty"
            ) from error
        self._as_image = wandb.Image
        self._number = -1  # of the last measures; a picture goes with them
        self._known: set[str] = set()

    def write(self, method: str, phase: str, step: int, scalars: Mapping[str, np.ndarray]) -> None:
        """Logs the means of scalars `[S]`."""
        self._number += 1
        self._log(f"{method}/{phase}", step, {name: float(np.mean(value)) for name, value in scalars.items()})

    def write_picture(self, method: str, phase: str, step: int, picture: np.ndarray) -> None:
        """Logs pixels, `[H, W, 3]` bytes."""
        self._log(f"{method}/{phase}", step, {"learned_loss": self._as_image(picture)})

    def _log(self, group: str, step: int, values: dict[str, Any]) -> None:
        if group not in self._known:  # the steps of each phase are an axis of their own
            self._known.add(group)
            self._run.define_metric(f"{group}/step", hidden=True)
            self._run.define_metric(f"{group}/*", step_metric=f"{group}/step")
        if self._number >= self._run.starting_step:
            logged = {f"{group}/{name}": value for name, value in {"step": step, **values}.items()}
            self._run.log(logged, step=self._number)

    def __enter__(self) -> WandbRun:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        self._run.finish(exit_code=0 if kind is None else 1)


def _run_id(workdir: Path) -> str:
    """The name of the workdir's run, drawn once."""
    path = workdir / layout.WANDB_ID
    if not path.exists():
        write_json(path, {"id": uuid.uuid4().hex[:12]})
    return read_json(path, "id")["id"]
