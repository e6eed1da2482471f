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
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from adalfl_jax.bilevel import make_bilevel_step, prime
from adalfl_jax.data import augment, epoch_indices, take
from adalfl_jax.data.streaming import stream
from adalfl_jax.fitting import draw_targets_and_outputs, fit_to_task_loss, relative_mismatch
from adalfl_jax.hypergradient import ONE_INNER_STEP, REMEMBERING
from adalfl_jax.initialization import make_offline_step
from adalfl_jax.task_losses import TASK_LOSSES
from adalfl_jax.training.config import LEARNING
from adalfl_jax.training.faults import skip_nonfinite
from adalfl_jax.training.hosts import warn
from adalfl_jax.training.sections import STARTS
from adalfl_jax.training.setup import Setup, make_inner_optimizer, make_outer_optimizer
from adalfl_jax.training.sharding import (
    DATA,
    SEED,
    divide_batch,
    divide_state,
    join_parts,
    over_seeds,
    own_part,
    replicate,
    replicated,
    to_host,
)
from adalfl_jax.training.start import load_start
from adalfl_jax.training.state import RunState
from adalfl_jax.training.steps import STEPS, inner_arguments, make_online_bilevel_step, phi_metrics
from adalfl_jax.types import Batch, BilevelBatch, LossFn, Phi, PyTree, Theta


class SeedKeys(NamedTuple):
    """The random streams of a seed, `[S]` keys each."""

    theta: jax.Array
    phi: jax.Array
    offline: jax.Array
    training: jax.Array


class StepSource(NamedTuple):
    """What a step makes its batches of; scanned over."""

    inner: PyTree  # [B], or [K, B] in a K-step unroll: indices into the training split, or its examples
    outer: PyTree  # [B]: indices into the outer split, or its examples
    rng_key: jax.Array  # []
    augmentation_key: jax.Array  # []
    step: jax.Array  # [] int32, its number; the same for all seeds


_SEED_AXES = StepSource(inner=1, outer=1, rng_key=1, augmentation_key=1, step=None)  # pyright: ignore[reportArgumentType]

FITTING = 2**31  # folded into phi's key to fit phi; so large, it is none of the few keys that `init` makes of it
POOR_FIT = 0.55  # of the gradient; a default network lacks .3 of the cross-entropy's, and .4 with 100 classes

Splits = tuple[Batch, Batch | None]  # of inner and of outer batches; None: of the training split too, passed once
ChunkMetrics = dict[str, jax.Array]  # name -> [S, num_steps]


class Program(NamedTuple):
    """The steps of a phase, compiled whole: for batches it draws and for batches it is given."""

    # (state, keys, splits, learning_rate, first_step, *, num_steps) -> (state, metrics), which draws its batches
    advance: Callable[..., tuple[RunState, ChunkMetrics]]
    # (state, sources [num_steps, S, ...], learning_rate) -> (state, metrics), on examples it is given
    advance_block: Callable[..., tuple[RunState, ChunkMetrics]]


def make_seed_keys(seeds: tuple[int, ...], mesh: Mesh | None = None) -> SeedKeys:
    """The keys of several seeds, on every device of a mesh."""
    if mesh is not None:
        return jax.jit(functools.partial(make_seed_keys, seeds), out_shardings=replicated(mesh))()
    return SeedKeys(*jax.vmap(lambda seed: jax.random.split(jax.random.key(seed), 4), out_axes=1)(jnp.array(seeds)))


def init_theta(setup: Setup, keys: SeedKeys) -> Theta:
    """A fresh theta for every seed."""
    optimizer = make_inner_optimizer(setup.config, setup.config.inner.learning_rate)

    def one_seed(key: jax.Array) -> RunState:
        return _divided(setup, RunState(Theta.create(*setup.model.init(key), optimizer), None))

    theta = jax.jit(over_seeds(setup.mesh, one_seed))(keys.theta).theta
    assert theta is not None
    return theta


def init_phi(setup: Setup, keys: SeedKeys) -> Phi:
    """A fresh phi for every seed, where the config says it starts."""
    optimizer = optax.adam(setup.config.offline.learning_rate)
    start = setup.config.learned_loss.start
    given = None if start in STARTS else load_start(setup.config)
    fitted_to = _fitted_to(setup)

    def one_seed(key: jax.Array, given: PyTree) -> RunState:
        params = setup.learned_loss.init(key) if given is None else given
        if fitted_to is not None:
            params = fit_to_task_loss(
                setup.learned_loss,
                params,
                fitted_to,
                jax.random.fold_in(key, FITTING),
                num_outputs=setup.dataset.num_outputs,
                is_classification=setup.dataset.is_classification,
            )
        return _divided(setup, RunState(None, Phi.create(params, optimizer)))

    phi = jax.jit(over_seeds(setup.mesh, one_seed))(keys.phi, given).phi
    assert phi is not None
    return phi


def _fitted_to(setup: Setup) -> LossFn | None:
    start = setup.config.learned_loss.start
    return setup.task_loss_fn if start == "task_loss" else TASK_LOSSES.get(start)


def warn_of_poor_fit(setup: Setup, phi: Phi) -> None:
    """Warns where a phi of `init_phi` was fitted to a loss and is far from it."""
    if (fitted_to := _fitted_to(setup)) is None:
        return
    targets, outputs = draw_targets_and_outputs(
        jax.random.key(FITTING), 256, setup.dataset.num_outputs, is_classification=setup.dataset.is_classification
    )

    def one_seed(params: PyTree) -> jax.Array:
        return relative_mismatch(setup.learned_loss, params, fitted_to, targets, outputs)

    worst = float(jax.jit(jax.vmap(one_seed))(to_host(phi.params)).max())
    if not worst <= POOR_FIT:  # or nan
        warn(
            f"config.learned_loss.start: a loss that was fitted to {setup.config.learned_loss.start!r} lacks "
            f"{worst:.0%} of its gradient, at most {POOR_FIT:.0%} is expected, so training does not begin as on that; "
            "try larger config.learned_loss.hidden_sizes or, of classes, other predictions"
        )


def init_training(
    setup: Setup, method: str, keys: SeedKeys, phi: Phi | None = None, theta: Theta | None = None
) -> RunState:
    """The state a method starts from: a fresh theta and, if it learns, a phi and what an online step remembers.

    Args:
      setup: of the run.
      method: one of `METHODS`.
      keys: of the seeds.
      phi: what the offline phase learned; a fresh one by default. Its optimiser starts anew.
      theta: of `init_theta`, the same for every method; made here by default.
    """
    theta = init_theta(setup, keys) if theta is None else theta
    if method not in LEARNING:
        return RunState(theta, None)
    phi = _restart_outer_optimizer(setup, init_phi(setup, keys) if phi is None else phi)
    config, factor = setup.config, init_rate_factor(setup)
    if method != "adalfl":
        return RunState(theta, phi, factor)
    batch = _batch_shapes(setup)

    def one_seed(theta: Theta, phi: Phi, learning_rate: jax.Array) -> Phi | None:  # traced, as in the steps to come
        step = make_online_bilevel_step(setup, make_inner_optimizer(config, learning_rate))
        return _divided(setup, RunState(None, prime(step, theta, phi, batch))).phi

    phi = jax.jit(over_seeds(setup.mesh, one_seed, (0, 0, None)))(theta, phi, config.inner.learning_rate)
    return RunState(theta, phi, factor)


def init_rate_factor(setup: Setup) -> jax.Array | None:
    """Of a method that trains on a learned loss: 1, until its first step is measured; None where alpha stays."""
    return replicate(setup.mesh, jnp.ones(setup.config.num_seeds)) if setup.config.inner.first_step_rate else None


def _restart_outer_optimizer(setup: Setup, phi: Phi) -> Phi:
    """phi with a fresh Adam state; the offline phase's moments are dropped."""
    return jax.jit(jax.vmap(lambda params: Phi.create(params, make_outer_optimizer(setup.config))))(phi.params)


def _divided(setup: Setup, state: RunState) -> RunState:
    return divide_state(setup.mesh, state, setup.config.batch_size)


def _batch_shapes(setup: Setup) -> BilevelBatch:
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
            return _divided(setup, state), metrics

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
