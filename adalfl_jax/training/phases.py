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
from adalfl_jax.data import take
from adalfl_jax.data.streaming import stream
from adalfl_jax.hypergradient import ONE_INNER_STEP, REMEMBERING
from adalfl_jax.initialization import make_offline_step
from adalfl_jax.training.batches import (
    SEED_AXES,
    Splits,
    StepSource,
    both_splits,
    draw_sources,
    make_batch,
    split_sizes,
)
from adalfl_jax.training.faults import skip_nonfinite
from adalfl_jax.training.initial import SeedKeys
from adalfl_jax.training.optimizers import make_inner_optimizer
from adalfl_jax.training.setup import Setup
from adalfl_jax.training.sharding import (
    DATA,
    SEED,
    divide_batch,
    join_parts,
    over_seeds,
    own_part,
    replicated,
)
from adalfl_jax.training.state import RunState, Step
from adalfl_jax.training.steps import STEPS, inner_arguments, phi_metrics
from adalfl_jax.types import BilevelBatch

ChunkMetrics = dict[str, jax.Array]  # name -> [S, num_steps]
MakeStep = Callable[[jax.Array, jax.Array | None], Step]  # of the learning rate and the factor on it
SelectKey = Callable[[SeedKeys], jax.Array]
Draw = Callable[..., StepSource]  # `draw_sources` of this phase
Advance = Callable[..., tuple[RunState, ChunkMetrics]]  # a chunk, of all seeds or of one; from what, each place says


class Program(NamedTuple):
    """The steps of a phase, compiled whole: for batches it draws and for batches it is given."""

    # (state, keys, splits, learning_rate, first_step, *, num_steps) -> (state, metrics), which draws its batches
    advance: Advance
    # (state, sources [num_steps, S, ...], learning_rate) -> (state, metrics), on examples it is given
    advance_block: Advance


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

    def make_step(learning_rate: jax.Array, rate_factor: jax.Array | None):
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


def _make_program(setup: Setup, make_step: MakeStep, select_key: SelectKey, num_inner_steps: int) -> Program:
    """Puts a step under scan, seeds and jit."""
    advance_seed = _scan_steps(setup, make_step, num_inner_steps)
    draw = functools.partial(draw_sources, num_inner_steps=num_inner_steps, batch_size=setup.config.batch_size)

    @functools.partial(jax.jit, out_shardings=(None, replicated(setup.mesh)))
    def advance_block(state, sources, learning_rate):
        one_seed = functools.partial(advance_seed, fetch=lambda source: source)
        return over_seeds(setup.mesh, one_seed, (0, SEED_AXES, None))(state, sources, learning_rate)

    if setup.dataset.is_streamed:
        return Program(_streamed(setup, draw, select_key, advance_block, num_inner_steps), advance_block)
    return Program(_resident(setup, draw, select_key, advance_seed), advance_block)


def _scan_steps(setup: Setup, make_step: MakeStep, num_inner_steps: int) -> Advance:
    """Makes what takes the steps of one seed; its `fetch` gives a step's examples for what the source holds."""
    mesh = setup.mesh

    def advance_seed(
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
            state, metrics = step(state, make_batch(setup, source))
            return setup.divide(state), metrics

        state, metrics = jax.lax.scan(divided_step, state._replace(rate_factor=None), sources)
        return state._replace(rate_factor=factor), metrics

    return advance_seed


def _resident(setup: Setup, draw: Draw, select_key: SelectKey, advance_seed: Advance) -> Advance:
    """Makes `Program.advance` for examples on the device: one program, which draws and gathers its batches."""

    @functools.partial(jax.jit, static_argnames="num_steps", out_shardings=(None, replicated(setup.mesh)))
    def advance(state, keys, splits: Splits, learning_rate, first_step, *, num_steps: int):
        train, outer = both_splits(splits)

        def fetch(source: StepSource) -> StepSource:
            return source._replace(inner=take(train, source.inner), outer=take(outer, source.outer))

        def one_seed(state: RunState, key: jax.Array) -> tuple[RunState, ChunkMetrics]:
            sources = draw(key, split_sizes(splits), first_step, num_steps=num_steps)
            return advance_seed(state, sources, learning_rate, fetch)

        return over_seeds(setup.mesh, one_seed)(state, select_key(keys))

    return advance


def _streamed(setup: Setup, draw: Draw, select_key: SelectKey, advance_block: Advance, num_inner_steps: int) -> Advance:
    """Makes `Program.advance` for examples on the host: blocks of steps, whose batches are sent to the device."""
    mesh = setup.mesh
    specs = P(None, SEED, *[None] * (num_inner_steps > 1), DATA), P(None, SEED, DATA)
    join = functools.partial(join_parts, mesh, specs)

    @functools.partial(jax.jit, static_argnames=("sizes", "num_steps"), out_shardings=replicated(mesh))
    def draw_all(keys, sizes: tuple[int, int], first_step, *, num_steps: int) -> StepSource:  # [num_steps, S, ...]
        one_seed = functools.partial(draw, sizes=sizes, num_steps=num_steps)
        return jax.vmap(lambda key: one_seed(key, first_step=first_step), out_axes=SEED_AXES)(select_key(keys))

    def advance(state, keys, splits: Splits, learning_rate, first_step, *, num_steps: int):
        sources, blocks = draw_all(keys, split_sizes(splits), first_step, num_steps=num_steps), []
        rest = (sources.rng_key, sources.augmentation_key, sources.step)
        indices = [own_part(mesh, *each) for each in zip(specs, jax.device_get(sources[:2]), strict=True)]
        for inner, outer, block in stream(both_splits(splits), (indices[0], indices[1]), rest, join):
            state, metrics = advance_block(state, StepSource(inner, outer, *block), learning_rate)
            blocks.append(metrics)
        return state, jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *blocks)

    return advance
