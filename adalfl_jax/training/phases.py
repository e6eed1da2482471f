"""The two phases of a run, as programs that advance every seed by one chunk of steps on the device.

Seeds are a leading axis S of every array, put there by `jax.vmap`. The keys of a step depend on the seed and the number
of the step alone, so neither the length of a chunk nor the number of seeds changes a result, and all methods of one
seed start from the same theta_0 and see the same batches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from adalfl_jax.bilevel import make_bilevel_step
from adalfl_jax.data import augment, epoch_indices, take
from adalfl_jax.data.streaming import stream
from adalfl_jax.hypergradient import ONE_INNER_STEP, REMEMBERING
from adalfl_jax.initialization import make_offline_step
from adalfl_jax.training.faults import skip_nonfinite
from adalfl_jax.training.optimizers import make_inner_optimizer
from adalfl_jax.training.setup import Setup
from adalfl_jax.training.sharding import (
    DATA,
    SEED,
    divide_batch,
    divide_state,
    join_parts,
    over_seeds,
    own_part,
    replicated,
)
from adalfl_jax.training.state import RunState
from adalfl_jax.training.steps import STEPS, inner_arguments, phi_metrics
from adalfl_jax.types import Batch, BilevelBatch, PyTree


class StepSource(NamedTuple):
    """What a step makes its batches of; scanned over."""

    inner: PyTree  # [B], or [K, B] in a K-step unroll: indices into the training split, or its examples
    outer: PyTree  # [B]: indices into the outer split, or its examples
    rng_key: jax.Array  # []
    augmentation_key: jax.Array  # []
    step: jax.Array  # [] int32, its number; the same for all seeds


_SEED_AXES = StepSource(inner=1, outer=1, rng_key=1, augmentation_key=1, step=None)  # pyright: ignore[reportArgumentType]

Splits = tuple[Batch, Batch | None]  # of inner and of outer batches; None: of the training split too, passed once
ChunkMetrics = dict[str, jax.Array]  # name -> [S, num_steps]


class Program(NamedTuple):
    """The steps of a phase, compiled whole: for batches it draws and for batches it is given."""

    # (state, keys, splits, learning_rate, first_step, *, num_steps) -> (state, metrics), which draws its batches
    advance: Callable[..., tuple[RunState, ChunkMetrics]]
    # (state, sources [num_steps, S, ...], learning_rate) -> (state, metrics), on examples it is given
    advance_block: Callable[..., tuple[RunState, ChunkMetrics]]


def divided(setup: Setup, state: RunState) -> RunState:
    """A state with its large arrays divided over the mesh, where the run has one."""
    return divide_state(setup.mesh, state, setup.config.batch_size)


def batch_shapes(setup: Setup) -> BilevelBatch:
    """The batch of a step, without values."""

    def make(rng_key: jax.Array) -> BilevelBatch:
        size = setup.config.batch_size
        batch = Batch(*(jnp.zeros((size, *leaf.shape[1:]), leaf.dtype) for leaf in setup.dataset.train))
        return _make_batch(setup, StepSource(batch, batch, rng_key, rng_key, jnp.zeros((), jnp.int32)))

    return jax.eval_shape(make, jax.random.key(0))


def splits_of(setup: Setup) -> Splits:
    """The training split and the one outer batches come from."""
    return setup.dataset.train, setup.outer_examples


def offline_hypergradient(name: str, num_inner_steps: int) -> str:
    """The estimator of the offline phase: the named one, or "unrolled" where that cannot be taken there.

    One that remembers earlier steps needs all of a theta's, and some take no leading axis K.
    """
    is_out_of_place = name in REMEMBERING or (num_inner_steps > 1 and name in ONE_INNER_STEP)
    return "unrolled" if is_out_of_place else name


def make_offline_program(setup: Setup) -> Program:
    """Algorithm 1: advances phi on fresh models."""
    config = setup.config
    inner_optimizer = make_inner_optimizer(config, config.inner.learning_rate)
    num_inner_steps = config.offline.num_inner_steps
    bilevel_step = make_bilevel_step(
        *inner_arguments(setup, inner_optimizer),
        optax.adam(config.offline.learning_rate),
        hypergradient=config.estimator.make(offline_hypergradient(config.hypergradient, num_inner_steps)),
    )
    offline_step = make_offline_step(bilevel_step, setup.model.init, inner_optimizer)

    def make_step(learning_rate: jax.Array, rate_factor: None):
        del learning_rate, rate_factor  # phi is learned for the rate in the config

        def step(state: RunState, batch: BilevelBatch) -> tuple[RunState, ChunkMetrics]:
            assert state.phi is not None
            phi, metrics = offline_step(state.phi, batch._replace(progress=jnp.zeros(())))  # every theta is fresh
            return RunState(None, phi), metrics._asdict() | phi_metrics(state.phi, phi)

        return step

    return _make_program(setup, make_step, lambda keys: keys.offline, num_inner_steps)


def make_training_program(setup: Setup, method: str) -> Program:
    """Training of theta, by the step of a method."""
    make_step = STEPS[method]
    return _make_program(
        setup,
        lambda rate, factor: make_step(setup, make_inner_optimizer(setup.config, rate, factor)),
        lambda keys: keys.training,
        num_inner_steps=1,
    )


def _make_program(setup: Setup, make_step, select_key, num_inner_steps: int) -> Program:
    """Puts a step under scan, seeds and jit."""
    mesh, whole = setup.mesh, replicated(setup.mesh)
    draw = functools.partial(_draw_sources, num_inner_steps=num_inner_steps, batch_size=setup.config.batch_size)

    def advance_one_seed(
        state: RunState, sources: StepSource, learning_rate: jax.Array, fetch: Callable[[StepSource], StepSource]
    ) -> tuple[RunState, ChunkMetrics]:
        factor = state.rate_factor
        step = make_step(learning_rate, factor)
        if setup.config.on_nonfinite == "skip":
            step = skip_nonfinite(step)

        def divided_step(state: RunState, source: StepSource) -> tuple[RunState, ChunkMetrics]:
            source = fetch(source)
            inner = divide_batch(mesh, source.inner, axis=0 if num_inner_steps == 1 else 1)
            source = source._replace(inner=inner, outer=divide_batch(mesh, source.outer))
            state, metrics = step(state, _make_batch(setup, source))
            return divided(setup, state), metrics

        state, metrics = jax.lax.scan(divided_step, state._replace(rate_factor=None), sources)
        return state._replace(rate_factor=factor), metrics

    @functools.partial(jax.jit, static_argnames="num_steps", out_shardings=(None, whole))
    def advance_resident(state, keys, splits, learning_rate, first_step, *, num_steps: int):
        train, outer = _both(splits)

        def fetch(source: StepSource) -> StepSource:
            return source._replace(inner=take(train, source.inner), outer=take(outer, source.outer))

        def one_seed(state: RunState, key: jax.Array) -> tuple[RunState, ChunkMetrics]:
            sources = draw(key, _sizes(splits), first_step, num_steps=num_steps)
            return advance_one_seed(state, sources, learning_rate, fetch)

        return over_seeds(mesh, one_seed)(state, select_key(keys))

    @functools.partial(jax.jit, static_argnames=("sizes", "num_steps"), out_shardings=whole)
    def draw_all(keys, sizes: tuple[int, int], first_step, *, num_steps: int) -> StepSource:  # [num_steps, S, ...]
        one_seed = functools.partial(draw, sizes=sizes, num_steps=num_steps)
        return jax.vmap(lambda key: one_seed(key, first_step=first_step), out_axes=_SEED_AXES)(select_key(keys))

    @functools.partial(jax.jit, out_shardings=(None, whole))
    def advance_block(state, sources, learning_rate):
        one_seed = functools.partial(advance_one_seed, fetch=lambda source: source)
        return over_seeds(mesh, one_seed, (0, _SEED_AXES, None))(state, sources, learning_rate)

    def advance_streamed(state, keys, splits, learning_rate, first_step, *, num_steps: int):
        sources, blocks = draw_all(keys, _sizes(splits), first_step, num_steps=num_steps), []
        rest = (sources.rng_key, sources.augmentation_key, sources.step)
        specs = P(None, SEED, *[None] * (num_inner_steps > 1), DATA), P(None, SEED, DATA)
        indices = [own_part(mesh, *each) for each in zip(specs, jax.device_get(sources[:2]), strict=True)]
        join = functools.partial(join_parts, mesh, specs)
        for inner, outer, block in stream(_both(splits), (indices[0], indices[1]), rest, join):
            state, metrics = advance_block(state, StepSource(inner, outer, *block), learning_rate)
            blocks.append(metrics)
        return state, jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *blocks)

    return Program(advance_streamed if setup.dataset.is_streamed else advance_resident, advance_block)


def _make_batch(setup: Setup, source: StepSource) -> BilevelBatch:
    """Augments and normalises examples; those of the validation split are not augmented."""
    settings, inner_key, outer_key = setup.config.augmentation, *jax.random.split(source.augmentation_key)

    def prepare(batch: Batch, rng_key: jax.Array, augmented: bool) -> Batch:
        inputs = batch.inputs
        if augmented and (settings.padding or settings.flip):
            inputs = augment(rng_key, inputs, padding=settings.padding, flip=settings.flip)
        return Batch(setup.dataset.normalize(inputs), batch.targets)

    inner = prepare(source.inner, inner_key, augmented=True)
    outer = prepare(source.outer, outer_key, augmented=setup.config.outer.split == "train")
    return BilevelBatch(inner, outer, source.rng_key, source.step, source.step / setup.config.num_steps)


def _both(splits: Splits) -> tuple[Batch, Batch]:
    train, outer = splits
    return train, train if outer is None else outer


def _sizes(splits: Splits) -> tuple[int, int]:
    train, outer = _both(splits)
    return len(train.inputs), len(outer.inputs)


def _draw_sources(
    rng_key: jax.Array,
    sizes: tuple[int, int],
    first_step: jax.Array,
    *,
    num_steps: int,
    num_inner_steps: int,
    batch_size: int,
) -> StepSource:
    """Draws the batches and keys of a chunk. Inner and outer batches come from streams of their own."""
    inner_key, outer_key, step_key, augmentation_key = jax.random.split(rng_key, 4)
    draw = functools.partial(epoch_indices, batch_size=batch_size)
    inner = draw(inner_key, first_step * num_inner_steps, num_steps=num_steps * num_inner_steps, num_examples=sizes[0])
    if num_inner_steps > 1:
        inner = inner.reshape(num_steps, num_inner_steps, batch_size)
    outer = draw(outer_key, first_step, num_steps=num_steps, num_examples=sizes[1])

    steps = first_step + jnp.arange(num_steps)

    def fold_steps(key: jax.Array) -> jax.Array:
        return jax.vmap(functools.partial(jax.random.fold_in, key))(steps)

    return StepSource(inner, outer, fold_steps(step_key), fold_steps(augmentation_key), steps)
