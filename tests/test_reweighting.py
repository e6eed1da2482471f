"""Learning to Reweight: weights by finite differences and in closed form, and the step they make."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adalfl_jax
from adalfl_jax.reweighting import _normalize
from adalfl_jax.task_losses import example_cross_entropy, softmax_cross_entropy
from tests.problems import BATCH_SIZE, OPTIMIZERS, make_batch, make_model, make_problem


def make_step(model="plain", optimizer="sgd", example_loss_fn=example_cross_entropy):
    model, inner, _, theta, _ = make_problem(model, optimizer)
    step = adalfl_jax.make_reweighting_step(model.apply, example_loss_fn, softmax_cross_entropy, inner)
    return step, theta


def outputs_of(model, theta, params, inputs, key):
    return model.apply(params, theta.model_state, inputs, train=True, rng_key=key)


def weighted_gradient(model, theta, batch, weights):
    """Of the weighted sum of the losses of the inner batch, and the model state after that pass."""
    key = jax.random.split(batch.rng_key)[0]

    def objective(params):
        outputs, state = outputs_of(model, theta, params, batch.inner.inputs, key)
        return weights @ example_cross_entropy(batch.inner.targets, outputs), state

    return jax.grad(objective, has_aux=True)(theta.params)


def outer_loss(model, theta, batch, weights, rate=0.01):
    """L after the virtual step of the paper, without this library's estimators."""
    gradient, state = weighted_gradient(model, theta, batch, weights)
    params = jax.tree.map(lambda leaf, slope: leaf - rate * slope, theta.params, gradient)
    key = jax.random.split(batch.rng_key)[1]
    outputs, _ = outputs_of(model, theta._replace(model_state=state), params, batch.outer.inputs, key)
    return softmax_cross_entropy(batch.outer.targets, outputs)


def weights_by_finite_differences(model, theta, batch, step=1e-4):
    offsets = step * jnp.eye(BATCH_SIZE)
    slopes = jax.jit(
        jax.vmap(lambda offset: outer_loss(model, theta, batch, offset) - outer_loss(model, theta, batch, -offset))
    )(offsets)
    weights = jnp.maximum(-slopes / (2 * step), 0)
    return weights / weights.sum()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        ("batch_norm", "nesterov"),
        ("dropout", "sgd"),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in (("plain", "nesterov"), ("plain", "sgd"), ("batch_norm", "sgd"), ("dropout", "nesterov"))
        ),
    ],
)
def test_theta_moves_by_the_weights_that_finite_differences_give(name, optimizer):
    """Whatever the optimiser: its step is the real one, the virtual one is plain SGD."""
    step, theta = make_step(name, optimizer)
    model, batch = make_model(name), make_batch(jax.random.key(1))
    weights = weights_by_finite_differences(model, theta, batch)
    assert 0 < (weights == 0).sum() < BATCH_SIZE
    gradient, state = jax.jit(functools.partial(weighted_gradient, model))(theta, batch, weights)
    updates, opt_state = OPTIMIZERS[optimizer].update(gradient, theta.opt_state, theta.params)
    expected = adalfl_jax.Theta(optax.apply_updates(theta.params, updates), state, opt_state)
    after, metrics = jax.jit(step)(theta, batch)
    chex.assert_trees_all_close(after, expected, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(metrics.zero_share, (weights == 0).mean())
    np.testing.assert_allclose(metrics.effective_size, 1 / (weights**2).sum(), rtol=1e-5)
    unmoved = jax.jit(functools.partial(outer_loss, model))(theta, batch, jnp.zeros(BATCH_SIZE))
    np.testing.assert_allclose(metrics.outer_loss, unmoved, rtol=1e-12)


@pytest.mark.usefixtures("float64")
def test_weights_are_the_positive_products_of_the_gradients():
    model, batch = make_model("plain"), make_batch(jax.random.key(1))
    step, theta = make_step()

    def losses(params):
        return example_cross_entropy(batch.inner.targets, outputs_of(model, theta, params, batch.inner.inputs, None)[0])

    def task_loss(params):
        outputs, _ = outputs_of(model, theta, params, batch.outer.inputs, None)
        return softmax_cross_entropy(batch.outer.targets, outputs)

    each, task = jax.jit(jax.jacrev(losses))(theta.params), jax.jit(jax.grad(task_loss))(theta.params)
    products = sum(
        (ours.reshape(BATCH_SIZE, -1) @ theirs.ravel())
        for ours, theirs in zip(jax.tree.leaves(each), jax.tree.leaves(task), strict=True)
    )
    weights = jnp.maximum(products, 0) / jnp.maximum(products, 0).sum()
    expected = jax.tree.map(lambda leaf, slopes: leaf - 0.3 * jnp.tensordot(weights, slopes, 1), theta.params, each)
    after, metrics = jax.jit(step)(theta, batch)
    chex.assert_trees_all_close(after.params, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(metrics.inner_loss, weights @ jax.jit(losses)(theta.params), rtol=1e-9)


def binary_batch(inner_labels, outer_labels):
    """One input of 1 for every label, on which examples of one label help one another and harm the others."""
    (inner, outer) = (jnp.array(labels) for labels in (inner_labels, outer_labels))
    return adalfl_jax.BilevelBatch((jnp.ones((len(inner), 1)), inner), (jnp.ones((len(outer), 1)), outer))


def binary_step(inner_labels, outer_labels):
    inner = optax.sgd(0.5)
    step = adalfl_jax.make_reweighting_step(
        lambda params, model_state, inputs, *, train, rng_key: (inputs @ params, model_state),
        example_cross_entropy,
        softmax_cross_entropy,
        inner,
    )
    theta = adalfl_jax.Theta.create(jnp.zeros((1, 2)), (), inner)
    return jax.jit(step)(theta, binary_batch(inner_labels, outer_labels))


def test_examples_that_harm_weigh_nothing_and_the_others_share_what_there_is():
    theta, metrics = binary_step([0, 0, 0, 1, 1], [1, 1])
    np.testing.assert_allclose(metrics.zero_share, 0.6, rtol=1e-6)
    np.testing.assert_allclose(metrics.effective_size, 2.0, rtol=1e-6)
    np.testing.assert_allclose(metrics.inner_loss, np.log(2), rtol=1e-6)
    np.testing.assert_allclose(theta.params, [[-0.25, 0.25]], rtol=1e-6)


def test_of_many_examples_that_help_alike_none_weighs_nothing():
    _, metrics = binary_step([1] * 500, [1, 1])
    assert metrics.zero_share == 0
    np.testing.assert_allclose(metrics.effective_size, 500, rtol=1e-4)


@pytest.mark.parametrize("run", [lambda function: function, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("largest", [1e-37, 1.0, 8e37, 3e38])
def test_weights_of_any_size_add_up_to_one(largest, run):
    weights = run(_normalize)(largest * jnp.array([1.0, 1.0, 0.5, 0.0]))
    np.testing.assert_allclose(weights, [0.4, 0.4, 0.2, 0.0], rtol=1e-6)
    assert run(_normalize)(jnp.zeros(0)).shape == (0,)


@pytest.mark.parametrize("scale", [1e-10, 1e19])
def test_weights_whose_sum_overflows_are_those_of_a_smaller_batch(scale):
    def apply(params, model_state, inputs, *, train, rng_key):
        return inputs @ params, model_state

    optimizer = optax.sgd(0.1)
    step = jax.jit(adalfl_jax.make_reweighting_step(apply, example_cross_entropy, softmax_cross_entropy, optimizer))
    theta = adalfl_jax.Theta.create(jnp.zeros((4, 3)), (), optimizer)
    inputs, labels = jax.random.normal(jax.random.key(0), (8, 4)), jnp.arange(8) % 3
    batches = [adalfl_jax.BilevelBatch(*[(inputs * factor, labels)] * 2) for factor in (1.0, scale)]
    sizes = [step(theta, batch)[1].effective_size for batch in batches]
    assert sizes[0] > 1
    np.testing.assert_allclose(sizes[1], sizes[0], rtol=1e-5)


@pytest.mark.parametrize("outer_labels", [[1, 1], [0, 1]])
def test_where_no_example_helps_theta_stays(outer_labels):
    theta, metrics = binary_step([0, 0, 0], outer_labels)
    assert not theta.params.any()
    assert (metrics.zero_share, metrics.effective_size, metrics.inner_loss) == (1, 0, 0)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "name", ["linear", *(pytest.param(name, marks=pytest.mark.slow) for name in ("batch_norm", "dropout"))]
)
def test_scan_and_jit_equal_the_eager_loop(name):
    step, theta = make_step(name, "nesterov")
    batches = jax.vmap(make_batch)(jax.random.split(jax.random.key(2), 3))
    scanned = jax.lax.scan(step, theta, batches)
    measured = []
    for index in range(3):
        theta, metrics = step(theta, jax.tree.map(lambda leaf, i=index: leaf[i], batches))
        measured.append(metrics)
    looped = theta, jax.tree.map(lambda *leaves: jnp.stack(leaves), *measured)
    chex.assert_trees_all_close(scanned, looped, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("float64")
def test_vmapped_seeds_equal_single_runs():
    step, _ = make_step("plain", "sgd")
    thetas = [make_problem("plain", "sgd", jax.random.key(seed))[3] for seed in (1, 2)]
    batch = make_batch(jax.random.key(1))
    together = jax.jit(jax.vmap(step, (0, None)))(jax.tree.map(lambda *leaves: jnp.stack(leaves), *thetas), batch)
    for seed, theta in enumerate(thetas):
        alone = jax.tree.map(lambda leaf, s=seed: leaf[s], together)
        chex.assert_trees_all_close(alone, jax.jit(step)(theta, batch), rtol=1e-9, atol=1e-12)


def test_a_loss_that_is_not_one_an_example_is_refused():
    step, theta = make_step(example_loss_fn=softmax_cross_entropy)
    with pytest.raises(ValueError, match=r"example_loss_fn must return one loss an example, \[B\] = \(8,\); got \(\)"):
        step(theta, make_batch(jax.random.key(1)))


def test_several_inner_steps_are_refused():
    step, theta = make_step()
    with pytest.raises(ValueError, match=r"one inner batch, .* leading axis K = 2; drop that axis"):
        step(theta, make_batch(jax.random.key(1), num_inner_steps=2))


def test_what_is_measured_of_weights_that_are_nan_is_nan():
    def apply(params, model_state, inputs, *, train, rng_key):
        return inputs @ params, model_state

    optimizer = optax.sgd(0.1)
    step = adalfl_jax.make_reweighting_step(apply, example_cross_entropy, softmax_cross_entropy, optimizer)
    batch = jnp.full((4, 5), jnp.nan), jnp.zeros(4, int)
    theta = adalfl_jax.Theta.create(jnp.ones((5, 3)), (), optimizer)
    assert all(jnp.isnan(value) for value in jax.jit(step)(theta, adalfl_jax.BilevelBatch(batch, batch))[1])
