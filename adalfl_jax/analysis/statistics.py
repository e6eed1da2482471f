"""Means over seeds, and differences between methods seed by seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.stats

ROUNDING = 2e-5  # a difference of this share of two metrics may be rounding: of means in float32, or to six digits


def describe(per_seed: Sequence[float]) -> dict[str, Any]:
    """Values, mean and sample standard deviation (None for a single seed) of a metric over seeds."""
    values = np.asarray(per_seed, float)
    std = float(values.std(ddof=1)) if len(values) > 1 else None
    return {"per_seed": values.tolist(), "mean": float(values.mean()), "std": std}


def paired_difference(first: Sequence[float], second: Sequence[float], confidence: float = 0.95) -> dict[str, Any]:
    """Paired t-test of `second - first` over seeds that share data order and initial weights.

    Returns:
      The mean difference, its confidence interval `[low, high]`, the two-sided p-value and the effect size (Cohen's
      d_z: the mean difference in standard deviations of the differences); the last three are None where there are fewer
      than two seeds, all differences are equal or one is not finite, for which the test is not defined.

    Raises:
      ValueError: different numbers of seeds, or none.
    """
    differences = _differences(first, second)
    result: dict[str, Any] = {"mean_difference": float(differences.mean())}
    result |= {"interval": None, "p_value": None, "effect_size": None}
    rounding = ROUNDING * np.abs([first, second]).max(axis=0)
    if _are_several(differences) and (differences - rounding / 2).max() > (differences + rounding / 2).min():
        test = scipy.stats.ttest_rel(second, first)
        interval = test.confidence_interval(confidence)
        result |= {"interval": [float(interval.low), float(interval.high)], "p_value": float(test.pvalue)}
        result["effect_size"] = float(differences.mean() / differences.std(ddof=1))
    return result


def signed_rank_test(first: Sequence[float], second: Sequence[float]) -> dict[str, Any]:
    """Wilcoxon's signed-rank test of `second - first` over seeds, which one lost seed does not decide.

    Returns:
      The two-sided `p_value`, None where there are fewer than two seeds, no difference or one that is not finite; at
      least 2^(1 - seeds). It is exact, with ties too, which have the mean of their ranks; what is equal has none.
      Differences that rounding may have set apart (`ROUNDING`) tie, so that the test is a little coarser than SciPy's.

    Raises:
      ValueError: different numbers of seeds, or none.
    """
    differences = _differences(first, second)
    if not _are_several(differences):
        return {"p_value": None}
    rounding = ROUNDING * np.abs([first, second]).max(axis=0)
    differences[np.abs(differences) <= rounding] = 0
    if not differences.any():
        return {"p_value": None}
    moved = differences != 0
    # Twice the ranks, which are whole numbers; SciPy's own test is exact with ties up to 13 values, or not at all.
    ranks = (2 * scipy.stats.rankdata(_tied(np.abs(differences[moved]), rounding[moved]))).astype(int)
    chances = np.ones(1)  # of each sum of the ranks that go up, if signs are drawn
    for rank in ranks:
        chances = (np.pad(chances, (0, rank)) + np.pad(chances, (rank, 0))) / 2
    offsets = np.abs(2 * np.arange(len(chances)) - ranks.sum())
    is_as_far = offsets >= offsets[ranks[differences[moved] > 0].sum()]
    return {"p_value": min(1.0, float(chances[is_as_far].sum()))}


def _tied(sizes: np.ndarray, rounding: np.ndarray) -> np.ndarray:
    """The numbers of groups, the smallest first: what a number is above the first of its group may be rounding."""
    groups, first, group = np.empty(len(sizes), int), None, -1
    for index in sizes.argsort(kind="stable"):
        if first is None or sizes[index] - sizes[first] > max(rounding[index], rounding[first]):
            first, group = index, group + 1
        groups[index] = group
    return groups


def _differences(first: Sequence[float], second: Sequence[float]) -> np.ndarray:
    if not 0 < len(first) == len(second):
        raise ValueError(f"a paired test takes as many values of one as of the other; got {len(first)}, {len(second)}")
    return np.asarray(second, float) - np.asarray(first, float)


def _are_several(differences: np.ndarray) -> bool:
    return len(differences) > 1 and bool(np.isfinite(differences).all())


def adjust_p_values(tests: Sequence[dict[str, Any]]) -> None:
    """Gives tests, as from the functions above, an `adjusted_p_value` for their number (Benjamini and Hochberg).

    Those that are not defined have none and are not counted.
    """
    defined = [test for test in tests if test["p_value"] is not None]
    if defined:
        adjusted = scipy.stats.false_discovery_control([test["p_value"] for test in defined])
        for test, p_value in zip(defined, adjusted, strict=True):
            test["adjusted_p_value"] = float(p_value)
