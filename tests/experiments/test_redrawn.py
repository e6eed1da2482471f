"""Noisy labels on data drawn again: what is other, and what is shown of it."""

from experiments.study import noisy_labels, redrawn
from experiments.study.arms import make_config
from tests.experiments.made_up import numbers_of


def test_all_but_the_draw_is_as_in_noisy_labels():
    before = {comparison.name: comparison for comparison in noisy_labels.comparisons()}
    again = redrawn.comparisons()
    assert len(again) == 2 * len(noisy_labels.NOISE)
    for comparison in again:
        assert comparison.num_tuning_seeds == 6  # where the first draw had two
        first = before[comparison.name.removeprefix("redrawn_")]
        assert {"adalfl"} < {arm.name for arm in comparison.arms} <= {arm.name for arm in first.arms}
        for arm in comparison.arms:
            config, other = (make_config(each, arm, arm.grid[0], range(1)).to_dict() for each in (comparison, first))
            assert (config["dataset"].pop("seed"), other["dataset"].pop("seed")) == (1, 0)
            assert config == other


def test_an_average_over_the_wrong_labels_stands_beside_every_noise():
    there = redrawn.comparisons()[: len(noisy_labels.NOISE)]  # of MNIST, with the MLP
    known = {comparison.name: numbers_of(comparison, (0.04, 0.03, 0.05, 0.02)) for comparison in there}
    overview, *others = redrawn.parts(redrawn.comparisons(), known)
    assert [part.name for part in others] == list(known) == list(overview.comparisons)
    by_noise, average = overview.tables
    assert len(by_noise.rows) == len(noisy_labels.NOISE)
    assert [row["contests"] for row in average.rows] == [len(noisy_labels.NOISE) - 1] * 4  # right labels are left out
    assert average.rows[0]["arm"] == "AdaLFL, untuned"
    assert redrawn.parts(redrawn.comparisons(), {}) == []
