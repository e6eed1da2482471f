"""The studies there are, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.study import (
    ablation,
    behaviour,
    clean_labels,
    clean_set,
    noisy_labels,
    past_the_paper,
    recipe,
    redrawn,
    text,
    thrift,
    transfer,
    weighting,
)
from experiments.study.arms import Comparison
from experiments.study.tables import Part, comparison_parts


class Study(NamedTuple):
    """Comparisons, and what is shown of them."""

    comparisons: Callable[[], list[Comparison]]
    parts: Callable[[Sequence[Comparison], Mapping[str, Any]], list[Part]] = comparison_parts
    measure: Callable[[Mapping[str, Any], Path], dict[str, Any]] = lambda numbers, workdir: {}  # further numbers


STUDIES = {
    "ablation": Study(ablation.comparisons),
    "behaviour": Study(behaviour.comparisons, behaviour.parts, behaviour.measure),
    "clean_labels": Study(clean_labels.comparisons),
    "clean_set": Study(clean_set.comparisons, clean_set.parts),
    "noisy_labels": Study(noisy_labels.comparisons, noisy_labels.parts, noisy_labels.measure),
    "past_the_paper": Study(past_the_paper.comparisons),
    "recipe": Study(recipe.comparisons),
    "redrawn": Study(redrawn.comparisons, redrawn.parts),
    "text": Study(text.comparisons),
    "thrift": Study(thrift.comparisons),
    "transfer": Study(transfer.comparisons, transfer.parts),
    "weighting": Study(weighting.comparisons, weighting.parts),
}
