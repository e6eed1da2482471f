"""Batches of steps: inner and outer ones come from streams of their own, whatever the chunks are."""

import functools

import chex
import jax
import jax.numpy as jnp

from adalfl_jax.data import take
from adalfl_jax.training.batches import StepSource, draw_sources, make_batch
from adalfl_jax.training.setup import make_setup
from tests.training.tiny import tiny_config


def test_inner_and_outer_batches_are_drawn_apart():
    sources = draw_sources(jax.random.key(0), (100, 100), jnp.asarray(0), num_steps=5, num_inner_steps=1, batch_size=10)
    assert not (sources.inner == sources.outer).all(axis=1).any()


def test_batches_are_of_all_examples_of_their_split_each_once_an_epoch():
    sources = draw_sources(jax.random.key(0), (40, 20), jnp.asarray(0), num_steps=4, num_inner_steps=1, batch_size=10)
    assert sorted(sources.inner.ravel().tolist()) == list(range(40))
    assert sorted(sources.outer.ravel().tolist()) == sorted([*range(20)] * 2)


def test_augmentation_and_dropout_have_keys_of_their_own():
    sizes, first = (100, 100), jnp.asarray(0)
    sources = draw_sources(jax.random.key(0), sizes, first, num_steps=5, num_inner_steps=1, batch_size=10)
    keys = [jax.random.key_data(keys).tolist() for keys in (sources.rng_key, sources.augmentation_key)]
    assert len({tuple(key) for of_steps in keys for key in of_steps}) == 10


def test_inner_and_outer_examples_are_augmented_apart():
    setup = make_setup(tiny_config({"augmentation.padding": 2, "outer.split": "train"}))
    rows = take(setup.dataset.train, jnp.arange(10))
    batch = make_batch(setup, StepSource(rows, rows, *jax.random.split(jax.random.key(0)), jnp.asarray(0)))
    assert (batch.inner.inputs != batch.outer.inputs).any()


def test_batches_of_several_inner_steps_go_on_where_the_chunk_before_ended():
    draw = functools.partial(draw_sources, jax.random.key(0), (100, 100), num_inner_steps=2, batch_size=10)
    whole, end = draw(jnp.asarray(0), num_steps=5), draw(jnp.asarray(3), num_steps=2)
    assert len({tuple(rows) for rows in whole.inner.reshape(10, 10).tolist()}) == 10
    chex.assert_trees_all_equal(end.inner, whole.inner[3:])
    chex.assert_trees_all_equal(end.outer, whole.outer[3:])


def test_progress_is_the_share_of_the_steps_that_are_done():
    setup = make_setup(tiny_config(num_steps=8))
    rows = take(setup.dataset.train, jnp.arange(10))
    keys = jax.random.split(jax.random.key(0))
    for step in (0, 2, 7):
        assert make_batch(setup, StepSource(rows, rows, *keys, jnp.asarray(step))).progress == step / 8
