"""A method with the same settings for every noise, beside rivals that are tuned for each, in tables and a picture."""

from __future__ import annotations

import collections
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from adalfl_jax.analysis.figures import STYLE
from adalfl_jax.analysis.statistics import adjust_p_values, describe, paired_difference
from experiments.study.tables import HIGHLIGHT
from experiments.tables import SIGNIFICANT, Row, Table, is_level, show_difference, show_mean, show_p_value

BEST_NOTE = (
    "The best rival is the one that has the lowest mean in the test split, which nobody knows beforehand. p-values are "
    f"those of the tables below; level means p of {SIGNIFICANT} or more."
)
FEWEST = 3  # noises that are averaged over
TICKS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)
OTHERS = "#9ca3af"  # the colour of rivals that few contests have


class Contest(NamedTuple):
    """A comparison, of its reference with rivals."""

    name: str  # of the comparison
    problem: str
    noise: str
    numbers: Mapping[str, Any]  # of the comparison
    rivals: tuple[str, ...]  # arms

    @property
    def reference(self) -> str:
        """The arm that rivals are compared with."""
        return self.numbers["reference"]

    def title(self, arm: str) -> str:
        """What an arm is called."""
        return self.numbers["arms"][arm]["title"]

    def errors(self, arm: str) -> np.ndarray:
        """Test errors of an arm, seed by seed."""
        return np.asarray(self.numbers["arms"][arm]["test"]["per_seed"])

    def best(self) -> str:
        """The rival whose mean error is lowest."""
        return min(self.rivals, key=lambda arm: self.errors(arm).mean())

    def test(self, rival: str) -> Row:
        """The paired test of the reference against this rival."""
        return self.numbers["differences"][rival]

    def is_level(self, rival: str) -> bool:
        """Whether no difference from the reference is found."""
        return is_level(self.test(rival))

    def ratio(self, rival: str) -> float:
        """The mean error of a rival, divided by that of the reference."""
        return float(self.errors(rival).mean() / self.errors(self.reference).mean())


def find_contests(
    problems: Mapping[str, str], noises: Mapping[str, str], rivals: Sequence[str], known: Mapping[str, Any]
) -> list[Contest]:
    """Those there are numbers of.

    Args:
      problems: name -> what it is called.
      noises: name -> what it is called; a comparison is named PROBLEM_NOISE.
      rivals: arms that the reference is compared with, where they were trained.
      known: name of a comparison -> its numbers.
    """
    contests = []
    for problem, noise in itertools.product(problems, noises):
        name = f"{problem}_{noise}"
        numbers = known.get(name)
        if numbers is not None and "test" in numbers["arms"].get(numbers["reference"], {}):
            there = tuple(arm for arm in rivals if arm in numbers["differences"])
            if there:
                contests.append(Contest(name, problems[problem], noises[noise], numbers, there))
    return contests


def contests_table(contests: Sequence[Contest]) -> Table:
    """A row a contest, with the rival that is best there and the number of those above, level and below."""
    name = contests[0].title(contests[0].reference)

    def error(contest: Contest, arm: str) -> str:
        return show_mean(contest.numbers["arms"][arm]["test"], 100)

    def count(row: Row, wanted: int) -> str:
        contest = row["contest"]
        signs = [0 if contest.is_level(each) else np.sign(contest.ratio(each) - 1) for each in contest.rivals]
        return str(signs.count(wanted))

    return Table(
        f"{name}, and the best rival: test error rate, %",
        {
            "problem": lambda row: row["contest"].problem,
            "labels": lambda row: row["contest"].noise,
            name: lambda row: error(row["contest"], row["contest"].reference),
            "the best rival": lambda row: row["contest"].title(row["best"]),
            "its error": lambda row: error(row["contest"], row["best"]),
            f"{name} minus it": lambda row: show_difference(row["contest"].test(row["best"]), 100),
            "p": lambda row: show_p_value(row["contest"].test(row["best"])),
            "worse rivals": lambda row: count(row, 1),
            "level": lambda row: count(row, 0),
            "better": lambda row: count(row, -1),
        },
        [{"contest": contest, "best": contest.best()} for contest in contests],
        (BEST_NOTE,),
    )


def average_tables(contests: Sequence[Contest], title: str) -> tuple[Table, ...]:
    """For each problem the arms that all of its contests have, by their error over all; no table without any.

    Averaged are logarithms, seed by seed, so that no noise counts for more than another.

    Args:
      contests: what is averaged over.
      title: of the table.
    """
    rows: list[Row] = []
    for problem in dict.fromkeys(contest.problem for contest in contests):
        rows += _averages([contest for contest in contests if contest.problem == problem])
    if not rows:
        return ()
    name = contests[0].title(contests[0].reference)
    tested = [row["test"] for row in rows if row["test"] is not None]
    adjust_p_values(tested)

    def ratio(row: Row) -> str:
        if row["test"] is None:
            return ""
        interval = row["test"]["interval"]
        around = "" if interval is None else " ({:.2f} to {:.2f})".format(*np.exp(interval))
        return f"{np.exp(row['test']['mean_difference']):.2f}{around}"

    table = Table(
        f"{title}: the geometric mean of test error rates, %",
        {
            "problem": lambda row: row["problem"],
            "labels": lambda row: str(row["contests"]),
            "arm": lambda row: row["arm"],
            "mean over them": lambda row: show_mean(row["error"], 100),
            f"divided by that of {name}": ratio,
            "p": lambda row: show_p_value(row["test"]),
            "at worst, divided by the best there": lambda row: f"{row['most']:.2f}",
        },
        rows,
        tuple(_left_out(contests, rows)),
    )
    return (table,)


def _left_out(contests: Sequence[Contest], rows: Sequence[Row]) -> list[str]:
    """A note on problems that have enough contests for a row, and not of the same seeds."""
    counts = collections.Counter(contest.problem for contest in contests)
    shown = {row["problem"] for row in rows}
    missing = [problem for problem, count in counts.items() if count >= FEWEST and problem not in shown]
    return [f"Left out are problems whose tables are of different seeds: {'; '.join(missing)}."] if missing else []


def _averages(contests: Sequence[Contest]) -> list[Row]:
    """Rows of `average_tables` of one problem, the best first; none of too few contests, or of different seeds."""
    first = contests[0]
    if len(contests) < FEWEST or any(contest.numbers["seeds"] != first.numbers["seeds"] for contest in contests):
        return []
    arms = [*(arm for arm in first.rivals if all(arm in contest.rivals for contest in contests)), first.reference]
    errors = {arm: np.stack([contest.errors(arm) for contest in contests]) for arm in arms}  # [noises, S]
    logarithms = {arm: np.log(values).mean(axis=0) for arm, values in errors.items()}
    lowest = np.min([values.mean(axis=1) for values in errors.values()], axis=0)
    rows = [
        {
            "problem": first.problem,
            "contests": len(contests),
            "arm": first.title(arm),
            "error": describe(np.exp(logarithms[arm]).tolist()),
            "test": None if arm == first.reference else paired_difference(logarithms[first.reference], logarithms[arm]),
            "most": (errors[arm].mean(axis=1) / lowest).max(),
        }
        for arm in arms
    ]
    return sorted(rows, key=lambda row: row["error"]["mean"])


def contests_figure(contests: Sequence[Contest], key_rivals: Sequence[str]) -> Figure:
    """A line a contest: errors of rivals, divided by that of the reference, hollow where the two are level.

    Args:
      contests: what is drawn.
      key_rivals: those that have a colour each.
    """
    name = contests[0].title(contests[0].reference)
    problems = list(dict.fromkeys(contest.problem for contest in contests))
    lines = [index + 1.3 * (1 + problems.index(contest.problem)) for index, contest in enumerate(contests)]
    colors = dict(zip(key_rivals, matplotlib.colormaps["tab10"](range(10)), strict=False))
    titles = {rival: contest.title(rival) for rival in key_rivals for contest in contests if rival in contest.rivals}
    marker = functools.partial(Line2D, [], [], marker="o", linestyle="")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 1.9 + 0.23 * lines[-1]), layout="constrained")
        axes = figure.subplots()
        axes.axvline(1, color=HIGHLIGHT, linewidth=2, zorder=1)
        for line, contest in zip(lines, contests, strict=True):
            for rival in sorted(contest.rivals, key=lambda rival: rival in titles):
                color = colors[rival] if rival in titles else OTHERS
                face = "white" if contest.is_level(rival) else color
                axes.plot(contest.ratio(rival), line, "o", color=color, markerfacecolor=face, markersize=6, zorder=2)
        for problem in problems:
            line = lines[[contest.problem for contest in contests].index(problem)] - 1
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # the line of 1 stops at it
            over = axes.get_yaxis_transform()
            axes.text(0.005, line, problem, transform=over, fontweight="bold", va="center", bbox=box)
        axes.set(xscale="log", ylim=(lines[-1] + 0.7, -0.5), xlabel=f"test error, divided by that of {name}")
        axes.set_yticks(lines, [contest.noise for contest in contests])
        axes.xaxis.set(major_locator=FixedLocator(TICKS), minor_locator=NullLocator())
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.set_title("← the rival is better", loc="left", fontweight="normal", fontsize=9)
        axes.set_title("the rival is worse →", loc="right", fontweight="normal", fontsize=9)
        handles = [marker(color=colors[rival], label=title) for rival, title in titles.items()]
        if any(rival not in titles for contest in contests for rival in contest.rivals):
            handles.append(marker(color=OTHERS, label="other tuned rivals"))
        handles.append(marker(color="#374151", markerfacecolor="white", label=f"hollow: level with {name}"))
        handles.append(Line2D([], [], color=HIGHLIGHT, linewidth=2, label=name))
        figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8)
    return figure
