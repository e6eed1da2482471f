"""The suite `thrift`: a step whose meta-gradient is saved on, and what that does to a gradient with batch norm."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from adalfl_jax import BilevelBatch, Theta
from adalfl_jax.hypergradient import BilevelProblem, forward
from adalfl_jax.hypergradient.problem import first_examples
from adalfl_jax.task_losses import softmax_cross_entropy
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
from experiments.page import Row, Table

VARIANTS: dict[str, dict[str, Any]] = {
    "forward": {},
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
    "one estimate": lambda row: f"{row['noise']:.2f}",
    "mean of all": lambda row: f"{row['bias']:.2f}",
    "its standard error": lambda row: f"{row['error']:.2f}",
}


def thrift_suite(names: list[str], num_steps: int | None, num_rounds: int) -> list[Table]:
    """The cost of every variant for each problem, and the bias where there is batch norm."""
    tables = []
    for name in names:
        problem = PROBLEMS[name]
        rounds_of_four = -(-(num_steps or problem.num_steps) // 4)
        tables.append(costs(title(name), problem._replace(num_steps=4 * rounds_of_four), num_rounds))
    return [*tables, bias("Bias with batch norm, WideResNet 10-1, 32x32, batch 32", WITH_BATCH_NORM, num_draws=64)]


def costs(heading: str, problem: Problem, num_rounds: int) -> Table:
    """Times every variant against the task-loss step."""
    start, batches = draw_start(problem), draw_batches(problem, problem.num_steps)
    programs = {TASK_LOSS: task_loss_program(problem, start, batches)}
    for name, options in VARIANTS.items():
        programs[name] = bilevel_program(problem, start, batches, **options)
    times = time_in_turn(programs, num_rounds)
    rows = [timed(times, *program) for program in programs.items()]
    columns = {"step": lambda row: row["program"], **{name: COSTS[name] for name in COSTS if name != "GFLOP"}}
    return Table(heading, columns, rows)


def bias(heading: str, problem: Problem, num_draws: int) -> Table:
    """How far estimates on random parts of one batch are from its gradient: each, and their mean."""
    start, batch = draw_start(problem), first_batch(draw_batches(problem, 1))
    optimizer, apply_fn = optax.sgd(INNER_RATE), problem.make_model().apply
    theta = Theta.create(start.params, start.model_state, optimizer)

    def gradient(fractions: tuple[float, float], theta: Theta, batch: BilevelBatch) -> jax.Array:
        task = BilevelProblem(apply_fn, LOSS.apply, softmax_cross_entropy, optimizer, fractions[0])
        batch = batch._replace(outer=first_examples(batch.outer, fractions[1]))
        return ravel_pytree(forward(task, theta, start.phi_params, batch).gradient)[0]

    def shuffled(batch: BilevelBatch, rng_key: jax.Array) -> BilevelBatch:
        orders = (jax.random.permutation(key, problem.batch_size) for key in jax.random.split(rng_key))
        inner, outer = (
            jax.tree.map(lambda leaf, order=order: leaf[order], part)
            for part, order in zip((batch.inner, batch.outer), orders, strict=True)
        )
        return batch._replace(inner=inner, outer=outer)

    whole = jax.jit(functools.partial(gradient, (1.0, 1.0)))(theta, batch)
    keys, rows = jax.random.split(jax.random.key(3), num_draws), []
    for fractions in FRACTIONS:
        on_part = functools.partial(gradient, fractions)
        estimate = jax.jit(lambda key, theta, batch, of=on_part: of(theta, shuffled(batch, key)))
        errors = jnp.stack([estimate(key, theta, batch) - whole for key in keys]) / jnp.linalg.norm(whole)
        rows.append(
            {
                "inner": fractions[0],
                "outer": fractions[1],
                "noise": float(jnp.linalg.norm(errors, axis=1).mean()),
                "bias": float(jnp.linalg.norm(errors.mean(axis=0))),
                "error": float(jnp.sqrt(errors.var(axis=0, ddof=1).sum() / num_draws)),
            }
        )
    return Table(
        heading, BIAS, rows, (f"Distances from the gradient of the whole batch, over its norm; {num_draws} draws.",)
    )
