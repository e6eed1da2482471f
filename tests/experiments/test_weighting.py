"""Rivals that weigh examples: what is tuned further, and what is shown of it."""

import pytest

from experiments.study import noisy_labels, weighting
from experiments.study.arms import make_config
from tests.experiments.made_up import numbers_of


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
    there = weighting.comparisons()[: len(noisy_labels.NOISE)]  # of MNIST, with the MLP
    known = {comparison.name: numbers_of(comparison, (0.03, 0.05, 0.02)) for comparison in there}
    overview, *others = weighting.parts(weighting.comparisons(), known)
    assert [part.name for part in others] == list(known) == list(overview.comparisons)
    by_noise, average = overview.tables
    assert {row["best"] for row in by_noise.rows} == {"meta_weight_net_decayed"}
    assert [row["contests"] for row in average.rows] == [len(noisy_labels.NOISE) - 1] * 3  # right labels are left out
    assert weighting.parts(weighting.comparisons(), {}) == []
