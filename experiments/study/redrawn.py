"""`noisy_labels` with splits, wrong labels and clean set drawn anew, and more seeds to tune by: do its findings hold?

Everything about AdaLFL, its initialisation among them, was settled on the draw before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.study.arms import Comparison, suffix_of
from experiments.study.noisy_labels import (
    AHEAD,
    ARMS,
    MANY_FOR_TUNING,
    MLP,
    NOISE,
    PROBLEMS,
    SETTING,
    UNTUNED,
    contests_by_noise,
    show_noise,
)
from experiments.study.overview import average_tables, contests_figure, contests_table
from experiments.study.tables import Part, comparison_parts

DRAW = 1  # the dataset seed; that of all other studies is 0
PREFIX = "redrawn_"


def comparisons() -> list[Comparison]:
    """Every noise, with the MLP and the rivals that are ahead somewhere."""
    return [
        Comparison(
            f"{PREFIX}{problem}_{noise}",
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
    suffix = suffix_of(comparisons)
    contests, wrong = contests_by_noise(known, AHEAD, suffix, PREFIX)
    if not contests:
        return []
    overview = Part(
        f"redrawn{suffix}",
        "Drawn again: AdaLFL, untuned, and its closest rivals",
        tuple(contest.name for contest in contests),
        contests_figure(contests, AHEAD),
        (contests_table(contests), *average_tables(wrong, "Drawn again, over all wrong labels")),
    )
    return [overview, *comparison_parts(comparisons, known)]
