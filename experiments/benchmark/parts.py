"""The suite `parts`: where the time of a bilevel step goes.

Each part runs alone under `lax.scan`, on another batch at every step, from the same theta and phi. Parts that share
work are timed together: "the same" is the row above.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from adalfl_jax import Batch, BilevelBatch, Theta
from adalfl_jax.hypergradient.one_step import JACOBIAN_PRODUCTS, forward, linearize, loss_gradient_of
from adalfl_jax.hypergradient.problem import BilevelProblem, outer_objective
from adalfl_jax.task_losses import softmax_cross_entropy
from adalfl_jax.types import PyTree
from experiments.benchmark.problems import (
    INNER_RATE,
    LOSS,
    PROBLEMS,
    TASK_LOSS,
    Problem,
    Start,
    bilevel_program,
    draw_batches,
    draw_start,
    first_batch,
    scan_program,
    task_loss_program,
    title,
)
from experiments.benchmark.timing import Program, median, ratio, time_in_turn
from experiments.page import Row, Table

WHOLE = "the whole step"
COLUMNS: dict[str, Callable[[Row], str]] = {
    "part": lambda row: row["part"],
    "ms": lambda row: f"{row['ms']:.3f}",
    "in task-loss steps": lambda row: str(row["ratio"]),
    "GFLOP": lambda row: f"{row['gflop']:.3g}",
}


def parts_suite(names: list[str], num_steps: int | None, num_rounds: int) -> list[Table]:
    """One table a problem."""
    return [_table(name, num_steps, num_rounds) for name in names]


def _table(name: str, num_steps: int | None, num_rounds: int) -> Table:
    problem = PROBLEMS[name]
    start, batches = draw_start(problem), draw_batches(problem, num_steps or problem.num_steps)
    programs = {TASK_LOSS: task_loss_program(problem, start, batches), **part_programs(problem, start, batches)}
    programs[WHOLE] = bilevel_program(problem, start, batches)
    times = time_in_turn(programs, num_rounds)
    rows = [
        {
            "part": part,
            "ms": median(times, part),
            "ratio": ratio(times, part, TASK_LOSS),
            "gflop": program.flops() / 1e9,
        }
        for part, program in programs.items()
    ]
    return Table(title(name), COLUMNS, rows)


def part_programs(problem: Problem, start: Start, batches: BilevelBatch) -> dict[str, Program]:
    """The programs of the parts, by what they compute."""
    optimizer = optax.sgd(INNER_RATE)
    bilevel = BilevelProblem(problem.make_model().apply, LOSS.apply, softmax_cross_entropy, optimizer)
    theta = Theta.create(start.params, start.model_state, optimizer)

    def program(compute: Callable[[BilevelBatch], PyTree]) -> Program:
        empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(compute, first))
        # The result of a step is what the next one carries, so that none can be left out.
        return scan_program(lambda _, batch: (compute(batch), ()), empty, batches)

    def model_parts(batch: BilevelBatch, *, with_product: bool) -> PyTree:
        point, _ = linearize(bilevel, theta, Batch(*batch.inner), batch.rng_key)
        (gradient,) = point.pullback(point.outputs)
        return (gradient, JACOBIAN_PRODUCTS[forward](point, gradient)) if with_product else gradient

    def loss_parts(batch: BilevelBatch, *, with_phi: bool) -> PyTree:
        inputs, targets = batch.inner
        outputs = inputs.reshape(problem.batch_size, -1)[:, : problem.num_outputs]
        loss, gradient, to_phi = loss_gradient_of(bilevel, start.phi_params, targets, outputs)
        return (loss, gradient, to_phi(outputs)) if with_phi else (loss, gradient)

    def outer_part(batch: BilevelBatch) -> PyTree:
        return jax.value_and_grad(outer_objective, argnums=1)(
            bilevel, theta.params, theta.model_state, batch.outer, batch.rng_key
        )

    first = first_batch(batches)
    return {
        "f and Jᵀc on the inner batch": program(lambda batch: model_parts(batch, with_product=False)),
        "the same, and J w": program(lambda batch: model_parts(batch, with_product=True)),
        "L and its gradient on the outer batch": program(outer_part),
        "M and its gradient by the outputs": program(lambda batch: loss_parts(batch, with_phi=False)),
        "the same, and the gradient of phi": program(lambda batch: loss_parts(batch, with_phi=True)),
    }
