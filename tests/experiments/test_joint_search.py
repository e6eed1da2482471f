"""Loss and architecture in one phi: the meta-gradient of both, and a training of a few steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import adalfl_jax
from adalfl_jax import data
from adalfl_jax.hypergradient import BilevelProblem
from adalfl_jax.models import make_model
from adalfl_jax.task_losses import softmax_cross_entropy
from experiments import joint_search as program
from tests.hypergradient.reference import assert_relative, finite_differences
from tests.problems import NUM_INPUTS, NUM_OUTPUTS, make_batch

LOSS = adalfl_jax.LossNetwork(hidden_sizes=(3,))


@pytest.mark.usefixtures("float64")
def test_the_gradient_of_loss_and_architecture_is_exact():
    """The architecture is in the inner and in the outer pass, and counts in both."""
    model = make_model("mlp", (NUM_INPUTS,), NUM_OUTPUTS, hidden_sizes=(6,))
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), model.init(jax.random.key(0))[0])
    optimizer, batch = optax.sgd(0.3), make_batch(jax.random.key(1))
    theta = adalfl_jax.Theta.create(params, {}, optimizer)
    phi_params = {"loss": LOSS.init(jax.random.key(2)), "architecture": 0.1 * jnp.arange(5.0)}

    def outer_loss(phi):
        f = functools.partial(
            program.mixed_mlp, model_state={}, train=True, rng_key=None, architecture=phi["architecture"]
        )

        def inner(params):
            return LOSS.apply(phi["loss"], batch.inner.targets, f(params, inputs=batch.inner.inputs)[0])

        after = jax.tree.map(lambda p, g: p - 0.3 * g, theta.params, jax.grad(inner)(theta.params))
        return softmax_cross_entropy(batch.outer.targets, f(after, inputs=batch.outer.inputs)[0])

    problem = BilevelProblem(program.mixed_mlp, LOSS.apply, softmax_cross_entropy, optimizer)
    result = jax.jit(lambda *state: program.through_architecture(problem, *state))(theta, phi_params, batch)
    assert_relative(ravel_pytree(result.gradient)[0], finite_differences(outer_loss, phi_params))


@pytest.fixture
def training(monkeypatch):
    monkeypatch.setattr(program, "NUM_POINTS", 2)
    monkeypatch.setattr(program, "NETWORK", LOSS)
    dataset = data.random_dataset("digits", data.load_spec("digits"), 60)
    even = jnp.zeros(len(program.ACTIVATIONS))
    return program.make_training(dataset, 4, learns=("loss", "architecture"), start=even)


def test_a_training_has_errors_at_each_point_and_the_weights_of_the_activations(training):
    valid, test, weights = jax.eval_shape(training, jnp.arange(3), 0.1)  # traced, and not compiled
    assert valid.shape == test.shape == (3, 2)
    assert weights.shape == (3, len(program.ACTIVATIONS))


@pytest.mark.slow
def test_of_phi_moves_what_is_to_learn(training):
    _, _, weights = training(jnp.arange(2), 0.1)
    np.testing.assert_allclose(weights.sum(axis=1), 1.0, rtol=1e-6)
    assert (weights != 0.2).all()
