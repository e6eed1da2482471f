"""What is measured between chunks, for every seed at once."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from adalfl_jax.analysis.measures import compare_gradients, make_loss_shape
from adalfl_jax.learned_losses import LossNetwork
from adalfl_jax.training.phases import RunState
from adalfl_jax.training.setup import Setup
from adalfl_jax.types import Batch, Theta

EVAL_BATCH_SIZE = 1000  # examples in one forward pass of an evaluation
PROBE_SIZE = 500  # training examples the gradients of M_phi and L are compared on


class Evaluation:
    """Measures of a `RunState` on the device; compiled once for each kind of state."""

    def __init__(self, setup: Setup):
        self._setup = setup
        dataset = setup.dataset
        self._held_out = {"valid": dataset.valid, "test": dataset.test}
        self._probe = jax.tree.map(lambda array: array[:PROBE_SIZE], dataset.train)
        self._scalars = jax.jit(functools.partial(_measure, setup))
        self._shape_of = None
        if isinstance(setup.learned_loss, LossNetwork):
            self.predictions, shape_of = make_loss_shape(setup.learned_loss)
            self._shape_of = jax.jit(jax.vmap(shape_of))

    def scalars(self, state: RunState, learning_rate: float) -> dict[str, jax.Array]:
        """Metrics on the validation and test split and, with a learned loss, its gradient's scale; each `[S]`."""
        return {} if state.theta is None else self._scalars(state, learning_rate, self._held_out, self._probe)

    def loss_shape(self, state: RunState) -> jax.Array | None:
        """l_phi `[S, 2, P]` over `predictions` for targets 0 and 1; None where no loss network takes part."""
        return None if state.phi is None or self._shape_of is None else self._shape_of(state.phi.params)


def _measure(
    setup: Setup, state: RunState, learning_rate: jax.Array, held_out: dict[str, Batch], probe: Batch
) -> dict[str, jax.Array]:
    def one_seed(state: RunState) -> dict[str, jax.Array]:
        theta = state.theta
        assert theta is not None
        values = {
            f"{name}/{setup.config.metric}": setup.metric_fn(split.targets, predict(setup, theta, split.inputs))
            for name, split in held_out.items()
        }
        if state.phi is not None:
            loss_fn = functools.partial(setup.learned_loss.apply, state.phi.params)
            comparison = compare_gradients(setup.model.apply, loss_fn, setup.task_loss_fn, theta, probe, learning_rate)
            values |= comparison._asdict()
        return values

    return jax.vmap(one_seed)(state)


def predict(setup: Setup, theta: Theta, inputs: jax.Array) -> jax.Array:
    """Outputs `[N, C]` of the model in eval mode, at most `EVAL_BATCH_SIZE` examples at a time."""

    def apply(inputs: jax.Array) -> jax.Array:
        return setup.model.apply(theta.params, theta.model_state, inputs, train=False, rng_key=None)[0]

    num_whole = len(inputs) // EVAL_BATCH_SIZE * EVAL_BATCH_SIZE
    parts = []
    if num_whole:
        outputs = jax.lax.map(apply, inputs[:num_whole].reshape(-1, EVAL_BATCH_SIZE, *inputs.shape[1:]))
        parts.append(outputs.reshape(num_whole, -1))
    if num_whole < len(inputs):
        parts.append(apply(inputs[num_whole:]))
    return jnp.concatenate(parts)
