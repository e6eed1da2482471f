"""Tunes and trains the arms of a comparison and tests their differences."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from adalfl_jax.analysis.record import RunRecord
from adalfl_jax.analysis.statistics import (
    ROUNDING,
    adjust_p_values,
    describe,
    paired_difference,
    signed_rank_test,
)
from adalfl_jax.training.digest import digest_of
from adalfl_jax.training.files import BusyError
from experiments.study.arms import Arm, Comparison, Overrides, field_words, make_config, make_source_config, settings_of
from experiments.study.runs import Diverged, Outcome, flat_share_of, outcome_of, run, started

Say = Callable[[str], None]
Item = TypeVar("Item")
Result = TypeVar("Result")


def compare_arms(
    comparison: Comparison, workdir: Path, *, tuning_seeds: range, seeds: range, say: Say
) -> dict[str, Any]:
    """Trains what is missing and returns all numbers of a comparison, as JSON holds them.

    Returns:
      `arms`: by name the settings, the metric on the test and the validation split per seed, the point of the grid that
      was taken and what the others reached, the curve of the test metric, steps and seconds to the target, and how flat
      the learned loss is at the end; `target`: the metric the first arm ends at, None if it diverges; and what
      `paired_tests` returns.

    Raises:
      BusyError: as `do_free`.
    """

    def settle(arm: Arm) -> tuple[dict[str, Any], Outcome | None]:
        return _settle(comparison, arm, workdir, tuning_seeds, seeds, say)

    settled = dict(zip((arm.name for arm in comparison.arms), do_free(settle, comparison.arms), strict=True))
    arms = {name: numbers for name, (numbers, _) in settled.items()}
    outcomes = {name: outcome for name, (_, outcome) in settled.items() if outcome is not None}
    first = outcomes.get(comparison.arms[0].name)
    target = None if first is None else float(first.test.mean())
    for name, outcome in outcomes.items():
        arms[name] |= _numbers(outcome, target)
    return {
        "title": comparison.title,
        "config": comparison.config,
        "seeds": list(seeds),
        "tuning_seeds": list(tuning_seeds),
        "reference": comparison.reference,
        "target": target,
        "arms": arms,
        **paired_tests(arms, comparison.reference, comparison.pairs),
    }


def paired_tests(
    arms: Mapping[str, Mapping[str, Any]], reference: str, pairs: Iterable[tuple[str, str]]
) -> dict[str, dict[str, Any] | list[dict[str, Any]]]:
    """Tests arms that did not diverge, seed for seed, from the numbers that `compare_arms` has of each.

    Returns:
      `differences`: by arm, paired t-tests of the reference less that arm, each with a `signed_rank` test; `pairs`: the
      same of an arm less another. The p-values of either are adjusted for their number, and those by ranks for theirs.
    """
    errors = {name: arm["test"]["per_seed"] for name, arm in arms.items() if "test" in arm}
    others = [name for name in errors if name != reference and reference in errors]
    against_others = _tests([(errors[name], errors[reference]) for name in others])
    there = [(arm, against) for arm, against in pairs if arm in errors and against in errors]
    further = _tests([(errors[against], errors[arm]) for arm, against in there])
    return {
        "differences": dict(zip(others, against_others, strict=True)),
        "pairs": [
            {"arm": arm, "against": against, **test} for (arm, against), test in zip(there, further, strict=True)
        ],
    }


def _tests(errors: Iterable[tuple[list[float], list[float]]]) -> list[dict[str, Any]]:
    """Tests of the second less the first, adjusted for their number."""
    tests = [paired_difference(*each) | {"signed_rank": signed_rank_test(*each)} for each in errors]
    adjust_p_values(tests)
    adjust_p_values([test["signed_rank"] for test in tests])
    return tests


def do_free(do: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Does something with every item, passing over those that need a run which another process trains.

    Raises:
      BusyError: some were passed over; the same call does them later, and finds the runs of the others finished.
    """
    results, busy = [], None
    for item in items:
        try:
            results.append(do(item))
        except BusyError as error:
            busy = error
    if busy is not None:
        raise busy
    return results


def _settle(
    comparison: Comparison, arm: Arm, workdir: Path, tuning_seeds: range, seeds: range, say: Say
) -> tuple[dict[str, Any], Outcome | None]:
    """Tunes and trains an arm; returns the numbers it has for itself, and what it reached unless it diverged."""
    point, tuning = _tune(comparison, arm, workdir, tuning_seeds, say)
    numbers: dict[str, Any] = {"title": arm.title, "chosen": None if point is None else dict(point), "tuning": tuning}
    numbers["settings"] = settings_of(comparison, arm, point or {})
    if point is None:
        return numbers | {"diverged": "at every point of the grid"}, None
    say(f"{comparison.title}: {arm.title}{_words(point)}, {len(seeds)} seeds")
    found, digest = _train(comparison, arm, point, seeds, workdir)
    numbers["run"] = digest
    if isinstance(found, Diverged):
        return numbers | {"diverged": found.reason}, None
    return numbers | {"flat_share": flat_share_of(found)}, outcome_of(found, early_stopping=arm.early_stopping)


def _train(
    comparison: Comparison, arm: Arm, point: Overrides, seeds: range, workdir: Path, *, for_tuning: bool = False
) -> tuple[RunRecord | Diverged, str | None]:
    """A run, and the digest it is kept under; trained, with the one it starts from, if the study has not got it."""
    config = make_config(comparison, arm, point, seeds, for_tuning=for_tuning)
    if arm.source is not None:
        start = started(config, make_source_config(arm.source, seeds, for_tuning=for_tuning), workdir)
        if isinstance(start, Diverged):
            return start, None
        config = start
    return run(config, workdir), digest_of(config)


def _tune(
    comparison: Comparison, arm: Arm, workdir: Path, seeds: range, say: Say
) -> tuple[Overrides | None, list[dict[str, Any]]]:
    """The best point of an arm's grid by the mean validation metric, and that of all; None if all diverge."""
    if len(arm.grid) == 1:
        return arm.grid[0], []

    def attempt(point: Overrides) -> dict[str, Any]:
        say(f"{comparison.title}: tuning {arm.title}{_words(point)}")
        found, _ = _train(comparison, arm, point, seeds, workdir, for_tuning=True)
        valid = None
        if not isinstance(found, Diverged):
            valid = float(outcome_of(found, early_stopping=arm.early_stopping).valid.mean())
        return {"point": dict(point), "valid": valid}

    tried = do_free(attempt, arm.grid)
    finite = [entry for entry in tried if entry["valid"] is not None]
    return min(finite, key=lambda entry: entry["valid"])["point"] if finite else None, tried


def _numbers(outcome: Outcome, target: float | None) -> dict[str, Any]:
    limit = -np.inf if target is None else target * (1 + ROUNDING)  # NumPy adds up a mean of an axis in another order
    reached = np.flatnonzero(outcome.curve.mean(axis=0) <= limit)
    steps = int(outcome.steps[reached[0]]) if len(reached) else None
    total = outcome.seconds
    seconds = None if steps is None else total["offline"] + total["training"] * steps / int(outcome.steps[-1])
    return {
        "test": describe(outcome.test.tolist()),
        "valid": describe(outcome.valid.tolist()),
        "steps": outcome.steps.tolist(),
        "curve": outcome.curve.tolist(),
        "seconds": total,
        "steps_to_target": steps,
        "seconds_to_target": seconds,
    }


def _words(point: Overrides) -> str:
    return "".join(f", {field_words(name)} {value}" for name, value in point.items())
