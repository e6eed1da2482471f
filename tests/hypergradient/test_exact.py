"""Every exact estimator against central finite differences in float64, of an outer loss composed from scratch."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import adalfl_jax
from adalfl_jax.hypergradient import ESTIMATORS, ONE_INNER_STEP, BilevelProblem, num_inner_steps
from adalfl_jax.hypergradient.update import differentiable_update
from adalfl_jax.task_losses import softmax_cross_entropy
from tests.hypergradient.reference import assert_relative, estimate, estimator_program, finite_differences, outer_loss
from tests.problems import BATCH_SIZE, MODELS, NUM_INPUTS, NUM_OUTPUTS, OPTIMIZERS, make_batch, make_problem

ELSEWHERE = {"nesterov": "batch_norm", "adam": "dropout"}
QUICK = {(ELSEWHERE.get(name, "plain"), name) for name in OPTIMIZERS}
"""Every optimiser and every model; the slow tests have all pairs."""


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("model_name", "optimizer_name"),
    [
        pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow)
        for pair in itertools.product(MODELS, OPTIMIZERS)
    ],
)
def test_estimators_equal_finite_differences_and_each_other(model_name, optimizer_name):
    model, optimizer, loss, theta, phi_params = make_problem(model_name, optimizer_name)
    batch = make_batch(jax.random.key(1))
    results = [estimate(name, model, loss, optimizer, theta, phi_params, batch) for name in ("forward", "unrolled")]
    expected = finite_differences(
        lambda phi: outer_loss(model.apply, loss.apply, optimizer, theta, batch, phi), phi_params
    )
    gradients = [ravel_pytree(result.gradient)[0] for result in results]
    for gradient in gradients:
        assert_relative(gradient, expected)
    assert_relative(gradients[0], gradients[1])
    chex.assert_trees_all_close(results[0]._replace(gradient=None), results[1]._replace(gradient=None), rtol=1e-12)


OTHERS = {"recompute": ("batch_norm", "nesterov"), "checkpointed": ("dropout", "clip"), "mixed_mode": ("plain", "adam")}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("name", "model_name", "optimizer_name"),
    [
        pytest.param(name, *pair, marks=() if pair == OTHERS[name] else pytest.mark.slow)
        for name, pair in itertools.product(OTHERS, OTHERS.values())
    ],
)
def test_the_other_exact_estimators_equal_the_unrolled_one(name, model_name, optimizer_name):
    model, optimizer, loss, theta, phi_params = make_problem(model_name, optimizer_name)
    batch = make_batch(jax.random.key(1))
    result, expected = (estimate(each, model, loss, optimizer, theta, phi_params, batch) for each in (name, "unrolled"))
    chex.assert_trees_all_close(result, expected, rtol=1e-9, atol=1e-14)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("model_name", "optimizer_name"),
    [("batch_norm", "nesterov"), pytest.param("dropout", "adam", marks=pytest.mark.slow)],
)
def test_unrolling_several_inner_steps_is_exact(model_name, optimizer_name):
    model, optimizer, loss, theta, phi_params = make_problem(model_name, optimizer_name)
    batch = make_batch(jax.random.key(1), num_inner_steps=3)
    result = estimate("unrolled", model, loss, optimizer, theta, phi_params, batch)
    expected = finite_differences(
        lambda phi: outer_loss(model.apply, loss.apply, optimizer, theta, batch, phi), phi_params
    )
    assert_relative(ravel_pytree(result.gradient)[0], expected)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("model_name", "optimizer_name"),
    [
        ("plain", "momentum"),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in (("batch_norm", "nesterov"), ("dropout", "adam"))),
    ],
)
def test_saving_memory_changes_nothing(model_name, optimizer_name):
    """Five steps: two segments of two and one that is left over for the checkpointed estimator."""
    model, optimizer, loss, theta, phi_params = make_problem(model_name, optimizer_name)
    batch = make_batch(jax.random.key(1), num_inner_steps=5)
    first, second = (
        estimate(name, model, loss, optimizer, theta, phi_params, batch) for name in ("checkpointed", "mixed_mode")
    )
    expected = finite_differences(
        lambda phi: outer_loss(model.apply, loss.apply, optimizer, theta, batch, phi), phi_params
    )
    assert_relative(ravel_pytree(first.gradient)[0], expected)
    chex.assert_trees_all_close(first, second, rtol=1e-8, atol=1e-12)


@pytest.mark.usefixtures("float64")
def test_one_inner_step_on_a_leading_axis_equals_one_without():
    model, optimizer, loss, theta, phi_params = make_problem("plain", "momentum")
    batch = make_batch(jax.random.key(1))
    stacked = batch._replace(inner=jax.tree.map(lambda leaf: leaf[None], batch.inner))
    plain = estimate("unrolled", model, loss, optimizer, theta, phi_params, batch)
    chex.assert_trees_all_close(
        plain, estimate("unrolled", model, loss, optimizer, theta, phi_params, stacked), rtol=1e-12
    )


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["unrolled", "mixed_mode"])
def test_a_loss_that_reads_theta_is_exact_when_unrolled(name):
    model, optimizer, loss, theta, phi_params = make_problem("plain", "sgd")

    def regularised(phi, targets, outputs, *, params):
        return loss.apply(phi, targets, outputs) + phi["layer_2"]["kernel"].sum() * optax.tree.norm(
            params, squared=True
        )

    batch = make_batch(jax.random.key(1))
    problem = BilevelProblem(model.apply, regularised, softmax_cross_entropy, optimizer)
    result = jax.jit(functools.partial(ESTIMATORS[name], problem))(theta, phi_params, batch)

    def reference(phi):
        def objective(params):
            outputs, _ = model.apply(params, {}, batch.inner.inputs, train=True, rng_key=None)
            return regularised(phi, batch.inner.targets, outputs, params=params)

        params = jax.tree.map(lambda p, g: p - 0.3 * g, theta.params, jax.grad(objective)(theta.params))
        outputs, _ = model.apply(params, {}, batch.outer.inputs, train=True, rng_key=None)
        return softmax_cross_entropy(batch.outer.targets, outputs)

    assert_relative(ravel_pytree(result.gradient)[0], finite_differences(reference, phi_params))


@pytest.mark.parametrize(
    "optimizer", [optax.radam(1e-2), optax.contrib.prodigy(), optax.contrib.mechanize(optax.sgd(0.1))]
)
def test_optimizers_that_are_said_to_have_no_finite_derivative_have_none(optimizer):
    model, _, loss, theta, phi_params = make_problem("plain", "sgd")
    batch = make_batch(jax.random.key(1))
    batch = batch._replace(inner=batch.inner._replace(inputs=batch.inner.inputs.at[:, 0].set(0.0)))
    step = adalfl_jax.make_bilevel_step(model.apply, loss.apply, softmax_cross_entropy, optimizer, optax.sgd(1e-3))
    theta, phi = (
        adalfl_jax.Theta.create(theta.params, {}, optimizer),
        adalfl_jax.Phi.create(phi_params, optax.sgd(1e-3)),
    )
    for _ in range(4):
        theta, phi, metrics = jax.jit(step)(theta, phi, batch)
    assert np.isnan(metrics.hypergradient_norm)


@pytest.mark.parametrize("estimator", ["forward", "unrolled"])
@pytest.mark.parametrize("length", [1e3, 1e6, 1e9])
def test_adam_of_a_long_gradient_that_is_clipped_has_a_finite_derivative(estimator, length):
    """An input that is always 0 has a gradient of exactly 0, and clipping brings what stands for it nearer to 0."""
    loss = adalfl_jax.LossNetwork((8,), predictions="raw")
    optimizer, phi_params = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)), loss.init(jax.random.key(0))
    inputs = jax.random.normal(jax.random.key(1), (8, 4)).at[:, 0].set(0.0)
    params, batch = jax.random.normal(jax.random.key(2), (4, 3)), adalfl_jax.Batch(inputs, jnp.arange(8) % 3)

    def long_loss(phi_params, targets, outputs):
        return length * loss.apply(phi_params, targets, outputs)

    def apply(params, model_state, inputs, *, train, rng_key):
        return inputs @ params, model_state

    step = adalfl_jax.make_bilevel_step(
        apply, long_loss, softmax_cross_entropy, optimizer, optax.sgd(1e-3), hypergradient=estimator
    )
    theta, phi = adalfl_jax.Theta.create(params, {}, optimizer), adalfl_jax.Phi.create(phi_params, optax.sgd(1e-3))
    for _ in range(3):
        theta, phi, metrics = jax.jit(step)(theta, phi, adalfl_jax.BilevelBatch(batch, batch))
        assert np.isfinite(metrics.hypergradient_norm)
        assert metrics.hypergradient_norm > 0


def test_a_gradient_whose_length_overflows_has_the_derivative_of_plain_optax():
    clip, params = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)), jnp.ones(3)
    gradient, state = jnp.array([1.0, 2.0, 0.0]) * 3e19, clip.init(params)
    for update in (clip.update, functools.partial(differentiable_update, clip)):
        _, pullback, _ = jax.vjp(
            lambda gradient, update=update: update(gradient, state, params), gradient, has_aux=True
        )
        np.testing.assert_array_equal(pullback(jnp.ones(3))[0], np.zeros(3))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name in ("mixed_mode", "unrolled")))
        for name in sorted(set(ESTIMATORS) - set(ONE_INNER_STEP) - {"conjugate_gradient"})
    ],
)
def test_no_nan_where_an_optimiser_takes_the_length_of_parameters_that_stay_zero(name):
    """Adaptive clipping does, of each array; one that nothing reads stays as it starts."""
    model, _, loss, theta, phi_params = make_problem("plain", "sgd")
    clip = optax.chain(optax.adaptive_grad_clip(0.01), optax.sgd(0.1))

    def apply(params, model_state, inputs, *, train, rng_key):
        outputs, model_state = model.apply(params["read"], model_state, inputs, train=train, rng_key=rng_key)
        return outputs + 0 * params["unread"].sum(), model_state

    batch, found = make_batch(jax.random.key(1), num_inner_steps=3), []
    for start in (0.0, 1e-6):
        params = {"read": theta.params, "unread": jnp.full(NUM_OUTPUTS, start)}
        problem = BilevelProblem(apply, loss.apply, softmax_cross_entropy, clip)
        start = adalfl_jax.Theta.create(params, theta.model_state, clip)
        gradient = jax.jit(functools.partial(ESTIMATORS[name], problem))(start, phi_params, batch).gradient
        found.append(ravel_pytree(gradient)[0])
    assert jnp.linalg.norm(found[1]) > 0
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-6 * float(jnp.abs(found[1]).max()))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("optimizer", [optax.lars(0.1), optax.lamb(0.1, eps=0.1)], ids=["lars", "lamb"])
def test_parameters_that_start_at_zero_pass_the_gradient_of_an_optimiser_that_scales_by_their_length(optimizer):
    """Its factor is 1 at zero, and no limit of what it is near zero."""
    model, _, loss, theta, phi_params = make_problem("plain", "sgd")
    params = jax.tree.map(jnp.zeros_like, theta.params)
    theta, batch = adalfl_jax.Theta.create(params, theta.model_state, optimizer), make_batch(jax.random.key(1))
    expected = finite_differences(
        lambda phi: outer_loss(model.apply, loss.apply, optimizer, theta, batch, phi), phi_params
    )
    for name in ("forward", "unrolled"):
        found = estimate(name, model, loss, optimizer, theta, phi_params, batch).gradient
        assert_relative(ravel_pytree(found)[0], expected)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("estimator", ["forward", pytest.param("unrolled", marks=pytest.mark.slow)])
def test_clipping_a_gradient_of_exactly_zero_passes_the_gradient_of_no_clipping(estimator):
    """A flat loss (last layer zero) has grad M = 0 but d grad M / d phi != 0, so phi must still learn."""
    model, sgd, loss, theta, phi_params = make_problem("plain", "sgd")
    loss = adalfl_jax.LossNetwork(hidden_sizes=(4, 4), output_activation="identity")
    phi_params["layer_2"]["kernel"] *= 0.0
    batch = make_batch(jax.random.key(1))
    clip = optax.chain(optax.clip_by_global_norm(1.0), sgd)
    clipped = estimate(
        estimator, model, loss, clip, theta._replace(opt_state=clip.init(theta.params)), phi_params, batch
    )
    plain = estimate(estimator, model, loss, sgd, theta, phi_params, batch)
    assert_relative(ravel_pytree(clipped.gradient)[0], ravel_pytree(plain.gradient)[0])


@pytest.mark.parametrize("name", ["forward", pytest.param("unrolled", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adam(1e-3),
        optax.rmsprop(1e-3),
        optax.adafactor(1e-2),
        optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
        optax.chain(optax.normalize_by_update_norm(), optax.sgd(0.1)),
    ],
    ids=["adam", "rmsprop", "adafactor", "clip", "normalize"],
)
def test_no_nan_where_the_inner_gradient_is_exactly_zero(optimizer, name):
    model, _, loss, theta, phi_params = make_problem("plain", "sgd")
    program = estimator_program(name, model, loss, optimizer)
    theta = theta._replace(opt_state=optimizer.init(theta.params))
    batch = make_batch(jax.random.key(1))
    dead = batch._replace(inner=batch.inner._replace(inputs=jnp.zeros((BATCH_SIZE, NUM_INPUTS))))
    flat = jax.tree.map(jnp.zeros_like, phi_params)
    for case_batch, case_phi in ((batch, phi_params), (dead, phi_params), (batch, flat), (dead, flat)):
        chex.assert_tree_all_finite(program(theta, case_phi, case_batch).gradient)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_differentiable_update_has_the_values_of_the_update_bit_for_bit(name):
    _, optimizer, _, theta, _ = make_problem("plain", name)
    arguments = jax.tree.map(lambda leaf: jnp.where(leaf > 0, leaf, 0.0), theta.params), theta.opt_state, theta.params
    chex.assert_trees_all_equal(
        jax.jit(lambda *arguments: differentiable_update(optimizer, *arguments))(*arguments),
        jax.jit(optimizer.update)(*arguments),
    )


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("estimator", ["forward", "unrolled"])
def test_a_step_is_differentiable_in_what_the_optimiser_closes_over(estimator):
    model, _, loss, theta, phi_params = make_problem("plain", "sgd")
    batch = make_batch(jax.random.key(1))

    @jax.jit
    def outer(rate):
        optimizer = optax.sgd(rate)
        problem = BilevelProblem(model.apply, loss.apply, softmax_cross_entropy, optimizer)
        start = theta._replace(opt_state=optimizer.init(theta.params))
        return ESTIMATORS[estimator](problem, start, phi_params, batch).outer_loss

    slope = (outer(0.3 + 1e-6) - outer(0.3 - 1e-6)) / 2e-6
    np.testing.assert_allclose(jax.grad(outer)(0.3), slope, rtol=1e-6)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["mixed_mode", pytest.param("unrolled", marks=pytest.mark.slow)])
def test_a_step_is_differentiated_and_mapped_over_what_the_loss_closes_over(name):
    model, optimizer, loss, theta, phi_params = make_problem(loss=adalfl_jax.LossNetwork((4,)))
    batch = make_batch(jax.random.key(1), 2)

    def outer(scale):
        problem = BilevelProblem(
            model.apply, lambda *arguments: scale * loss.apply(*arguments), softmax_cross_entropy, optimizer
        )
        result = ESTIMATORS[name](problem, theta, phi_params, batch)
        return result.outer_loss, ravel_pytree(result.gradient)[0]

    values, gradients = jax.jit(jax.vmap(outer))(jnp.asarray([0.5 - 1e-6, 0.5, 0.5 + 1e-6]))
    (_, gradient), slope = jax.jit(jax.value_and_grad(outer, has_aux=True))(0.5)
    np.testing.assert_allclose(slope, (values[2] - values[0]) / 2e-6, rtol=1e-6)
    assert_relative(gradients[1], gradient, 1e-12)


def test_an_empty_batch_is_refused():
    batch = jax.tree.map(lambda leaf: leaf[:0], make_batch(jax.random.key(1)).inner)
    with pytest.raises(ValueError, match=r"empty; got inner \(0, 5\)"):
        num_inner_steps(adalfl_jax.BilevelBatch(batch, batch))


@pytest.mark.parametrize("name", ONE_INNER_STEP)
def test_one_step_estimators_refuse_several_inner_steps(name):
    model, optimizer, loss, theta, phi_params = make_problem()
    with pytest.raises(ValueError, match=rf"'{name}' differentiates through exactly one.*leading axis K = 3.*unrolled"):
        estimate(name, model, loss, optimizer, theta, phi_params, make_batch(jax.random.key(1), num_inner_steps=3))


@pytest.mark.parametrize(
    ("inner", "outer", "message"),
    [
        (((8, 5), (7,)), ((8, 5), (8,)), r"batch.inner.*\[B\].*\(8, 5\).*\(7,\)"),
        (((8, 5), (8,)), ((8, 5), (9,)), r"batch.outer.*\[B\].*\(8, 5\).*\(9,\)"),
        (((3, 8, 5), (8,)), ((8, 5), (8,)), r"batch.inner.*\[K, B\].*\(3, 8, 5\).*\(8,\)"),
        (((3, 2, 8, 5), (3,)), ((8, 5), (8,)), r"leading axis K more.*\(3, 2, 8, 5\)"),
    ],
)
def test_batches_that_do_not_fit_together_are_named(inner, outer, message):
    parts = [(jnp.zeros(inputs), jnp.zeros(targets, jnp.int32)) for inputs, targets in (inner, outer)]
    with pytest.raises(ValueError, match=message):
        num_inner_steps(adalfl_jax.BilevelBatch(*parts))
