"""Noisy labels on data drawn again: what is other, and what is shown of it."""

import numpy as np

from experiments.study import noisy_labels, redrawn
from experiments.study.arms import make_config
from experiments.study.compare import paired_tests


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
    spread, known = np.linspace(0.99, 1.01, 4), {}
    for comparison in redrawn.comparisons()[: len(noisy_labels.NOISE)]:  # of MNIST
        arms = {
            arm.name: {"title": arm.title, "chosen": None, "tuning": []}
            | {"test": {"mean": mean, "std": None, "per_seed": (mean * spread).tolist()}}
            | {"steps": [0, 250, 500], "curve": [[0.9, 2 * mean, mean]]}
            for arm, mean in zip(comparison.arms, (0.04, 0.03, 0.05, 0.02), strict=True)
        }
        numbers = {"title": comparison.title, "metric": "error_rate", "reference": "adalfl", "seeds": [*range(4)]}
        numbers |= {"tuning_seeds": [0], "target": None, "arms": arms}
        known[comparison.name] = numbers | paired_tests(arms, "adalfl", ())
    overview, *others = redrawn.parts(redrawn.comparisons(), known)
    assert [part.name for part in others] == list(known) == list(overview.comparisons)
    by_noise, average = overview.tables
    assert len(by_noise.rows) == len(noisy_labels.NOISE)
    assert [row["contests"] for row in average.rows] == [len(noisy_labels.NOISE) - 1] * 4  # right labels are left out
    assert average.rows[0]["arm"] == "AdaLFL, untuned"
    assert redrawn.parts(redrawn.comparisons(), {}) == []
