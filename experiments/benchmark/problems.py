"""Problems that need neither data nor a configuration, and the programs that train on them.

Inputs are standard normal and labels uniform. A program takes its steps under one `lax.scan`, on batches that are on
the device already, a different one each step, with a state that is donated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adalfl_jax import Batch, BilevelBatch, LossNetwork, Phi, Theta, make_bilevel_step, make_task_step, prime
from adalfl_jax.models import Model, make_model
from adalfl_jax.task_losses import softmax_cross_entropy
from adalfl_jax.types import LossFn, PyTree
from experiments.benchmark.flops import count_flops
from experiments.benchmark.timing import Program

INNER_RATE, OUTER_RATE = 0.01, 1e-5  # the paper's
LOSS = LossNetwork()
TASK_LOSS = "task loss"  # the program all others are compared with


class Start(NamedTuple):
    """Where training begins."""

    params: PyTree
    model_state: PyTree
    phi_params: PyTree


class Problem(NamedTuple):
    """A model, and the shape of its batches."""

    model: str
    input_shape: tuple[int, ...]
    batch_size: int
    num_steps: int  # of a timed run, for it to last long enough
    options: Mapping[str, Any] = {}
    num_outputs: int = 10

    def make_model(self) -> Model:
        """The model as pure functions."""
        return make_model(self.model, self.input_shape, self.num_outputs, **self.options)


MNIST, CIFAR = (28, 28, 1), (32, 32, 3)
PROBLEMS = {
    "logistic": Problem("logistic", MNIST, 100, 200),
    "mlp": Problem("mlp", MNIST, 128, 20),
    "lenet5": Problem("lenet5", MNIST, 128, 20),
    "resnet18": Problem("resnet", CIFAR, 32, 2, {"depth": 18}),
}
TITLES = {
    "logistic": "Logistic regression 784-10",
    "mlp": "MLP 784-1000-1000-10",
    "lenet5": "LeNet-5, 28x28",
    "resnet18": "ResNet-18, 32x32",
}


def title(name: str) -> str:
    """What a problem is called, and its batch size."""
    return f"{TITLES[name]}, batch {PROBLEMS[name].batch_size}"


def draw_batches(problem: Problem, num_steps: int, num_inner_steps: int | None = None) -> BilevelBatch:
    """The batches of some steps, `[num_steps, B, ...]`, or `[num_steps, K, B, ...]` inside a K-step unroll."""
    rng = np.random.default_rng(0)

    def batch(*lead: int) -> Batch:
        inputs = rng.standard_normal((*lead, problem.batch_size, *problem.input_shape), np.float32)
        labels = rng.integers(0, problem.num_outputs, (*lead, problem.batch_size), np.int32)
        return Batch(inputs, labels)  # pyright: ignore[reportArgumentType]

    unroll = () if num_inner_steps is None else (num_inner_steps,)
    keys = jax.random.split(jax.random.key(0), num_steps)
    steps = jnp.arange(num_steps, dtype=jnp.int32)
    return BilevelBatch(batch(num_steps, *unroll), batch(num_steps), keys, steps)


def draw_start(problem: Problem) -> Start:
    """Parameters and state of the model, and the parameters of the loss."""
    params, model_state = jax.jit(problem.make_model().init)(jax.random.key(1))
    return Start(params, model_state, LOSS.init(jax.random.key(2)))


def task_loss_program(
    problem: Problem, start: Start, batches: BilevelBatch, loss_fn: LossFn = softmax_cross_entropy
) -> Program:
    """Training on the task loss, or on another that does not change."""
    optimizer = optax.sgd(INNER_RATE)
    task_step = make_task_step(problem.make_model().apply, loss_fn, optimizer)
    theta = Theta.create(start.params, start.model_state, optimizer)
    return scan_program(lambda theta, batch: task_step(theta, batch.inner, batch.rng_key), theta, batches)


def bilevel_program(problem: Problem, start: Start, batches: BilevelBatch, **options: Any) -> Program:
    """Training theta and phi together, with options of `make_bilevel_step`.

    Raises:
      ValueError: such a step does not take such batches.
    """
    return scan_program(*bilevel_step_of(problem, start, batches, optax.adam(OUTER_RATE), **options), batches)


def bilevel_step_of(
    problem: Problem,
    start: Start,
    batches: BilevelBatch,
    outer_optimizer: optax.GradientTransformation,
    **options: Any,
) -> tuple[Callable, tuple[Theta, Phi]]:
    """A step `((theta, phi), batch) -> ((theta, phi), metrics)` and the state it starts from.

    Raises:
      ValueError: such a step does not take such batches.
    """
    inner_optimizer, apply_fn = optax.sgd(INNER_RATE), problem.make_model().apply
    bilevel_step = make_bilevel_step(
        apply_fn, LOSS.apply, softmax_cross_entropy, inner_optimizer, outer_optimizer, **options
    )
    theta = Theta.create(start.params, start.model_state, inner_optimizer)
    phi, first = Phi.create(start.phi_params, outer_optimizer), first_batch(batches)
    phi = prime(bilevel_step, theta, phi, first)

    def step(state: tuple[Theta, Phi], batch: BilevelBatch):
        theta, phi, metrics = bilevel_step(*state, batch)
        return (theta, phi), metrics

    jax.eval_shape(step, (theta, phi), first)
    return step, (theta, phi)


def first_batch(batches: BilevelBatch) -> BilevelBatch:
    """The batch of the first step."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), batches)


def scan_program(step: Callable, state: PyTree, batches: BilevelBatch) -> Program:
    """The compiled program of a step over all batches."""
    batches = jax.device_put(batches)

    @functools.partial(jax.jit, donate_argnums=0)
    def steps(state: PyTree, batches: BilevelBatch):
        return jax.lax.scan(step, state, batches)

    compiled = steps.lower(state, batches).compile()
    memory = compiled.memory_analysis()
    return Program(
        restart=lambda: jax.block_until_ready(jax.tree.map(jnp.copy, state)),
        run=lambda state: jax.block_until_ready(compiled(state, batches)),
        num_steps=len(batches.outer[1]),
        temporary_bytes=memory.temp_size_in_bytes if memory else 0,
        flops=lambda: count_flops(step, state, first_batch(batches)),
    )


def phi_gradient(problem: Problem, start: Start, batches: BilevelBatch, **options: Any) -> PyTree:
    """The gradient of phi in the first step, as the outer optimiser is given it."""
    recorder = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda updates, state, params=None: (jax.tree.map(jnp.zeros_like, updates), updates),
    )
    step, state = bilevel_step_of(problem, start, batches, recorder, **options)
    (_, phi), _ = jax.jit(step)(state, first_batch(batches))
    return phi.opt_state


def relative_difference(tree: PyTree, reference: PyTree) -> float:
    """The norm of the difference over that of the reference."""
    flat, expected = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(part)]) for part in (tree, reference))
    return float(np.linalg.norm(flat - expected) / np.linalg.norm(expected))


def first_in_float64(start: Start, batches: BilevelBatch) -> tuple[Start, BilevelBatch]:
    """The start and the batches of the first step alone, `[1, ...]`, in double precision; under `jax.enable_x64`."""
    return as_float64(start), as_float64(jax.tree.map(lambda leaf: leaf[:1], batches))


def as_float64(tree: PyTree) -> PyTree:
    """The same values in double precision; under `jax.enable_x64`."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64) if leaf.dtype == np.float32 else leaf, tree)
