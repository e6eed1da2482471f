"""The configuration of a run as a frozen dataclass: unknown keys, wrong types and impossible values end here.

`configs/default.py` has a value and a sentence for every field; this file and `sections` have their types and ranges.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from adalfl_jax.hypergradient import DIFFERENCES, ESTIMATORS, ONE_STEP, REMEMBERING
from adalfl_jax.registry import require_known
from adalfl_jax.task_losses import METRICS, TASK_LOSSES
from adalfl_jax.training.fields import NonNegativeInt, PositiveInt32, build, jsonable, require, require_expected
from adalfl_jax.training.methods import METHODS
from adalfl_jax.training.sections import (
    AugmentationConfig,
    BaselineConfig,
    CheckpointConfig,
    DatasetConfig,
    EstimatorConfig,
    HostsConfig,
    InnerConfig,
    LearnedLossConfig,
    MeshConfig,
    ModelConfig,
    OfflineConfig,
    OuterConfig,
    TuningConfig,
)

FAULT_POLICIES = ("stop", "skip", "back_off")
WITHOUT_EFFECT = (
    "checkpoint",
    "hosts",
    "mesh",
    "num_loss_figures",
    "profile_steps",
    "wandb_project",
)  # on what a run computes


def first_of_the_last(num_steps: int, share: float) -> int:
    """The number of the first of the last steps, which are a share of all, and one at least."""
    return num_steps - max(1, round(share * num_steps))


@dataclasses.dataclass(frozen=True, slots=True)
class TrainConfig:
    """One run of `train`, or one comparison."""

    method: str
    methods: tuple[str, ...]
    seed: int
    num_seeds: PositiveInt32
    dataset: DatasetConfig
    augmentation: AugmentationConfig
    model: ModelConfig
    task_loss: str
    metric: str
    batch_size: PositiveInt32
    num_steps: PositiveInt32
    eval_every: PositiveInt32
    inner: InnerConfig
    outer: OuterConfig
    offline: OfflineConfig
    learned_loss: LearnedLossConfig
    hypergradient: str
    estimator: EstimatorConfig
    baseline: BaselineConfig
    tuning: TuningConfig
    on_nonfinite: str
    checkpoint: CheckpointConfig
    num_loss_figures: NonNegativeInt
    profile_steps: tuple[int, ...]
    wandb_project: str
    mesh: MeshConfig
    hosts: HostsConfig

    def __post_init__(self) -> None:
        require_expected(self)
        are_names = not any("," in name for name in self.methods)
        require("methods", self.methods, are_names, "a tuple of names, as in \"('task_loss', 'adalfl')\"")
        for name in (self.method, *self.methods):
            require_known("method", METHODS, name)
        require(
            "methods", self.methods, 0 < len(self.methods) == len(set(self.methods)), "one method or more, each once"
        )
        require_known("task loss", TASK_LOSSES, self.task_loss)
        require_known("metric", METRICS, self.metric)
        require_known("on_nonfinite", FAULT_POLICIES, self.on_nonfinite)
        self._check_hypergradient()
        require("outer.every", self.outer.every, self.outer.every <= self.num_steps, "at most config.num_steps")
        steps = self.profile_steps
        is_range = len(steps) == 2 and 1 <= steps[0] <= steps[1]
        require("profile_steps", steps, not steps or is_range, "empty, or a first and a last step, from 1")
        longest = max(self.num_steps, self.offline.num_steps)
        fits = not steps or steps[0] <= longest
        require("profile_steps", steps, fits, f"steps that some phase takes, at most {longest}")
        fits = 0 <= self.seed <= 2**31 - self.num_seeds
        require("seed", self.seed, fits, "a whole number from 0, with all of num_seeds below 2**31")

    def _check_hypergradient(self) -> None:
        name = self.hypergradient
        require_known("hypergradient", ESTIMATORS, name)
        if self.outer.pipelined or self.outer.inner_fraction < 1:
            require(
                "hypergradient",
                name,
                name in ONE_STEP,
                f"one of {', '.join(ONE_STEP)} with outer.pipelined or outer.inner_fraction (any takes "
                "outer.outer_fraction)",
            )
        if self.learned_loss.is_bounded:
            share = self.outer.inner_fraction
            require("outer.inner_fraction", share, share == 1, "1.0 with learned_loss.floor or learned_loss.ceiling")
        if self.outer.every > 1:
            require(
                "hypergradient",
                name,
                name not in REMEMBERING,
                "one that remembers nothing with outer.every above 1",
            )
        if name in DIFFERENCES:
            is_coarse = self.model.compute_dtype == "bfloat16"
            require("hypergradient", name, not is_coarse, '"forward" with model.compute_dtype "bfloat16"')

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of the run, one model each."""
        return tuple(range(self.seed, self.seed + self.num_seeds))

    @property
    def first_joint_step(self) -> int:
        """The number of the first step of theta on both splits; `num_steps` where `outer.joint_share` wants none."""
        share = self.outer.joint_share
        return first_of_the_last(self.num_steps, share) if share else self.num_steps

    def trains_on_valid(self, method: str) -> bool:
        """Whether theta trains on the very examples that a method's validation metric is of."""
        is_whole = self.outer.split == "valid" and self.outer.split_fraction == 1
        joins = self.outer.joint_share > 0 and method != "reweighting"  # to which they give weights alone
        return is_whole and (method == "fine_tuned" or joins)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Builds a config from nested mappings: a `ConfigDict`, or what `json.load` gives.

        Raises:
          ConfigError: an unknown or missing key, a value of a wrong type or out of its range.
        """
        return build(cls, values, "config")

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries and lists, as `json.dumps` takes them."""
        return jsonable(dataclasses.asdict(self))
