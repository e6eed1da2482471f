"""Meta-gradients on a part of the batch, and phi updated at some steps alone."""

from contextlib import nullcontext

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import adalfl_jax
from adalfl_jax.hypergradient import ESTIMATORS, ONE_STEP, Hypergradient, OneStep, Truncated, estimator_name
from adalfl_jax.task_losses import softmax_cross_entropy
from tests.problems import BATCH_SIZE, make_batch, make_problem


def make(model_name="plain", optimizer_name="sgd"):
    model, optimizer, loss, theta, phi_params = make_problem(model_name, optimizer_name)
    outer = optax.adam(0.01)
    functions = (model.apply, loss.apply, softmax_cross_entropy, optimizer, outer)
    return functions, theta, adalfl_jax.Phi.create(phi_params, outer)


def hypergradient(functions, theta, phi, batch, **options):
    """As the step gives it to the outer optimiser."""
    recorder = optax.GradientTransformation(lambda _: (), lambda updates, state, params: (updates, updates))
    step = adalfl_jax.make_bilevel_step(*functions[:4], recorder, **options)
    return step(theta, phi._replace(opt_state=()), batch)[1].opt_state


def mean_over_rotations(functions, theta, phi, batch, **options):
    """The mean gradient over all rotations of both batches, in which every example is in the part as often; and one."""

    def rotated(inner, outer):
        parts = [
            jax.tree.map(lambda leaf, by=by: jnp.roll(leaf, by, 0), part)
            for by, part in ((inner, batch.inner), (outer, batch.outer))
        ]
        rolled = adalfl_jax.BilevelBatch(*parts)
        return ravel_pytree(hypergradient(functions, theta, phi, rolled, **options))[0]

    every = jnp.arange(BATCH_SIZE)
    gradients = jax.jit(jax.vmap(jax.vmap(rotated, (None, 0)), (0, None)))(every, every)
    return gradients.mean(axis=(0, 1)), gradients[0, 0]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("estimator", "fraction"),
    [
        *(pytest.param(name, 0.25, marks=() if name == "forward" else pytest.mark.slow) for name in ONE_STEP),
        pytest.param("forward", (0.5, 1.0), marks=pytest.mark.slow),
        ("unrolled", (1.0, 0.25)),
    ],
)
def test_a_part_of_the_batch_gives_the_gradient_unbiased(estimator, fraction):
    functions, theta, phi = make("plain", "nesterov")
    batch = make_batch(jax.random.key(1))
    options = {"hypergradient": estimator}
    mean, single = mean_over_rotations(functions, theta, phi, batch, meta_batch_fraction=fraction, **options)
    expected = ravel_pytree(jax.jit(lambda: hypergradient(functions, theta, phi, batch, **options))())[0]
    tolerance = {"finite_difference": 1e-5}.get(estimator, 1e-7)
    assert jnp.linalg.norm(mean - expected) < tolerance * jnp.linalg.norm(expected)
    assert jnp.linalg.norm(single - expected) > 0.01 * jnp.linalg.norm(expected)


def test_a_part_has_an_example_at_least():
    functions, theta, phi = make()
    batch = make_batch(jax.random.key(1))
    part, expected = (
        jax.jit(lambda fraction=fraction: hypergradient(functions, theta, phi, batch, meta_batch_fraction=fraction))()
        for fraction in (0.01, 1 / BATCH_SIZE)
    )
    chex.assert_trees_all_equal(part, expected)
    assert optax.tree.norm(part) > 0


def test_with_dropout_the_first_examples_have_the_outputs_they_have_in_the_whole_batch():
    """What a part of the batch needs beside random order: the masks of the first rows do not depend on the others."""
    (apply_fn, *_), theta, _ = make("dropout")
    inputs, rng_key = make_batch(jax.random.key(1)).inner.inputs, jax.random.key(3)
    whole, first = (apply_fn(theta.params, {}, part, train=True, rng_key=rng_key)[0] for part in (inputs, inputs[:2]))
    np.testing.assert_allclose(first, whole[:2], rtol=1e-5)
    assert not np.allclose(apply_fn(theta.params, {}, inputs, train=False, rng_key=None)[0], whole, rtol=1e-2)


@pytest.mark.usefixtures("float64")
def test_with_batch_norm_a_part_is_biased_and_less_so_with_the_whole_inner_batch():
    functions, theta, phi = make("batch_norm")
    batch = make_batch(jax.random.key(1))
    expected = ravel_pytree(jax.jit(lambda: hypergradient(functions, theta, phi, batch))())[0]

    def bias(fraction):
        mean, _ = mean_over_rotations(functions, theta, phi, batch, meta_batch_fraction=fraction)
        return jnp.linalg.norm(mean - expected) / jnp.linalg.norm(expected)

    assert bias(0.5) > 0.05
    assert 0.01 < bias((1.0, 0.5)) < bias(0.5) / 2


def test_a_batch_that_does_not_fit_is_refused_before_a_part_is_taken():
    functions, theta, phi = make()
    batch = make_batch(jax.random.key(1))
    inputs, targets = batch.outer
    step = adalfl_jax.make_bilevel_step(*functions, meta_batch_fraction=0.5)
    with pytest.raises(ValueError, match=r"batch.outer: inputs and targets must share.*\(8, 5\) and targets \(7,\)"):
        step(theta, phi, batch._replace(outer=(inputs, targets[:7])))


def test_outer_every_takes_outputs_of_another_type_than_phi():
    functions, theta, phi = make()

    def apply_fn(*arguments, **keywords):
        outputs, model_state = functions[0](*arguments, **keywords)
        return outputs.astype(jnp.bfloat16), model_state

    step = jax.jit(adalfl_jax.make_bilevel_step(apply_fn, *functions[1:], outer_every=2))
    for number in range(2):
        *_, metrics = step(theta, phi, make_batch(jax.random.key(1))._replace(step=number))
        chex.assert_tree_all_finite(metrics)


@pytest.mark.parametrize("model_name", ["plain", "batch_norm"])
def test_theta_is_updated_on_the_whole_batch(model_name):
    functions, theta, phi = make(model_name, "momentum")
    batch = make_batch(jax.random.key(1))
    thetas = [
        jax.jit(adalfl_jax.make_bilevel_step(*functions, meta_batch_fraction=fraction))(theta, phi, batch)[0]
        for fraction in (1.0, 0.25)
    ]
    chex.assert_trees_all_close(*thetas, rtol=1e-6)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("estimator", "model"),
    [
        ("forward", "batch_norm"),
        ("forward", "dropout"),
        pytest.param("mixed_mode", "batch_norm", marks=pytest.mark.slow),
    ],
)
def test_phi_learns_at_every_nth_step_alone(estimator, model):
    functions, theta, phi = make(model, "momentum")
    plain = jax.jit(adalfl_jax.make_bilevel_step(*functions, hypergradient=estimator))
    step = jax.jit(adalfl_jax.make_bilevel_step(*functions, hypergradient=estimator, outer_every=3))
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
        ({"meta_batch_fraction": 0.0}, r"meta_batch_fraction must be a number in \(0, 1\].*got 0.0"),
        ({"meta_batch_fraction": (1.0, 1.5)}, r"meta_batch_fraction must be a number in \(0, 1\].*got \(1.0, 1.5\)"),
        (
            {"meta_batch_fraction": 0.5, "hypergradient": "unrolled"},
            r"inner batch is for .* got 'unrolled', .*\(1.0, 0.5\)",
        ),
        ({"meta_batch_fraction": (0.5, 0.5, 0.5)}, r"or two: of inner and outer; got \(0.5, 0.5, 0.5\)"),
        ({"meta_batch_fraction": "half"}, r"meta_batch_fraction must be a number.*got 'half'"),
        ({"hypergradient": Truncated}, r"hypergradient must be a name or an estimator.*got <class"),
        ({"outer_every": 0}, r"outer_every must be a whole number of at least 1; got 0"),
        ({"outer_every": 2, "hypergradient": "truncated"}, r"'truncated' has to see every step.*outer_every = 2"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    functions, _, _ = make()
    with pytest.raises(ValueError, match=message):
        adalfl_jax.make_bilevel_step(*functions, **options)


def test_a_part_of_the_inner_batch_is_refused_for_a_loss_whose_bounds_are_of_the_whole():
    functions, _, _ = make()
    for settings, is_refused in (({"ceiling": 1.0}, True), ({}, False)):
        bounded = adalfl_jax.RescaledLoss(adalfl_jax.LossNetwork(), **settings)
        changed = (functions[0], bounded.apply, *functions[2:])
        adalfl_jax.make_bilevel_step(*changed, meta_batch_fraction=(1.0, 0.5))
        with pytest.raises(ValueError, match=r"are of the whole batch.*\(1.0, 0.5\)") if is_refused else nullcontext():
            adalfl_jax.make_bilevel_step(*changed, meta_batch_fraction=0.5)


def test_an_estimator_goes_by_its_key_and_one_of_ones_own_by_its_name():
    assert [estimator_name(estimator) for estimator in ESTIMATORS.values()] == list(ESTIMATORS)
    assert [ESTIMATORS[name].name for name in ONE_STEP] == list(ONE_STEP)

    class Mine(OneStep):
        name = "mine"

        def _product(self, point, direction):
            return direction

        def require_product(self, *arguments):
            pass

    assert estimator_name(Mine()) == "mine"


def test_an_estimator_of_ones_own_may_say_that_it_has_to_see_every_step():
    def remembering(*arguments):
        return ESTIMATORS["forward"](*arguments)

    remembering.remembers = True
    functions, _, _ = make()
    with pytest.raises(ValueError, match=r"remembering.* has to see every step"):
        adalfl_jax.make_bilevel_step(*functions, hypergradient=remembering, outer_every=2)


def test_an_estimator_that_leaves_theta_alone_is_refused_between_steps():
    def still(problem, theta, phi_params, batch, carry):
        return Hypergradient(theta, phi_params, jnp.zeros(()), jnp.zeros(()), carry)

    functions, theta, phi = make("plain", "momentum")
    step = adalfl_jax.make_bilevel_step(*functions, hypergradient=still, outer_every=2)
    with pytest.raises(ValueError, match=r"one step of problem.inner_optimizer.*got an optimiser's state of type"):
        step(theta, phi, make_batch(jax.random.key(1))._replace(step=0))


def test_an_estimator_that_takes_two_steps_is_refused_between_steps():
    def twice(problem, theta, phi_params, batch, carry):
        once = ESTIMATORS["forward"](problem, theta, phi_params, batch, carry)
        return ESTIMATORS["forward"](problem, once.theta, phi_params, batch, carry)

    functions, theta, phi = make("plain", "momentum")
    step = adalfl_jax.make_bilevel_step(*functions, hypergradient=twice, outer_every=2)
    with pytest.raises(ValueError, match=r"one step of problem.inner_optimizer.*; got two steps of it or more. Set"):
        step(theta, phi, make_batch(jax.random.key(1))._replace(step=0))


def test_counting_needs_the_number_of_the_step():
    functions, theta, phi = make()
    step = adalfl_jax.make_bilevel_step(*functions, outer_every=2)
    with pytest.raises(ValueError, match=r"outer_every = 2 goes by the number of the step.*got None"):
        step(theta, phi, make_batch(jax.random.key(1)))
    with pytest.raises(ValueError, match=r"drop the leading axis K"):
        step(theta, phi, make_batch(jax.random.key(1), num_inner_steps=2)._replace(step=0))


def test_a_part_of_the_inner_batch_has_the_key_of_the_whole():
    """With dropout its outputs are otherwise those of another network than the step's."""
    keys = {}

    def apply_fn(params, model_state, inputs, *, train, rng_key):
        if not isinstance(rng_key, jax.core.Tracer):
            keys.setdefault(len(inputs), set()).add(tuple(jax.random.key_data(rng_key).tolist()))
        return inputs @ params, model_state

    loss, inner, outer = adalfl_jax.ScaledTaskLoss(), optax.sgd(0.1), optax.adam(0.1)
    step = adalfl_jax.make_bilevel_step(
        apply_fn, loss.apply, softmax_cross_entropy, inner, outer, meta_batch_fraction=(0.5, 1.0)
    )
    theta = adalfl_jax.Theta.create(jnp.zeros((2, 3)), (), inner)
    phi = adalfl_jax.Phi.create(loss.init(jax.random.key(0)), outer)
    whole, other = ((jnp.ones((size, 2)), jnp.zeros(size, int)) for size in (8, 6))
    step(theta, phi, adalfl_jax.BilevelBatch(whole, other, rng_key=jax.random.key(1)))
    assert keys[4] == keys[8] != keys[6]
    assert len(keys[8]) == len(keys[6]) == 1
