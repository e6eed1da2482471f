"""Meta-Weight-Net: the gradient of theta, that of phi through it, and a run from a configuration."""

import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import adalfl_jax
from adalfl_jax.task_losses import example_cross_entropy, softmax_cross_entropy
from adalfl_jax.training import ConfigError, compare, train
from adalfl_jax.training.setup import make_setup
from tests.hypergradient.reference import assert_relative, estimate, finite_differences
from tests.problems import make_batch, make_problem
from tests.training.tiny import DIABETES, tiny_config

LOSS = adalfl_jax.WeightNetwork(hidden_size=6)
TARGETS, OUTPUTS = jnp.array([0, 2, 1]), jnp.array([[0.3, -1.2, 2.0], [0.1, 0.4, -0.5], [3.0, -2.0, 1.0]])


def drawn(seed=0):
    """phi whose weights differ from example to example more than those of a fresh one."""
    return jax.tree.map(lambda leaf: 2 * leaf, LOSS.init(jax.random.key(seed)))


def numpy_weights(phi_params, losses):
    hidden, output = (jax.tree.map(np.asarray, phi_params[f"layer_{layer}"]) for layer in (0, 1))
    units = np.maximum(losses[:, None] * hidden["kernel"] + hidden["bias"], 0)
    return 1 / (1 + np.exp(-(units @ output["kernel"] + output["bias"])[:, 0]))


@pytest.mark.parametrize("targets", [TARGETS, jax.nn.one_hot(TARGETS, 3)], ids=["labels", "distributions"])
def test_it_is_the_mean_of_weighted_cross_entropies(targets):
    phi_params = drawn()
    losses = np.asarray(example_cross_entropy(targets, OUTPUTS))
    weights = numpy_weights(phi_params, losses)
    assert weights.std() > 0.01
    np.testing.assert_allclose(LOSS.weights(phi_params, jnp.asarray(losses)), weights, rtol=1e-5)
    np.testing.assert_allclose(LOSS.apply(phi_params, targets, OUTPUTS), (weights * losses).mean(), rtol=1e-5)


def field(phi_params, outputs):
    """What theta moves along: the gradient of each cross-entropy times its weight, by definition."""
    gradients = jax.jacrev(functools.partial(example_cross_entropy, TARGETS))(outputs)  # [B, B, C]
    weights = LOSS.weights(phi_params, example_cross_entropy(TARGETS, outputs))
    return (weights[:, None, None] * gradients).mean(axis=0)


@pytest.mark.usefixtures("float64")
def test_its_gradient_holds_weights_constant():
    phi_params, outputs = drawn(), OUTPUTS.astype(jnp.float64)
    gradient = jax.jit(jax.grad(LOSS.apply, argnums=2))(phi_params, TARGETS, outputs)
    np.testing.assert_allclose(gradient, jax.jit(field)(phi_params, outputs), rtol=1e-12)

    def weighted(outputs):
        losses = example_cross_entropy(TARGETS, outputs)
        return (LOSS.weights(phi_params, losses) * losses).mean()

    through_weights = jax.jit(jax.grad(weighted))(outputs)
    assert np.abs(gradient - through_weights).max() > 1e-3


@pytest.mark.usefixtures("float64")
def test_its_gradient_has_the_derivatives_of_what_theta_moves_along():
    """Weights included: theta's next gradient sees the weights that theta's move makes."""
    phi_params, outputs = drawn(), OUTPUTS.astype(jnp.float64)
    hessian = jax.jit(jax.hessian(LOSS.apply, argnums=2))(phi_params, TARGETS, outputs)
    jacobian = jax.jit(jax.jacfwd(field, argnums=1))(phi_params, outputs)
    np.testing.assert_allclose(hessian, jacobian, rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(hessian, hessian.transpose(2, 3, 0, 1), rtol=1e-10, atol=1e-14)
    step = 1e-5 * jnp.eye(9).reshape(9, 3, 3)
    moved = (
        jax.vmap(jax.jit(lambda step: field(phi_params, outputs + step) - field(phi_params, outputs - step)))(step)
        / 2e-5
    )
    np.testing.assert_allclose(hessian.reshape(3, 3, 9), jnp.moveaxis(moved, 0, -1), rtol=1e-6, atol=1e-9)


@pytest.mark.usefixtures("float64")
def test_its_value_has_the_derivative_of_the_weights_in_phi():
    phi_params, outputs = drawn(), OUTPUTS.astype(jnp.float64)
    gradient, _ = ravel_pytree(jax.jit(jax.grad(LOSS.apply))(phi_params, TARGETS, outputs))
    assert_relative(gradient, finite_differences(lambda phi: LOSS.apply(phi, TARGETS, outputs), phi_params))


def outer_loss(model, theta, batch, phi_params):
    """L after steps of SGD at 0.3, each along weighted gradients of single examples."""
    (inputs, targets), params = batch.inner, theta.params
    if targets.ndim == 1:
        inputs, targets = inputs[None], targets[None]
    for step in range(len(inputs)):

        def example_losses(params, step=step):
            return example_cross_entropy(
                targets[step], model.apply(params, {}, inputs[step], train=True, rng_key=None)[0]
            )

        weights = LOSS.weights(phi_params, example_losses(params))
        gradients = jax.jacrev(example_losses)(params)
        params = jax.tree.map(
            lambda leaf, gradient, weights=weights: leaf - 0.3 * jnp.tensordot(weights, gradient, 1) / len(weights),
            params,
            gradients,
        )
    outputs, _ = model.apply(params, {}, batch.outer.inputs, train=True, rng_key=None)
    return softmax_cross_entropy(batch.outer.targets, outputs)


ONE_STEP = ("forward", "recompute", "unrolled", "checkpointed", "mixed_mode")


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("num_inner_steps", [None, pytest.param(3, marks=pytest.mark.slow)])
def test_exact_meta_gradients_are_those_of_the_update_by_finite_differences(num_inner_steps):
    model, optimizer, _, theta, _ = make_problem("plain", "sgd")
    batch, phi_params = make_batch(jax.random.key(1), num_inner_steps), drawn()
    written_out = jax.jit(functools.partial(outer_loss, model, theta, batch))
    expected, value = finite_differences(written_out, phi_params), written_out(phi_params)
    for name in ONE_STEP[2 if num_inner_steps else 0 :]:
        result = estimate(name, model, LOSS, optimizer, theta, phi_params, batch)
        assert_relative(ravel_pytree(result.gradient)[0], expected)
        np.testing.assert_allclose(result.outer_loss, value, rtol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_losses_of_any_size_have_finite_gradients(scale):
    gradients = jax.jit(jax.grad(LOSS.apply, argnums=(0, 2)))(drawn(), TARGETS, scale * OUTPUTS)
    chex.assert_tree_all_finite(gradients)


def test_bilevel_steps_raise_the_weights_of_examples_that_help():
    """Two of five inner labels are wrong; phi learns to weigh examples of small loss, which are right, more."""
    inputs = jax.random.normal(jax.random.key(0), (200, 4))
    labels = (inputs[:, 0] > 0).astype(jnp.int32)
    noisy = jnp.where(jnp.arange(200) % 5 < 2, 1 - labels, labels)
    inner, outer = optax.sgd(0.5), optax.adam(0.03)

    def apply_fn(params, model_state, inputs, *, train, rng_key):
        return inputs @ params, model_state

    step = adalfl_jax.make_bilevel_step(apply_fn, LOSS.apply, softmax_cross_entropy, inner, outer)
    theta = adalfl_jax.Theta.create(jnp.zeros((4, 2)), (), inner)
    phi = adalfl_jax.Phi.create(LOSS.init(jax.random.key(1)), outer)
    batch = adalfl_jax.BilevelBatch((inputs, noisy), (inputs, labels))

    def body(carry, _):
        theta, phi, metrics = step(*carry, batch)
        return (theta, phi), metrics.outer_loss

    plain = theta
    (theta, phi), losses = jax.jit(lambda carry: jax.lax.scan(body, carry, None, length=300))((theta, phi))
    weights = LOSS.weights(phi.params, example_cross_entropy(noisy, inputs @ theta.params))
    assert weights[noisy == labels].mean() > 2 * weights[noisy != labels].mean()

    task_step = adalfl_jax.make_task_step(apply_fn, softmax_cross_entropy, inner)
    plain, _ = jax.jit(lambda theta: jax.lax.scan(lambda theta, _: task_step(theta, batch.inner), theta, None, 300))(
        plain
    )
    assert losses[-1] < 0.8 * softmax_cross_entropy(labels, inputs @ plain.params)


def test_a_size_that_is_none_is_refused():
    for size in (0, -1, 2.5):
        with pytest.raises(ValueError, match=rf"hidden_size must be a whole number of at least 1; got {size}"):
            adalfl_jax.WeightNetwork(size)


WEIGHTS = {"learned_loss.family": "weight_network", "learned_loss.weight_hidden_size": 7}


@pytest.mark.slow
def test_a_comparison_with_it_runs_from_a_configuration(tmp_path):
    config = tiny_config(WEIGHTS, methods=("task_loss", "ml3", "adalfl"))
    summary = compare(config, tmp_path)
    assert all(np.isfinite(info["test"]["mean"]) for info in summary["methods"].values())
    assert (tmp_path / "report.html").exists()
    frozen = adalfl_jax.load_learned_loss(tmp_path / "learned_loss.safetensors")
    assert frozen.loss == adalfl_jax.WeightNetwork(7)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert any("implicit_learning_rate" in record for record in records)


@pytest.mark.slow
def test_it_learns_from_its_first_draw_without_an_offline_phase(tmp_path):
    summary = train(tiny_config(WEIGHTS, **{"offline.num_steps": 0}), tmp_path)
    assert np.isfinite(summary["methods"]["adalfl"]["test"]["mean"])


def test_a_regression_has_no_weighted_cross_entropy():
    with pytest.raises(
        ConfigError, match=r"learned_loss\.family must be .* task loss 'squared_error'; got 'weight_net"
    ):
        make_setup(tiny_config(DIABETES | WEIGHTS))
