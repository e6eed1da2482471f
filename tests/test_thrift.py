"""Meta-gradients on a part of the batch, and phi updated at some steps alone."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import adalfl_jax
from adalfl_jax.hypergradient import BilevelProblem, MetaBatch, make_estimator
from adalfl_jax.models import batch_statistics
from adalfl_jax.task_losses import softmax_cross_entropy
from tests.problems import BATCH_SIZE, make_batch, make_problem

ONE_STEP = ("forward", "recompute", "finite_difference", "central_difference")


def make(model_name="plain", optimizer_name="sgd"):
    model, optimizer, loss, theta, phi_params = make_problem(model_name, optimizer_name)
    outer = optax.adam(0.01)
    functions = (model.apply, loss.apply, softmax_cross_entropy, optimizer, outer)
    return functions, theta, adalfl_jax.Phi.create(phi_params, outer)


def hypergradient(functions, theta, phi, batch, estimator="forward", meta_batch=None):
    problem = BilevelProblem(*functions[:4], meta_batch)
    return make_estimator(estimator)(problem, theta, phi.params, batch)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("estimator", ONE_STEP)
def test_a_part_of_the_batch_gives_the_gradient_unbiased(estimator):
    """The mean over all rotations of both batches, in which every example is in the part equally often."""
    functions, theta, phi = make("plain", "nesterov")
    batch = make_batch(jax.random.key(1))

    def rotated(inner, outer):
        roll = [
            jax.tree.map(lambda leaf, by=by: jnp.roll(leaf, by, 0), part)
            for by, part in ((inner, batch.inner), (outer, batch.outer))
        ]
        return hypergradient(functions, theta, phi, adalfl_jax.BilevelBatch(*roll), estimator, MetaBatch(0.25))

    every = jnp.arange(BATCH_SIZE)
    parts = jax.jit(jax.vmap(jax.vmap(rotated, (None, 0)), (0, None)))(every, every)
    whole = jax.jit(lambda: hypergradient(functions, theta, phi, batch, estimator))()
    mean = ravel_pytree(jax.tree.map(lambda leaf: leaf.mean(axis=(0, 1)), parts.gradient))[0]
    expected = ravel_pytree(whole.gradient)[0]
    tolerance = {"finite_difference": 1e-5}.get(estimator, 1e-7)
    assert jnp.linalg.norm(mean - expected) < tolerance * jnp.linalg.norm(expected)
    single = ravel_pytree(jax.tree.map(lambda leaf: leaf[0, 0], parts.gradient))[0]
    assert jnp.linalg.norm(single - expected) > 0.05 * jnp.linalg.norm(expected)


@pytest.mark.parametrize("model_name", ["plain", "batch_norm"])
def test_theta_is_updated_on_the_whole_batch(model_name):
    functions, theta, phi = make(model_name, "momentum")
    batch = make_batch(jax.random.key(1))
    statistics_fn = batch_statistics if model_name == "batch_norm" else None
    thetas = [
        jax.jit(adalfl_jax.make_bilevel_step(*functions, **options))(theta, phi, batch)[0]
        for options in ({}, {"meta_batch_fraction": 0.25, "meta_statistics_fn": statistics_fn})
    ]
    chex.assert_trees_all_close(*thetas, rtol=1e-6)


@pytest.mark.usefixtures("float64")
def test_batch_statistics_are_those_of_the_batch():
    functions, theta, phi = make("batch_norm")
    seen = {}

    def statistics_fn(before, after):
        seen["statistics"] = batch_statistics(before, after, momentum=0.99)  # of the tests' model
        return seen["statistics"]

    batch = make_batch(jax.random.key(1))
    adalfl_jax.make_bilevel_step(*functions, meta_batch_fraction=0.5, meta_statistics_fn=statistics_fn)(
        theta, phi, batch
    )
    hidden = batch.inner.inputs @ theta.params["hidden"]["kernel"] + theta.params["hidden"]["bias"][None]
    np.testing.assert_allclose(seen["statistics"]["norm"]["mean"], hidden.mean(axis=0), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(seen["statistics"]["norm"]["var"], hidden.var(axis=0), rtol=1e-9)


@pytest.mark.usefixtures("float64")
def test_phi_learns_at_every_nth_step_alone():
    functions, theta, phi = make("batch_norm", "momentum")
    plain = jax.jit(adalfl_jax.make_bilevel_step(*functions))
    step = jax.jit(adalfl_jax.make_bilevel_step(*functions, outer_every=3))
    state, reference = (theta, phi), (theta, phi)
    for number, key in enumerate(jax.random.split(jax.random.key(2), 6)):
        batch = make_batch(key)
        before = state[1]
        *state, metrics = step(*state, batch._replace(step=number))
        theta_next, phi_next, plain_metrics = plain(*reference, batch)
        reference = (theta_next, phi_next if number in (2, 5) else reference[1])
        chex.assert_trees_all_close(tuple(state), reference, rtol=1e-12)
        np.testing.assert_allclose(metrics.inner_loss, plain_metrics.inner_loss, rtol=1e-12)
        if number in (2, 5):
            chex.assert_trees_all_close(metrics, plain_metrics, rtol=1e-12)
        else:
            chex.assert_trees_all_equal(state[1], before)
            assert metrics.hypergradient_norm == 0


def test_steps_in_between_pay_for_no_second_model_under_seeds_and_scan():
    """An unmapped step number keeps the branch a branch: the program holds a conditional, not both and a select."""
    functions, theta, phi = make()
    step = adalfl_jax.make_bilevel_step(*functions, outer_every=2)
    batch = make_batch(jax.random.key(1))
    seeds = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), (theta, phi))

    def run(seeds, numbers):
        def one_seed(theta, phi):
            def body(state, number):
                *state, metrics = step(*state, batch._replace(step=number))
                return tuple(state), metrics

            return jax.lax.scan(body, (theta, phi), numbers)

        return jax.vmap(one_seed)(*seeds)

    assert "cond[" in str(jax.make_jaxpr(run)(seeds, jnp.arange(4)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"meta_batch_fraction": 0.0}, r"meta_batch_fraction must be a number in \(0, 1\]; got 0.0"),
        ({"meta_batch_fraction": 1.5}, r"meta_batch_fraction must be a number in \(0, 1\]; got 1.5"),
        ({"meta_batch_fraction": 0.5, "hypergradient": "unrolled"}, r"meta_batch_fraction is for .* got 'unrolled'"),
        ({"meta_statistics_fn": batch_statistics}, r"for a meta_batch_fraction below 1"),
        ({"outer_every": 0}, r"outer_every must be a whole number of at least 1; got 0"),
        ({"outer_every": 2, "hypergradient": "truncated"}, r"'truncated' has to see every step.*outer_every = 2"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    functions, _, _ = make()
    with pytest.raises(ValueError, match=message):
        adalfl_jax.make_bilevel_step(*functions, **options)


def test_counting_needs_the_number_of_the_step():
    functions, theta, phi = make()
    step = adalfl_jax.make_bilevel_step(*functions, outer_every=2)
    with pytest.raises(ValueError, match=r"outer_every = 2 goes by the number of the step.*got None"):
        step(theta, phi, make_batch(jax.random.key(1)))
    with pytest.raises(ValueError, match=r"drop the leading axis K"):
        step(theta, phi, make_batch(jax.random.key(1), num_inner_steps=2)._replace(step=0))
