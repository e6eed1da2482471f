"""The suite `parts`: where the time of a bilevel step goes.

Each part runs alone under `lax.scan`, on another batch at every step, from the same theta and phi. Parts that share
work are timed together: "the same" is f and its pullback, or M and its gradient. Then the products that seeds make.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from adalfl_jax import Batch, BilevelBatch, Theta
from adalfl_jax.hypergradient.one_step import FiniteDifference, Forward, OneStep, linearize, loss_gradient_of
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
from experiments.tables import Row, Table

WHOLE = "the whole step"
NUM_SEEDS = 10
NUM_PRODUCTS = 50  # in a program
PRODUCTS = {
    "logistic regression, 100 x 784 by 784 x 10": (100, 784, 10),
    "loss network, 1000 x 40 by 40 x 40": (1000, 40, 40),
    "LeNet-5's second convolution as patches, 12800 x 150 by 150 x 16": (12800, 150, 16),
    "MLP, 128 x 1000 by 1000 x 1000": (128, 1000, 1000),
}
COLUMNS: dict[str, Callable[[Row], str]] = {
    "part": lambda row: row["part"],
    "ms": lambda row: f"{row['ms']:.3f}",
    "in task-loss steps": lambda row: str(row["ratio"]),
    "GFLOP": lambda row: f"{row['gflop']:.3g}",
}


def parts_suite(names: list[str], num_steps: int | None, num_rounds: int) -> list[Table]:
    """A table for each problem, and one of products of matrices."""
    return [*(_table(name, num_steps, num_rounds) for name in names), products(PRODUCTS, NUM_SEEDS, num_rounds)]


def products(shapes: Mapping[str, tuple[int, int, int]], num_seeds: int, num_rounds: int) -> Table:
    """x W of several seeds in one batched product, against those of one."""
    rows = []
    for name, shape in shapes.items():
        programs = {str(count): product_program(shape, count) for count in (1, num_seeds)}
        times = time_in_turn(programs, num_rounds)
        milliseconds = {f"ms_{count}": median(times, str(count)) for count in (1, num_seeds)}
        rows.append({"product": name, **milliseconds, "ratio": ratio(times, str(num_seeds), "1")})
    columns: dict[str, Callable[[Row], str]] = {
        "product": lambda row: row["product"],
        "one seed, ms": lambda row: f"{row['ms_1']:.3f}",
        f"{num_seeds} seeds, ms": lambda row: f"{row[f'ms_{num_seeds}']:.3f}",
        "ratio": lambda row: str(row["ratio"]),
    }
    return Table(f"Products of matrices, {num_seeds} seeds at once", columns, rows)


def product_program(shape: tuple[int, int, int], num_seeds: int) -> Program:
    """Products `[S, B, n] @ [S, n, m]`, one after the other."""
    num_rows, num_in, num_out = shape
    inputs = jax.random.normal(jax.random.key(0), (num_seeds, num_rows, num_in))
    weights = jax.random.normal(jax.random.key(1), (num_seeds, num_in, num_out))

    def run(weights: jax.Array) -> jax.Array:
        # The next product needs all of this one, so none can be left out or taken together with another.
        return jax.lax.fori_loop(
            0, NUM_PRODUCTS, lambda _, weights: weights + 1e-30 * (inputs @ weights).max(), weights
        )

    compiled = jax.jit(run).lower(weights).compile()
    return Program(lambda: weights, lambda weights: jax.block_until_ready(compiled(weights)), NUM_PRODUCTS)


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

    def outputs_alone(batch: BilevelBatch) -> PyTree:
        return linearize(bilevel, theta, Batch(*batch.inner), batch.rng_key)[0].outputs

    def model_parts(batch: BilevelBatch, *, product: OneStep | None) -> PyTree:
        point, _ = linearize(bilevel, theta, Batch(*batch.inner), batch.rng_key)
        (gradient,) = point.pullback(point.outputs)
        return gradient if product is None else (gradient, product.jacobian_product(point, gradient))

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
        "f on the inner batch": program(outputs_alone),
        "f and Jᵀc on the inner batch": program(lambda batch: model_parts(batch, product=None)),
        "the same, and J w": program(lambda batch: model_parts(batch, product=Forward())),
        "the same, and J w by a difference": program(lambda batch: model_parts(batch, product=FiniteDifference())),
        "L and its gradient on the outer batch": program(outer_part),
        "M and its gradient by the outputs": program(lambda batch: loss_parts(batch, with_phi=False)),
        "the same, and the gradient of phi": program(lambda batch: loss_parts(batch, with_phi=True)),
    }
