"""What `summary.json` says of a run and its methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adalfl_jax.analysis.statistics import adjust_p_values, describe, paired_difference
from adalfl_jax.training.config import TrainConfig
from adalfl_jax.training.machine import describe_machine
from adalfl_jax.training.methods import METHODS
from adalfl_jax.training.results import MethodResult
from adalfl_jax.training.setup import Setup


def summarize(setup: Setup, results: Sequence[MethodResult]) -> dict[str, Any]:
    """The summary of a run that is over, but for the learned loss it keeps."""
    config = setup.config
    methods = {
        result.method: method_entry(
            config,
            result.method,
            learning_rate=result.learning_rate,
            learning_rates=result.learning_rates,
            test=result.test.tolist(),
            valid=result.valid.tolist(),
            seconds={"training": round(result.seconds, 2), "offline": round(result.offline_seconds, 2)},
            tuning=result.tuning,
        )
        for result in results
    }
    reference = "adalfl" if "adalfl" in methods else results[-1].method
    comparisons = [
        {"method": reference, "against": name}
        | paired_difference(methods[name]["test"]["per_seed"], methods[reference]["test"]["per_seed"])
        for name in methods
        if name != reference
    ]
    adjust_p_values(comparisons)
    return {
        "dataset": config.dataset.name,
        "data": setup.dataset.content,
        "metric": config.metric,
        "num_steps": config.num_steps,
        "seeds": list(config.seeds),
        "methods": methods,
        "comparisons": comparisons,
        "environment": describe_machine(("adalfl_jax", "jax", "jaxlib", "flax", "optax", "numpy")),
    }


def method_entry(
    config: TrainConfig,
    method: str,
    *,
    learning_rate: float | None,
    test: Sequence[float],
    valid: Sequence[float],
    seconds: Mapping[str, float | None],
    **further: Any,
) -> dict[str, Any]:
    """The entry of one method.

    Args:
      config: of the run.
      method: a key of `METHODS`.
      learning_rate: alpha, None where it is known at the end alone.
      test: metric of each seed on the test split.
      valid: the same on the validation split.
      seconds: of "training" and of the "offline" phase, None where they are known at the end alone.
      **further: what some entries have; those that are None are left out.
    """
    entry = {
        "title": METHODS[method].title,
        "learning_rate": learning_rate,
        "test": describe(test),
        "valid": describe(valid),
        "seconds": seconds,
    }
    if config.trains_on_valid(method):
        further["trains_on_valid"] = True
    return entry | {name: value for name, value in further.items() if value is not None}
