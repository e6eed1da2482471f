"""Finite differences of the outputs: the order of their error, its size at the step they choose, what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from adalfl_jax.hypergradient import one_step
from adalfl_jax.models import functionalize
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
@pytest.mark.parametrize("model_name", ["batch_norm", "dropout"])
def test_in_double_precision_the_step_is_chosen_well(model_name):
    one_sided, central, exact = gradients(["finite_difference", "central_difference", "forward"], model_name)
    assert 0 < relative_error(one_sided, exact) < 1e-6
    assert 0 < relative_error(central, exact) < 1e-8


@pytest.mark.parametrize("model_name", ["batch_norm", pytest.param("dropout", marks=pytest.mark.slow)])
def test_in_single_precision_a_hundredth_is_never_reached(model_name):
    *estimates, exact = gradients(["finite_difference", "central_difference", "forward"], model_name)
    for each in estimates:
        assert relative_error(each, exact) < 1e-2


@pytest.mark.parametrize("name", ["finite_difference", "central_difference"])
def test_where_nothing_moves_the_gradient_is_zero(name):
    model, _, loss, theta, phi_params = make_problem()
    still = optax.set_to_zero()
    theta = theta._replace(opt_state=still.init(theta.params))
    result = estimate(name, model, loss, still, theta, phi_params, make_batch(jax.random.key(1)))
    assert not ravel_pytree(result.gradient)[0].any()


@pytest.mark.parametrize("name", ["finite_difference", "central_difference"])
def test_outputs_of_16_bits_are_refused(name):
    _, optimizer, loss, theta, phi_params = make_problem()
    model = functionalize(lambda rngs: MODELS["plain"](rngs))

    def apply_fn(*arguments, **keywords):
        outputs, model_state = model.apply(*arguments, **keywords)
        return outputs.astype(jnp.bfloat16), model_state

    with pytest.raises(ValueError, match=r"parameters and outputs of 32 bits or more; got bfloat16.*forward"):
        estimate(
            name, model._replace(apply=apply_fn), loss, optimizer, theta, phi_params, make_batch(jax.random.key(1))
        )
