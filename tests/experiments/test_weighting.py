"""Rivals that weigh examples: what is tuned further, and what is shown of it."""

import numpy as np
import pytest

from experiments.study import noisy_labels, weighting
from experiments.study.arms import make_config
from experiments.study.compare import paired_tests


def test_rates_are_added_to_those_of_noisy_labels_and_all_else_is_as_there():
    before = {comparison.name: comparison for comparison in noisy_labels.comparisons()}
    rivals = {arm.name: arm for arm in noisy_labels.ARMS}
    found = weighting.comparisons()
    assert len(found) == len(noisy_labels.PROBLEMS) * len(noisy_labels.NOISE)
    for comparison in found:
        assert comparison.overrides == before[comparison.name.removeprefix("weighting_")].overrides
        for arm in comparison.arms:
            if arm.name in rivals:
                points = rivals[arm.name].grid
                assert (arm.overrides, arm.grid[: len(points)]) == (rivals[arm.name].overrides, points)


@pytest.mark.parametrize("comparison", weighting.comparisons(), ids=lambda comparison: comparison.name)
def test_no_point_is_tried_twice(comparison):
    for arm in comparison.arms:
        configs = [make_config(comparison, arm, point, range(1)) for point in arm.grid]
        assert len(set(configs)) == len(configs)
        if "decayed" in arm.name:
            assert {config.inner.schedule for config in configs} == {"linear"}


def test_an_average_over_the_wrong_labels_stands_beside_every_noise():
    spread, known = np.linspace(0.99, 1.01, 4), {}
    for comparison in weighting.comparisons()[: len(noisy_labels.NOISE)]:  # of MNIST, MLP
        arms = {
            arm.name: {"title": arm.title, "chosen": None, "tuning": []}
            | {"test": {"mean": mean, "std": None, "per_seed": (mean * spread).tolist()}}
            | {"steps": [0, 250, 500], "curve": [[0.9, 2 * mean, mean]]}
            for arm, mean in zip(comparison.arms, (0.03, 0.05, 0.02), strict=True)
        }
        numbers = {"title": comparison.title, "metric": "error_rate", "reference": "adalfl", "seeds": [*range(4)]}
        numbers |= {"tuning_seeds": [0], "target": None, "arms": arms}
        known[comparison.name] = numbers | paired_tests(arms, "adalfl", ())
    overview, *others = weighting.parts(weighting.comparisons(), known)
    assert [part.name for part in others] == list(known) == list(overview.comparisons)
    by_noise, average = overview.tables
    assert {row["best"] for row in by_noise.rows} == {"meta_weight_net_decayed"}
    assert [row["contests"] for row in average.rows] == [len(noisy_labels.NOISE) - 1] * 3  # right labels are left out
    assert weighting.parts(weighting.comparisons(), {}) == []
