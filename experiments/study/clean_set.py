"""What it is worth to train on the clean set too in the last fifth of the steps, with a learned loss and without.

Problems are those of `noisy_labels`; its rivals here train on the clean set at the end or are the best robust loss.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.study.arms import Arm, Comparison, suffix_of
from experiments.study.noisy_labels import (
    AHEAD,
    ARMS,
    NOISE,
    PROBLEMS,
    SETTING,
    UNTUNED,
    contests_by_noise,
    show_noise,
)
from experiments.study.overview import Contest, average_tables, contests_figure
from experiments.study.tables import Part, show_pair
from experiments.tables import Row, Table, either, show_mean, show_p_value, show_point

SHARE = 0.2  # of the steps: as many as those of "fine_tuned"


def _then_joint(arm: Arm) -> Arm:
    overrides = {**arm.overrides, "outer.joint_share": SHARE}
    return arm._replace(name=f"{arm.name}_then_joint", title=f"{arm.title}, joint at the end", overrides=overrides)


RIVALS = {arm.name: arm for arm in ARMS if arm.name in AHEAD}
BY_HAND, LEARNED = _then_joint(RIVALS["symmetric_decayed"]), _then_joint(UNTUNED)
COMPARED = (*RIVALS.values(), BY_HAND, UNTUNED)
PAIRS = ((BY_HAND.name, "symmetric_decayed"), (BY_HAND.name, "symmetric_fine_tuned"))


def comparisons() -> list[Comparison]:
    """Every problem with every noise."""
    return [
        Comparison(
            f"{problem}_{noise}",
            f"{title}, {show_noise(noise)}, the clean set at the end",
            "default",
            {**SETTING, **overrides, **NOISE[noise]},
            (*COMPARED, LEARNED),
            reference=LEARNED.name,
            pairs=PAIRS,
        )
        for problem, (title, overrides) in PROBLEMS.items()
        for noise in NOISE
    ]


def parts(comparisons: Sequence[Comparison], known: Mapping[str, Any]) -> list[Part]:
    """One picture, for each problem a table with a column for each noise, and averages over noises."""
    suffix = suffix_of(comparisons)
    contests, wrong = contests_by_noise(known, [arm.name for arm in COMPARED], suffix)
    if not contests:
        return []
    by_problem = {title: [each for each in contests if each.problem == title] for title, _ in PROBLEMS.values()}
    tables = (
        *(_errors_table(title, there) for title, there in by_problem.items() if there),
        *average_tables(wrong, "The clean set at the end, over all wrong labels"),
    )
    if len(wrong) < len(contests):
        tables += average_tables(contests, "The clean set at the end, over wrong labels and right ones")
    figure = contests_figure(contests, [arm.name for arm in COMPARED])
    names = tuple(contest.name for contest in contests)
    return [Part(f"clean_set{suffix}", "Ways to use the clean set, by the labels", names, figure, tables)]


def _errors_table(title: str, contests: Sequence[Contest]) -> Table:
    """A row an arm and a column a noise, with the p-value of the difference from the reference."""

    def error(contest: Contest, row: Row) -> str:
        name = row["arm"].name
        found = contest.numbers["arms"][name]
        if "test" not in found:
            return "diverged"
        point = show_point(found["chosen"], found["tuning"], lambda field: "at")
        mean = f"{show_mean(found['test'], 100)} {point}".strip()
        return mean if name == contest.reference else f"{mean}, p = {show_p_value(contest.test(name))}"

    cells = {contest.noise: functools.partial(error, contest) for contest in contests}
    arms = (arm for arm in (*COMPARED, LEARNED) if all(arm.name in contest.numbers["arms"] for contest in contests))
    seeds = either(f"{each.numbers['seeds'][0]} to {each.numbers['seeds'][-1]}" for each in contests)
    about = (
        f'Seeds {seeds}. After "at" stands the learning rate that tuning took. p-values are of the '
        f"difference from {LEARNED.title}, adjusted for their number with each kind of labels."
    )
    return Table(
        f"{title}, the clean set at the end: test error rate, %",
        {"arm": lambda row: row["arm"].title} | cells,
        [{"arm": arm} for arm in arms],
        (about, *(note for pair in PAIRS if (note := _further_differences(pair, contests)))),
    )


def _further_differences(pair: tuple[str, str], contests: Sequence[Contest]) -> str:
    """A sentence about a pair of `PAIRS`, or nothing."""
    shown = [
        f"{contest.noise} {show_pair(test, 100)}"
        for contest in contests
        for test in contest.numbers["pairs"]
        if (test["arm"], test["against"]) == pair
    ]
    titles = {arm.name: arm.title for arm in COMPARED}
    return f"Further differences: {titles[pair[0]]} minus {titles[pair[1]]}: {'; '.join(shown)}." if shown else ""
