"""The suite `peers`: a step here and in PyTorch, on the same weights, batches and settings."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from adalfl_jax.training.machine import num_cores
from adalfl_jax.types import BilevelBatch
from experiments.benchmark.problems import (
    PROBLEMS,
    TASK_LOSS,
    Problem,
    Start,
    bilevel_program,
    draw_batches,
    draw_start,
    first_in_float64,
    phi_gradient,
    relative_difference,
    task_loss_program,
    title,
)
from experiments.benchmark.timing import Times, median, ratio, time_in_turn
from experiments.tables import Row, Table

PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "higher", "torchopt")
EXACT = ("forward", "recompute", "unrolled")
OURS = "JAX, forward"
TOLERANCE = 1e-4
COLUMNS: dict[str, Callable[[Row], str]] = {
    "step": lambda row: row["program"],
    "ms": lambda row: f"{row['ms']:.3f}",
    "in own task-loss steps": lambda row: str(row["to_task_loss"]),
    f"in steps of “{OURS}”": lambda row: str(row["to_ours"]),
}


class MissingPeerError(Exception):
    """What is to be compared with is not installed."""


class GradientMismatchError(Exception):
    """Two programs that are to be compared do not compute the same."""


def require_peers() -> None:
    """Raises MissingPeerError without PyTorch or higher."""
    missing = [name for name in ("torch", "higher") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingPeerError(
            f"suite 'peers' compares with {' and '.join(missing)}, not installed here; "
            'install the extra: .venv/bin/python -m pip install --constraint constraints.txt --editable ".[bench]"'
        )


def facts() -> dict[str, Any]:
    """Where PyTorch computes, and on how many threads: as many as XLA."""
    import torch  # pyright: ignore[reportMissingImports]

    from experiments.benchmark.torch_steps import device

    torch.set_num_threads(num_cores())
    if jax.default_backend() == "gpu":
        torch.set_float32_matmul_precision("high")  # TensorFloat-32, as XLA does by default
        torch.backends.cudnn.allow_tf32 = True
    place = device().type
    if place == "cpu" and jax.default_backend() != "cpu":
        place = "the CPU, not the device: this installation of PyTorch has no CUDA, and the columns do not compare"
    return {"PyTorch's threads": torch.get_num_threads(), "PyTorch on": place}


def peers_suite(names: list[str], num_steps: int | None, num_rounds: int) -> list[Table]:
    """A table for each problem."""
    return [compare(title(name), PROBLEMS[name], num_steps, num_rounds) for name in names]


def compare(heading: str, problem: Problem, num_steps: int | None, num_rounds: int) -> Table:
    """Times the steps of one problem, once their gradients are known to be equal.

    Raises:
      GradientMismatchError: they are not.
    """
    from experiments.benchmark.torch_steps import BILEVEL_STEPS, Twin, task_loss

    start, batches = draw_start(problem), draw_batches(problem, num_steps or problem.num_steps)
    worst = check_gradients(problem, start, batches)
    twin = Twin(problem, start, batches)
    programs = {f"JAX, {TASK_LOSS}": task_loss_program(problem, start, batches)}
    for name in EXACT:
        programs[f"JAX, {name}"] = bilevel_program(problem, start, batches, hypergradient=name)
    for name, make_step in {TASK_LOSS: task_loss, **BILEVEL_STEPS}.items():
        programs[f"PyTorch, {name}"] = twin.program(make_step)
    times = time_in_turn(programs, num_rounds)
    note = f"The gradients of φ agree to {worst:.0e} of their norm in double precision."
    return Table(heading, COLUMNS, [_row(times, name) for name in programs], (note,))


def check_gradients(problem: Problem, start: Start, batches: BilevelBatch) -> float:
    """The largest relative difference between gradients of phi in the first step, all in double precision.

    In single precision the rounding of a deep network with batch norm comes close to the tolerance.

    Raises:
      GradientMismatchError: it is above the tolerance.
    """
    from experiments.benchmark.torch_steps import BILEVEL_STEPS, Twin

    with jax.enable_x64(True):
        start, first = first_in_float64(start, batches)
        gradients = {f"JAX, {name}": phi_gradient(problem, start, first, hypergradient=name) for name in EXACT}
    twin = Twin(problem, start, first)
    for name, make_step in BILEVEL_STEPS.items():
        gradients[f"PyTorch, {name}"] = twin.phi_gradient(make_step)
    return require_equal(gradients)


def require_equal(gradients: dict[str, Any]) -> float:
    """The largest relative difference from ours.

    Raises:
      GradientMismatchError: it is above the tolerance.
    """
    differences = {name: relative_difference(gradient, gradients[OURS]) for name, gradient in gradients.items()}
    name = max(differences, key=lambda name: np.nan_to_num(differences[name], nan=np.inf))
    if not differences[name] <= TOLERANCE:
        raise GradientMismatchError(
            f"the gradient of phi by “{name}” differs from that by “{OURS}” by {differences[name]:.1e} of its norm, "
            f"above {TOLERANCE:g}; nothing was timed"
        )
    return differences[name]


def _row(times: Times, name: str) -> Row:
    own = f"{name.partition(',')[0]}, {TASK_LOSS}"
    return {
        "program": name,
        "ms": median(times, name),
        "to_task_loss": ratio(times, name, own),
        "to_ours": ratio(times, name, OURS),
    }
