"""Sampling: without replacement within an epoch, the same however it is cut."""

import functools

import jax
import numpy as np
import pytest

from adalfl_jax.data import epoch_indices, take
from adalfl_jax.types import Batch

KEY = jax.random.key(0)


@pytest.mark.parametrize(("num_examples", "batch_size"), [(12, 4), (13, 4), (7, 7), (9, 5)])
def test_an_epoch_sees_no_example_twice_and_every_batch_is_full(num_examples, batch_size):
    steps_per_epoch = num_examples // batch_size
    indices = epoch_indices(KEY, 0, num_steps=3 * steps_per_epoch, num_examples=num_examples, batch_size=batch_size)
    assert indices.shape == (3 * steps_per_epoch, batch_size)
    epochs = np.asarray(indices).reshape(3, -1)
    for epoch in epochs:
        assert len(set(epoch.tolist())) == steps_per_epoch * batch_size
        assert epoch.min() >= 0
        assert epoch.max() < num_examples
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 3


def test_a_step_has_the_same_batch_however_the_steps_are_cut():
    @functools.partial(jax.jit, static_argnums=1)
    def draw(first, count):
        return epoch_indices(KEY, first, num_steps=count, num_examples=23, batch_size=5)

    whole = draw(0, 40)
    for first in range(0, 40, 3):
        for count in (1, 9):
            if first + count <= 40:
                np.testing.assert_array_equal(draw(first, count), whole[first : first + count])


def test_a_loop_of_ones_own_draws_by_one_compiled_program():
    before = epoch_indices._cache_size()
    for first_step in (0, 1, 30):
        epoch_indices(KEY, first_step, num_steps=1, num_examples=11, batch_size=2)
    assert epoch_indices._cache_size() == before + 1


def test_seeds_see_different_orders_under_vmap():
    keys = jax.random.split(KEY, 3)
    draw = jax.vmap(lambda key: epoch_indices(key, 0, num_steps=2, num_examples=50, batch_size=10))
    together = np.asarray(draw(keys))
    assert len({seed.tobytes() for seed in together}) == 3
    alone = epoch_indices(keys[1], 0, num_steps=2, num_examples=50, batch_size=10)
    np.testing.assert_array_equal(together[1], alone)


def test_examples_are_taken_of_every_array_of_their_inputs():
    split = Batch({"image": np.arange(20).reshape(10, 2), "age": np.arange(10)}, np.arange(10) % 3)
    taken = take(split, np.array([[1, 4], [7, 0]]))
    np.testing.assert_array_equal(taken.inputs["image"][1, 0], [14, 15])
    np.testing.assert_array_equal(taken.inputs["age"], [[1, 4], [7, 0]])
    np.testing.assert_array_equal(taken.targets, [[1, 1], [1, 0]])


@pytest.mark.parametrize("batch_size", [0, 11])
def test_a_batch_that_does_not_fit_is_refused(batch_size):
    with pytest.raises(ValueError, match=rf"a batch of {batch_size} cannot be drawn from a split of 10 examples"):
        epoch_indices(KEY, 0, num_steps=1, num_examples=10, batch_size=batch_size)


@pytest.mark.parametrize("kind", [Batch, lambda *arrays: arrays], ids=["batch", "tuple"])
def test_take_keeps_inputs_and_targets_together(kind):
    split = kind(np.arange(20).reshape(10, 2), np.arange(10))
    inputs, targets = take(split, np.array([[3, 1], [9, 0]]))
    np.testing.assert_array_equal(inputs[..., 0], 2 * targets)
    assert targets.shape == (2, 2)
