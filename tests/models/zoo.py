"""What the tests of models share: the smallest of them, and weights and images that are cheap to draw."""

import functools
import math

import chex
import jax
import numpy as np
import optax
import pytest

import adalfl_jax
from adalfl_jax.models import MODELS, functionalize
from adalfl_jax.task_losses import softmax_cross_entropy
from tests.problems import Convolutional

MIN_SIZES = {"lenet5": 16, "vgg16": 32, "allcnnc": 9, "squeezenet": 8, "resnet": 8, "wide_resnet": 4}
WITH_BLOCKS = {"vgg16": 5, "allcnnc": 3, "squeezenet": 11, "resnet": 8, "wide_resnet": 3}  # name -> number of blocks
CHEAP = {"logistic": {}, "mlp": {"hidden_sizes": (20, 10)}, "lenet5": {}, "wide_resnet": {"depth": 10, "width": 1}}

COMPUTED = [pytest.param(name, marks=[] if name in CHEAP else [pytest.mark.slow]) for name in MODELS]
"""All models, for tests that compute them; a model that takes long to compile is left to the slow tests."""


def smallest_shape(name, channels=3):
    return (MIN_SIZES[name], MIN_SIZES[name], channels) if name in MIN_SIZES else (1,)


def larger_shape(name):
    return (MIN_SIZES.get(name, 1) + 3, MIN_SIZES.get(name, 1) + 10, 2)


def random_variables(model, seed=0, dtype=np.float32):
    """Parameters and state drawn on the host, none of them trivially 0 or 1; the model's own takes long to compile."""
    generator = np.random.default_rng(seed)

    def draw(path, leaf):
        kind = path[-1].key
        if kind == "kernel":
            values = generator.normal(scale=math.sqrt(2 / math.prod(leaf.shape[:-1])), size=leaf.shape)
        elif kind in ("scale", "var"):
            values = generator.uniform(0.5, 1.5, leaf.shape)
        else:
            assert kind in ("bias", "mean"), path
            values = generator.normal(scale=0.2, size=leaf.shape)
        return values.astype(dtype)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(model.init, jax.random.key(0)))


def random_images(shape, batch_size=4, seed=1):
    return np.random.default_rng(seed).normal(size=(batch_size, *shape)).astype(np.float32)


def assert_close(actual, expected, tolerance):
    """Equal trees but for `tolerance` times the largest entry; some gradients are zero but for rounding."""
    limit = tolerance * max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    chex.assert_trees_all_close(actual, expected, rtol=0, atol=limit)


@functools.cache
def bilevel_step(estimator, remat=False, compute_dtype="float32"):
    """(theta, phi, metrics, hypergradient) after a step of a small convolutional network and its loss."""
    model = functionalize(lambda rngs: Convolutional(3, 3, rngs=rngs, remat=remat), compute_dtype=compute_dtype)
    loss, inner, outer = adalfl_jax.LossNetwork(hidden_sizes=(8, 8)), optax.sgd(0.1, 0.9, nesterov=True), optax.sgd(1.0)
    step = adalfl_jax.make_bilevel_step(
        model.apply, loss.apply, softmax_cross_entropy, inner, outer, hypergradient=estimator
    )
    theta = adalfl_jax.Theta.create(*random_variables(model), inner)
    phi = adalfl_jax.Phi.create(loss.init(jax.random.key(0)), outer)
    targets = np.arange(32) % 3
    batch = adalfl_jax.BilevelBatch(*((random_images((8, 8, 3), 32, seed), targets) for seed in (1, 2)))
    theta, after, metrics = jax.jit(step)(theta, phi, batch)
    return theta, after, metrics, optax.tree.sub(phi.params, after.params)
