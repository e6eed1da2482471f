"""The suite `thrift`: a step whose meta-gradient is saved on, and what that does to a gradient with batch norm."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from adalfl_jax import Batch, BilevelBatch, Theta
from adalfl_jax.hypergradient import BilevelProblem, Forward
from adalfl_jax.hypergradient.one_step import linearize, loss_gradient_of, update_theta
from adalfl_jax.hypergradient.problem import AnyBatch, first_examples, inner_and_outer_keys, outer_gradient
from adalfl_jax.task_losses import softmax_cross_entropy
from adalfl_jax.types import PyTree
from experiments.benchmark.estimators import COSTS, timed
from experiments.benchmark.problems import (
    CIFAR,
    INNER_RATE,
    LOSS,
    PROBLEMS,
    TASK_LOSS,
    Problem,
    bilevel_program,
    draw_batches,
    draw_start,
    first_batch,
    task_loss_program,
    title,
)
from experiments.benchmark.timing import time_in_turn
from experiments.tables import Row, Table

VARIANTS: dict[str, dict[str, Any]] = {
    "forward": {},
    "recompute": {"hypergradient": "recompute"},
    "finite difference": {"hypergradient": "finite_difference"},
    "half of the batch": {"meta_batch_fraction": 1 / 2},
    "a quarter": {"meta_batch_fraction": 1 / 4},
    "an eighth": {"meta_batch_fraction": 1 / 8},
    "a quarter of the outer batch": {"meta_batch_fraction": (1.0, 1 / 4)},
    "every 4th step": {"outer_every": 4},
    "every 4th step, a quarter": {"outer_every": 4, "meta_batch_fraction": 1 / 4},
    "pipelined": {"pipelined": True},
    "pipelined, finite difference": {"pipelined": True, "hypergradient": "finite_difference"},
}
WITH_BATCH_NORM = Problem("wide_resnet", CIFAR, 32, 1, {"depth": 10, "width": 1})
FRACTIONS = tuple((inner, outer) for outer in (1 / 2, 1 / 4, 1 / 8) for inner in (outer, 1.0))
BIAS: dict[str, Callable[[Row], str]] = {
    "share of the inner batch": lambda row: f"1/{round(1 / row['inner'])}",
    "of the outer": lambda row: f"1/{round(1 / row['outer'])}",
    "one estimate": lambda row: f"{row['noise']:.3f}",
    "bias": lambda row: f"{row['bias']:.3f}",
    "its standard error": lambda row: f"{row['error']:.3f}",
}


def thrift_suite(names: list[str], num_steps: int | None, num_rounds: int) -> list[Table]:
    """The cost of every variant for each problem, and the bias where there is batch norm."""
    tables = []
    for name in names:
        problem = PROBLEMS[name]
        rounds_of_four = -(-(num_steps or problem.num_steps) // 4)
        tables.append(costs(title(name), problem._replace(num_steps=4 * rounds_of_four), num_rounds))
    return [*tables, bias("Bias with batch norm, WideResNet 10-1, 32x32, batch 32", WITH_BATCH_NORM, num_orders=4)]


def costs(heading: str, problem: Problem, num_rounds: int) -> Table:
    """Times every variant against the task-loss step."""
    start, batches = draw_start(problem), draw_batches(problem, problem.num_steps)
    frozen = functools.partial(LOSS.apply, start.phi_params)
    programs = {TASK_LOSS: task_loss_program(problem, start, batches)}
    programs["learned loss, frozen"] = task_loss_program(problem, start, batches, frozen)
    for name, options in VARIANTS.items():
        programs[name] = bilevel_program(problem, start, batches, **options)
    times = time_in_turn(programs, num_rounds)
    rows = [timed(times, *program) for program in programs.items()]
    columns = {"step": lambda row: row["program"], **{name: COSTS[name] for name in COSTS if name != "GFLOP"}}
    return Table(heading, columns, rows)


def bias(heading: str, problem: Problem, num_orders: int) -> Table:
    """How far estimates on parts of one batch are from its gradient: each, and their mean over all rotations."""
    start, batch = draw_start(problem), first_batch(draw_batches(problem, 1))
    optimizer = optax.sgd(INNER_RATE)
    task = BilevelProblem(problem.make_model().apply, LOSS.apply, softmax_cross_entropy, optimizer)
    theta = Theta.create(start.params, start.model_state, optimizer)

    def errors_of(fractions: tuple[float, float], rng_key: jax.Array) -> tuple[jax.Array, jax.Array]:
        single, mean = over_rotations(task, theta, start.phi_params, shuffled(batch, rng_key), fractions)
        return (single - whole[None]) / jnp.linalg.norm(whole), (mean - whole) / jnp.linalg.norm(whole)

    whole = ravel_pytree(jax.jit(functools.partial(Forward(), task))(theta, start.phi_params, batch).gradient)[0]
    keys, rows = jax.random.split(jax.random.key(3), num_orders), []
    for inner, outer in FRACTIONS:
        errors = functools.partial(errors_of, (inner, outer))
        single, mean = jax.jit(lambda keys, errors=errors: jax.lax.map(errors, keys))(keys)
        rows.append(
            {
                "inner": inner,
                "outer": outer,
                "noise": float(jnp.linalg.norm(single, axis=-1).mean()),
                "bias": float(jnp.linalg.norm(mean.mean(axis=0))),
                "error": float(jnp.sqrt(mean.var(axis=0, ddof=1).sum() / num_orders)),
            }
        )
    note = (
        "Distances from the gradient of the whole batch, over its norm. The bias is that of the mean over all "
        f"{problem.batch_size**2} pairs of rotations, in {num_orders} random orders."
    )
    return Table(heading, BIAS, rows, (note,))


def shuffled(batch: BilevelBatch, rng_key: jax.Array) -> BilevelBatch:
    """Both batches in random orders."""
    orders = (jax.random.permutation(key, len(batch.outer[1])) for key in jax.random.split(rng_key))
    parts = (
        jax.tree.map(lambda leaf, order=order: leaf[order], part)
        for order, part in zip(orders, (batch.inner, batch.outer), strict=True)
    )
    return batch._replace(**dict(zip(("inner", "outer"), parts, strict=True)))


def over_rotations(
    problem: BilevelProblem, theta: Theta, phi_params: PyTree, batch: BilevelBatch, fractions: tuple[float, float]
) -> tuple[jax.Array, jax.Array]:
    """What `Forward` estimates on parts of a batch and of its rotations, in which every example is in a part as often.

    An estimate is linear in w, so the mean over all pairs of an inner and an outer part needs the mean w alone.

    Returns:
      estimates on the parts of equally rotated batches `[B, |phi|]`; the mean over all pairs of rotations `[|phi|]`.
    """
    keys = inner_and_outer_keys(batch.rng_key)
    point, model_state = linearize(problem, theta, batch.inner, keys[0])
    _, cotangent, _ = loss_gradient_of(problem, phi_params, batch.inner[1], point.outputs)
    theta_next, to_direction = update_theta(problem, theta, model_state, point.pullback(cotangent)[0])

    def direction(shift: jax.Array) -> PyTree:
        part = _rotated_part(batch.outer, shift, fractions[1])
        return to_direction(outer_gradient(problem, theta_next.params, model_state, part, keys[1])[1])[0]

    def estimates(given: tuple[jax.Array, PyTree]) -> tuple[jax.Array, ...]:
        part = _rotated_part(batch.inner, given[0], fractions[0])
        point, _ = linearize(problem, theta, part, keys[0])
        *_, to_phi = loss_gradient_of(problem, phi_params, part.targets, point.outputs)
        products = (Forward().jacobian_product(point, w) for w in (given[1], mean_direction))
        return tuple(ravel_pytree(to_phi(product))[0] for product in products)

    shifts = jnp.arange(len(batch.outer[1]))
    directions = jax.lax.map(direction, shifts)
    mean_direction = jax.tree.map(lambda leaf: leaf.mean(axis=0), directions)
    single, on_mean = jax.lax.map(estimates, (shifts, directions))
    return single, on_mean.mean(axis=0)


def _rotated_part(batch: AnyBatch, shift: jax.Array, fraction: float) -> Batch:
    return first_examples(Batch(*(jnp.roll(leaf, shift, axis=0) for leaf in batch)), fraction)
