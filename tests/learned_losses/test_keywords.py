"""A learned loss that reads how far training is."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adalfl_jax
from adalfl_jax.hypergradient.problem import BilevelProblem, inner_step, outer_objective
from adalfl_jax.learned_losses.keywords import at_progress, declares
from adalfl_jax.task_losses import softmax_cross_entropy
from adalfl_jax.training import train
from adalfl_jax.training.batches import splits_of
from adalfl_jax.training.evaluation import Evaluation
from adalfl_jax.training.initial import init_phi, init_training, make_seed_keys
from adalfl_jax.training.phases import make_offline_program, make_training_program
from adalfl_jax.training.setup import make_setup
from adalfl_jax.training.state import RunState
from tests.problems import make_batch, make_problem
from tests.training.tiny import final_state, tiny_config

LOSS = adalfl_jax.LossNetwork(hidden_sizes=(3,), use_progress=True)
PROGRESS = {"learned_loss.use_progress": True, "learned_loss.hidden_sizes": (3,)}
TARGETS, OUTPUTS = jnp.array([0, 2]), jnp.array([[0.5, -1.0, 0.2], [2.0, 0.1, -0.3]])


def dependent_phi(rng_key):
    """phi whose weights of progress are not zero."""
    params = LOSS.init(rng_key)
    return jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(rng_key, leaf.shape), params)


def make_parts(num_batches, outer):
    model, optimizer, _, theta, _ = make_problem("plain", "momentum")
    phi = adalfl_jax.Phi.create(dependent_phi(jax.random.key(3)), outer)
    batches = [
        make_batch(key)._replace(progress=jnp.array(0.25 * index), rng_key=None)
        for index, key in enumerate(jax.random.split(jax.random.key(2), num_batches))
    ]
    return (model.apply, LOSS.apply, softmax_cross_entropy, optimizer), theta, phi, batches


def at(problem, progress):
    apply_fn, learned_loss_fn, *rest = problem
    return apply_fn, functools.partial(learned_loss_fn, progress=progress), *rest


def test_a_fresh_loss_does_not_depend_on_progress():
    plain, apply = adalfl_jax.LossNetwork(hidden_sizes=(3,)), jax.jit(LOSS.apply)
    expected = jax.jit(plain.apply)(plain.init(jax.random.key(0)), TARGETS, OUTPUTS)
    for progress in (0.0, 1.0):
        found = apply(LOSS.init(jax.random.key(0)), TARGETS, OUTPUTS, progress=progress)
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_what_the_user_has_bound_is_not_asked_for_nor_replaced():
    seen = []

    def loss_fn(phi_params, targets, outputs, *, progress=None, params=None):
        seen.append((progress, params))
        return phi_params * outputs.mean()

    bound = functools.wraps(loss_fn)(functools.partial(functools.partial(loss_fn, progress=0.5), params=1.0))
    for name, before, after in (("progress", loss_fn, bound), ("params", loss_fn, bound)):
        assert declares(before, name)
        assert not declares(after, name)
    at_progress(bound, 0.75)(1.0, TARGETS, OUTPUTS)
    model, inner, _, theta, _ = make_problem()
    outer = optax.sgd(0.1)
    step = adalfl_jax.make_bilevel_step(
        model.apply, bound, softmax_cross_entropy, inner, outer
    )  # no `params` to refuse
    batch = make_batch(jax.random.key(0))._replace(progress=0.75)
    jax.eval_shape(step, theta, adalfl_jax.Phi.create(jnp.ones(()), outer), batch)
    assert {*seen} == {(0.5, 1.0)}


@pytest.mark.parametrize("hypergradient", ["forward", "truncated"])
def test_progress_may_begin_as_a_whole_number(hypergradient):
    outer = optax.adam(1e-2)
    parts, theta, phi, batches = make_parts(2, outer)
    step = jax.jit(adalfl_jax.make_bilevel_step(*parts, outer, hypergradient=hypergradient))
    found = []
    for start in (0, 0.0):
        after = step(theta, phi, batches[0]._replace(progress=start))
        found.append(step(*after[:2], batches[1]._replace(progress=0.5))[0].params)
    chex.assert_trees_all_equal(*found)


def test_progress_is_one_number_where_it_is_used_and_ignored_elsewhere():
    with pytest.raises(ValueError, match=r"use_progress needs .* give the loss `progress=`.*; got None"):
        LOSS.apply(LOSS.init(jax.random.key(0)), TARGETS, OUTPUTS)
    with pytest.raises(ValueError, match=r"progress must be one number, .*; got float32\[2\]"):
        LOSS.apply(LOSS.init(jax.random.key(0)), TARGETS, OUTPUTS, progress=jnp.zeros(2))
    plain = adalfl_jax.LossNetwork(hidden_sizes=(3,))
    phi_params = plain.init(jax.random.key(0))
    assert plain.apply(phi_params, TARGETS, OUTPUTS, progress=0.5) == plain.apply(phi_params, TARGETS, OUTPUTS)


def test_a_frozen_or_rescaled_one_passes_progress_on():
    phi_params = dependent_phi(jax.random.key(0))
    rescaled = adalfl_jax.RescaledLoss(LOSS)
    frozen = adalfl_jax.FrozenLoss(rescaled, phi_params)
    value, apply = jax.jit(frozen), jax.jit(LOSS.apply)
    values = [value(TARGETS, OUTPUTS, progress=progress) for progress in (0.1, 0.9)]
    expected = [apply(phi_params, TARGETS, OUTPUTS, progress=progress) for progress in (0.1, 0.9)]
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    assert abs(values[0] - values[1]) > 1e-3
    scaled = adalfl_jax.RescaledLoss(adalfl_jax.ScaledTaskLoss())  # which reads no progress
    jax.jit(scaled.apply)(scaled.init(jax.random.key(0)), TARGETS, OUTPUTS, progress=0.5)


def test_a_function_around_a_loss_passes_progress_on_where_it_says_so():
    loss = adalfl_jax.LossNetwork(use_progress=True)

    def silent(*arguments, **keywords):
        return loss.apply(*arguments, **keywords)

    @functools.wraps(loss.apply)
    def telling(*arguments, **keywords):
        return loss.apply(*arguments, **keywords)

    phi, targets, outputs = loss.init(jax.random.key(0)), jnp.array([0, 1]), jnp.zeros((2, 3))
    expected = jax.jit(functools.partial(loss.apply, progress=0.5))(phi, targets, outputs)
    assert jax.jit(at_progress(telling, 0.5))(phi, targets, outputs) == expected
    with pytest.raises(ValueError, match=r"around `apply` must declare and hand on .functools\.wraps.; got None"):
        at_progress(silent, 0.5)(phi, targets, outputs)


def test_a_task_step_takes_the_progress_of_its_loss():
    (apply_fn, *_, optimizer), theta, phi, (batch, _) = make_parts(2, optax.sgd(0.1))
    frozen = adalfl_jax.FrozenLoss(LOSS, phi.params)
    step = adalfl_jax.make_task_step(apply_fn, frozen, optimizer)
    with pytest.raises(ValueError, match="use_progress needs"):
        step(theta, batch.inner)
    found = jax.jit(functools.partial(step, progress=0.7))(theta, batch.inner)
    fixed = adalfl_jax.make_task_step(apply_fn, functools.partial(frozen, progress=0.7), optimizer)
    chex.assert_trees_all_equal(found, jax.jit(fixed)(theta, batch.inner))


def test_an_argument_with_a_default_is_declared_too():
    def with_default(phi_params, targets, outputs, progress=0.0):
        return (1 + progress) * softmax_cross_entropy(targets, outputs)

    (apply_fn, _, task_loss, optimizer), theta, phi, (_, batch) = make_parts(2, outer := optax.sgd(0.1))
    step = jax.jit(adalfl_jax.make_bilevel_step(apply_fn, with_default, task_loss, optimizer, outer))
    losses = [step(theta, phi, batch._replace(progress=progress))[2].inner_loss for progress in (None, 1.0)]
    np.testing.assert_allclose(losses[1], 2 * losses[0], rtol=1e-6)


@pytest.mark.usefixtures("float64")
def test_the_loss_of_a_step_is_that_at_its_progress():
    outer = optax.sgd(0.1)
    problem, theta, phi, (_, batch) = make_parts(2, outer)
    step = adalfl_jax.make_bilevel_step(*problem, outer, hypergradient="mixed_mode")
    expected = jax.jit(adalfl_jax.make_bilevel_step(*at(problem, 0.25), outer))(theta, phi, batch)
    _, found = jax.jit(lambda *state: jax.lax.scan(lambda _, batch: (None, step(*state, batch)), None, stack([batch])))(
        theta, phi
    )
    chex.assert_trees_all_close(jax.tree.map(lambda leaf: leaf[0], found), expected, rtol=1e-9)


@pytest.mark.slow
def test_a_step_that_leaves_phi_alone_reads_progress_too():
    problem, theta, phi, (_, batch) = make_parts(2, optax.sgd(0.1))
    batch = batch._replace(step=0)
    found, expected = (
        jax.jit(adalfl_jax.make_bilevel_step(*each, optax.sgd(0.1), outer_every=2))(theta, phi, batch)
        for each in (problem, at(problem, 0.25))
    )
    chex.assert_trees_all_close(found, expected, rtol=1e-6)


@pytest.mark.usefixtures("float64")
def test_every_step_of_a_window_keeps_its_own_progress():
    outer = optax.sgd(0.0)  # phi is the same throughout
    problem, theta, phi, batches = make_parts(3, outer)
    step = adalfl_jax.make_bilevel_step(
        *problem, optax.sgd(1.0), hypergradient=adalfl_jax.make_estimator("truncated", window=3)
    )
    carried = adalfl_jax.prime(step, theta, phi, batches[0])

    def body(state, batch):
        theta, carried = state
        theta, after, _ = step(theta, carried, batch)
        return (theta, carried._replace(carry=after.carry)), optax.tree.sub(phi.params, after.params)

    gradients = jax.jit(lambda state: jax.lax.scan(body, state, stack(batches))[1])((theta, carried))

    def through_all(phi_params):
        after = theta
        for batch in batches:
            after, _ = inner_step(BilevelProblem(*at(problem, batch.progress)), after, phi_params, batch.inner, None)
        return outer_objective(BilevelProblem(*problem), after.params, after.model_state, batches[-1].outer, None)

    expected = jax.jit(jax.grad(through_all))(phi.params)
    chex.assert_trees_all_close(jax.tree.map(lambda leaf: leaf[-1], gradients), expected, rtol=1e-9)


@pytest.mark.usefixtures("float64")
def test_a_pipelined_step_updates_phi_at_the_progress_of_the_step_before():
    outer = optax.adam(0.01)
    problem, theta, phi, batches = make_parts(3, outer)
    plain = jax.jit(adalfl_jax.make_bilevel_step(*problem, outer))
    pipelined = adalfl_jax.make_bilevel_step(*problem, outer, pipelined=True)

    def body(state, batch):
        return pipelined(*state, batch)[:2], None

    primed = adalfl_jax.prime(pipelined, theta, phi, batches[0])
    (_, found), _ = jax.jit(lambda state: jax.lax.scan(body, state, stack(batches)))((theta, primed))
    for this, following in itertools.pairwise(batches):
        theta, phi, _ = plain(theta, phi, this._replace(outer=following.inner))
    chex.assert_trees_all_close(found.params, phi.params, rtol=1e-9)


def test_every_part_of_a_run_gives_progress_to_its_loss():
    """Traced, not run: a loss that uses progress raises without."""
    setup = make_setup(tiny_config(PROGRESS, num_seeds=1))

    def run():
        keys = make_seed_keys(setup.config.seeds)
        phi = init_phi(setup, keys)
        offline, _ = make_offline_program(setup).advance(
            RunState(None, phi), keys, splits_of(setup), 0.1, 0, num_steps=1
        )
        ends = []
        for method in ("ml3", "adalfl"):
            start = init_training(setup, method, keys, offline.phi)
            ends.append(
                make_training_program(setup, method).advance(start, keys, splits_of(setup), 0.1, 0, num_steps=1)
            )
        evaluation = Evaluation(setup)
        state = ends[1][0]
        return ends, evaluation.scalars(state, 0.1, 0.5), evaluation.loss_shape(state, 0.5)

    *_, shape = jax.eval_shape(run)
    assert shape.shape == (1, 2, 101)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "is_learned"), [("adalfl", True), ("ml3", False)])
def test_the_weights_of_progress_are_learned_online_alone(method, is_learned, tmp_path):
    config = tiny_config(PROGRESS, num_steps=4, eval_every=4, num_seeds=1, method=method)
    train(config, tmp_path)
    weights = final_state(config, tmp_path, method).phi.params["layer_0"]["kernel"][0, 2]
    assert bool((weights != 0).all()) == is_learned


def stack(batches):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
