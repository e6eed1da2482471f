"""Evolution strategies on outer losses whose smoothed gradient is known; means over many draws, within 5 errors."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adalfl_jax
from adalfl_jax.hypergradient import BilevelProblem, EvolutionStrategies, PersistentEvolutionStrategies
from adalfl_jax.task_losses import softmax_cross_entropy
from tests.problems import make_batch, make_problem

pytestmark = pytest.mark.usefixtures("float64")


def accumulator(power):
    """theta' = theta - phi, and L = theta'^power: a loss that remembers every phi since the start."""

    def learned_loss(phi, targets, outputs, *, params):
        return phi * params

    def apply_fn(params, model_state, inputs, *, train, rng_key):
        return params * jnp.ones((1, 1)), model_state

    optimizer = optax.sgd(1.0)
    problem = BilevelProblem(apply_fn, learned_loss, lambda _, outputs: outputs[0, 0] ** power, optimizer)
    example = (jnp.ones((1, 1)), jnp.ones((1, 1)))
    theta = adalfl_jax.Theta.create(jnp.zeros(()), (), optimizer)
    return problem, theta, lambda key: adalfl_jax.BilevelBatch(example, example, key)


def assert_mean(samples, expected):
    error = samples.std(ddof=1) / np.sqrt(len(samples))
    assert error < 0.1 * abs(expected)
    assert abs(samples.mean() - expected) < 5 * error


@pytest.mark.parametrize("estimator", [EvolutionStrategies(2), PersistentEvolutionStrategies(2)])
def test_a_loss_without_parameters_has_an_empty_gradient(estimator):
    model, optimizer, _, theta, _ = make_problem()
    problem = BilevelProblem(
        model.apply, lambda _, *given: softmax_cross_entropy(*given), softmax_cross_entropy, optimizer
    )
    result = jax.jit(lambda batch: estimator(problem, theta, {}, batch))(make_batch(jax.random.key(0)))
    assert result.gradient == {}
    assert jnp.isfinite(result.outer_loss)


@pytest.mark.parametrize("sigma", [0.1, 1.0])
def test_the_gradient_is_that_of_the_smoothed_loss_biased_by_sigma_squared(sigma):
    """L = -phi^3 at the new theta, whose mean under a Gaussian has the slope -3 (phi^2 + sigma^2)."""
    problem, theta, batch = accumulator(power=3)
    estimator = EvolutionStrategies(num_pairs=1, sigma=sigma)
    keys = jax.random.split(jax.random.key(0), 20_000)
    samples = jax.jit(jax.vmap(lambda key: estimator(problem, theta, jnp.asarray(0.5), batch(key)).gradient))(keys)
    assert_mean(np.asarray(samples), -3 * (0.5**2 + sigma**2))


def test_more_pairs_are_the_mean_of_as_many_draws():
    problem, theta, batch = accumulator(power=3)
    keys = jax.random.split(jax.random.key(0), 2000)
    variances = []
    for num_pairs in (1, 16):
        estimator = EvolutionStrategies(num_pairs, sigma=0.1)
        samples = jax.jit(
            jax.vmap(lambda key, estimator=estimator: estimator(problem, theta, jnp.asarray(0.5), batch(key)).gradient)
        )(keys)
        variances.append(samples.var())
    np.testing.assert_allclose(variances[0] / variances[1], 16, rtol=0.25)


@pytest.mark.parametrize(("horizon", "expected"), [(4, (2, 8, 18, 32, 10)), (1, (2, 4, 6, 8, 10))])
def test_persistent_particles_see_the_whole_horizon(horizon, expected):
    """L = theta^2 with theta_t = -t phi, so dL/dphi = 2 t^2 phi; one step alone gives 2 t phi, and restarts forget."""
    problem, theta, batch = accumulator(power=2)
    estimator = PersistentEvolutionStrategies(num_pairs=1, sigma=0.1, horizon=horizon)

    def run(key):
        def step(state, key):
            result = estimator(problem, state[0], jnp.asarray(1.0), batch(key), state[1])
            return (result.theta, result.carry), result.gradient

        first = estimator(problem, theta, jnp.asarray(1.0), batch(key))
        _, rest = jax.lax.scan(step, (first.theta, first.carry), jax.random.split(key, 4))
        return jnp.concatenate([first.gradient[None], rest])

    samples = np.asarray(jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 20_000)))
    for step, value in enumerate(expected):
        assert_mean(samples[:, step], value)


@pytest.mark.slow
def test_with_a_horizon_of_one_they_are_evolution_strategies():
    model, optimizer, loss, theta, phi_params = make_problem("dropout", "momentum")
    problem = BilevelProblem(model.apply, loss.apply, softmax_cross_entropy, optimizer)
    batch = make_batch(jax.random.key(1), num_inner_steps=2)
    results = [
        jax.jit(lambda estimator=estimator: estimator(problem, theta, phi_params, batch)._replace(carry=()))()
        for estimator in (EvolutionStrategies(3, 0.1), PersistentEvolutionStrategies(3, 0.1, horizon=1))
    ]
    chex.assert_trees_all_close(*results, rtol=1e-10)
    unrolled = jax.jit(lambda: adalfl_jax.make_estimator("unrolled")(problem, theta, phi_params, batch))()
    chex.assert_trees_all_close(results[0]._replace(gradient=()), unrolled._replace(gradient=()), rtol=1e-10)


def test_a_primed_carry_starts_particles_at_theta():
    model, optimizer, loss, theta, phi_params = make_problem("plain", "momentum")
    outer = optax.sgd(0.1)
    step = adalfl_jax.make_bilevel_step(
        model.apply,
        loss.apply,
        softmax_cross_entropy,
        optimizer,
        outer,
        hypergradient=PersistentEvolutionStrategies(2, 0.1, horizon=3),
    )
    phi, batch = adalfl_jax.Phi.create(phi_params, outer), make_batch(jax.random.key(1))
    primed = adalfl_jax.prime(step, theta, phi, batch)
    chex.assert_trees_all_close(jax.jit(step)(theta, primed, batch), jax.jit(step)(theta, phi, batch), rtol=1e-12)


@pytest.mark.parametrize("family", [EvolutionStrategies, PersistentEvolutionStrategies])
def test_what_cannot_be_drawn_is_refused(family):
    problem, theta, batch = accumulator(power=2)
    with pytest.raises(ValueError, match=r"draws displacements of phi from batch.rng_key; got None"):
        family()(problem, theta, jnp.asarray(1.0), batch(None))
    with pytest.raises(ValueError, match="num_pairs must be a whole number of at least 1; got 0"):
        family(num_pairs=0)
    with pytest.raises(ValueError, match=r"sigma must be a number above 0; got 0\.0"):
        family(sigma=0.0)
    with pytest.raises(ValueError, match="horizon must be a whole number of at least 1; got 0"):
        PersistentEvolutionStrategies(horizon=0)
