"""The rivals that weigh examples, at rates that decay; with LeNet-5, where `noisy_labels` has none, at constant ones.

Their steps cost as much as AdaLFL's, which with LeNet-5 is more than those of all other rivals together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.study.arms import Arm, Comparison, Overrides, grid
from experiments.study.noisy_labels import (
    ARMS,
    LINEAR,
    NOISE,
    PROBLEMS,
    SETTING,
    UNTUNED,
    parts_by_noise,
    show_noise,
)
from experiments.study.tables import Part

NAME = "weighting"
BY_NAME = {arm.name: arm for arm in ARMS}
CONSTANT = BY_NAME["meta_weight_net"]


def _points(*rates: float) -> tuple[Overrides, ...]:
    return grid(inner__learning_rate=rates, outer__learning_rate=(1e-3, 1e-2, 3e-2))


def _further(arm: Arm, *points: Overrides) -> Arm:
    return arm._replace(grid=(*arm.grid, *points))


DECAYED = Arm(
    "meta_weight_net_decayed", "Meta-Weight-Net, decayed", {**CONSTANT.overrides, **LINEAR}, _points(0.03, 0.1, 0.3)
)
REWEIGHTING, REWEIGHTING_DECAYED = BY_NAME["reweighting"], BY_NAME["reweighting_decayed"]
RIVALS: dict[str, tuple[Arm, ...]] = {
    "mlp": (DECAYED, REWEIGHTING_DECAYED),
    "lenet5": (  # whose best rates are larger
        _further(CONSTANT, *_points(0.3, 1.0)),
        _further(DECAYED, *_points(1.0)),
        _further(REWEIGHTING, *grid(inner__learning_rate=(0.3, 1.0))),
        _further(REWEIGHTING_DECAYED, *grid(inner__learning_rate=(1.0,))),
    ),
}
KEY_RIVALS = (CONSTANT.name, DECAYED.name, REWEIGHTING.name, REWEIGHTING_DECAYED.name)


def comparisons() -> list[Comparison]:
    """Every problem with every noise."""
    return [
        Comparison(
            f"{NAME}_{problem}_{noise}",
            f"{title}, {show_noise(noise)}, learned weights of examples",
            "default",
            {**SETTING, **overrides, **corruption},
            (*RIVALS[overrides["model.name"]], UNTUNED),
            reference=UNTUNED.name,
        )
        for problem, (title, overrides) in PROBLEMS.items()
        for noise, corruption in NOISE.items()
    ]


def parts(comparisons: Sequence[Comparison], known: Mapping[str, Any]) -> list[Part]:
    """An overview with averages over the wrong labels, and every comparison."""
    title = "Learned weights of examples, and AdaLFL, untuned"
    averaged = "Learned weights of examples, over all wrong labels"
    return parts_by_noise(NAME, title, averaged, KEY_RIVALS, comparisons, known)
