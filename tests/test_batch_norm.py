"""Batch norm in a bilevel step: its statistics are those of plain training, and its derivative is whole."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import adalfl_jax
from adalfl_jax.models import Model, functionalize, make_model
from adalfl_jax.task_losses import softmax_cross_entropy
from tests.hypergradient.reference import assert_relative, estimate, finite_differences, outer_loss
from tests.models.zoo import random_variables
from tests.problems import NUM_INPUTS, NUM_OUTPUTS, OPTIMIZERS, Convolutional, make_batch, make_problem

IMAGE_SHAPE = (8, 8, 3)


class Case(NamedTuple):
    model: Model
    optimizer: optax.GradientTransformation
    loss: adalfl_jax.LossNetwork
    theta: adalfl_jax.Theta
    phi_params: dict
    make_batch: Callable


@functools.cache
def make_case(name):
    """A model with batch norm, its loss, where they start, and batches; to be called in float64."""
    if name == "linear":
        return Case(*make_problem("batch_norm", "nesterov"), make_batch)
    if name == "convolutional":
        model = functionalize(lambda rngs: Convolutional(IMAGE_SHAPE[-1], NUM_OUTPUTS, rngs=rngs))
    else:
        model = make_model("wide_resnet", IMAGE_SHAPE, NUM_OUTPUTS, depth=10, width=1)
    optimizer, loss = OPTIMIZERS["nesterov"], adalfl_jax.LossNetwork(hidden_sizes=(4, 4))
    theta = adalfl_jax.Theta.create(*random_variables(model, dtype=np.float64), optimizer)
    return Case(model, optimizer, loss, theta, loss.init(jax.random.key(0)), make_images)


def make_images(rng_key, num_inner_steps=None):
    """The batches of `make_batch` with images, whose channels have means of their own, in the place of vectors."""
    batch, generator = (
        make_batch(rng_key, num_inner_steps),
        np.random.default_rng(np.asarray(jax.random.key_data(rng_key))),
    )
    inner, outer = (
        part._replace(inputs=generator.normal(size=(*part.targets.shape, *IMAGE_SHAPE)) + np.arange(3.0))
        for part in (batch.inner, batch.outer)
    )
    return batch._replace(inner=inner, outer=outer)


@functools.cache
def bilevel_step(name, estimator):
    """`(theta, phi_params, batch, learning rate of phi) -> (theta, phi_params, metrics)`"""
    case = make_case(name)

    def step(theta, phi_params, batch, learning_rate):
        outer = optax.sgd(learning_rate)
        functions = case.model.apply, case.loss.apply, softmax_cross_entropy, case.optimizer, outer
        step = adalfl_jax.make_bilevel_step(*functions, hypergradient=estimator)
        theta, phi, metrics = step(theta, adalfl_jax.Phi.create(phi_params, outer), batch)
        return theta, phi.params, metrics

    return jax.jit(step)


@functools.cache
def plain_step(name):
    """`(theta, phi_params, inner batch, key) -> theta`, on the learned loss as it stands"""
    case = make_case(name)

    def step(theta, phi_params, batch, rng_key):
        def frozen(targets, outputs):
            return case.loss.apply(phi_params, targets, outputs)

        return adalfl_jax.make_task_step(case.model.apply, frozen, case.optimizer)(theta, batch, rng_key)[0]

    return jax.jit(step)


def batches_of(case, num_steps):
    return [case.make_batch(key) for key in jax.random.split(jax.random.key(2), num_steps)]


def assert_equal_trajectory(actual, expected):
    chex.assert_trees_all_close(actual, expected, rtol=1e-10, atol=1e-10)


both_estimators = pytest.mark.parametrize("estimator", ["forward", "unrolled"])
both_cases = pytest.mark.parametrize("name", ["linear", pytest.param("wide_resnet", marks=pytest.mark.slow)])


@pytest.mark.usefixtures("float64")
@both_estimators
@both_cases
def test_bilevel_steps_leave_the_statistics_of_plain_steps_on_the_same_losses(name, estimator):
    case = make_case(name)
    theta, plain, phi_params = case.theta, case.theta, case.phi_params
    for batch in batches_of(case, 5):
        inner_key, _ = jax.random.split(batch.rng_key)
        plain = plain_step(name)(plain, phi_params, batch.inner, inner_key)
        theta, phi_params, _ = bilevel_step(name, estimator)(theta, phi_params, batch, 0.1)
        assert_equal_trajectory(theta, plain)
    assert optax.tree.norm(optax.tree.sub(phi_params, case.phi_params)) > 1e-3  # five losses, not one


@pytest.mark.usefixtures("float64")
def test_several_inner_steps_leave_the_statistics_of_as_many_plain_steps():
    case = make_case("linear")
    batch, plain = case.make_batch(jax.random.key(2), num_inner_steps=3), case.theta
    theta, _, _ = bilevel_step("linear", "unrolled")(case.theta, case.phi_params, batch, 0.1)
    inner_key, _ = jax.random.split(batch.rng_key)
    for index, key in enumerate(jax.random.split(inner_key, 3)):
        inner = jax.tree.map(lambda leaf, i=index: leaf[i], batch.inner)
        plain = plain_step("linear")(plain, case.phi_params, inner, key)
    assert_equal_trajectory(theta, plain)


@pytest.mark.usefixtures("float64")
@both_estimators
@both_cases
def test_the_outer_batch_leaves_no_trace_in_theta(name, estimator):
    """With a learning rate of zero phi is the same at every step, whatever the outer batches are."""
    case = make_case(name)
    thetas, losses = [case.theta, case.theta], [None, None]
    for batch in batches_of(case, 2):
        others = batch.outer._replace(inputs=5 - 2 * batch.outer.inputs, targets=batch.outer.targets[::-1])
        for run, outer in enumerate((batch.outer, others)):
            thetas[run], _, metrics = bilevel_step(name, estimator)(
                thetas[run], case.phi_params, batch._replace(outer=outer), 0.0
            )
            losses[run] = metrics.outer_loss
    chex.assert_trees_all_equal(*thetas)
    assert losses[0] != losses[1]


@pytest.mark.usefixtures("float64")
@both_estimators
def test_statistics_are_the_average_of_nine_parts_old_and_one_part_batch(estimator):
    """Computed by hand for the first batch norm, which follows a 3x3 convolution."""
    case = make_case("convolutional")
    batch = case.make_batch(jax.random.key(3))
    padded = np.pad(batch.inner.inputs, ((0, 0), (1, 1), (1, 1), (0, 0)))
    kernel, bias = (case.theta.params["features"]["blocks"][0]["conv"][name] for name in ("kernel", "bias"))
    hidden = bias + sum(padded[:, i : i + 8, j : j + 8] @ kernel[i, j] for i in range(3) for j in range(3))
    theta, _, _ = bilevel_step("convolutional", estimator)(case.theta, case.phi_params, batch, 0.1)
    before, after = (state["features"]["blocks"][0]["norm"] for state in (case.theta.model_state, theta.model_state))
    expected = {"mean": hidden.mean(axis=(0, 1, 2)), "var": hidden.var(axis=(0, 1, 2))}
    expected = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, before, expected)
    chex.assert_trees_all_close(after, expected, rtol=1e-10, atol=1e-12)
    for old, new in zip(jax.tree.leaves(case.theta.model_state), jax.tree.leaves(theta.model_state), strict=True):
        assert (np.abs(new - old) > 1e-6).all()


# The derivative


def normalising_model(stopped):
    """A model with batch norm written out; `stopped` takes the statistics of a batch for constants."""

    def init(rng_key):
        keys = jax.random.split(rng_key)
        params = {
            "hidden": 0.5 * jax.random.normal(keys[0], (NUM_INPUTS, 6)),
            "scale": jnp.linspace(0.5, 1.5, 6),
            "bias": jnp.linspace(-0.5, 0.5, 6),
            "output": 0.5 * jax.random.normal(keys[1], (6, NUM_OUTPUTS)),
        }
        return params, {"mean": jnp.zeros(6), "var": jnp.ones(6)}

    def apply(params, model_state, inputs, *, train, rng_key):
        del train, rng_key
        hidden = inputs @ params["hidden"]
        batch_statistics = {"mean": hidden.mean(axis=0), "var": hidden.var(axis=0)}
        if stopped:
            batch_statistics = jax.lax.stop_gradient(batch_statistics)
        mean, scale = batch_statistics["mean"], params["scale"] * jax.lax.rsqrt(batch_statistics["var"] + 1e-5)
        normalised = jnp.tanh((hidden - mean[None, :]) * scale[None, :] + params["bias"][None, :])
        averages = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, model_state, batch_statistics)
        return normalised @ params["output"], averages

    return Model(init, apply)


@functools.cache
def meta_gradients(stopped):
    """Of every estimator, and finite differences of the inner update as it is run."""
    model, optimizer, loss = normalising_model(stopped), OPTIMIZERS["nesterov"], adalfl_jax.LossNetwork((4, 4))
    theta = adalfl_jax.Theta.create(*model.init(jax.random.key(0)), optimizer)
    batch, phi_params = make_batch(jax.random.key(1)), loss.init(jax.random.key(2))
    differences = finite_differences(
        lambda phi: outer_loss(model.apply, loss.apply, optimizer, theta, batch, phi), phi_params
    )
    estimates = {
        name: ravel_pytree(estimate(name, model, loss, optimizer, theta, phi_params, batch).gradient)[0]
        for name in ("forward", "unrolled")
    }
    return estimates, differences


@pytest.mark.usefixtures("float64")
def test_the_meta_gradient_goes_through_the_statistics_of_the_batch():
    estimates, differences = meta_gradients(stopped=False)
    for gradient in estimates.values():
        assert_relative(gradient, differences)


@pytest.mark.usefixtures("float64")
def test_a_meta_gradient_that_passes_the_statistics_by_is_noticed():
    """The test above can fail: without that path, finite differences of either model say otherwise."""
    _, differences = meta_gradients(stopped=False)
    estimates, own_differences = meta_gradients(stopped=True)
    for gradient in estimates.values():
        for expected in (differences, own_differences):
            assert np.linalg.norm(gradient - expected) > 1e-3 * np.linalg.norm(expected)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["convolutional", pytest.param("wide_resnet", marks=pytest.mark.slow)])
def test_the_meta_gradient_of_a_network_of_images_equals_finite_differences(name):
    """Along a few directions of phi, each through all of the network's batch norms, in the inner and the outer pass."""
    case = make_case(name)
    batch = case.make_batch(jax.random.key(4))
    start, unravel = ravel_pytree(case.phi_params)
    directions = np.random.default_rng(0).normal(size=(3, start.size))

    @jax.jit
    def value(offset):
        functions = case.model.apply, case.loss.apply, case.optimizer
        return outer_loss(*functions, case.theta, batch, unravel(start + offset))

    step = 1e-5
    differences = [(value(step * line) - value(-step * line)) / (2 * step) for line in directions]
    for estimator in ("forward", "unrolled"):
        _, phi_params, _ = bilevel_step(name, estimator)(case.theta, case.phi_params, batch, 1.0)
        assert_relative(directions @ (start - ravel_pytree(phi_params)[0]), np.asarray(differences))


# Training


def draw_patterns(rng_key, num_examples):
    """Noisy images of one of four patterns, far from a mean of zero and a variance of one."""
    class_key, noise_key = jax.random.split(rng_key)
    patterns = jax.random.normal(jax.random.key(0), (4, 6, 6, 1))
    targets = jax.random.randint(class_key, (num_examples,), 0, len(patterns))
    noise = jax.random.normal(noise_key, (num_examples, 6, 6, 1))
    return adalfl_jax.Batch(100 + 5 * (patterns[targets] + 0.5 * noise), targets)


@pytest.mark.slow
def test_after_training_the_running_statistics_serve_as_well_as_those_of_a_batch():
    model, loss = functionalize(lambda rngs: Convolutional(1, 4, rngs=rngs)), adalfl_jax.ScaledTaskLoss()
    inner, outer = optax.sgd(0.1, momentum=0.9, nesterov=True), optax.adam(1e-2)
    step = adalfl_jax.make_bilevel_step(model.apply, loss.apply, softmax_cross_entropy, inner, outer)

    def body(carry, rng_key):
        inner_key, outer_key = jax.random.split(rng_key)
        theta, phi, _ = step(
            *carry, adalfl_jax.BilevelBatch(draw_patterns(inner_key, 64), draw_patterns(outer_key, 64))
        )
        return (theta, phi), None

    @jax.jit
    def accuracies(rng_key):
        init_key, steps_key, held_out_key = jax.random.split(rng_key, 3)
        untrained = adalfl_jax.Theta.create(*model.init(init_key), inner)
        start = untrained, adalfl_jax.Phi.create(loss.init(init_key), outer)
        (theta, _), _ = jax.lax.scan(body, start, jax.random.split(steps_key, 100))
        held_out = draw_patterns(held_out_key, 500)

        def accuracy(model_state, train):
            outputs, _ = model.apply(theta.params, model_state, held_out.inputs, train=train, rng_key=None)
            return (outputs.argmax(axis=-1) == held_out.targets).mean()

        return {
            "batch": accuracy(theta.model_state, True),
            "running": accuracy(theta.model_state, False),
            "never updated": accuracy(untrained.model_state, False),
        }

    by = accuracies(jax.random.key(1))
    assert by["running"] > 0.9
    assert abs(by["running"] - by["batch"]) < 0.03
    assert by["never updated"] < 0.6
