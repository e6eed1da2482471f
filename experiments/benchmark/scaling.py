"""The suite `scaling`: how the price of a bilevel step changes with the sizes of a problem."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from experiments.benchmark.problems import (
    PROBLEMS,
    TASK_LOSS,
    Problem,
    bilevel_program,
    draw_batches,
    draw_start,
    task_loss_program,
)
from experiments.benchmark.timing import median, ratio, time_in_turn
from experiments.tables import Row, Table

MLP = PROBLEMS["mlp"]._replace(options={"hidden_sizes": (1000, 1000)})
BILEVEL = "bilevel"
GRID = {
    "batch size": {str(size): MLP._replace(batch_size=size) for size in (16, 64, 128, 256, 512)},
    "width": {str(width): MLP._replace(options={"hidden_sizes": (width, width)}) for width in (100, 300, 1000, 2000)},
    "outputs C": {str(count): MLP._replace(num_outputs=count) for count in (2, 10, 100, 1000)},
    "inputs and width": {
        "64, 64": MLP._replace(input_shape=(64,), options={"hidden_sizes": (64, 64)}, num_steps=400),
        "64, 512": MLP._replace(input_shape=(64,), options={"hidden_sizes": (512, 512)}, num_steps=100),
        "784, 1000": MLP,
    },
}  # what is varied -> its value -> the problem; all else is as in the MLP of the other suites
COLUMNS: dict[str, Callable[[Row], str]] = {
    "task-loss step, ms": lambda row: f"{row['task_loss_ms']:.3f}",
    "bilevel step, ms": lambda row: f"{row['bilevel_ms']:.3f}",
    "in task-loss steps": lambda row: str(row["ratio"]),
}


def scaling_suite(num_steps: int | None, num_rounds: int) -> list[Table]:
    """A table for each size."""
    return [sweep(size, problems, num_steps, num_rounds) for size, problems in GRID.items()]


def sweep(size: str, problems: Mapping[str, Problem], num_steps: int | None, num_rounds: int) -> Table:
    """A bilevel step against a task-loss step, along one size."""
    rows = []
    for value, problem in problems.items():
        start, batches = draw_start(problem), draw_batches(problem, num_steps or problem.num_steps)
        programs = {
            TASK_LOSS: task_loss_program(problem, start, batches),
            BILEVEL: bilevel_program(problem, start, batches),
        }
        times = time_in_turn(programs, num_rounds)
        rows.append(
            {
                "value": value,
                "task_loss_ms": median(times, TASK_LOSS),
                "bilevel_ms": median(times, BILEVEL),
                "ratio": ratio(times, BILEVEL, TASK_LOSS),
            }
        )
    return Table(f"MLP 784-1000-1000-10, batch 128, by {size}", {size: lambda row: row["value"], **COLUMNS}, rows)
