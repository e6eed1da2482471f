"""The study of training on the clean set too, at the end."""

import re

import numpy as np
import pytest

from adalfl_jax.training.digest import digest_of
from experiments.study import clean_set, noisy_labels
from experiments.study.arms import make_config
from experiments.tables import render_table

SEEDS = 4


def of_tuning(arm):
    points = [{"inner.learning_rate": rate} for rate in (0.1, 0.3, 1.0)] if "symmetric" in arm else []
    return {"chosen": points[1] if points else None, "tuning": [{"point": point} for point in points]}


def numbers_of(comparison, means):
    """Arm -> its mean error, at which its seeds are but for a percent."""
    spread = np.linspace(0.99, 1.01, SEEDS)
    tests = {arm: {"mean": mean, "std": None, "per_seed": (mean * spread).tolist()} for arm, mean in means.items()}
    titles = {arm.name: arm.title for arm in comparison.arms}
    rivals = [arm for arm in means if arm != comparison.reference]
    return {
        "title": comparison.title,
        "reference": comparison.reference,
        "seeds": list(range(SEEDS)),
        "arms": {arm: {"title": titles[arm], "test": test, **of_tuning(arm)} for arm, test in tests.items()},
        "pairs": [
            {"arm": arm, "against": against, "mean_difference": -0.005, "interval": None}
            | {"adjusted_p_value": 0.03, "signed_rank": {"adjusted_p_value": 0.04}}
            for arm, against in comparison.pairs
            if arm in means and against in means
        ],
        "differences": {arm: {"adjusted_p_value": 0.01 * (1 + place)} for place, arm in enumerate(rivals)},
    }


@pytest.fixture
def comparisons():
    return {comparison.name: comparison for comparison in clean_set.comparisons()}


def test_what_noisy_labels_has_trained_is_not_trained_again(comparisons):
    others = {comparison.name: comparison for comparison in noisy_labels.comparisons()}
    for name, comparison in comparisons.items():
        there = {arm.name: arm for arm in others[name].arms}
        shared = [arm for arm in comparison.arms if arm.name in there]
        assert len(shared) == 4
        for arm in shared:
            assert arm == there[arm.name]
            for point in arm.grid:
                one, other = (make_config(each, arm, point, range(2)) for each in (comparison, others[name]))
                assert digest_of(one) == digest_of(other)


def test_the_clean_set_joins_in_two_arms_alone(comparisons):
    for comparison in comparisons.values():
        shares = {
            arm.name: make_config(comparison, arm, arm.grid[0], range(2)).outer.joint_share for arm in comparison.arms
        }
        joined = {name for name, share in shares.items() if share == 0.2}
        assert joined == {"symmetric_decayed_then_joint", "adalfl_then_joint"}
        assert {share for name, share in shares.items() if name not in joined} == {0}
        assert comparison.reference == "adalfl_then_joint"


def test_errors_stand_in_a_column_for_each_noise(comparisons):
    names = ["mnist_mlp_40", "mnist_mlp_80", "mnist_mlp_pair_40"]
    means = {
        "symmetric_decayed": 0.02,
        "symmetric_decayed_then_joint": 0.015,
        "adalfl": 0.04,
        "adalfl_then_joint": 0.03,
    }
    known = {name: numbers_of(comparisons[name], means) for name in names}
    known["fashion_mnist_mlp_40"] = numbers_of(comparisons["fashion_mnist_mlp_40"], means)
    (part,) = clean_set.parts(list(comparisons.values()), known)
    assert part.comparisons == (*names, "fashion_mnist_mlp_40")
    first, second, *averages = part.tables
    assert list(first.columns) == [
        "arm",
        "40 % wrong labels",
        "80 % wrong labels",
        "40 % of labels moved to the next class",
    ]
    assert list(second.columns) == ["arm", "40 % wrong labels"]
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in render_table(second).splitlines()[4:8]]
    assert rows == [
        ["symmetric cross-entropy, decayed", "2.00 at 0.3, p = 0.01"],
        ["symmetric cross-entropy, decayed, joint at the end", "1.50 at 0.3, p = 0.02"],
        ["AdaLFL, untuned", "4.00, p = 0.03"],
        ["AdaLFL, untuned, joint at the end", "3.00"],
    ]
    further = "joint at the end minus symmetric cross-entropy, decayed: 40 % wrong labels -0.50, p = 0.03"
    assert second.notes[-1].endswith(f"{further} (0.04 by ranks).")
    (average,) = averages  # of MNIST, which has three noises
    assert [row["arm"] for row in average.rows] == [rows[place][0] for place in (1, 0, 3, 2)]
    known["mnist_mlp_clean"] = numbers_of(comparisons["mnist_mlp_clean"], means)
    (part,) = clean_set.parts(list(comparisons.values()), known)
    assert [table.rows[0]["contests"] for table in part.tables[2:]] == [3, 4]


def test_an_arm_that_diverged_is_shown_so(comparisons):
    numbers = numbers_of(comparisons["mnist_mlp_40"], {"symmetric_decayed": 0.02, "adalfl_then_joint": 0.03})
    numbers["arms"]["adalfl"] = {"title": "AdaLFL, untuned", "diverged": "a number that is not finite"}
    (part,) = clean_set.parts(list(comparisons.values()), {"mnist_mlp_40": numbers})
    assert re.search(r"^\| AdaLFL, untuned +\| diverged +\|$", render_table(*part.tables), re.MULTILINE)


def test_nothing_is_shown_of_nothing(comparisons):
    assert clean_set.parts(list(comparisons.values()), {}) == []
