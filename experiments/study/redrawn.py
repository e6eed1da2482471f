"""`noisy_labels` with splits, wrong labels and clean set drawn anew, and more seeds to tune by: do its findings hold?

Everything about AdaLFL, its initialisation among them, was settled on the draw before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.study.arms import Comparison
from experiments.study.noisy_labels import (
    AHEAD,
    ARMS,
    MANY_FOR_TUNING,
    MLP,
    NOISE,
    PROBLEMS,
    SETTING,
    UNTUNED,
    parts_by_noise,
    show_noise,
)
from experiments.study.tables import Part

DRAW = 1  # the dataset seed; that of all other studies is 0
NAME = "redrawn"


def comparisons() -> list[Comparison]:
    """Every noise, with the MLP and the rivals that are ahead somewhere."""
    return [
        Comparison(
            f"{NAME}_{problem}_{noise}",
            f"{title}, {show_noise(noise)}, drawn again",
            "default",
            {**SETTING, **overrides, **corruption, "dataset.seed": DRAW},
            ARMS,
            reference=UNTUNED.name,
            num_tuning_seeds=MANY_FOR_TUNING,
        ).select(AHEAD)
        for problem, (title, overrides) in PROBLEMS.items()
        for noise, corruption in NOISE.items()
        if overrides["model.name"] == MLP["model.name"]
    ]


def parts(comparisons: Sequence[Comparison], known: Mapping[str, Any]) -> list[Part]:
    """An overview with averages over the wrong labels, and every comparison."""
    title, averaged = "Drawn again: AdaLFL, untuned, and its closest rivals", "Drawn again, over all wrong labels"
    return parts_by_noise(NAME, title, averaged, AHEAD, comparisons, known)
