"""The batches of a step: which examples and keys it gets, and what is made of those before a model sees them."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from adalfl_jax.data import augment, epoch_indices
from adalfl_jax.training.setup import Setup
from adalfl_jax.types import Batch, BilevelBatch, PyTree


class StepSource(NamedTuple):
    """What a step makes its batches of; scanned over."""

    inner: PyTree  # [B], or [K, B] in a K-step unroll: indices into the training split, or its examples
    outer: PyTree  # [B]: indices into the outer split, or its examples
    rng_key: jax.Array  # []
    augmentation_key: jax.Array  # []
    step: jax.Array  # [] int32, its number; the same for all seeds


SEED_AXES = StepSource(inner=1, outer=1, rng_key=1, augmentation_key=1, step=None)  # pyright: ignore[reportArgumentType]

Splits = tuple[Batch, Batch | None]  # of inner and of outer batches; None: of the training split too, passed once


def splits_of(setup: Setup) -> Splits:
    """The training split and the one outer batches come from."""
    return setup.dataset.train, setup.outer_examples


def both_splits(splits: Splits) -> tuple[Batch, Batch]:
    """The examples of inner and of outer batches: the training split twice where both come from it."""
    train, outer = splits
    return train, train if outer is None else outer


def split_sizes(splits: Splits) -> tuple[int, int]:
    """The numbers of examples that inner and outer batches are drawn from."""
    train, outer = both_splits(splits)
    return len(train.inputs), len(outer.inputs)


def draw_sources(
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


def make_batch(setup: Setup, source: StepSource) -> BilevelBatch:
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


def batch_shapes(setup: Setup) -> BilevelBatch:
    """The batch of a step, without values."""

    def make(rng_key: jax.Array) -> BilevelBatch:
        size = setup.config.batch_size
        batch = Batch(*(jnp.zeros((size, *leaf.shape[1:]), leaf.dtype) for leaf in setup.dataset.train))
        return make_batch(setup, StepSource(batch, batch, rng_key, rng_key, jnp.zeros((), jnp.int32)))

    return jax.eval_shape(make, jax.random.key(0))
