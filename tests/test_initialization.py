"""Algorithm 1: one scan over fresh models."""

import contextlib

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import adalfl_jax
from adalfl_jax.hypergradient import ESTIMATORS
from adalfl_jax.task_losses import softmax_cross_entropy
from adalfl_jax.types import BilevelMetrics
from tests.problems import make_batch, make_model, make_problem

pytestmark = pytest.mark.usefixtures("float64")


def make_offline(num_inner_steps=None, model="batch_norm"):
    model, inner, loss, _, phi_params = make_problem(model, "momentum")
    outer = optax.adam(1e-2)
    hypergradient = "forward" if num_inner_steps is None else "unrolled"
    bilevel_step = adalfl_jax.make_bilevel_step(
        model.apply, loss.apply, softmax_cross_entropy, inner, outer, hypergradient=hypergradient
    )
    step = adalfl_jax.make_offline_step(bilevel_step, model.init, inner)
    batches = jax.vmap(lambda key: make_batch(key, num_inner_steps))(jax.random.split(jax.random.key(5), 4))
    return step, adalfl_jax.Phi.create(phi_params, outer), batches, (bilevel_step, model, inner)


@pytest.mark.parametrize(("num_inner_steps", "model"), [(None, "batch_norm"), (2, "batch_norm"), (None, "dropout")])
def test_the_scan_equals_a_loop_over_fresh_models(num_inner_steps, model):
    step, phi, batches, (bilevel_step, model, inner) = make_offline(num_inner_steps, model)
    scanned, metrics = jax.jit(adalfl_jax.initialize_offline, static_argnums=0)(step, phi, batches)
    for index in range(4):
        batch = jax.tree.map(lambda leaf, i=index: leaf[i], batches)
        init_key, step_key = jax.random.split(batch.rng_key)
        theta = adalfl_jax.Theta.create(*jax.jit(model.init)(init_key), inner)
        _, phi, expected = jax.jit(bilevel_step)(theta, phi, batch._replace(rng_key=step_key))
        # Models are drawn in single precision, and its last bit depends on how that is compiled.
        chex.assert_trees_all_close(jax.tree.map(lambda leaf, i=index: leaf[i], metrics), expected, rtol=1e-6)
    chex.assert_trees_all_close(scanned, phi, rtol=1e-6, atol=1e-9)


def test_a_batch_may_be_drawn_when_it_is_due():
    step, phi, batches, (bilevel_step, model, inner) = make_offline(model="plain")
    at_once = jax.jit(adalfl_jax.initialize_offline, static_argnums=0)(step, phi, batches)
    step = adalfl_jax.make_offline_step(bilevel_step, model.init, inner, draw_batch=make_batch)
    when_due = adalfl_jax.initialize_offline(step, phi, jax.random.split(jax.random.key(5), 4))
    chex.assert_trees_all_close(when_due, at_once, rtol=1e-6, atol=1e-9)


def test_what_is_no_batch_is_told_of():
    step, phi, *_ = make_offline(model="plain")
    with pytest.raises(ValueError, match=r"batch must be an adalfl_jax\.BilevelBatch"):
        adalfl_jax.initialize_offline(step, phi, jax.random.split(jax.random.key(5), 4))


def test_every_step_draws_another_theta():
    step, phi, batches, _ = make_offline(model="plain")
    same = jax.tree.map(lambda leaf: leaf[jnp.zeros(4, int)], batches)
    keys = jax.random.split(jax.random.key(8), 4)
    _, metrics = jax.jit(jax.vmap(step, in_axes=(None, 0)))(phi, same._replace(rng_key=keys))
    assert len(jnp.unique(metrics.inner_loss)) == 4


def test_a_phase_that_learns_nothing_is_told():
    model, _, loss, _, phi_params = make_problem("plain", "sgd")
    outer = optax.adam(1e-2)
    _, phi, batches, _ = make_offline(model="plain")
    for rate, learns in ((0.1, True), (optax.linear_schedule(0.0, 0.1, 10), False)):
        inner = optax.sgd(rate)
        bilevel_step = adalfl_jax.make_bilevel_step(model.apply, loss.apply, softmax_cross_entropy, inner, outer)
        offline_step = adalfl_jax.make_offline_step(bilevel_step, model.init, inner)
        told = contextlib.nullcontext() if learns else pytest.warns(UserWarning, match="was 0 at 100% of the steps")
        with told:
            after, _ = adalfl_jax.initialize_offline(offline_step, phi, batches)
        is_same = jax.tree.map(lambda new, old: bool((new == old).all()), after.params, phi_params)
        assert all(jax.tree.leaves(is_same)) != learns


@pytest.mark.parametrize(("norms", "is_told"), [((0.0, 2.0, 0.0, 1.0), False), ((0.0, 0.0, 0.0, 1.0), True)])
def test_a_phase_is_told_of_where_more_than_half_its_steps_learn_nothing(norms, is_told):
    def step(phi, norm):
        return phi, BilevelMetrics(norm, norm, norm)

    with pytest.warns(UserWarning, match="was 0 at 75%") if is_told else contextlib.nullcontext():
        adalfl_jax.initialize_offline(step, adalfl_jax.Phi.create(jnp.ones(2), optax.sgd(1.0)), jnp.array(norms))


def test_a_step_that_leaves_most_of_the_phase_out_is_told():
    model, inner, loss, *_ = make_problem("plain", "sgd")
    bilevel_step = adalfl_jax.make_bilevel_step(
        model.apply, loss.apply, softmax_cross_entropy, inner, optax.adam(1e-2), outer_every=4
    )
    _, phi, batches, _ = make_offline(model="plain")
    step = adalfl_jax.make_offline_step(bilevel_step, model.init, inner)
    with pytest.warns(UserWarning, match=r"was 0 at 75% of the steps .* or the bilevel step be one with outer_every"):
        adalfl_jax.initialize_offline(step, phi, batches._replace(step=jnp.arange(4)))


def test_a_phase_that_loses_phi_is_told():
    step, phi, batches, _ = make_offline(model="plain")
    inputs = batches.inner.inputs.at[2].set(jnp.nan)
    with pytest.warns(UserWarning, match="the meta-gradient of step 2 of the offline phase is no finite number"):
        adalfl_jax.initialize_offline(step, phi, batches._replace(inner=batches.inner._replace(inputs=inputs)))


def test_the_offline_phase_needs_a_key():
    step, phi, batches, _ = make_offline()
    batch = jax.tree.map(lambda leaf: leaf[0], batches)
    for given, message in ((None, r"from batch.rng_key; got None"), (0, r"batch.rng_key must be one key.*got 0")):
        with pytest.raises(ValueError, match=message):
            step(phi, batch._replace(rng_key=given))


def test_batches_of_the_offline_phase_share_their_leading_axis():
    step, phi, batches, _ = make_offline()
    for key in (jax.random.key(0), jax.random.split(jax.random.key(0), 3)):
        with pytest.raises(ValueError, match=r"every array of batches, rng_key too, has the same leading axis S_init"):
            adalfl_jax.initialize_offline(step, phi, batches._replace(rng_key=key))


def test_the_offline_phase_lowers_the_loss_one_step_after_a_fresh_start():
    """Trained on one distribution of batches and judged on models it has never seen."""
    model = make_model("plain")
    loss, inner, outer = adalfl_jax.LossNetwork(hidden_sizes=(8,)), optax.sgd(0.3), optax.adam(1e-2)
    bilevel_step = adalfl_jax.make_bilevel_step(model.apply, loss.apply, softmax_cross_entropy, inner, outer)
    step = adalfl_jax.make_offline_step(bilevel_step, model.init, inner)
    centers = jax.random.normal(jax.random.key(0), (3, 5)) * 2

    def draw(key):
        label_key, noise_key, step_key = jax.random.split(key, 3)
        labels = jax.random.randint(label_key, (2, 16), 0, 3)
        inputs = centers[labels] + 0.3 * jax.random.normal(noise_key, (2, 16, 5))
        return adalfl_jax.BilevelBatch((inputs[0], labels[0]), (inputs[1], labels[1]), step_key)

    batches = jax.vmap(draw)(jax.random.split(jax.random.key(1), 400))
    phi = adalfl_jax.Phi.create(loss.init(jax.random.key(2)), outer)
    _, metrics = jax.jit(adalfl_jax.initialize_offline, static_argnums=0)(step, phi, batches)
    assert metrics.outer_loss[-50:].mean() < 0.8 * metrics.outer_loss[:50].mean()


def remembering(problem, theta, phi_params, batch, carry):
    """An estimator of a user's own that remembers a number."""
    result = ESTIMATORS["forward"](problem, theta, phi_params, batch)
    return result._replace(carry=jnp.ones(()))


@pytest.mark.parametrize(
    "options", [{"pipelined": True}, {"hypergradient": "truncated"}, {"hypergradient": remembering}]
)
def test_a_step_that_remembers_theta_is_refused(options):
    _, phi, batches, (_, model, inner) = make_offline()
    loss, outer = adalfl_jax.LossNetwork(hidden_sizes=(4, 4)), optax.adam(1e-2)
    bilevel_step = adalfl_jax.make_bilevel_step(model.apply, loss.apply, softmax_cross_entropy, inner, outer, **options)
    step = adalfl_jax.make_offline_step(bilevel_step, model.init, inner)
    with pytest.raises(ValueError, match="the offline phase forgets theta at every step"):
        adalfl_jax.initialize_offline(step, phi, batches)


@pytest.mark.parametrize("made", [jnp.ones((4, 3)), {"w": jnp.ones(3), "b": jnp.ones(3)}, (1.0, (), ())])
def test_a_model_is_made_of_parameters_and_state(made):
    loss, inner, outer = adalfl_jax.LossNetwork(hidden_sizes=(4,)), optax.sgd(0.1), optax.adam(1e-2)
    step = adalfl_jax.make_bilevel_step(
        lambda params, model_state, inputs, *, train, rng_key: (inputs @ params, model_state),
        loss.apply,
        adalfl_jax.task_losses.softmax_cross_entropy,
        inner,
        outer,
    )
    batch = (jnp.ones((8, 4)), jnp.zeros(8, int))
    phi = adalfl_jax.Phi.create(loss.init(jax.random.key(0)), outer)
    with pytest.raises(ValueError, match=r"init_fn must return two things, \(params, model_state\)"):
        adalfl_jax.make_offline_step(step, lambda _: made, inner)(
            phi, adalfl_jax.BilevelBatch(batch, batch, jax.random.key(1))
        )
