"""The sliding window against a gradient through the same steps written out."""

import functools

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import adalfl_jax
from adalfl_jax.hypergradient import BilevelProblem, Truncated
from adalfl_jax.hypergradient.problem import inner_step, outer_objective
from adalfl_jax.task_losses import softmax_cross_entropy
from tests.problems import make_batch, make_problem

pytestmark = pytest.mark.usefixtures("float64")

SMALL = adalfl_jax.LossNetwork((4,))


@functools.cache
def walk(model_name="dropout", optimizer_name="momentum", window=3, num_steps=5, is_primed=False):
    """Five steps with a phi that moves: the problem, and what went into and came out of each."""
    model, optimizer, loss, theta, phi_params = make_problem(model_name, optimizer_name, loss=SMALL)
    problem = BilevelProblem(model.apply, loss.apply, softmax_cross_entropy, optimizer)
    outer = optax.sgd(0.05)
    estimator = Truncated(window)
    step = jax.jit(lambda theta, phi, batch, carry: estimator(problem, theta, phi, batch, carry))
    batches = [make_batch(key) for key in jax.random.split(jax.random.key(2), num_steps)]
    carry, opt_state, past = (), outer.init(phi_params), []
    if is_primed:
        whole = adalfl_jax.make_bilevel_step(*problem[:4], outer, hypergradient=estimator)
        carry = adalfl_jax.prime(whole, theta, adalfl_jax.Phi(phi_params, opt_state), batches[0]).carry
    for batch in batches:
        result = step(theta, phi_params, batch, carry)
        past.append((theta, phi_params, batch, result))
        updates, opt_state = outer.update(result.gradient, opt_state)
        theta, phi_params, carry = result.theta, optax.apply_updates(phi_params, updates), result.carry
    return problem, past


def written_out(problem, past, index, window):
    """The sum over the window's steps of the derivatives of L(theta_{t+1}) by the phi each was taken with."""
    steps = past[max(0, index - window + 1) : index + 1]

    def loss(phis):
        theta = steps[0][0]
        for (_, _, batch, _), phi in zip(steps, phis, strict=True):
            inner_key, outer_key = jax.random.split(batch.rng_key)
            theta, _ = inner_step(problem, theta, phi, batch.inner, inner_key)
        return outer_objective(problem, theta.params, theta.model_state, batch.outer, outer_key)

    gradients = jax.jit(jax.grad(loss))([phi for _, phi, _, _ in steps])
    return jax.tree.map(lambda *parts: sum(parts), *gradients)


@pytest.mark.parametrize("is_primed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_step_differentiates_through_the_window_before_it(is_primed):
    problem, past = walk(is_primed=is_primed)
    for index in (1, 4):  # where the window is not full yet, and where it is
        chex.assert_trees_all_close(past[index][3].gradient, written_out(problem, past, index, 3), rtol=1e-9)


def test_theta_goes_where_the_unrolled_step_takes_it():
    problem, past = walk()
    for theta, phi_params, batch, result in past:
        inner_key, _ = jax.random.split(batch.rng_key)
        expected, _ = jax.jit(inner_step, static_argnums=0)(problem, theta, phi_params, batch.inner, inner_key)
        chex.assert_trees_all_close(result.theta, expected, rtol=1e-14, atol=1e-15)


def test_a_window_replays_from_where_its_steps_began():
    """To the last bit: what a replay rounds differently grows with training, and would make it another model's."""
    _, past = walk()
    began = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(theta for theta, *_ in past[-2:]))
    chex.assert_trees_all_equal(past[-1][-1].carry.steps.theta, began)


def test_a_step_of_a_window_is_evaluated_at_the_theta_it_keeps():
    """Which is moved here, so that what the step before makes of it is another."""
    problem, past = walk()
    (*_, before), (theta, phi_params, batch, _) = past[-2:]
    moved = jax.tree.map(lambda leaf: leaf.at[1].multiply(1.1), before.carry.steps.theta)
    carry = before.carry._replace(steps=before.carry.steps._replace(theta=moved))
    found = jax.jit(lambda *given: Truncated(3)(problem, *given).gradient)(theta, phi_params, batch, carry)

    def loss(phis):
        here = after = past[-3][0]
        starts = None, jax.tree.map(lambda leaf: leaf[1], moved), theta
        for start, phi, (_, _, batch, _) in zip(starts, phis, past[-3:], strict=True):
            if start is not None:  # with the value of one and the derivative of the other
                here = jax.tree.map(lambda value, made: value + (made - jax.lax.stop_gradient(made)), start, after)
            inner_key, outer_key = jax.random.split(batch.rng_key)
            after, _ = inner_step(problem, here, phi, batch.inner, inner_key)
        return outer_objective(problem, after.params, after.model_state, batch.outer, outer_key)

    gradients = jax.jit(jax.grad(loss))([phi for _, phi, _, _ in past[-3:]])
    expected = jax.tree.map(lambda *parts: sum(parts), *gradients)
    chex.assert_trees_all_close(found, expected, rtol=1e-9)
    assert not jnp.allclose(found["layer_0"]["kernel"], past[-1][-1].gradient["layer_0"]["kernel"], rtol=1e-3)


@pytest.mark.slow
def test_steps_may_be_differentiated_through():
    """By the inner learning rate, as reverse and forward mode do it and as a difference has it, up to what the third
    step makes of the phi that the second has updated through its window. The model is linear, which compiles faster."""
    loss = adalfl_jax.LossNetwork((3,))
    params, phi_params = 0.3 * jax.random.normal(jax.random.key(0), (5, 3)), loss.init(jax.random.key(1))

    def apply_fn(params, model_state, inputs, *, train, rng_key):
        return inputs @ params, model_state

    batches = [make_batch(key) for key in jax.random.split(jax.random.key(2), 3)]

    @jax.jit
    def last_loss(rate):
        inner, outer = optax.sgd(rate), optax.sgd(0.5)
        step = adalfl_jax.make_bilevel_step(
            apply_fn, loss.apply, softmax_cross_entropy, inner, outer, hypergradient=Truncated(2)
        )
        states = (
            adalfl_jax.Theta.create(params, (), inner),
            adalfl_jax.Phi.create(phi_params, outer),
        )
        for batch in batches:
            *states, metrics = step(*states, batch)
        return metrics.outer_loss

    difference = (last_loss(0.5 + 1e-5) - last_loss(0.5 - 1e-5)) / 2e-5
    for differentiate in (jax.grad, jax.jacfwd):
        assert jax.jit(differentiate(last_loss))(0.5) == pytest.approx(float(difference), rel=1e-6)


def test_what_the_state_of_a_model_begins_with_may_be_infinite():
    def apply_fn(params, lowest, inputs, *, train, rng_key):
        outputs = inputs @ params
        return outputs, jnp.minimum(lowest, outputs.min(axis=0))

    batch = make_batch(jax.random.key(1))
    inner, outer, loss = optax.sgd(0.1), optax.sgd(0.1), adalfl_jax.LossNetwork((3,))
    params, lowest = jnp.ones((batch.inner.inputs.shape[-1], 3)), jnp.full(3, jnp.inf)
    theta = adalfl_jax.Theta.create(params, lowest, inner)
    phi = adalfl_jax.Phi.create(loss.init(jax.random.key(0)), outer)
    step = adalfl_jax.make_bilevel_step(
        apply_fn, loss.apply, softmax_cross_entropy, inner, outer, hypergradient=Truncated(2)
    )
    step = jax.jit(step)
    for _ in range(2):
        theta, phi, _ = step(theta, phi, batch)
        assert jnp.isfinite(theta.model_state).all()


def test_a_window_of_one_is_the_unrolled_estimator():
    problem, past = walk(window=1, num_steps=2)
    chex.assert_trees_all_close(past[1][3].gradient, written_out(problem, past, 1, 1), rtol=1e-12)
    assert past[1][3].carry == ()


@pytest.mark.parametrize("window", [1, 2, 4])
def test_what_is_cut_off_a_quadratic_falls_with_the_window_as_a_power(window):
    """M = (theta - phi)^2 / 2 and L = theta^2 / 2: with r = 1 - alpha, dL/dphi is theta (1 - r^t), and K steps of it
    are theta (1 - r^K), so that r^K - r^t is missing."""
    rate, num_steps = 0.3, 6

    def apply_fn(params, model_state, inputs, *, train, rng_key):
        return params * jnp.ones((1, 1)), model_state

    def learned_loss(phi, targets, outputs):
        return ((outputs - phi) ** 2).sum() / 2

    optimizer = optax.sgd(rate)
    problem = BilevelProblem(apply_fn, learned_loss, lambda _, outputs: (outputs**2).sum() / 2, optimizer)
    theta, carry = adalfl_jax.Theta.create(jnp.asarray(3.0), (), optimizer), ()
    example = (jnp.ones((1, 1)), jnp.ones((1, 1)))
    step = jax.jit(lambda theta, carry: Truncated(window)(problem, theta, jnp.asarray(0.5), batch, carry))
    batch = adalfl_jax.BilevelBatch(example, example)
    for _ in range(num_steps):
        result = step(theta, carry)
        theta, carry = result.theta, result.carry
    whole = theta.params * (1 - (1 - rate) ** num_steps)
    missing = theta.params * ((1 - rate) ** window - (1 - rate) ** num_steps)
    chex.assert_trees_all_close(whole - result.gradient, missing, rtol=1e-10)


@pytest.mark.slow
def test_it_goes_under_a_scan():
    model, optimizer, loss, theta, phi_params = make_problem("batch_norm", "nesterov")
    outer = optax.adam(0.01)
    step = adalfl_jax.make_bilevel_step(
        model.apply, loss.apply, softmax_cross_entropy, optimizer, outer, hypergradient=Truncated(3)
    )
    batches = [make_batch(key) for key in jax.random.split(jax.random.key(2), 4)]
    phi = adalfl_jax.Phi.create(phi_params, outer)
    looped, jitted = (theta, phi), jax.jit(step)
    for batch in batches:
        *looped, _ = jitted(*looped, batch)

    def body(state, batch):
        *state, metrics = step(*state, batch)
        return tuple(state), metrics

    phi = adalfl_jax.prime(step, theta, phi, batches[0])
    scanned, _ = jax.jit(lambda *arguments: jax.lax.scan(body, *arguments))(
        (theta, phi), jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
    )
    chex.assert_trees_all_close(scanned[1].params, looped[1].params, rtol=1e-9)
    chex.assert_trees_all_close(scanned[0], looped[0], rtol=1e-9)


@pytest.mark.parametrize("window", [0, -1, 2.0])
def test_a_window_without_a_step_is_refused(window):
    with pytest.raises(ValueError, match=rf"window must be a whole number of at least 1; got {window}"):
        Truncated(window)


def test_a_primed_window_is_never_evaluated_at_its_zeros():
    """A loss that divides by phi has no derivative at the zeros of a primed carry."""
    model, optimizer, _, theta, _ = make_problem()
    outer = optax.sgd(0.1)

    def tempered(phi, targets, outputs):
        return softmax_cross_entropy(targets, outputs / phi)

    step = adalfl_jax.make_bilevel_step(
        model.apply, tempered, softmax_cross_entropy, optimizer, outer, hypergradient=Truncated(3)
    )
    phi, batch = adalfl_jax.Phi.create(jnp.ones(()), outer), make_batch(jax.random.key(1))
    primed = adalfl_jax.prime(step, theta, phi, batch)
    (theta_next, after, _), (expected_theta, expected, _) = (
        jax.jit(step)(theta, start, batch) for start in (primed, phi)
    )
    chex.assert_trees_all_close((theta_next, after.params), (expected_theta, expected.params), rtol=1e-12)


def test_the_carry_of_another_window_is_refused():
    model, optimizer, loss, theta, phi_params = make_problem()
    outer = optax.sgd(0.1)
    functions = (model.apply, loss.apply, softmax_cross_entropy, optimizer, outer)
    three, five = (adalfl_jax.make_bilevel_step(*functions, hypergradient=Truncated(size)) for size in (3, 5))
    phi, batch = adalfl_jax.Phi.create(phi_params, outer), make_batch(jax.random.key(1))
    with pytest.raises(ValueError, match=r"not that of this step, which is truncated: .*adalfl_jax.prime"):
        five(theta, adalfl_jax.prime(three, theta, phi, batch), batch)
    pipelined = adalfl_jax.make_bilevel_step(*functions, pipelined=True)
    with pytest.raises(ValueError, match=r"a PrimedCarry of \d+ arrays for a PrimedWindow of \d+"):
        three(theta, adalfl_jax.prime(pipelined, theta, phi, batch), batch)
