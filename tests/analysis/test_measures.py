import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

from adalfl_jax.analysis import along_true_class, compare_gradients, flat_share, make_loss_shape
from adalfl_jax.analysis.measures import flat_share_of_outputs, implied_smoothing
from adalfl_jax.learned_losses import LossNetwork, RescaledLoss
from adalfl_jax.models import functionalize
from adalfl_jax.task_losses import (
    generalized_cross_entropy,
    smoothed_cross_entropy,
    softmax_cross_entropy,
    squared_error,
    symmetric_cross_entropy,
)
from adalfl_jax.types import Batch, Theta

RATE = 0.25
THETA = Theta({"kernel": jnp.array([[1.0, -2.0], [0.5, 3.0]])}, {}, ())
BATCH = Batch(jnp.array([[1.0, 2.0], [-1.0, 0.5], [3.0, 1.0]]), jnp.array([[0.0, 1.0], [1.0, 0.0], [2.0, -1.0]]))


def apply_fn(params, model_state, inputs, *, train, rng_key):
    assert train
    return inputs @ params["kernel"], model_state


def compared(loss_fn, task_loss_fn=squared_error):
    return compare_gradients(apply_fn, loss_fn, task_loss_fn, THETA, BATCH, RATE)


def test_a_learned_loss_in_place_of_a_fixed_one_is_refused():
    with pytest.raises(ValueError, match="loss_fn"):
        compare_gradients(apply_fn, LossNetwork((4,)).apply, softmax_cross_entropy, THETA, BATCH, RATE)


@pytest.mark.parametrize("factor", [4.0, 0.5, 1.0])
def test_multiple_of_the_task_loss_is_measured_exactly(factor):
    comparison = compared(lambda targets, outputs: factor * squared_error(targets, outputs))
    assert comparison.gradient_scale == factor
    assert comparison.gradient_cosine == pytest.approx(1, abs=1e-6)
    assert comparison.implicit_learning_rate == pytest.approx(factor * RATE)


@pytest.mark.parametrize("margin", [1.0, 20.0, 40.0, 60.0, 80.0])
def test_gradients_of_a_fitted_model_are_compared_as_others(margin):
    inputs, targets = jnp.eye(4), jnp.arange(4)
    theta = Theta.create({"kernel": margin * jnp.eye(4)}, {}, optax.sgd(RATE))
    batch = Batch(inputs, targets)

    def tripled(targets, outputs):
        return 3 * softmax_cross_entropy(targets, outputs)

    comparison = compare_gradients(apply_fn, tripled, softmax_cross_entropy, theta, batch, RATE)
    np.testing.assert_allclose(comparison, [3, 1, 3 * RATE], rtol=1e-5)
    assert comparison.gradient_cosine <= 1


def test_a_cosine_is_no_more_than_one_in_few_bits_too():
    rng = np.random.default_rng(0)
    theta = Theta.create(
        {"kernel": jnp.array(rng.normal(size=THETA.params["kernel"].shape), jnp.bfloat16)}, {}, optax.sgd(1)
    )
    comparison = compare_gradients(apply_fn, lambda y, f: 3 * squared_error(y, f), squared_error, theta, BATCH, RATE)
    assert 0.999 < comparison.gradient_cosine <= 1
    assert comparison.gradient_scale == pytest.approx(3, rel=0.01)


def test_a_cosine_is_no_more_than_one_wherever_theta_is():
    def cosine(kernel):
        theta = Theta({"kernel": kernel}, {}, ())
        return compare_gradients(apply_fn, squared_error, squared_error, theta, BATCH, RATE).gradient_cosine

    cosines = jax.jit(jax.vmap(cosine))(jax.random.normal(jax.random.key(0), (200, 2, 2)))
    assert 0.999 < cosines.min() <= cosines.max() <= 1


def test_gradients_are_compared_outside_of_jit_without_compiling_anew(caplog):
    def task_loss_fn(targets, outputs):
        return squared_error(targets, outputs)

    compared(squared_error, task_loss_fn)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        compared(squared_error, task_loss_fn)
    assert not [record for record in caplog.records if "Compiling" in record.getMessage()]


@pytest.mark.parametrize(("power", "scale"), [(17, 1e34), (25, float(jnp.finfo(jnp.float32).max))])
def test_a_scale_is_at_most_the_largest_number(power, scale):
    comparison = compared(
        lambda targets, outputs: 10.0**power * squared_error(targets, outputs),
        lambda targets, outputs: 10.0**-power * squared_error(targets, outputs),
    )
    assert comparison.gradient_scale == pytest.approx(scale, rel=1e-5)


def test_opposite_of_the_task_loss_points_away():
    comparison = compared(lambda targets, outputs: -squared_error(targets, outputs))
    assert comparison.gradient_scale == 1
    assert comparison.gradient_cosine == pytest.approx(-1, abs=1e-6)
    assert comparison.implicit_learning_rate == pytest.approx(-RATE)


def test_gradients_at_an_angle_are_measured_as_numpy_does():
    def loss_fn(targets, outputs):
        return (outputs**3).mean()

    def gradient(fn):
        return np.asarray(jax.grad(lambda kernel: fn(BATCH.targets, BATCH.inputs @ kernel))(THETA.params["kernel"]))

    learned, task = gradient(loss_fn).ravel(), gradient(squared_error).ravel()
    comparison = compared(loss_fn)
    norms = np.linalg.norm(learned), np.linalg.norm(task)
    assert comparison.gradient_scale == pytest.approx(norms[0] / norms[1], rel=1e-5)
    assert comparison.gradient_cosine == pytest.approx(learned @ task / norms[0] / norms[1], rel=1e-5)
    assert comparison.implicit_learning_rate == pytest.approx(RATE * learned @ task / norms[1] ** 2, rel=1e-5)


@pytest.mark.parametrize("zero", ["learned", "task", "both"])
def test_zero_gradient_gives_zeros_and_of_two_the_scale_is_one(zero):
    def flat(targets, outputs):
        return 0.0 * outputs.sum()

    comparison = compared(
        flat if zero in ("learned", "both") else squared_error, flat if zero in ("task", "both") else squared_error
    )
    assert [float(value) for value in comparison] == [1.0 if zero == "both" else 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("predictions", "low", "high"),
    [("probabilities", 0, 1), ("log_probabilities", -8, 0), ("raw", -3, 3), ("sigmoid", 0, 1)],
)
def test_loss_shape_covers_the_range_of_the_predictions_with_zero_mean(predictions, low, high):
    loss = LossNetwork(hidden_sizes=(8,), predictions=predictions)
    grid, shape_of = make_loss_shape(loss, num_points=33)
    curves = shape_of(loss.init(jax.random.key(0)))
    assert grid.shape == (33,)
    assert (float(grid[0]), float(grid[-1])) == (low, high)
    assert curves.shape == (2, 33)
    np.testing.assert_allclose(curves.mean(axis=1), 0, atol=1e-5)


def test_loss_shape_is_the_network_up_to_a_constant():
    loss = LossNetwork(hidden_sizes=(8,), predictions="raw")
    phi = loss.init(jax.random.key(1))
    grid, shape_of = make_loss_shape(loss, num_points=5)
    curves = shape_of(phi)
    for target in (0.0, 1.0):
        points = [float(loss.apply(phi, jnp.array([[target]]), value[None, None])) for value in grid]
        np.testing.assert_allclose(np.diff(curves[int(target)]), np.diff(points), atol=1e-5)


def test_the_shape_of_a_loss_that_is_no_function_of_one_prediction_is_refused():
    with pytest.raises(ValueError, match=r"draws a LossNetwork, the `loss` inside.*got RescaledLoss"):
        make_loss_shape(RescaledLoss(LossNetwork()))  # pyright: ignore[reportArgumentType]


def test_the_flat_share_counts_what_gives_no_gradient():
    predictions = np.linspace(0, 1, 101)
    half = np.where(predictions < 0.5, predictions, 0.5)
    shapes = np.stack([np.stack([half, predictions]), np.stack([half, half]), np.zeros((2, 101))])
    np.testing.assert_allclose(flat_share(shapes), [0.25, 0.5, 1.0], atol=0.006)
    shapes[1, 0, 3] = np.nan
    np.testing.assert_allclose(flat_share(shapes), [0.25, np.nan, 1.0], atol=0.006)


@pytest.mark.parametrize(("slope", "share"), [(0.005, 0.5), (0.015, 0.0)])
def test_a_slope_below_a_hundredth_of_the_steepest_is_flat(slope, share):
    predictions = np.linspace(0, 1, 101)
    np.testing.assert_allclose(flat_share(np.stack([predictions, slope * predictions])), share)


def test_the_steepest_slope_is_that_of_either_target():
    loss, labels = LossNetwork(hidden_sizes=(8,)), jnp.arange(64) % 4
    outputs = 3 * jax.random.normal(jax.random.key(1), (64, 4))
    for seed in range(4):
        phi_params = loss.init(jax.random.key(seed))
        predictions, shape_of = make_loss_shape(loss)
        slopes = np.abs(np.diff(shape_of(phi_params, 0.0), axis=-1) / np.diff(predictions))  # [2, P - 1]
        found = [flat_share_of_outputs(loss, phi_params, labels, outputs, threshold=each) for each in (0.5, 0.8)]
        for threshold, share in zip((0.5, 0.8), found, strict=True):
            dense, points = jax.nn.one_hot(labels, 4), jax.nn.softmax(outputs)
            at = np.clip(np.searchsorted(predictions, points) - 1, 0, slopes.shape[1] - 1)
            expected = (slopes[np.asarray(dense, int), at] <= threshold * slopes.max()).mean()
            assert share == pytest.approx(expected, abs=0.05)


ALONG = np.array([0.05, 0.3, 0.8])


@pytest.mark.parametrize(
    ("loss_fn", "pull"),
    [
        (softmax_cross_entropy, lambda p: 1 - p),
        (generalized_cross_entropy, lambda p: p**0.7 * (1 - p)),
        (symmetric_cross_entropy, lambda p: (0.1 + 4 * p) * (1 - p)),
        (smoothed_cross_entropy, lambda p: 0.91 - p),
    ],
)
def test_the_pull_of_hand_made_losses_is_what_their_formulas_say(loss_fn, pull, float64):
    _, pulls = along_true_class(loss_fn, jnp.array(ALONG), 10)
    np.testing.assert_allclose(pulls, pull(ALONG), rtol=1e-6)


def test_the_values_along_the_true_class_are_those_of_the_loss_there(float64):
    loss = LossNetwork(hidden_sizes=(4,))
    phi = loss.init(jax.random.key(0))
    loss_fn = jax.jit(functools.partial(loss.apply, phi))
    values, _ = along_true_class(loss_fn, jnp.array(ALONG), 4)
    for value, p in zip(values, ALONG, strict=True):
        outputs = np.log(np.array([[(1 - p) / 3, p, (1 - p) / 3, (1 - p) / 3]]))
        assert value == pytest.approx(float(loss_fn(np.array([1]), outputs)))


def test_the_flat_share_of_outputs_counts_those_that_occur(float64):
    loss = LossNetwork(hidden_sizes=(8,), predictions="raw", use_bias=True)
    phi = loss.init(jax.random.key(3))
    rng, step = np.random.default_rng(0), 1e-6
    targets, outputs = rng.integers(0, 2, (20, 3)).astype(float), 3 * rng.standard_normal((20, 3))
    values, share_of = jax.jit(loss.elementwise), jax.jit(functools.partial(flat_share_of_outputs, loss))

    def slopes(targets, predictions):  # a definition by differences
        ends = [np.asarray(values(phi, targets, predictions + sign * step)) for sign in (1, -1)]
        return np.abs(ends[0] - ends[1]) / (2 * step)

    grid = np.broadcast_to(np.linspace(-3, 3, 101), (2, 101))
    steepest = slopes(np.broadcast_to([[0.0], [1.0]], (2, 101)), grid).max()
    for threshold in (0.01, 0.4):
        expected = (slopes(targets, outputs) <= threshold * steepest).mean()
        assert float(share_of(phi, targets, outputs, threshold=threshold)) == pytest.approx(expected)
    assert 0 < expected < 1
    nothing = jax.tree.map(np.zeros_like, phi)
    assert float(share_of(nothing, targets, outputs, threshold=0.01)) == 1
    outputs[4, 1] = np.nan
    assert np.isnan(share_of(phi, targets, outputs, threshold=0.01))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3])
def test_smoothed_cross_entropy_implies_its_own_smoothing(smoothing):
    logarithms, share = np.linspace(-8, 0, 101), smoothing / 10
    values = np.stack([-share * logarithms, -(1 - smoothing + share) * logarithms])
    found = implied_smoothing(logarithms, values, 10, of_logarithms=True)
    assert found == pytest.approx(smoothing, abs=1e-3)


def test_a_loss_that_is_least_in_between_implies_smoothing_for_each_seed():
    predictions = np.linspace(0, 1, 101)
    values = np.stack([[0 * predictions, (predictions - best) ** 2] for best in (0.55, 1.0)])
    np.testing.assert_allclose(implied_smoothing(predictions, values, 10), [0.5, 0.0], atol=1e-3)


def test_a_seed_that_diverged_has_no_smoothing_and_leaves_that_of_the_others():
    predictions = np.linspace(0, 1, 101)
    values = np.stack([[0 * predictions, (predictions - 0.55) ** 2]] * 2)
    values[0, 1, 7] = np.nan
    np.testing.assert_allclose(implied_smoothing(predictions, values, 10), [np.nan, 0.5], atol=1e-3)


def linear(params, model_state, inputs, *, train, rng_key):
    return inputs["x"] @ params, model_state


@pytest.mark.parametrize("batch_size", [None, 2, 8])
def test_gradients_are_compared_on_any_batch_a_step_takes(batch_size):
    inputs, targets = {"x": jax.random.normal(jax.random.key(0), (8, 4))}, jnp.arange(8) % 3
    theta = Theta.create(jax.random.normal(jax.random.key(1), (4, 3)), (), optax.sgd(0.1))
    found = compare_gradients(
        linear,
        lambda y, f: 2 * softmax_cross_entropy(y, f),
        softmax_cross_entropy,
        theta,
        (inputs, targets),
        0.1,
        batch_size=batch_size,
    )
    assert found == pytest.approx((2.0, 1.0, 0.2), rel=1e-5)


@pytest.mark.parametrize(("num_examples", "batch_size"), [(8, 3), (8, 16), (8, 0), (0, None)])
def test_gradients_are_compared_on_whole_batches_alone(num_examples, batch_size):
    batch = {"x": jnp.ones((num_examples, 4))}, jnp.zeros(num_examples, int)
    theta = Theta.create(jnp.ones((4, 3)), (), optax.sgd(0.1))
    with pytest.raises(ValueError, match=f"must divide the number of examples, {num_examples}"):
        compare_gradients(
            linear, softmax_cross_entropy, softmax_cross_entropy, theta, batch, 0.1, batch_size=batch_size
        )


def test_other_examples_are_taken_in_batches_too():
    sizes = []

    def sized(params, model_state, inputs, *, train, rng_key):
        sizes.append(len(inputs))
        return inputs @ params, model_state

    def ones(num_examples):
        return Batch(jnp.ones((num_examples, 4)), jnp.zeros(num_examples, int))

    theta, loss_fn = Theta(jnp.ones((4, 3)), (), ()), softmax_cross_entropy
    compare_gradients(sized, loss_fn, loss_fn, theta, ones(4), 0.1, batch_size=2, task_batch=ones(6))
    assert set(sizes) == {2}


@pytest.mark.parametrize("batch_size", [None, 2, 4])
def test_the_task_loss_may_be_taken_on_other_examples(batch_size):
    rng = np.random.default_rng(1)
    inputs, clean_inputs = jnp.array(rng.normal(size=(8, 4)), float), jnp.array(rng.normal(size=(2, 4)), float)
    batch = {"x": inputs}, jnp.array(rng.integers(0, 3, 8))
    clean = {"x": clean_inputs}, jnp.array([2, 0])
    theta = Theta.create(jnp.array(rng.normal(size=(4, 3)), float), (), optax.sgd(0.1))
    found = compare_gradients(
        linear,
        smoothed_cross_entropy,
        softmax_cross_entropy,
        theta,
        batch,
        0.1,
        batch_size=batch_size,
        task_batch=clean,
    )

    def gradient(loss_fn, examples):
        return jax.grad(lambda kernel: loss_fn(examples[1], examples[0]["x"] @ kernel))(theta.params)

    learned, task = gradient(smoothed_cross_entropy, batch), gradient(softmax_cross_entropy, clean)
    cosine = (learned * task).sum() / jnp.linalg.norm(learned) / jnp.linalg.norm(task)
    assert found.gradient_cosine == pytest.approx(float(cosine), rel=1e-5)
    assert found.gradient_scale == pytest.approx(float(jnp.linalg.norm(learned) / jnp.linalg.norm(task)), rel=1e-5)


class NormedAndDropped(nnx.Module):
    """A layer with batch norm, or with dropout, before it."""

    def __init__(self, first, rngs):
        self.first, self.last = first(rngs), nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, inputs):
        return self.last(self.first(inputs))


@pytest.mark.parametrize("batch_size", [None, 4])
@pytest.mark.parametrize(
    "first",
    [lambda rngs: nnx.BatchNorm(4, rngs=rngs), lambda rngs: nnx.Dropout(0.5, rngs=rngs)],
    ids=["batch_norm", "dropout"],
)
def test_gradients_are_those_of_train_mode(first, batch_size):
    model = functionalize(lambda rngs: NormedAndDropped(first, rngs))
    theta = Theta.create(*model.init(jax.random.key(0)), optax.sgd(0.1))
    batch, key = Batch(5 + 3 * jax.random.normal(jax.random.key(1), (8, 4)), jnp.arange(8) % 3), jax.random.key(2)
    keys = [key] if batch_size is None else [*jax.random.split(key, 2)]

    @functools.partial(jax.jit, static_argnums=0)
    def gradient(loss_fn):
        def objective(params, inputs, targets, key):
            return loss_fn(targets, model.apply(params, theta.model_state, inputs, train=True, rng_key=key)[0])

        parts = (jnp.split(array, len(keys)) for array in batch)
        found = [jax.grad(objective)(theta.params, *each) for each in zip(*parts, keys, strict=True)]
        return ravel_pytree(jax.tree.map(lambda *leaves: sum(leaves), *found))[0]

    losses = generalized_cross_entropy, softmax_cross_entropy
    learned, task = map(gradient, losses)
    found = compare_gradients(model.apply, *losses, theta, batch, 0.1, batch_size=batch_size, rng_key=key)
    norms = jnp.linalg.norm(learned), jnp.linalg.norm(task)
    expected = norms[0] / norms[1], learned @ task / norms[0] / norms[1], 0.1 * learned @ task / norms[1] ** 2
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_dropout_without_a_key_is_refused():
    model = functionalize(lambda rngs: nnx.Sequential(nnx.Linear(4, 3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)))
    theta = Theta.create(*model.init(jax.random.key(0)), optax.sgd(0.1))
    with pytest.raises(ValueError, match="give it an rng_key in train mode"):
        compare_gradients(
            model.apply, softmax_cross_entropy, softmax_cross_entropy, theta, (jnp.ones((2, 4)), jnp.arange(2)), 0.1
        )


def test_gradients_that_are_nan_compare_as_nan():
    theta = Theta.create(jnp.full((4, 3), jnp.nan), (), optax.sgd(0.1))
    batch = {"x": jnp.ones((8, 4))}, jnp.zeros(8, int)
    found = compare_gradients(linear, softmax_cross_entropy, softmax_cross_entropy, theta, batch, 0.1)
    assert np.isnan(found).all()
