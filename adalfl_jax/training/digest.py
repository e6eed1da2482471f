"""What a result is known by: a digest of all in a configuration that it depends on."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import adalfl_jax
from adalfl_jax.training.config import TrainConfig
from adalfl_jax.training.start import pin_start
from adalfl_jax.training.workdir import LAYOUT, settings_with_effect

_NOT_OFFLINE = ("method", "methods", "metric", "baseline", "tuning")
_NOT_OFFLINE_OUTER = (
    "learning_rate",
    "schedule",
    "every",
    "inner_fraction",
    "outer_fraction",
    "pipelined",
    "joint_share",
)


def digest_of(config: TrainConfig) -> str:
    """Twelve hexadecimal digits that the release, `LAYOUT` and any field but those of `WITHOUT_EFFECT` change.

    Of learned losses to start from they know the content, and not the path; of data the settings alone.

    Raises:
      ConfigError: learned losses to start from that cannot be read.
    """
    return _digest(settings_with_effect(pin_start(config).to_dict()))


def digest_of_offline_phase(config: TrainConfig) -> str:
    """The same of what the offline phase and its record depend on: runs that agree in it can share the phase."""
    settings = settings_with_effect(pin_start(config).to_dict())
    for field in _NOT_OFFLINE:
        del settings[field]
    for field in _NOT_OFFLINE_OUTER:
        del settings["outer"][field]
    del settings["inner"]["first_step_rate"]
    if config.inner.schedule == "constant":
        del settings["num_steps"]
    return _digest(settings)


def _digest(settings: dict[str, Any]) -> str:
    text = json.dumps({"version": adalfl_jax.__version__, "layout": LAYOUT, **settings}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
