"""Products with the Jacobian: the error of finite differences and its order, what each of them refuses."""

import functools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import adalfl_jax
from adalfl_jax.hypergradient import DIFFERENCES, one_step
from adalfl_jax.models import Model, functionalize
from adalfl_jax.task_losses import softmax_cross_entropy
from tests.hypergradient.reference import estimate
from tests.problems import MODELS, make_batch, make_problem


def gradients(names, model_name="plain", optimizer_name="sgd"):
    problem = make_problem(model_name, optimizer_name)
    batch = make_batch(jax.random.key(1))
    model, optimizer, loss, theta, phi_params = problem
    return [
        ravel_pytree(estimate(name, model, loss, optimizer, theta, phi_params, batch).gradient)[0] for name in names
    ]


def relative_error(actual, expected):
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(("params", "length"), [(jnp.array([3.0, 4.0]), 5.0), (jnp.array([0.03, 0.04]), 1.0)])
def test_theta_moves_as_far_as_rounding_and_the_order_of_the_difference_ask(params, length, order):
    point = types.SimpleNamespace(params=params, outputs=jnp.zeros(2))
    direction = jnp.array([0.0, 0.1])
    moved = one_step._difference_step(point, direction, order=order) * jnp.linalg.norm(direction)
    np.testing.assert_allclose(moved, np.finfo(np.float32).eps ** (1 / (1 + order)) * length, rtol=1e-6)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("name", "order"), [("finite_difference", 1), ("central_difference", 2)])
def test_the_error_has_the_order_of_the_difference(monkeypatch, name, order):
    (exact,) = gradients(["forward"])
    errors = []
    for step in (0.1, 0.05):
        monkeypatch.setattr(one_step, "_difference_step", lambda *_, step=step, **__: jnp.asarray(step))
        errors.append(relative_error(gradients([name])[0], exact))
    assert errors[0] > 1e-8
    np.testing.assert_allclose(errors[0] / errors[1], 2**order, rtol=0.1)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("model_name", ["batch_norm", pytest.param("dropout", marks=pytest.mark.slow)])
def test_in_double_precision_the_step_is_chosen_well(model_name):
    one_sided, central, exact = gradients(["finite_difference", "central_difference", "forward"], model_name)
    assert 0 < relative_error(one_sided, exact) < 1e-6
    assert 0 < relative_error(central, exact) < 1e-8


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["finite_difference", "central_difference"])
def test_the_step_is_one_that_parameters_of_less_precision_than_the_inputs_can_take(name):
    def apply(params, model_state, inputs, *, train, rng_key):
        return jnp.tanh(inputs @ params["hidden"]) @ params["output"], model_state

    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"hidden": (6, 8), "output": (8, 3)}
    params = {name: jax.random.normal(key, shapes[name], jnp.float32) for name, key in zip(shapes, keys, strict=False)}
    inputs = jax.random.normal(keys[2], (8, 6), jnp.float64)
    batch = adalfl_jax.Batch(inputs, jnp.arange(8) % 3)
    _, optimizer, loss, _, phi_params = make_problem()
    theta = adalfl_jax.Theta.create(params, (), optimizer)
    model = Model(lambda key: (params, ()), apply)
    estimated, exact = (
        ravel_pytree(
            estimate(each, model, loss, optimizer, theta, phi_params, adalfl_jax.BilevelBatch(batch, batch)).gradient
        )[0]
        for each in (name, "forward")
    )
    assert relative_error(estimated, exact) < 1e-3


@pytest.mark.parametrize("model_name", ["batch_norm", pytest.param("dropout", marks=pytest.mark.slow)])
def test_in_single_precision_a_hundredth_is_never_reached(model_name):
    *estimates, exact = gradients(["finite_difference", "central_difference", "forward"], model_name)
    for each in estimates:
        assert relative_error(each, exact) < 1e-2


@pytest.mark.parametrize("name", ["finite_difference", "central_difference"])
@pytest.mark.parametrize("kind", ["update of a frozen layer", "log-probabilities", "saturating"])
def test_a_model_that_starts_from_zero_has_its_gradient_from_the_first_step_on(kind, name):
    """Its outputs do not get small with its parameters, and a share of these would drown in their rounding."""
    key = jax.random.key(0)
    frozen = 3 * jax.random.normal(key, (6, 3))
    outputs = {
        "update of a frozen layer": lambda params, inputs: inputs @ (frozen + params),
        "log-probabilities": lambda params, inputs: jax.nn.log_softmax(inputs @ params),
        "saturating": lambda params, inputs: 5 * jnp.tanh(inputs @ params),
    }[kind]
    model = Model(
        lambda key: (jnp.zeros((6, 3)), ()), lambda params, state, inputs, **_: (outputs(params, inputs), state)
    )
    loss, optimizer = adalfl_jax.LossNetwork(), optax.sgd(0.01)
    phi_params, batch = loss.init(key), adalfl_jax.Batch(jax.random.normal(key, (16, 6)), jnp.arange(16) % 3)
    theta = adalfl_jax.Theta.create(jnp.zeros((6, 3)), (), optimizer)

    @jax.jit
    def both(theta):
        given = model, loss, optimizer, theta, phi_params, adalfl_jax.BilevelBatch(batch, batch)
        estimated, exact = (estimate(each, *given) for each in (name, "forward"))
        return exact.theta, [ravel_pytree(each.gradient)[0] for each in (estimated, exact)]

    for _ in range(3):
        theta, (estimated, exact) = both(theta)
        assert relative_error(estimated, exact) < 2e-2


@pytest.mark.parametrize("name", ["finite_difference", "central_difference"])
def test_where_nothing_moves_the_gradient_is_zero(name):
    model, _, loss, theta, phi_params = make_problem()
    still = optax.set_to_zero()
    theta = theta._replace(opt_state=still.init(theta.params))
    result = estimate(name, model, loss, still, theta, phi_params, make_batch(jax.random.key(1)))
    atol = 0.0 if jax.default_backend() == "cpu" else 1e-8  # a GPU may compile the losses of one point differently
    np.testing.assert_allclose(ravel_pytree(result.gradient)[0], 0.0, atol=atol)


@pytest.mark.parametrize("name", DIFFERENCES)
@pytest.mark.parametrize("where", ["inside", "outputs", "parameters"])
def test_numbers_of_16_bits_are_refused(name, where):
    _, optimizer, loss, theta, phi_params = make_problem()
    plain = functionalize(
        lambda rngs: MODELS["plain"](rngs), compute_dtype="bfloat16" if where == "inside" else "float32"
    )
    dtype = jnp.bfloat16

    def apply_fn(*arguments, **keywords):
        outputs, model_state = jax.jit(functools.partial(plain.apply, **keywords))(*arguments)
        return outputs.astype(dtype if where == "outputs" else outputs.dtype), model_state

    if where == "parameters":
        dtype = jnp.float16
        theta = theta._replace(params=jax.tree.map(lambda leaf: leaf.astype(dtype), theta.params))
    batch = make_batch(jax.random.key(1))
    problem = adalfl_jax.hypergradient.BilevelProblem(apply_fn, loss.apply, softmax_cross_entropy, optimizer)
    with pytest.raises(ValueError, match=rf"'{name}' takes differences.*got {dtype.__name__} among.*\"forward\""):
        adalfl_jax.make_estimator(name)(problem, theta, phi_params, batch)


@pytest.mark.parametrize(
    "optimizer",
    [optax.sgd(0.3, momentum=0.9, accumulator_dtype=jnp.float32), optax.adam(0.03, eps=0.1, mu_dtype=jnp.float32)],
    ids=["momentum", "adam"],
)
@pytest.mark.parametrize("options", [{}, {"pipelined": True}], ids=["forward", "pipelined"])
def test_an_optimiser_may_compute_in_wider_types_than_the_parameters(optimizer, options):
    """Those of bfloat16, whose updates are float32; the gradient is that of `unrolled`."""
    model, _, loss, theta, phi_params = make_problem()
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), theta.params)
    theta, outer = adalfl_jax.Theta.create(params, theta.model_state, optimizer), optax.sgd(1.0)
    phi, batch = adalfl_jax.Phi.create(phi_params, outer), make_batch(jax.random.key(1))
    batch = batch._replace(outer=batch.inner)
    stepped = []
    for settings in ({"hypergradient": "unrolled"}, options):
        step = jax.jit(
            adalfl_jax.make_bilevel_step(model.apply, loss.apply, softmax_cross_entropy, optimizer, outer, **settings)
        )
        after, updated, _ = step(theta, phi, batch)
        if settings.get("pipelined"):
            stepped.append(step(after, updated, batch)[1].params)
            continue
        chex.assert_trees_all_equal_dtypes(after.params, params)
        stepped.append(updated.params)
    exact, found = (ravel_pytree(optax.tree.sub(params, phi_params))[0] for params in stepped)
    np.testing.assert_allclose(found, exact, atol=0.1 * jnp.linalg.norm(exact))


@pytest.mark.parametrize("options", [{}, {"outer_every": 2}, {"pipelined": True}], ids=["plain", "every", "pipelined"])
def test_theta_of_few_bits_is_rounded_once_whatever_takes_the_step(options):
    model, _, loss, theta, phi_params = make_problem()
    optimizer = optax.adam(1e-2, mu_dtype=jnp.float32)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), theta.params)
    theta, outer = adalfl_jax.Theta.create(params, theta.model_state, optimizer), optax.sgd(1e-3)
    batch = make_batch(jax.random.key(1))._replace(step=0, rng_key=None)
    step = adalfl_jax.make_bilevel_step(model.apply, loss.apply, softmax_cross_entropy, optimizer, outer, **options)
    found, *_ = jax.jit(step)(theta, adalfl_jax.Phi.create(phi_params, outer), batch)
    frozen = adalfl_jax.FrozenLoss(loss, phi_params)
    expected, _ = jax.jit(adalfl_jax.make_task_step(model.apply, frozen, optimizer))(theta, batch.inner)
    chex.assert_trees_all_equal(found.params, expected.params)


BACKWARD_PASSES = {  # each fails elsewhere in JAX when it is transposed
    "clipped": lambda cotangent: jnp.clip(cotangent, -1, 1),
    "normalized": lambda cotangent: cotangent / jnp.linalg.norm(cotangent),
    "guided": lambda cotangent: jnp.where(cotangent > 0, cotangent, 0.5 * cotangent),
    "squared": lambda cotangent: cotangent * jnp.abs(cotangent),
}


@pytest.mark.parametrize("name", ["forward", "recompute"])
@pytest.mark.parametrize("backward", BACKWARD_PASSES)
def test_a_model_with_a_backward_pass_of_its_own_is_told_to_unroll(name, backward):
    model, optimizer, loss, theta, phi_params = make_problem()
    own = jax.custom_vjp(lambda values: values)
    own.defvjp(lambda values: (values, None), lambda _, cotangent: (BACKWARD_PASSES[backward](cotangent),))

    def apply_fn(*arguments, **keywords):
        outputs, model_state = model.apply(*arguments, **keywords)
        return own(outputs), model_state

    state = (model._replace(apply=apply_fn), loss, optimizer, theta, phi_params, make_batch(jax.random.key(1)))
    with pytest.raises(NotImplementedError, match=rf"'{name}' needs forward-mode.*custom_vjp.*unrolled"):
        estimate(name, *state)
    assert optax.tree.norm(estimate("unrolled", *state).gradient) > 0


def test_a_backward_pass_that_cannot_be_transposed_is_told_with_the_reason_and_recomputed():
    _, optimizer, loss, _, phi_params = make_problem()
    sizes = jnp.array([3, 5])  # rows of each expert
    experts = jnp.repeat(jnp.arange(2), sizes)

    def ragged(params, model_state, inputs, **_):
        return jax.lax.ragged_dot(inputs, params, sizes), model_state

    def dense(params, model_state, inputs, **_):
        return jnp.einsum("bi,bio->bo", inputs, params[experts]), model_state

    params, inputs = jax.random.normal(jax.random.key(0), (2, 6, 4)), jax.random.normal(jax.random.key(1), (8, 6))
    theta, part = adalfl_jax.Theta.create(params, (), optimizer), (inputs, jnp.arange(8) % 4)
    batch = adalfl_jax.BilevelBatch(part, part)

    def gradient(name, apply_fn):
        model = Model(lambda key: (params, ()), apply_fn)
        return estimate(name, model, loss, optimizer, theta, phi_params, batch).gradient

    with pytest.raises(NotImplementedError, match=r'with hypergradient="recompute" or "unrolled" \(JAX: Unimplemented'):
        gradient("forward", ragged)
    chex.assert_trees_all_close(gradient("recompute", ragged), gradient("forward", dense), rtol=1e-4, atol=1e-7)


@jax.custom_vjp
def sealed(values):
    return values


sealed.defvjp(lambda values: (sealed(values), None), lambda _, cotangent: (cotangent,))


@pytest.mark.parametrize("name", ["mixed_mode", "neumann", "conjugate_gradient"])
def test_a_forward_pass_without_a_derivative_is_told_to_unroll(name):
    model, optimizer, loss, theta, phi_params = make_problem()

    def apply_fn(*arguments, **keywords):
        outputs, model_state = model.apply(*arguments, **keywords)
        return sealed(outputs), model_state

    with pytest.raises(NotImplementedError, match=rf"'{name}' needs forward-mode.*custom_vjp.*unrolled"):
        estimate(
            name, model._replace(apply=apply_fn), loss, optimizer, theta, phi_params, make_batch(jax.random.key(1))
        )


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("name", "power", "error"), [("finite_difference", 2, 1), ("central_difference", 3, 2)])
def test_on_a_power_the_error_is_the_one_term_that_is_left(name, power, error):
    """(t + hw)^2 leaves h w^2 of a one-sided difference, (t +- hw)^3 leaves h^2 w^3 of a central one."""
    params, direction = jnp.asarray([0.3, -2.0]), jnp.asarray([1.5, 0.7])
    point = one_step.Linearization(lambda params: params**power, params, params**power, None)
    step = one_step._difference_step(point, direction, order=error)
    quotient = adalfl_jax.make_estimator(name).jacobian_product(point, direction)
    derivative = power * params ** (power - 1) * direction
    rounding = 10 * float(jnp.finfo(float).eps / step)
    np.testing.assert_allclose(quotient - derivative, step**error * direction**power, rtol=0, atol=rounding)
    assert jnp.abs(quotient - derivative).max() > 1e-12
