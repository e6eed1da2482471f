"""Implicit estimators on a quadratic M_phi whose minimum, Hessian and remainder are known."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adalfl_jax
from adalfl_jax.hypergradient import (
    ESTIMATORS,
    ONE_INNER_STEP,
    BilevelProblem,
    ConjugateGradient,
    Neumann,
    make_estimator,
)
from adalfl_jax.hypergradient.problem import inner_and_outer_keys, inner_step, outer_gradient
from adalfl_jax.hypergradient.unrolled import run_inner_steps
from adalfl_jax.task_losses import softmax_cross_entropy, squared_error
from tests.problems import make_batch, make_problem

NUM_PARAMS = 6
EIGENVALUES = np.linspace(0.5, 2.0, NUM_PARAMS)
pytestmark = pytest.mark.usefixtures("float64")


def quadratic():
    """M = (theta - A phi)^T H (theta - A phi) / 2, so that theta* = A phi; L is the squared error of X theta."""
    keys = jax.random.split(jax.random.key(0), 5)
    basis, _ = jnp.linalg.qr(jax.random.normal(keys[0], (NUM_PARAMS, NUM_PARAMS)))
    hessian = basis @ jnp.diag(jnp.asarray(EIGENVALUES)) @ basis.T
    matrix, phi = jax.random.normal(keys[1], (NUM_PARAMS, 3)), jax.random.normal(keys[2], (3,))
    inputs, targets = jax.random.normal(keys[3], (7, NUM_PARAMS)), jax.random.normal(keys[4], (7, 1))

    def learned_loss(phi, targets, outputs, *, params):
        distance = params - matrix @ phi
        return distance @ hessian @ distance / 2

    def apply_fn(params, model_state, inputs, *, train, rng_key):
        return (inputs @ params)[:, None], model_state

    optimizer = optax.sgd(0.1)
    problem = BilevelProblem(apply_fn, learned_loss, squared_error, optimizer)
    theta = adalfl_jax.Theta.create(matrix @ phi, (), optimizer)  # where M is stationary
    batch = adalfl_jax.BilevelBatch((inputs, targets), (inputs, targets))
    task_gradient = jax.grad(lambda params: squared_error(targets, (inputs @ params)[:, None]))(theta.params)
    return problem, theta, phi, batch, hessian, matrix, task_gradient


def test_conjugate_gradients_give_the_exact_derivative_at_the_minimum():
    problem, theta, phi, batch, _, matrix, task_gradient = quadratic()
    result = ConjugateGradient(num_iterations=NUM_PARAMS, damping=0.0)(problem, theta, phi, batch)
    np.testing.assert_allclose(result.gradient, matrix.T @ task_gradient, rtol=1e-4)  # theta*(phi) = A phi
    np.testing.assert_allclose(result.theta.params, theta.params, rtol=1e-12)


def test_conjugate_gradients_of_a_gradient_whose_squares_vanish():
    """As of a model that has converged, where the Hessian vanishes too: v is the gradient over the damping."""

    def apply_fn(params, model_state, inputs, *, train, rng_key):
        return (inputs @ params)[:, None], model_state

    def learned_loss(phi, targets, outputs, *, params):
        return params @ phi

    def task_loss(targets, outputs):
        return jnp.float32(1e-18) * outputs.mean()

    optimizer, example = optax.sgd(0.1), (jnp.ones((2, 3), jnp.float32), jnp.zeros((2, 1), jnp.float32))
    problem = BilevelProblem(apply_fn, learned_loss, task_loss, optimizer)
    theta = adalfl_jax.Theta.create(jnp.ones(3, jnp.float32), (), optimizer)
    batch = adalfl_jax.BilevelBatch(example, example)
    result = ConjugateGradient(damping=0.01)(problem, theta, jnp.ones(3, jnp.float32), batch)
    np.testing.assert_allclose(result.gradient, np.full(3, -1e-16), rtol=1e-5)


@pytest.mark.parametrize("estimator", [ConjugateGradient(NUM_PARAMS, 0.3), Neumann(200, 0.4, 0.3)])
def test_damping_is_added_to_the_hessian(estimator):
    problem, theta, phi, batch, hessian, matrix, task_gradient = quadratic()
    result = estimator(problem, theta, phi, batch)
    inverse = jnp.linalg.inv(hessian + 0.3 * jnp.eye(NUM_PARAMS))
    np.testing.assert_allclose(result.gradient, matrix.T @ hessian @ inverse @ task_gradient, rtol=1e-4)


@pytest.mark.parametrize("num_iterations", [1, 5, 20])
def test_the_bias_of_the_neumann_series_is_its_remainder(num_iterations):
    problem, theta, phi, batch, hessian, matrix, task_gradient = quadratic()
    gradient = Neumann(num_iterations, 0.4, damping=0.0)(problem, theta, phi, batch).gradient
    remainder = jnp.linalg.matrix_power(jnp.eye(NUM_PARAMS) - 0.4 * hessian, num_iterations)
    np.testing.assert_allclose(matrix.T @ task_gradient - gradient, matrix.T @ remainder @ task_gradient, rtol=1e-9)


@pytest.mark.parametrize("name", ["neumann", "conjugate_gradient"])
def test_the_bias_is_of_the_order_of_the_distance_from_the_minimum(name):
    """With a cubic term beside the quadratic one the Hessian changes on the way to the minimum."""
    problem, theta, phi, batch, _, matrix, _ = quadratic()
    still, quadratic_loss = optax.set_to_zero(), problem.learned_loss_fn  # theta stays where it is put

    def learned_loss(phi, targets, outputs, *, params):
        distance = params - matrix @ phi
        return quadratic_loss(phi, targets, outputs, params=params) + (distance**3).sum()

    problem = problem._replace(learned_loss_fn=learned_loss, inner_optimizer=still)
    settings = {"num_iterations": 40, "damping": 0.0} | ({"step_size": 0.4} if name == "neumann" else {})
    estimator = jax.jit(lambda theta: make_estimator(name, **settings)(problem, theta, phi, batch).gradient)
    at_minimum, far, near = (
        estimator(theta._replace(params=theta.params + distance, opt_state=still.init(theta.params)))
        for distance in (0.0, 2e-3, 1e-3)
    )
    np.testing.assert_allclose((far - at_minimum) / (near - at_minimum), 2.0, rtol=0.05)


def test_k_inner_steps_lead_to_the_point_where_the_theorem_is_applied():
    model, optimizer, loss, theta, phi_params = make_problem("batch_norm", "sgd")
    problem = BilevelProblem(model.apply, loss.apply, softmax_cross_entropy, optimizer)
    batch = make_batch(jax.random.key(1), num_inner_steps=3)
    result = jax.jit(lambda: Neumann(3, 0.01)(problem, theta, phi_params, batch))()
    expected = jax.jit(lambda: make_estimator("unrolled")(problem, theta, phi_params, batch))()
    chex.assert_trees_all_close(result._replace(gradient=()), expected._replace(gradient=()), rtol=1e-10, atol=1e-15)
    chex.assert_tree_all_finite(result.gradient)


def test_after_k_steps_the_theorem_is_of_the_last_batch_and_its_key():
    model, optimizer, loss, theta, phi_params = make_problem("dropout", "sgd")
    problem = BilevelProblem(model.apply, loss.apply, softmax_cross_entropy, optimizer)
    batch = make_batch(jax.random.key(1), num_inner_steps=3)
    inner_key, outer_key = inner_and_outer_keys(batch.rng_key)
    (inputs, targets), last_key = (leaf[-1] for leaf in batch.inner), jax.random.split(inner_key, 3)[-1]

    def expected():
        end, _ = run_inner_steps(problem, theta, phi_params, batch, inner_key)
        _, task_gradient = outer_gradient(problem, end.params, end.model_state, batch.outer, outer_key)

        def gradient_of_phi(params):
            outputs, _ = model.apply(params, end.model_state, inputs, train=True, rng_key=last_key)
            return jax.grad(loss.apply)(phi_params, targets, outputs)

        _, mixed = jax.jvp(gradient_of_phi, (end.params,), (task_gradient,))
        return jax.tree.map(lambda leaf: -0.01 * leaf, mixed)  # one term of the series: the step size times it

    found = jax.jit(lambda: Neumann(1, 0.01)(problem, theta, phi_params, batch).gradient)()
    chex.assert_trees_all_close(found, jax.jit(expected)(), rtol=1e-9, atol=1e-15)


def test_conjugate_gradients_take_as_many_products_as_they_are_given():
    problem, theta, phi, batch, hessian, matrix, task_gradient = quadratic()
    gradient = ConjugateGradient(num_iterations=1, damping=0.0)(problem, theta, phi, batch).gradient
    along = (task_gradient @ task_gradient) / (task_gradient @ hessian @ task_gradient)  # a step of steepest descent
    np.testing.assert_allclose(gradient, matrix.T @ hessian @ (along * task_gradient), rtol=1e-9)


@pytest.mark.parametrize("name", sorted(set(ESTIMATORS) - set(ONE_INNER_STEP)))
def test_the_inner_loss_is_the_mean_over_the_steps(name):
    model, optimizer, loss, theta, phi_params = make_problem()
    problem = BilevelProblem(model.apply, loss.apply, softmax_cross_entropy, optimizer)
    batch = make_batch(jax.random.key(3), 3)
    losses, state = [], theta
    for inputs, targets in zip(*batch.inner, strict=True):
        state, inner_loss = inner_step(problem, state, phi_params, (inputs, targets), None)
        losses.append(float(inner_loss))
    found = jax.jit(lambda: make_estimator(name)(problem, theta, phi_params, batch))()
    assert len(set(losses)) == 3
    assert float(found.inner_loss) == pytest.approx(np.mean(losses), rel=1e-9)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("neumann", {"num_iterations": 0}, "num_iterations must be .* got 0"),
        ("conjugate_gradient", {"num_iterations": 0}, "num_iterations must be .* got 0"),
        ("neumann", {"step_size": 0.0}, "step_size must be a number above 0; got 0.0"),
        ("conjugate_gradient", {"damping": -1.0}, "damping must be a number of at least 0; got -1.0"),
        ("neumann", {"num_terms": 3}, "unknown setting of 'neumann' 'num_terms'.*damping, num_iterations, step_size"),
        ("forward", {"damping": 1.0}, "hypergradient 'forward' has no settings; got damping"),
    ],
)
def test_settings_out_of_range_are_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        make_estimator(name, **settings)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("checkpointed", "conjugate_gradient") else [pytest.mark.slow])
        for name in sorted(set(ESTIMATORS) - set(ONE_INNER_STEP))
    ],
)
def test_the_steps_of_a_pytree_of_inputs_are_those_of_an_array(name):
    model, optimizer, loss, theta, phi_params = make_problem()
    batch = make_batch(jax.random.key(3), 3)
    outer = optax.adam(1e-2)

    def gradient_norm(apply_fn, wrap):
        step = jax.jit(
            adalfl_jax.make_bilevel_step(
                apply_fn, loss.apply, softmax_cross_entropy, optimizer, outer, hypergradient=name
            )
        )
        parts = [(wrap(part.inputs), part.targets) for part in batch[:2]]
        phi = adalfl_jax.Phi.create(phi_params, outer)
        return float(step(theta, phi, adalfl_jax.BilevelBatch(*parts, batch.rng_key))[2].hypergradient_norm)

    def of_first(params, model_state, inputs, /, **options):
        return model.apply(params, model_state, jax.tree.leaves(inputs)[0], **options)

    expected = gradient_norm(model.apply, lambda inputs: inputs)
    assert expected > 0
    for wrap in (lambda inputs: (inputs,), lambda inputs: {"a": inputs, "b": -inputs}):
        assert gradient_norm(of_first, wrap) == pytest.approx(expected, rel=1e-6)
