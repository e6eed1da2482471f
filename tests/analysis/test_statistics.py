import numpy as np
import pytest
import scipy.stats

from adalfl_jax.analysis.statistics import (
    ROUNDING,
    adjust_p_values,
    describe,
    paired_difference,
    signed_rank_test,
)
from experiments.tables import rounded


def test_describe_gives_mean_and_sample_deviation():
    assert describe([1.0, 2.0, 6.0]) == {
        "per_seed": [1.0, 2.0, 6.0],
        "mean": 3.0,
        "std": pytest.approx(7**0.5),
    }


def test_describe_of_one_seed_has_no_deviation():
    assert describe([2.5]) == {"per_seed": [2.5], "mean": 2.5, "std": None}


def test_paired_difference_is_the_paired_t_test():
    first, second = [1.0, 2.0, 3.0, 5.0], [0.5, 1.8, 2.0, 4.9]
    differences = np.subtract(second, first)
    mean, error = differences.mean(), differences.std(ddof=1) / 2
    half = scipy.stats.t.ppf(0.975, df=3) * error
    result = paired_difference(first, second)
    assert result["mean_difference"] == pytest.approx(mean)
    assert result["mean_difference"] < 0
    assert result["interval"] == pytest.approx([mean - half, mean + half])
    assert result["p_value"] == pytest.approx(2 * scipy.stats.t.cdf(mean / error, df=3))


def test_paired_difference_at_another_confidence():
    wide, narrow = (paired_difference([1, 2, 3], [2, 2, 5], confidence)["interval"] for confidence in (0.99, 0.5))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


@pytest.mark.parametrize(("first", "second"), [([1.0], [3.0]), ([1.0, 2.0, 5.0], [3.0, 4.0, 7.0])])
def test_paired_difference_without_spread_has_no_test(first, second):
    assert paired_difference(first, second) == {"mean_difference": 2.0} | dict.fromkeys(
        ("interval", "p_value", "effect_size")
    )


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("offset", [0.1, 0.3])
def test_differences_equal_but_for_rounding_have_no_test(offset, sign):
    first = [0.1, 0.2, 0.7]
    result = paired_difference([sign * value for value in first], [sign * (value + offset) for value in first])
    assert result["p_value"] is None


@pytest.mark.parametrize(("apart", "has_test"), [(0.5, False), (1.5, True)])
def test_differences_further_apart_than_one_rounding_have_a_test(apart, has_test):
    result = paired_difference([1.0, 1.0], [1.5, 1.5 * (1 + apart * ROUNDING)])
    assert (result["p_value"] is not None) == has_test


def test_metrics_below_0_have_the_test_by_ranks_of_their_sizes():
    first, second = np.array([1.0, 1.0, 2.0, 3.0]), np.array([1.5, 0.5 - 1e-6, 2.25, 3.125])
    assert signed_rank_test(-first, -second) == signed_rank_test(first, second)


def test_the_effect_size_is_the_mean_difference_in_its_standard_deviations():
    first, second = [0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0]
    assert paired_difference(first, second)["effect_size"] == pytest.approx(2.5 / np.std(second, ddof=1))
    assert paired_difference(first, [1.0] * 4)["effect_size"] is None


def test_one_lost_seed_does_not_decide_a_test_by_ranks():
    first = np.linspace(2.0, 3.0, 10)
    second = first - np.linspace(0.1, 0.2, 10)
    assert signed_rank_test(first, second)["p_value"] == pytest.approx(
        2 / 2**10
    )  # all of one sign: 2 of 2^10 as far off
    for value in (90.0, 1e6, 1e12):
        lost = np.where(np.arange(10) == 9, value, first)
        assert paired_difference(lost, second)["p_value"] > 0.3
        assert signed_rank_test(lost, second)["p_value"] == pytest.approx(2 / 2**10)
        assert signed_rank_test(second, lost)["p_value"] == signed_rank_test(lost, second)["p_value"]


def test_differences_equal_but_for_rounding_share_a_rank():
    first, second = np.zeros(4), np.array([0.3, -0.3, 0.1, 0.2])
    blurred = second * np.array([1, 1 + 1e-8, 1, 1])
    assert signed_rank_test(first, blurred) == signed_rank_test(first, second)
    # Errors among 360 examples, as float32 has them: 3 and 1 fewer tie wherever they are, beside a lost seed too.
    counts = np.array([[5, 9, 3, 40, 7, 245], [2, 6, 4, 41, 6, 230]])
    as_measured = (counts / np.float32(360)).astype(np.float32)
    p_value = scipy.stats.wilcoxon(counts[1] - counts[0]).pvalue
    assert signed_rank_test(*as_measured)["p_value"] == pytest.approx(p_value)
    assert signed_rank_test(*rounded(as_measured.tolist()))["p_value"] == pytest.approx(p_value)


def test_numbers_as_they_are_published_have_the_test_by_ranks_of_what_was_measured():
    rng = np.random.default_rng(0)
    for most in (8, 30, 300):  # of 360 examples
        for counts in rng.integers(0, most, (50, 2, 10)):
            exact, published = counts.astype(float), rounded((counts / 360).tolist())
            assert signed_rank_test(*published) == signed_rank_test(*exact)


def test_a_difference_of_a_ten_thousandth_is_no_rounding():
    first, second = np.ones(4), 1 + 1e-4 * np.array([3.0, -1.0, 2.0, 4.0])
    assert paired_difference(first, second)["p_value"] == pytest.approx(scipy.stats.ttest_rel(second, first).pvalue)
    assert signed_rank_test(first, second)["p_value"] == pytest.approx(0.25)


def test_what_ties_goes_by_the_rounding_of_the_larger_metric():
    first, second = np.array([1000.0, 0.0, 0.0]), np.array([1000.03, -0.026, 0.5])
    assert signed_rank_test(first, second) == signed_rank_test([0.0, 0.0, 0.0], [0.001, -0.001, 0.5])
    assert signed_rank_test(first, second) != signed_rank_test([0.0, 0.0, 0.0], [0.0015, -0.0013, 0.5])


@pytest.mark.parametrize("num_seeds", [5, 14, 17])
def test_ties_leave_the_test_by_ranks_exact(num_seeds):
    rng = np.random.default_rng(num_seeds)
    differences = rng.integers(-2, 6, num_seeds)
    ranks = scipy.stats.rankdata(np.abs(differences[differences != 0]))
    sums = np.zeros(1)
    for rank in ranks:  # of every choice of signs
        sums = np.concatenate([sums, sums + rank])
    found = ranks[differences[differences != 0] > 0].sum()
    is_as_far = np.abs(sums - ranks.sum() / 2) >= abs(found - ranks.sum() / 2) - 1e-9
    p_value = signed_rank_test(np.zeros(num_seeds), differences.astype(float))["p_value"]
    assert p_value == pytest.approx(is_as_far.mean(), rel=1e-9)


@pytest.mark.parametrize("num_seeds", [2, 10, 50])
def test_without_ties_the_test_by_ranks_is_that_of_scipy(num_seeds):
    differences = np.random.default_rng(num_seeds).normal(0.2, 1, num_seeds)
    expected = scipy.stats.wilcoxon(differences, method="exact").pvalue
    assert signed_rank_test(np.zeros(num_seeds), differences)["p_value"] == pytest.approx(expected, rel=1e-9)


def test_of_many_seeds_the_test_by_ranks_is_nearly_normal():
    differences = np.random.default_rng(0).integers(-5, 6, 200).astype(float)
    expected = scipy.stats.wilcoxon(differences, method="asymptotic").pvalue
    assert signed_rank_test(np.zeros(200), differences)["p_value"] == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("first", "second"),
    [([1.0], [2.0]), ([1.0, 2.0], [1.0, 2.0]), ([1.0, 2.0], [1.0 + 1e-7, 2.0 - 1e-7]), ([0.0, 0.0], [0.0, 0.0])],
)
def test_where_there_is_nothing_to_rank_there_is_no_test(first, second):
    assert signed_rank_test(first, second) == {"p_value": None}


def test_a_seed_that_both_lost_alike_does_not_hide_the_differences_of_others():
    first, second = [1e6, 1.0, 2.0, 1.5], [1e6, 0.5, 1.4, 0.9]
    assert paired_difference(first, second)["p_value"] == pytest.approx(scipy.stats.ttest_rel(second, first).pvalue)


def test_a_seed_that_both_lost_alike_does_not_tie_those_of_others():
    first, second = [1e6, 1.0, 2.0, 1.5], [1e6, 0.5, 1.4, 1.9]
    assert signed_rank_test(first, second) == signed_rank_test(first[1:], second[1:])


def test_p_values_are_adjusted_by_benjamini_and_hochberg():
    tests = [{"p_value": p_value} for p_value in (0.01, 0.04, None, 0.03, 0.5)]
    adjust_p_values(tests)
    found = [test.pop("adjusted_p_value", None) for test in tests]
    # The i-th smallest of n times n / i, and no more than those after it.
    assert found == [pytest.approx(0.04), pytest.approx(0.16 / 3), None, pytest.approx(0.16 / 3), pytest.approx(0.5)]
    adjust_p_values([])


def test_a_seed_without_a_number_leaves_both_tests_undefined():
    first, second = [1.0, 2.0, 3.0], [1.5, 2.2, float("nan")]
    tests = [paired_difference(first, second), signed_rank_test(first, second), {"p_value": 0.01}]
    assert [test["p_value"] for test in tests] == [None, None, 0.01]
    adjust_p_values(tests)
    assert tests[2]["adjusted_p_value"] == 0.01


@pytest.mark.parametrize("test", [paired_difference, signed_rank_test])
@pytest.mark.parametrize(("first", "second"), [([1.0, 2.0], [1.0]), ([], [])])
def test_pairs_are_of_as_many_values(test, first, second):
    with pytest.raises(ValueError, match=f"got {len(first)}, {len(second)}"):
        test(first, second)


def test_ties_do_not_chain():
    """Neighbours are closer than rounding, the smallest and the largest fifty times as far apart as that."""
    differences = np.linspace(3e-5, 1.5e-3, 100) * np.where(np.arange(100) < 55, 1, -1)
    expected = scipy.stats.wilcoxon(differences).pvalue
    assert signed_rank_test(np.ones(100), 1 + differences)["p_value"] == pytest.approx(expected, rel=0.2)
