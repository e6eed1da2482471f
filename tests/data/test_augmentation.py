"""Crops and mirror images: every one is made of its own image and of nothing else."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adalfl_jax import data
from adalfl_jax.data import Examples, augment
from adalfl_jax.training.batches import StepSource, make_batch
from adalfl_jax.training.evaluation import _examples_for_gradients
from adalfl_jax.training.setup import make_setup
from adalfl_jax.types import Batch
from tests.training.tiny import tiny_config

SHAPES = st.sampled_from([(5, 4, 3, 1), (3, 1, 6, 2), (4, 5, 5, 3)])  # few, since each is compiled
PADDINGS = st.sampled_from([0, 1, 3])
DTYPES = st.sampled_from([np.uint8, np.float32])
SEEDS = st.integers(0, 2**31 - 1)
few = settings(max_examples=50, deadline=None, derandomize=True)


def numbered(shape, dtype):
    """Images `[B, H, W, channels]` in which every pixel tells its place within the image, and none is 0."""
    image = 1 + np.arange(np.prod(shape[1:])).reshape(shape[1:])
    return np.stack([image + 80 * index % 160 for index in range(shape[0])]).astype(dtype)


IMAGES = st.builds(numbered, SHAPES, DTYPES)


def windows(image, padding):
    """Every window of the image's size in the image with zeros around it, by its corner."""
    height, width, _ = image.shape
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    corners = np.ndindex(2 * padding + 1, 2 * padding + 1)
    return {(i, j): padded[i : i + height, j : j + width] for i, j in corners}


def corner_of(crop, image, padding):
    """Where a crop was cut out; None where that is nowhere."""
    found = [corner for corner, window in windows(image, padding).items() if np.array_equal(crop, window)]
    return found[0] if found else None


@few
@given(images=IMAGES, padding=PADDINGS, seed=SEEDS)
def test_every_crop_is_a_window_of_its_own_padded_image(images, padding, seed):
    crops = np.asarray(augment(jax.random.key(seed), images, padding=padding))
    assert (crops.shape, crops.dtype) == (images.shape, images.dtype)
    for crop, image in zip(crops, images, strict=True):
        assert corner_of(crop, image, padding) is not None


@few
@given(images=IMAGES, seed=SEEDS)
def test_every_image_is_mirrored_left_to_right_or_left_alone(images, seed):
    for flipped, image in zip(augment(jax.random.key(seed), images, flip=True), images, strict=True):
        assert np.array_equal(flipped, image) or np.array_equal(flipped, image[:, ::-1])


@few
@given(images=IMAGES, padding=PADDINGS, seed=SEEDS)
def test_a_mirrored_crop_is_a_window_of_the_mirrored_or_the_plain_image(images, padding, seed):
    for crop, image in zip(augment(jax.random.key(seed), images, padding=padding, flip=True), images, strict=True):
        crop = np.asarray(crop)
        assert any(corner_of(mirror, image, padding) is not None for mirror in (crop, crop[:, ::-1]))


@few
@given(images=IMAGES, seed=SEEDS)
def test_without_padding_and_flip_nothing_changes(images, seed):
    np.testing.assert_array_equal(augment(jax.random.key(seed), images), images)


IMAGE = np.arange(1, 37, dtype=np.uint8).reshape(1, 4, 9, 1)


def test_every_corner_is_drawn_equally_often_and_each_image_on_its_own():
    num_images, padding = 5000, 2
    crops = augment(jax.random.key(0), np.repeat(IMAGE, num_images, axis=0), padding=padding)
    index = {window.tobytes(): corner for corner, window in windows(IMAGE[0], padding).items()}
    corners = [index[np.asarray(crop).tobytes()] for crop in np.asarray(crops)]
    counts = np.zeros((5, 5), int)
    np.add.at(counts, tuple(np.transpose(corners)), 1)
    expected = num_images / 25
    assert ((counts - expected) ** 2 / expected).sum() < 51  # chi-squared with 24 degrees of freedom: p = 0.001


def test_half_of_all_images_are_mirrored():
    flipped = augment(jax.random.key(0), np.repeat(IMAGE, 5000, axis=0), flip=True)
    share = np.mean([np.array_equal(image, IMAGE[0]) for image in np.asarray(flipped)])
    assert abs(share - 0.5) < 4 * 0.5 / np.sqrt(5000)


def test_crop_and_mirror_are_drawn_independently():
    changed = np.asarray(augment(jax.random.key(0), np.repeat(IMAGE, 5000, axis=0), padding=1, flip=True))
    index = {
        orientation.tobytes(): (corner[0], mirrored)
        for corner, window in windows(IMAGE[0], 1).items()
        for mirrored, orientation in enumerate((window, window[:, ::-1]))
    }
    counts = np.zeros((3, 2), int)
    np.add.at(counts, tuple(np.transpose([index[image.tobytes()] for image in changed])), 1)
    np.testing.assert_allclose(counts / 5000, 1 / 6, atol=4 * np.sqrt(5 / 36 / 5000))


def test_leading_axes_are_kept_and_equal_keys_give_equal_images():
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 6, 6, 2), np.uint8)
    both = [augment(jax.random.key(1), images, padding=2, flip=True) for _ in range(2)]
    np.testing.assert_array_equal(*both)
    flat = augment(jax.random.key(1), images.reshape(12, 6, 6, 2), padding=2, flip=True)
    np.testing.assert_array_equal(both[0], flat.reshape(images.shape))
    assert not np.array_equal(both[0], augment(jax.random.key(2), images, padding=2, flip=True))


# In the step


@pytest.fixture
def setup_of(monkeypatch):
    """A config on registered images that may be mirrored."""
    monkeypatch.setattr(data.loading, "DATASETS", copy.copy(data.DATASETS))
    images = np.random.default_rng(0).integers(1, 256, (300, 6, 6, 3), np.uint8)
    data.register_dataset("pictures", lambda: Examples(images, np.arange(300) % 3, num_classes=3))

    def make(**overrides):
        settings = {"dataset.name": "pictures", "batch_size": 20, "augmentation.padding": 2, "augmentation.flip": True}
        return make_setup(tiny_config(settings | overrides))

    return make


def prepared(setup, num_inner_steps=None):
    """Inner and outer batches of a step, and the images they were made of."""
    rows = np.arange(20) if num_inner_steps is None else np.arange(20 * num_inner_steps).reshape(num_inner_steps, 20)
    inner = Batch(setup.dataset.train.inputs[rows], setup.dataset.train.targets[rows])
    outer = data.take(setup.dataset.valid, np.arange(20))
    batch = make_batch(setup, StepSource(inner, outer, jax.random.key(3), jax.random.key(4), jnp.zeros((), jnp.int32)))
    return batch, inner, outer


def test_validation_images_in_the_outer_batch_are_left_alone(setup_of):
    setup = setup_of(**{"outer.split": "valid"})
    batch, inner, outer = prepared(setup)
    np.testing.assert_array_equal(batch.outer.inputs, setup.dataset.normalize(outer.inputs))
    assert not np.allclose(batch.inner.inputs, setup.dataset.normalize(inner.inputs))


def test_training_images_of_both_batches_are_augmented_each_in_its_own_way(setup_of):
    setup = setup_of()
    inner = data.take(setup.dataset.train, np.arange(20))
    batch = make_batch(setup, StepSource(inner, inner, jax.random.key(3), jax.random.key(4), jnp.zeros((), jnp.int32)))
    plain = setup.dataset.normalize(inner.inputs)
    for left, right in ((batch.inner, batch.outer), (batch.inner, inner), (batch.outer, inner)):
        assert not np.allclose(left.inputs, plain if right is inner else right.inputs)


def test_what_is_put_around_an_image_is_black_after_it_is_normalised(setup_of):
    setup = setup_of(**{"augmentation.flip": False})
    batch, inner, _ = prepared(setup)
    black = np.asarray(setup.dataset.normalize(np.zeros((1, 1, 1, 3), np.uint8)))
    is_black = np.isclose(batch.inner.inputs, black, atol=1e-5).all(axis=-1)
    assert (inner.inputs > 0).all()
    assert 0.1 < is_black.mean() < 0.6


def test_every_inner_step_of_an_unroll_is_augmented_in_its_own_way(setup_of):
    setup = setup_of()
    batch, inner, _ = prepared(setup, num_inner_steps=3)
    assert batch.inner.inputs.shape == (3, 20, 6, 6, 3)
    same = np.broadcast_to(inner.inputs[:1], inner.inputs.shape)
    again = make_batch(
        setup,
        StepSource(inner._replace(inputs=same), inner, jax.random.key(3), jax.random.key(4), jnp.zeros((), jnp.int32)),
    ).inner.inputs
    assert not np.allclose(again[0], again[1])


def test_nothing_is_augmented_by_default(setup_of):
    setup = setup_of(**{"augmentation.padding": 0, "augmentation.flip": False})
    batch, inner, outer = prepared(setup)
    np.testing.assert_array_equal(batch.inner.inputs, setup.dataset.normalize(inner.inputs))
    np.testing.assert_array_equal(batch.outer.inputs, setup.dataset.normalize(outer.inputs))


def test_images_are_mirrored_where_they_are_not_cropped(setup_of):
    setup = setup_of(**{"augmentation.padding": 0})
    batch, inner, _ = prepared(setup)
    plain = np.asarray(setup.dataset.normalize(inner.inputs))
    is_plain, is_mirrored = (
        (np.asarray(batch.inner.inputs) == images).all(axis=(1, 2, 3)) for images in (plain, plain[:, :, ::-1])
    )
    assert (is_plain | is_mirrored).all()
    assert 0 < is_mirrored.sum() < len(plain)


def test_gradients_are_compared_on_what_a_model_takes(setup_of):
    setup = setup_of()
    examples = _examples_for_gradients(setup, setup.dataset.train)
    np.testing.assert_allclose(np.asarray(examples.inputs).std(), 1, atol=0.1)
