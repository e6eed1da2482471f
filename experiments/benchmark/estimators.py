"""The suite `estimators`: what every estimator of the meta-gradient costs, and how that grows with K inner steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from matplotlib.figure import Figure

from adalfl_jax.hypergradient import ESTIMATORS
from adalfl_jax.training.progress import tell
from experiments.benchmark.problems import (
    PROBLEMS,
    TASK_LOSS,
    Problem,
    bilevel_program,
    draw_batches,
    draw_start,
    first_in_float64,
    phi_gradient,
    relative_difference,
    task_loss_program,
    title,
)
from experiments.benchmark.timing import Program, Times, median, ratio, time_in_turn
from experiments.tables import Row, Table

UNROLLS = (1, 2, 4, 8, 16, 32)  # K
COSTS: dict[str, Callable[[Row], str]] = {
    "ms": lambda row: f"{row['ms']:.3f}",
    "in task-loss steps": lambda row: str(row["to_task_loss"]),
    "GFLOP": lambda row: f"{row['flops'] / 1e9:.3g}",
    "temporary MB": lambda row: f"{row['temporary_bytes'] / 1e6:.3g}",
}
ONE_STEP: dict[str, Callable[[Row], str]] = {
    "step": lambda row: row["program"],
    **COSTS,
    "error of the gradient": lambda row: "" if row["error"] is None else f"{row['error']:.0e}",
}
K_STEPS: dict[str, Callable[[Row], str]] = {
    "K": lambda row: str(row["num_inner_steps"]),
    "estimator": lambda row: row["program"],
    **COSTS,
}


def estimators_suite(names: list[str], num_steps: int | None, num_rounds: int) -> list[Table]:
    """Two tables for each problem: one inner step, and K of them."""
    variants = {name: {"hypergradient": name} for name in ESTIMATORS}
    tables = []
    for name in names:
        problem = PROBLEMS[name]
        problem = problem._replace(num_steps=num_steps or problem.num_steps)
        tables.append(one_step(f"{title(name)}, one inner step", problem, variants, num_rounds))
        tables.append(k_steps(f"{title(name)}, K inner steps", problem, UNROLLS, num_rounds))
    return tables


def one_step(heading: str, problem: Problem, variants: Mapping[str, dict[str, Any]], num_rounds: int) -> Table:
    """Variants of a bilevel step, each some options of `make_bilevel_step`, beside the task-loss step."""
    start, batches = draw_start(problem), draw_batches(problem, problem.num_steps)
    with jax.enable_x64(True):
        exact = phi_gradient(problem, *first_in_float64(start, batches), hypergradient="unrolled")
    programs, refusals = {TASK_LOSS: task_loss_program(problem, start, batches)}, {}
    errors: dict[str, float | None] = {TASK_LOSS: None}
    for name, options in variants.items():
        try:
            programs[name] = bilevel_program(problem, start, batches, **options)
        except ValueError as error:
            refusals[name] = str(error)
            continue
        errors[name] = relative_difference(phi_gradient(problem, start, batches, **options), exact)
    times = time_in_turn(programs, num_rounds)
    rows = [{**_costs(times, name, program), "error": errors[name]} for name, program in programs.items()]
    return Table(heading, ONE_STEP, rows, _notes(refusals))


def k_steps(heading: str, problem: Problem, unrolls: tuple[int, ...], num_rounds: int) -> Table:
    """Every estimator that takes K inner steps, for several K."""
    start = draw_start(problem)
    rows, refusals = [], {}
    for num_inner_steps in unrolls:
        num_steps = max(1, problem.num_steps // num_inner_steps)
        plain, batches = draw_batches(problem, problem.num_steps), draw_batches(problem, num_steps, num_inner_steps)
        programs = {TASK_LOSS: task_loss_program(problem, start, plain)}
        for name in ESTIMATORS:
            try:
                programs[name] = bilevel_program(problem, start, batches, hypergradient=name)
            except ValueError as error:
                refusals[name] = str(error)
        times = time_in_turn(programs, num_rounds)
        del programs[TASK_LOSS]
        rows += [{"num_inner_steps": num_inner_steps, **_costs(times, *program)} for program in programs.items()]
    return Table(heading, K_STEPS, rows, _notes(refusals))


def draw_growth(tables: list[Table], path: Path) -> None:
    """Writes a picture of memory and time against K, a row for each problem."""
    tables = [table for table in tables if "K" in table.columns]
    figure = Figure(figsize=(9, 3.2 * len(tables)), layout="constrained")
    axes = figure.subplots(len(tables), 2, squeeze=False)
    for table, pair in zip(tables, axes, strict=True):
        for ax, key, scale, label in zip(
            pair, ("temporary_bytes", "ms"), (1e6, 1), ("temporary memory, MB", "ms a step"), strict=True
        ):
            for name in dict.fromkeys(row["program"] for row in table.rows):
                rows = [row for row in table.rows if row["program"] == name]
                ax.plot([row["num_inner_steps"] for row in rows], [row[key] / scale for row in rows], "o-", label=name)
            ax.set(xscale="log", yscale="log", xlabel="inner steps K", ylabel=label)
            ticks = sorted({row["num_inner_steps"] for row in table.rows})
            ax.set_xticks(ticks, map(str, ticks), minor=False)
            ax.minorticks_off()
        pair[0].set_title(table.title, loc="left")
    axes[0][0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def timed(times: Times, name: str, program: Program) -> Row:
    """Time, ratio and memory of a program."""
    return {
        "program": name,
        "ms": median(times, name),
        "to_task_loss": ratio(times, name, TASK_LOSS),
        "temporary_bytes": program.temporary_bytes,
    }


def _costs(times: Times, name: str, program: Program) -> Row:
    return {**timed(times, name, program), "flops": program.flops()}


def _notes(refusals: dict[str, str]) -> tuple[str, ...]:
    for name, reason in refusals.items():
        tell(f"{name} is left out: {reason}")
    if not refusals:
        return ()
    return (f"Left out, since they do not take these batches: {', '.join(f'`{name}`' for name in refusals)}.",)
