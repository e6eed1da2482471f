"""Reduced forms of comparisons, which show in minutes that all works and make no results."""

from __future__ import annotations

from adalfl_jax.training import TrainConfig
from experiments.study.arms import QUICK_SUFFIX, Arm, Comparison, Overrides, make_config, make_source_config

DIGITS: Overrides = {"dataset.name": "digits", "model.name": "mlp", "batch_size": 50}
QUICK: Overrides = {
    "model.hidden_sizes": (64,),
    "num_steps": 300,
    "eval_every": 50,
    "offline.num_steps": 300,
}


def reduce_comparison(comparison: Comparison) -> Comparison:
    """With fewer steps and the first two points of every grid, and on digits where data are larger."""
    config = make_config(comparison, comparison.arms[0], {}, range(1))
    where = "" if _is_small(config) else "on digits, "
    title = f"{comparison.title} (quick form: {where}{QUICK['num_steps']} steps)"
    return comparison._replace(
        name=f"{comparison.name}{QUICK_SUFFIX}",
        title=title,
        arms=tuple(_reduced_arm(arm) for arm in comparison.arms),
        overrides=_reduced_overrides(config, comparison.overrides),
    )


def _reduced_arm(arm: Arm) -> Arm:
    source = arm.source
    if source is not None:
        config = make_source_config(source, range(1))
        source = source._replace(overrides=_reduced_overrides(config, source.overrides))
    return arm._replace(grid=arm.grid[:2], source=source)


def _reduced_overrides(config: TrainConfig, overrides: Overrides) -> Overrides:
    small = {} if _is_small(config) else dict(DIGITS)
    if config.model.name == "logistic":
        small.pop("model.name", None)  # it takes digits as they are
    if config.dataset.valid_examples:
        small |= {"dataset.valid_examples": 200}
    return {**overrides, **QUICK, **small}


def _is_small(config: TrainConfig) -> bool:
    return config.dataset.name in ("digits", "diabetes")
