"""The learned learning rate."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adalfl_jax
from adalfl_jax.task_losses import softmax_cross_entropy
from tests.problems import make_batch, make_problem


def test_it_is_the_task_loss_times_the_exponential_of_phi():
    loss = adalfl_jax.ScaledTaskLoss("squared_error")
    targets, outputs = jnp.array([[1.0], [2.0]]), jnp.array([[3.0], [2.5]])
    assert loss.apply(loss.init(jax.random.key(0)), targets, outputs) == pytest.approx(4.25 / 2)
    assert loss.apply({"log_scale": jnp.log(3.0)}, targets, outputs) == pytest.approx(3 * 4.25 / 2)


def test_outputs_of_few_bits_have_a_loss_of_as_many():
    loss, outputs = adalfl_jax.ScaledTaskLoss(), jnp.ones((2, 3), jnp.bfloat16)
    assert loss.apply(loss.init(jax.random.key(0)), jnp.array([0, 2]), outputs).dtype == jnp.bfloat16


@pytest.mark.usefixtures("float64")
def test_its_hypergradient_is_that_of_the_learning_rate():
    """d L / d phi at phi = 0 equals alpha d L / d alpha, here by central differences over alpha itself."""
    model, _, _, theta, _ = make_problem("plain", "sgd")
    batch = make_batch(jax.random.key(1))
    loss = adalfl_jax.ScaledTaskLoss()
    unit = optax.sgd(1.0)
    step = adalfl_jax.make_bilevel_step(model.apply, loss.apply, softmax_cross_entropy, optax.sgd(0.3), unit)
    phi = adalfl_jax.Phi.create(loss.init(jax.random.key(0)), unit)
    after = jax.jit(step)(theta, phi, batch)[1].params["log_scale"]

    @jax.jit
    def outer_loss(rate):
        task_step = adalfl_jax.make_task_step(model.apply, softmax_cross_entropy, optax.sgd(rate))
        params = task_step(theta, batch.inner)[0].params
        return softmax_cross_entropy(
            batch.outer.targets, model.apply(params, {}, batch.outer.inputs, train=True, rng_key=None)[0]
        )

    slope = (outer_loss(0.3 + 1e-6) - outer_loss(0.3 - 1e-6)) / 2e-6
    np.testing.assert_allclose(-after, 0.3 * slope, rtol=1e-6)


def test_an_unknown_task_loss_lists_the_known():
    with pytest.raises(ValueError, match=r"unknown task loss 'squared_eror'; did you mean 'squared_error'.*huber"):
        adalfl_jax.ScaledTaskLoss("squared_eror")
