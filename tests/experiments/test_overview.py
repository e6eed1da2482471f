"""One method for every noise, beside rivals that are tuned for each."""

import numpy as np
import pytest
import scipy.stats
from matplotlib.colors import to_hex

from adalfl_jax.analysis.statistics import describe
from experiments.study import overview
from experiments.tables import render_table

SEEDS = 4
NOISES = {"0": "none", "20": "a fifth", "40": "two fifths"}


def numbers_of(means, p_values):
    """Of a comparison: the reference has its mean at every seed, rivals vary by a few percent."""
    spread = {arm: np.linspace(0.98, 1.02, SEEDS) if arm != "ours" else np.ones(SEEDS) for arm in means}
    arms = {arm: {"title": arm.title(), "test": describe((mean * spread[arm]).tolist())} for arm, mean in means.items()}
    differences = {
        arm: {"mean_difference": means["ours"] - means[arm], "interval": None, "adjusted_p_value": p_value}
        for arm, p_value in p_values.items()
    }
    return {"reference": "ours", "seeds": list(range(SEEDS)), "arms": arms, "differences": differences}


@pytest.fixture
def known():
    return {
        "mine_0": numbers_of({"a": 0.02, "b": 0.04, "ours": 0.01}, {"a": 0.001, "b": 0.2}),
        "mine_20": numbers_of({"a": 0.02, "b": 0.10, "ours": 0.04}, {"a": 0.05, "b": 0.01}),
        "mine_40": numbers_of({"a": 0.16, "b": 0.05, "c": 0.1, "ours": 0.10}, {"a": 0.01, "b": 0.01}),
        "other_20": numbers_of({"a": 0.02, "ours": 0.04}, {"a": 0.01}),
        "mine_20_variants": numbers_of({"a": 0.9, "ours": 0.01}, {"a": 0.01}),
    }


def contests_of(known):
    return overview.find_contests({"mine": "Mine", "other": "Other"}, NOISES, ["a", "b", "c"], known)


def cells(table):
    rows = render_table(table).splitlines()[4:]
    return [[cell.strip() for cell in row.strip("| ").split(" | ")] for row in rows if row.startswith("|")]


def test_a_contest_has_the_rivals_that_were_tested(known):
    found = [(contest.name, contest.rivals) for contest in contests_of(known)]
    assert found == [("mine_0", ("a", "b")), ("mine_20", ("a", "b")), ("mine_40", ("a", "b")), ("other_20", ("a",))]
    del known["mine_40"]["arms"]["ours"]["test"]  # it diverged
    assert [contest.name for contest in contests_of(known)] == ["mine_0", "mine_20", "other_20"]


def test_each_contest_is_a_row_with_its_best_rival_and_the_numbers_of_others(known):
    rows = cells(overview.contests_table(contests_of(known)))
    assert [row[:2] + row[3:4] for row in rows] == [
        ["Mine", "none", "A"],
        ["Mine", "a fifth", "A"],
        ["Mine", "two fifths", "B"],
        ["Other", "a fifth", "A"],
    ]
    assert [row[-4:] for row in rows] == [  # p, and rivals above, level, below
        ["0.001", "1", "1", "0"],
        ["0.05", "1", "1", "0"],
        ["0.01", "1", "0", "1"],
        ["0.01", "0", "0", "1"],
    ]
    assert rows[0][5] == "-1.00"


def test_an_average_weighs_every_noise_alike_and_is_tested_seed_by_seed(known):
    (table,) = overview.average_tables(contests_of(known), "All")
    rows = cells(table)  # of one problem: the other has too few noises
    means = {"A": [0.02, 0.02, 0.16], "B": [0.04, 0.10, 0.05], "Ours": [0.01, 0.04, 0.10]}
    geometric = {arm: 100 * np.exp(np.log(values).mean()) for arm, values in means.items()}
    assert [row[2] for row in rows] == sorted(means, key=lambda arm: geometric[arm])
    lowest = np.min([*means.values()], axis=0)
    spread = np.linspace(0.98, 1.02, SEEDS)
    p_values = []
    for _, noises, arm, mean, ratio, p_value, most in rows:
        assert noises == "3"
        factor = 1 if arm == "Ours" else spread.mean()
        assert float(mean.split()[0]) == pytest.approx(geometric[arm] * factor, abs=0.01)
        assert float(most) == pytest.approx(max(means[arm] / lowest), abs=0.01)
        if arm == "Ours":
            assert (ratio, p_value) == ("", "")
        else:
            logarithms = np.log(geometric[arm] / geometric["Ours"] * spread)
            low, high = np.exp(scipy.stats.t.interval(0.95, SEEDS - 1, logarithms.mean(), scipy.stats.sem(logarithms)))
            assert ratio == f"{np.exp(logarithms.mean()):.2f} ({low:.2f} to {high:.2f})"
            p_values.append((p_value, scipy.stats.ttest_1samp(logarithms, 0).pvalue))
    shown, raw = zip(*p_values, strict=True)
    assert list(shown) == [f"{p_value:.1g}" for p_value in scipy.stats.false_discovery_control(raw)]


def test_noises_of_other_seeds_are_not_averaged(known):
    known["mine_20"]["seeds"] = [7, 8, 9, 10]
    assert overview.average_tables(contests_of(known), "All") == ()
    known |= {f"other_{noise}": known["mine_0"] for noise in NOISES}
    (table,) = overview.average_tables(contests_of(known), "All")
    assert {row[0] for row in cells(table)} == {"Other"}
    assert table.notes[-1] == "Left out are problems whose tables are of different seeds: Mine."


def test_two_noises_are_too_few_for_an_average(known):
    del known["mine_20"]
    assert overview.average_tables(contests_of(known), "All") == ()
    known["mine_0"]["seeds"] = [7, 8, 9, 10]
    known |= {f"other_{noise}": known["mine_40"] for noise in NOISES}
    (table,) = overview.average_tables(contests_of(known), "All")
    assert {row[0] for row in cells(table)} == {"Other"}
    assert not any("Left out" in note for note in table.notes)


def test_a_rival_is_drawn_at_its_share_and_hollow_where_it_is_level(known):
    figure = overview.contests_figure(contests_of(known), ["a"])
    (axes,) = figure.axes
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    ratios = sorted(float(line.get_xdata()[0]) for line in dots)
    assert ratios == pytest.approx([0.5, 0.5, 0.5, 1.6, 2, 2.5, 4])
    hollow = [float(line.get_xdata()[0]) for line in dots if to_hex(line.get_markerfacecolor()) == "#ffffff"]
    assert sorted(hollow) == pytest.approx([0.5, 4])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "A",
        "other tuned rivals",
        "hollow: level with Ours",
        "Ours",
    ]
