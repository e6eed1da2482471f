"""Loss and architecture searched together: phi has the weights of an activation too, and one outer update moves both.

    .venv/bin/python -m experiments.joint_search --write=docs/results.md

`make_bilevel_step` gives phi to the learned loss alone, and an architecture is in both forward passes. What it takes is
an estimator, which is where a forward pass meets phi: `through_architecture` here is the exact one-step gradient with
the model bound to phi in the inner and the outer pass. The step, phi and its optimiser are the library's. The model is
an MLP of one hidden layer on digits, whose activation is a mixture with softmax weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import app, flags

import adalfl_jax
from adalfl_jax import data
from adalfl_jax.hypergradient import (
    BilevelProblem,
    Hypergradient,
    inner_and_outer_keys,
    inner_step,
    outer_objective,
)
from adalfl_jax.models import make_model
from adalfl_jax.task_losses import error_rate, softmax_cross_entropy
from adalfl_jax.types import BilevelBatch, PyTree, Theta
from experiments.launch import parse_flags
from experiments.trials import Curves, Point, Trial, compare_trials, publish_trials

NAME = "joint_search"
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "identity": lambda x: x,
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "sin": jnp.sin,
}
HIDDEN_SIZE, BATCH_SIZE, NUM_POINTS = 64, 50, 20
RATES, ETAS = (0.03, 0.1, 0.3, 1.0, 3.0), {"loss": 3e-4, "architecture": 1e-2}
NETWORK = adalfl_jax.LossNetwork()

_STEPS = flags.DEFINE_integer(
    "num_steps", 1000, f"Training steps, rounded down to a multiple of {NUM_POINTS}.", lower_bound=NUM_POINTS
)
_SEEDS = flags.DEFINE_integer("num_models", 10, "Seeds that are compared.", lower_bound=2)


def mixed_mlp(
    params: PyTree, model_state: PyTree, inputs: jax.Array, *, train: bool, rng_key: Any, architecture: jax.Array
) -> tuple[jax.Array, PyTree]:
    """An MLP of the zoo's parameters with activations mixed by softmax(architecture), `[5]`."""
    del train, rng_key
    hidden = inputs.reshape(len(inputs), -1) @ params["hidden"][0]["kernel"] + params["hidden"][0]["bias"][None, :]
    mixed = jnp.stack([fn(hidden) for fn in ACTIVATIONS.values()], axis=-1) @ jax.nn.softmax(architecture)
    return mixed @ params["output"]["kernel"] + params["output"]["bias"][None, :], model_state


def through_architecture(
    problem: BilevelProblem, theta: Theta, phi_params: PyTree, batch: BilevelBatch, carry: PyTree = (), /
) -> Hypergradient:
    """The exact gradient through one step for phi = {"loss": ..., "architecture": ...}, an estimator as any other.

    Where the architecture a is in both passes the outer loss depends on it twice: dL/da = d L(theta'(a), a) / da.
    """
    inner_key, outer_key = inner_and_outer_keys(batch.rng_key)

    def objective(phi_params: PyTree) -> tuple[jax.Array, tuple[Theta, jax.Array]]:
        bound = problem._replace(
            apply_fn=functools.partial(mixed_mlp, architecture=phi_params["architecture"]),
            learned_loss_fn=lambda phi, targets, outputs: problem.learned_loss_fn(phi["loss"], targets, outputs),
        )
        theta_next, inner_loss = inner_step(bound, theta, phi_params, batch.inner, inner_key)
        outer_loss = outer_objective(bound, theta_next.params, theta_next.model_state, batch.outer, outer_key)
        return outer_loss, (theta_next, inner_loss)

    (outer_loss, (theta_next, inner_loss)), gradient = jax.value_and_grad(objective, has_aux=True)(phi_params)
    return Hypergradient(theta_next, gradient, inner_loss, outer_loss, carry)


def make_training(
    dataset: data.Dataset, num_steps: int, *, learns: tuple[str, ...], start: jax.Array
) -> Callable[[jax.Array, float], tuple[jax.Array, jax.Array, jax.Array]]:
    """Makes the program that trains models side by side; phi starts at the task loss and the given architecture.

    Args:
      dataset: digits.
      num_steps: of training.
      learns: which parts of phi move, of "loss" and "architecture". A loss that does not is the task loss.
      start: of the architecture, `[5]`.

    Returns:
      `(seeds [S], alpha) -> ` error rates on the validation and on the test split, `[S, NUM_POINTS]`, and the
      architecture's weights `[S, 5]`.
    """
    model = make_model("mlp", dataset.input_shape, dataset.num_outputs, hidden_sizes=(HIDDEN_SIZE,))
    etas: dict[Hashable, Any] = {
        part: optax.adam(eta) if part in learns else optax.set_to_zero() for part, eta in ETAS.items()
    }
    outer = optax.partition(etas, {part: part for part in etas})
    apply_fn = functools.partial(mixed_mlp, architecture=start)  # the estimator puts that of phi in its place
    loss = NETWORK if "loss" in learns else adalfl_jax.ScaledTaskLoss()

    def one_model(seed: jax.Array, rate: jax.Array):
        theta_key, phi_key, fit_key, inner_key, outer_key = jax.random.split(jax.random.key(seed), 5)
        inner = optax.sgd(rate)
        step = adalfl_jax.make_bilevel_step(
            apply_fn, loss.apply, softmax_cross_entropy, inner, outer, hypergradient=through_architecture
        )
        params = loss.init(phi_key)
        if "loss" in learns:
            params = adalfl_jax.fit_to_task_loss(
                loss, params, softmax_cross_entropy, fit_key, num_outputs=dataset.num_outputs
            )
        theta = Theta.create(*model.init(theta_key), inner)
        phi = adalfl_jax.Phi.create({"loss": params, "architecture": start}, outer)
        draw = functools.partial(
            data.epoch_indices, num_steps=num_steps, num_examples=len(dataset.train.inputs), batch_size=BATCH_SIZE
        )

        def body(state: tuple, indices: tuple[jax.Array, jax.Array]) -> tuple[tuple, None]:
            theta, phi = state
            inner_batch, outer_batch = (data.take(dataset.train, part) for part in indices)
            return step(theta, phi, BilevelBatch(inner_batch, outer_batch))[:2], None

        def piece(state: tuple, indices: tuple[jax.Array, jax.Array]) -> tuple[tuple, jax.Array]:
            theta, phi = jax.lax.scan(body, state, indices)[0]
            errors = [_error(theta, phi.params["architecture"], part) for part in (dataset.valid, dataset.test)]
            return (theta, phi), jnp.stack(errors)

        kept = num_steps - num_steps % NUM_POINTS
        pieces = jax.tree.map(
            lambda leaf: leaf[:kept].reshape(NUM_POINTS, -1, BATCH_SIZE), (draw(inner_key, 0), draw(outer_key, 0))
        )
        (_, phi), errors = jax.lax.scan(piece, (theta, phi), pieces)
        return errors[:, 0], errors[:, 1], jax.nn.softmax(phi.params["architecture"])

    return jax.jit(jax.vmap(one_model, in_axes=(0, None)))


def _error(theta: Theta, architecture: jax.Array, batch: adalfl_jax.Batch) -> jax.Array:
    outputs, _ = mixed_mlp(theta.params, {}, batch.inputs, train=False, rng_key=None, architecture=architecture)
    return error_rate(batch.targets, outputs)


def make_trials(dataset: data.Dataset, num_steps: int) -> dict[str, Trial]:
    """Every activation by itself, mixtures, and what is learned of them; tuned on validation, judged on test errors."""
    even = jnp.zeros(len(ACTIVATIONS))

    def trial(title: str, learns: tuple[str, ...] = (), start: jax.Array = even) -> Trial:
        training = make_training(dataset, num_steps, learns=learns, start=start)

        def run(point: Point, seeds: Sequence[int]) -> Curves:
            valid, test, weights = jax.device_get(training(jnp.array(seeds), point["alpha"]))
            shares = zip(ACTIVATIONS, weights.mean(axis=0), strict=True)
            notes = ", ".join(f"{name} {share:.0%}" for name, share in shares) if "architecture" in learns else ""
            return Curves(valid[:, -1], test[:, -1], test, notes)

        return Trial(title, run, tuple({"alpha": rate} for rate in RATES))

    def alone(name: str) -> jax.Array:
        return jnp.where(jnp.arange(len(ACTIVATIONS)) == list(ACTIVATIONS).index(name), 0.0, -30.0)

    return {
        **{name: trial(f"{name}, task loss", start=alone(name)) for name in ACTIVATIONS},
        "even": trial("even mixture, task loss"),
        "architecture": trial("architecture learned, task loss", ("architecture",)),
        "loss": trial("even mixture, loss learned", ("loss",)),
        "joint": trial("both learned", ("loss", "architecture")),
    }


def main(argv: list[str]) -> None:
    """Trains all models, writes numbers and a picture, and prints the table."""
    del argv
    publish_trials(
        NAME,
        lambda memory: compare_trials(
            make_trials(data.load("digits"), _STEPS.value),
            "joint",
            tuning_seeds=range(5),
            seeds=range(100, 100 + _SEEDS.value),
            largest_is_best=False,
            settings={"num_steps": _STEPS.value},
            memory=memory,
        ),
        title=f"digits, MLP 64-{HIDDEN_SIZE}-10, the activation learned",
        measure="test error rate, %",
        scale=100,
        xlabel="step",
        ylabel="test error rate",
        every=_STEPS.value // NUM_POINTS,
    )


if __name__ == "__main__":
    app.run(main, flags_parser=functools.partial(parse_flags, unused=("config",)))
