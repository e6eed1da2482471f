"""What is measured between chunks, for every seed at once."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from adalfl_jax.analysis.measures import compare_gradients, flat_share_of_outputs, make_loss_shape
from adalfl_jax.data import representative_rows
from adalfl_jax.learned_losses import LossNetwork, RescaledLoss, at_progress
from adalfl_jax.training.setup import Setup
from adalfl_jax.training.sharding import divide_batch, over_seeds, place_rows, replicate, replicated
from adalfl_jax.training.state import RunState, learning_rate_of
from adalfl_jax.types import Batch, Theta

EVAL_BATCHES = 4  # training batches in one forward pass of an evaluation, which keeps nothing for a backward one
PROBE_SIZE = 500  # examples of a split, in whole batches, on which gradients are taken to be compared
STREAM_BLOCK = 20  # forward passes on examples that go to the device in one piece, where they are streamed


class _Probe(NamedTuple):
    """Examples that gradients are compared on."""

    train: Batch
    valid: Batch


class Evaluation:
    """Measures of a `RunState` on the device; compiled once for each kind of state."""

    def __init__(self, setup: Setup):
        self._setup = setup
        dataset = setup.dataset
        self._held_out = {"valid": dataset.valid, "test": dataset.test}
        self._probe = _Probe(*(_examples_for_gradients(setup, split) for split in (dataset.train, dataset.valid)))
        whole = replicated(setup.mesh)
        outputs = over_seeds(setup.mesh, functools.partial(predict, setup), in_axes=(0, None))
        self._outputs = jax.jit(outputs, out_shardings=whole)
        self._scalars = jax.jit(functools.partial(_measure, setup), out_shardings=whole)
        self._shape_of = None
        if (network := _network_of(setup)) is not None:
            self.predictions, shape_of = make_loss_shape(network)
            self._shape_of = jax.jit(jax.vmap(shape_of, in_axes=(0, None)), out_shardings=whole)

    def scalars(self, state: RunState, learning_rate: float, progress: float) -> dict[str, jax.Array]:
        """Metrics on the validation and test split and, with a learned loss, its gradient's scale; each `[S]`."""
        if state.theta is None:
            return {}
        outputs = {name: self._predict_all(state.theta, split) for name, split in self._held_out.items()}
        targets = {name: split.targets for name, split in self._held_out.items()}
        return self._scalars(state, learning_rate, progress, outputs, targets, self._probe)

    def loss_shape(self, state: RunState, progress: float) -> jax.Array | None:
        """l_phi `[S, 2, P]` over `predictions` for targets 0 and 1; None where no loss network takes part."""
        return None if state.phi is None or self._shape_of is None else self._shape_of(state.phi.params, progress)

    def _predict_all(self, theta: Theta, split: Batch) -> jax.Array:
        """Outputs `[S, N, C]`; a streamed split goes to the device block by block."""
        if not self._setup.dataset.is_streamed:
            return self._outputs(theta, split.inputs)
        size = STREAM_BLOCK * EVAL_BATCHES * self._setup.config.batch_size
        blocks = (split.inputs[start : start + size] for start in range(0, len(split.inputs), size))
        return jnp.concatenate([self._outputs(theta, place_rows(self._setup.mesh, block)) for block in blocks], axis=1)


def _examples_for_gradients(setup: Setup, split: Batch) -> Batch:
    """Examples that stand for a split, as a model takes them: whole batches, or all of less than one."""
    batch_size = min(setup.config.batch_size, len(split.inputs))
    num_batches = max(min(PROBE_SIZE, len(split.inputs)) // batch_size, 1)
    rows = representative_rows(split.targets, num_batches * batch_size)
    inputs, targets = (jnp.asarray(array[rows]) for array in split)
    return replicate(setup.mesh, Batch(setup.dataset.normalize(inputs), targets))


def _network_of(setup: Setup) -> LossNetwork | None:
    """The loss network that the learned loss is made of, if any; a scale does not change a shape."""
    loss = setup.learned_loss
    network = loss.loss if isinstance(loss, RescaledLoss) else loss
    return network if type(network) is LossNetwork else None


def _measure(
    setup: Setup,
    state: RunState,
    learning_rate: jax.Array,
    progress: jax.Array,
    outputs: dict[str, jax.Array],  # [S, N, C] each
    targets: dict[str, jax.Array],
    probe: _Probe,
) -> dict[str, jax.Array]:
    def one_seed(state: RunState, outputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
        values = {f"{name}/{setup.config.metric}": setup.metric_fn(targets[name], outputs[name]) for name in targets}
        if state.phi is not None:
            assert state.theta is not None
            loss_fn = functools.partial(at_progress(setup.learned_loss.apply, progress), state.phi.params)
            compare = functools.partial(
                compare_gradients,
                setup.model.apply,
                loss_fn,
                setup.task_loss_fn,
                state.theta,
                probe.train,
                learning_rate_of(state, learning_rate),
                batch_size=setup.config.batch_size,
                rng_key=jax.random.key(0),  # of dropout: the same units at every evaluation
            )
            values |= compare()._asdict()
            values["valid_gradient_cosine"] = compare(task_batch=probe.valid).gradient_cosine
            if (network := _network_of(setup)) is not None:
                valid = jnp.asarray(targets["valid"]), outputs["valid"]
                values["flat_output_share"] = flat_share_of_outputs(
                    network, state.phi.params, *valid, progress=progress
                )
        return values

    return over_seeds(setup.mesh, one_seed)(state, outputs)


def predict(setup: Setup, theta: Theta, inputs: jax.Array) -> jax.Array:
    """Outputs `[N, C]` of the model in eval mode, a few batches at a time."""
    batch_size = EVAL_BATCHES * setup.config.batch_size

    def apply(inputs: jax.Array) -> jax.Array:
        inputs = setup.dataset.normalize(divide_batch(setup.mesh, inputs) if len(inputs) == batch_size else inputs)
        return setup.model.apply(theta.params, theta.model_state, inputs, train=False, rng_key=None)[0]

    num_whole = len(inputs) // batch_size * batch_size
    parts = []
    if num_whole:
        outputs = jax.lax.map(apply, inputs[:num_whole].reshape(-1, batch_size, *inputs.shape[1:]))
        parts.append(outputs.reshape(num_whole, -1))
    if num_whole < len(inputs):
        parts.append(apply(inputs[num_whole:]))
    return jnp.concatenate(parts)
