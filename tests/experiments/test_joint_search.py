"""Loss and architecture in one phi: the meta-gradient of both, and a training of a few steps."""

import dataclasses
import functools
import importlib
import types

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


def test_inner_and_outer_batches_and_those_of_two_models_are_drawn_apart(monkeypatch):
    seen = []

    def make_step(*_, **settings):
        def step(theta, phi, batch):
            jax.debug.callback(
                lambda *drawn: seen.append([*map(np.asarray, drawn)]),
                batch.inner.inputs[:, 0],
                batch.outer.inputs[:, 0],
            )
            return theta, phi, {}

        return step

    monkeypatch.setattr(program, "NUM_POINTS", 2)
    monkeypatch.setattr(adalfl_jax, "make_bilevel_step", make_step)
    dataset = data.random_dataset("digits", data.load_spec("digits"), 200)
    numbered = jnp.broadcast_to(jnp.arange(200.0)[:, None, None, None], dataset.train.inputs.shape)
    dataset = dataclasses.replace(dataset, train=dataset.train._replace(inputs=numbered))
    even = jnp.zeros(len(program.ACTIVATIONS))
    program.make_training(dataset, 4, learns=(), start=even)(jnp.arange(2), 0.1)
    jax.effects_barrier()
    num_models, num_steps = 2, 4
    assert len({frozenset(part.flat) for drawn in seen for part in drawn}) == 2 * num_models * num_steps


@pytest.mark.slow
def test_of_phi_moves_what_is_to_learn(training):
    _, _, weights = training(jnp.arange(2), 0.1)
    np.testing.assert_allclose(weights.sum(axis=1), 1.0, rtol=1e-6)
    assert (weights != 0.2).all()


def test_rates_are_tuned_by_validation_and_activations_by_themselves_are_pure(monkeypatch):
    starts, errors = (
        [],
        np.array([[0.4, 0.3]]),
    )

    def training(dataset, num_steps, *, learns, start):
        starts.append(start)
        return lambda seeds, rate: (errors, errors + 0.5, np.full((1, len(program.ACTIVATIONS)), 0.2))

    monkeypatch.setattr(program, "make_training", training)
    trials = program.make_trials(None, 4)
    curves = trials["joint"].run({"alpha": 0.1}, [0])
    assert (curves.valid.tolist(), curves.scores.tolist(), curves.values.tolist()) == ([0.3], [0.8], [[0.9, 0.8]])
    for index in range(len(program.ACTIVATIONS)):
        assert jax.nn.softmax(starts[index])[index] > 0.999


@pytest.mark.parametrize(
    ("name", "largest_is_best", "settings"),
    [("joint_search", False, {"num_steps": 7}), ("policy_gradient", True, {"num_iterations": 7})],
)
def test_programs_of_trials_judge_on_other_seeds_than_they_tune_on(name, largest_is_best, settings, monkeypatch):
    program, given = importlib.import_module(f"experiments.{name}"), {}
    monkeypatch.setattr(program, "make_trials", lambda *_: {})
    monkeypatch.setattr(program, "compare_trials", lambda trials, reference, **named: given.update(named))
    monkeypatch.setattr(program, "publish_trials", lambda name, compare, **named: compare(None))
    monkeypatch.setattr(program, "cartpole", lambda: None, raising=False)
    for flag, value in (("_SEEDS", 3), ("_STEPS", 7), ("_ITERATIONS", 7)):
        monkeypatch.setattr(program, flag, types.SimpleNamespace(value=value), raising=False)
    program.main([name])
    assert (given["seeds"], given["largest_is_best"]) == (range(100, 103), largest_is_best)
    assert set(given["seeds"]).isdisjoint(given["tuning_seeds"])
    assert settings.items() <= given["settings"].items()
