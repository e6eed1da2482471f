"""A learned loss with bounds on its gradient: the direction is M's, the length is within them."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import adalfl_jax
from adalfl_jax.task_losses import softmax_cross_entropy, squared_error
from adalfl_jax.training import ConfigError
from adalfl_jax.training.setup import make_setup
from tests.hypergradient.reference import assert_relative, estimate, finite_differences
from tests.problems import make_batch, make_problem
from tests.training.tiny import tiny_config

NETWORK = adalfl_jax.LossNetwork(hidden_sizes=(3,))
TARGETS = jnp.array([0, 2, 1, 1])
BOUNDS = ((1.0, 1.0), (0.5, 0.5), (0.0, 0.01), (100.0, None), (0.01, 100.0), (0.0, None))
OUTPUTS = jnp.array([[0.5, -1.0, 0.2], [2.0, 0.1, -0.3], [-0.4, 1.3, 0.0], [0.0, 0.6, 1.7]])


def gradient(loss, phi_params, targets=TARGETS, outputs=OUTPUTS):
    return jax.jit(jax.grad(lambda outputs: loss.apply(phi_params, targets, outputs)))(outputs)


def test_its_gradient_has_the_direction_of_m_and_a_length_within_the_bounds():
    phi_params = NETWORK.init(jax.random.key(0))

    @jax.jit
    def measure():
        own, task = gradient(NETWORK, phi_params), jax.grad(lambda f: softmax_cross_entropy(TARGETS, f))(OUTPUTS)
        found = [gradient(adalfl_jax.RescaledLoss(NETWORK, floor=a, ceiling=b), phi_params) for a, b in BOUNDS]
        norm = jnp.linalg.norm
        lengths = jnp.stack([norm(one) for one in [own, *found]]) / norm(task)
        return lengths, jnp.stack([jnp.vdot(one, own) / (norm(one) * norm(own)) for one in found])

    (own, *ratios), cosines = measure()
    assert 0.01 < own < 100
    np.testing.assert_allclose(ratios, [1.0, 0.5, 0.01, 100.0, own, own], rtol=1e-5)
    np.testing.assert_allclose(cosines, 1.0, rtol=1e-6)


def test_bounds_hold_for_outputs_of_few_bits():
    """Squares of gradients that are small in float16 are zero there."""
    phi_params, targets = NETWORK.init(jax.random.key(0)), jnp.arange(100)
    outputs = jax.random.normal(jax.random.key(1), (100, 100)).astype(jnp.float16)
    own = gradient(adalfl_jax.RescaledLoss(NETWORK, floor=1.0, ceiling=1.0), phi_params, targets, outputs)
    task = jax.jit(jax.grad(lambda outputs: softmax_cross_entropy(targets, outputs)))(outputs)
    assert own.dtype == jnp.float16
    assert jnp.linalg.norm(own.astype(float)) / jnp.linalg.norm(task.astype(float)) == pytest.approx(1, rel=0.03)


@pytest.mark.parametrize("scale", [1e-4, 1e-6, 1e-8])
def test_a_gradient_that_float16_hardly_holds_is_rescaled_and_has_finite_derivatives(scale):
    phi_params = jax.tree.map(lambda leaf: scale ** (1 / 3) * leaf, NETWORK.init(jax.random.key(0)))
    loss, outputs = adalfl_jax.RescaledLoss(NETWORK, floor=1.0, ceiling=1.0), OUTPUTS.astype(jnp.float16)

    def length(phi_params):
        own = jax.grad(lambda outputs: loss.apply(phi_params, TARGETS, outputs))(outputs)
        return jnp.linalg.norm(own.astype(float))

    found, derivative = jax.jit(jax.value_and_grad(length))(phi_params)
    task = jax.grad(lambda outputs: softmax_cross_entropy(TARGETS, outputs))(OUTPUTS)
    assert found == pytest.approx(float(jnp.linalg.norm(task)), rel=2e-3)
    chex.assert_tree_all_finite(derivative)


def test_without_bounds_it_is_m():
    phi_params = NETWORK.init(jax.random.key(0))
    assert adalfl_jax.RescaledLoss(NETWORK).apply(phi_params, TARGETS, OUTPUTS) == NETWORK.apply(
        phi_params, TARGETS, OUTPUTS
    )


@pytest.mark.parametrize(("floor", "ceiling"), BOUNDS)
@pytest.mark.parametrize("output", [-80.0, -84.0, -86.0, -120.0])
def test_losses_and_meta_gradients_are_finite_where_m_is_saturated_and_the_task_loss_is_not(floor, ceiling, output):
    """The gradient of the task loss is up to 1e38 times as long, or M has none at all."""
    network = adalfl_jax.LossNetwork(hidden_sizes=(3,), predictions="sigmoid")
    loss = adalfl_jax.RescaledLoss(network, squared_error, floor, ceiling)
    targets, outputs = jnp.ones((8, 1)), jnp.full((8, 1), output)

    def along(phi_params):
        value, found = jax.value_and_grad(lambda outputs: loss.apply(phi_params, targets, outputs))(outputs)
        return found.sum(), value

    found = jax.jit(jax.value_and_grad(along, has_aux=True))(network.init(jax.random.key(0)))
    chex.assert_tree_all_finite(found)


def test_the_progress_that_m_needs_is_asked_for():
    @dataclasses.dataclass(frozen=True)
    class Fading:
        def init(self, rng_key):
            return NETWORK.init(rng_key)

        def apply(self, phi_params, targets, outputs, *, progress):
            return (1 - progress) * NETWORK.apply(phi_params, targets, outputs)

    loss, phi_params = adalfl_jax.RescaledLoss(Fading(), floor=0.5), NETWORK.init(jax.random.key(0))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"the loss reads `progress`, .*or the loss a default for it; got None"):
        loss.apply(phi_params, TARGETS, OUTPUTS)
    chex.assert_tree_all_finite(loss.apply(phi_params, TARGETS, OUTPUTS, progress=0.5))


@pytest.mark.usefixtures("float64")
def test_bounds_hold_for_gradients_whose_squares_are_no_numbers():
    """In float32 their squares are zero or infinite; the meta-gradient is the one that float64 has."""

    @dataclasses.dataclass(frozen=True)
    class Scaled:
        init = NETWORK.init

        def apply(self, phi, targets, outputs):
            return jnp.exp(phi["log_scale"]) * NETWORK.apply(phi["params"], targets, outputs)

    loss = adalfl_jax.RescaledLoss(Scaled(), floor=1.0, ceiling=1.0)  # pyright: ignore[reportArgumentType]

    @jax.jit
    def measure(log_scale, params, outputs):
        def along(params):
            found = gradient(loss, {"log_scale": log_scale, "params": params}, outputs=outputs)
            return (jnp.cos(jnp.arange(12, dtype=found.dtype)) * found.ravel()).sum(), jnp.linalg.norm(found)

        task = jnp.linalg.norm(jax.grad(lambda f: softmax_cross_entropy(TARGETS, f))(outputs))
        meta_gradient, length = jax.grad(along, has_aux=True)(params)
        return length / task, ravel_pytree(meta_gradient)[0]

    for log_scale in (-60.0, -40.0, 40.0, 60.0):
        given = (jnp.array(log_scale), NETWORK.init(jax.random.key(0)), OUTPUTS)
        (ratio, meta_gradient), (exact, expected) = (
            measure(*jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), given))
            for dtype in (jnp.float32, jnp.float64)
        )
        assert meta_gradient.dtype == jnp.float32
        assert float(ratio) == pytest.approx(1, rel=1e-5)
        assert float(exact) == pytest.approx(1, rel=1e-12)
        np.testing.assert_allclose(meta_gradient, expected, rtol=1e-3, atol=1e-4 * float(jnp.abs(expected).max()))


def test_bounds_that_do_not_hold_change_nothing_at_all():
    phi_params = NETWORK.init(jax.random.key(0))
    loose = adalfl_jax.RescaledLoss(NETWORK, floor=1e-3, ceiling=1e3)

    @functools.partial(jax.jit, static_argnums=0)
    def both(loss):
        found, pullback = jax.vjp(lambda phi_params: gradient(loss, phi_params), phi_params)
        return found, pullback(OUTPUTS)

    chex.assert_trees_all_close(both(loose), both(NETWORK), rtol=1e-6)


def held_outer_loss(model, loss, theta, phi_params, batch, num_steps):
    """phi -> L after the steps, the factor of each taken at the outputs of the path that `phi_params` itself takes."""

    def path(phi, held):
        params, seen = theta.params, []
        for step in range(num_steps):
            inputs, targets = jax.tree.map(lambda leaf, k=step: leaf[k], batch.inner)

            def outputs_of(params, inputs=inputs):
                return model.apply(params, {}, inputs, train=True, rng_key=None)[0]

            outputs, pullback = jax.vjp(outputs_of, params)
            seen.append(outputs)
            at = outputs if held is None else held[step]
            length = jnp.linalg.norm(gradient(loss.loss, phi, targets, at))
            wanted = jnp.linalg.norm(jax.grad(lambda f, y=targets: softmax_cross_entropy(y, f))(at))
            factor = jnp.clip(length, loss.floor * wanted, loss.ceiling * wanted) / length
            descent = pullback(factor * gradient(loss.loss, phi, targets, outputs))[0]
            params = optax.apply_updates(params, optax.tree.scale(-0.3, descent))
        outer = model.apply(params, {}, batch.outer.inputs, train=True, rng_key=None)[0]
        return softmax_cross_entropy(batch.outer.targets, outer), seen

    _, held = jax.jit(lambda phi: path(phi, None))(phi_params)
    return lambda phi: path(phi, held)[0]


@pytest.mark.usefixtures("float64")
def test_a_meta_gradient_through_one_step_is_exact():
    """With one step nothing is held: the outputs that the factor is taken at do not depend on phi."""
    assert_gradients_equal_finite_differences(["forward"], num_steps=1)


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
def test_through_several_steps_each_factor_is_held_while_theta_moves():
    assert_gradients_equal_finite_differences(["unrolled", "mixed_mode"], num_steps=2)


def assert_gradients_equal_finite_differences(names, num_steps):
    loss = adalfl_jax.RescaledLoss(NETWORK, floor=1.0, ceiling=1.0)
    model, optimizer, _, theta, phi_params = make_problem(loss=loss)
    batch = make_batch(jax.random.key(1), num_inner_steps=num_steps)
    reference = held_outer_loss(model, loss, theta, phi_params, batch, num_steps)
    expected = finite_differences(reference, phi_params, step=1e-6)
    if num_steps == 1:
        batch = batch._replace(inner=jax.tree.map(lambda leaf: leaf[0], batch.inner))
    for name in names:
        result = estimate(name, model, loss, optimizer, theta, phi_params, batch)
        assert_relative(ravel_pytree(result.gradient)[0], expected)


@pytest.mark.usefixtures("float64")
def test_phi_cannot_learn_a_scale():
    """Of a factor on all of M the meta-gradient is zero where the length is set, and is not without bounds."""

    class Scaled(adalfl_jax.LossNetwork):
        def apply(self, phi_params, targets, outputs):
            return jnp.exp(phi_params["log_scale"]) * super().apply(phi_params["network"], targets, outputs)

        def init(self, rng_key):
            return {"log_scale": jnp.zeros(()), "network": super().init(rng_key)}

    found = {}
    for name, loss in {
        "free": Scaled((3,)),
        "set": adalfl_jax.RescaledLoss(Scaled((3,)), floor=1.0, ceiling=1.0),
    }.items():
        model, optimizer, _, theta, phi_params = make_problem(loss=loss)
        result = estimate("forward", model, loss, optimizer, theta, phi_params, make_batch(jax.random.key(1)))
        found[name] = result.gradient
    assert abs(found["free"]["log_scale"]) > 1e-4
    assert abs(found["set"]["log_scale"]) < 1e-15
    assert optax.tree.norm(found["set"]["network"]) > 1e-5


@pytest.mark.parametrize("bound", [1.0, 2.0])
def test_a_length_that_is_set_has_no_derivative_where_it_is_that_of_the_loss_itself(bound):
    loss = adalfl_jax.RescaledLoss(adalfl_jax.ScaledTaskLoss(), floor=bound, ceiling=bound)
    targets, outputs = jnp.array([0, 2]), jnp.array([[0.3, -1.0, 0.2], [1.0, 0.1, -0.4]])
    by_scale = jax.jit(jax.jacfwd(lambda scale: gradient(loss, {"log_scale": scale}, targets, outputs)))
    for log_scale in (0.0, 0.1):
        np.testing.assert_allclose(by_scale(jnp.float32(log_scale)), 0, atol=1e-6)


def test_a_flat_loss_stays_flat_and_has_finite_derivatives():
    loss = adalfl_jax.RescaledLoss(NETWORK, floor=1.0, ceiling=1.0)
    flat = jax.tree.map(jnp.zeros_like, NETWORK.init(jax.random.key(0)))
    np.testing.assert_array_equal(gradient(loss, flat), 0.0)
    biased = adalfl_jax.LossNetwork(hidden_sizes=(4,), use_bias=True)
    constant = jax.tree.map(jnp.zeros_like, biased.init(jax.random.key(0)))
    constant["layer_1"]["bias"] += 3.0
    bounded = adalfl_jax.RescaledLoss(biased, floor=2.0, ceiling=2.0)
    value = biased.apply(constant, TARGETS, OUTPUTS)
    assert value != 0
    np.testing.assert_array_equal(bounded.apply(constant, TARGETS, OUTPUTS), value)
    by_phi = jax.jit(jax.grad(lambda phi_params: jnp.vdot(gradient(loss, phi_params), OUTPUTS)))
    chex.assert_tree_all_finite(by_phi(flat))


class Regularizer:
    def init(self, rng_key):
        return jnp.zeros(())

    def apply(self, phi_params, targets, outputs, *, params):
        return jnp.exp(phi_params) * optax.tree.norm(params)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"floor": -1.0}, r"floor must be a number of at least 0; got -1.0"),
        ({"floor": float("inf")}, r"floor must be a number of at least 0; got inf"),
        ({"floor": "1"}, r"floor must be a number of at least 0; got '1'"),
        ({"floor": 2.0, "ceiling": 1.0}, r"ceiling must be no less than floor, 2.0; got 1.0"),
        ({"ceiling": 0.0}, r"ceiling must be a number above 0; got 0.0"),
        ({"loss": NETWORK.apply}, r"loss must be a learned loss with init and apply, as .*; got <bound method"),
        ({"loss": Regularizer()}, r"loss must not read theta \(keyword argument `params`\) to be rescaled; got <"),
        ({"task_loss": "hubert"}, r"unknown task loss 'hubert'; did you mean 'huber'"),
    ],
)
def test_bounds_out_of_their_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        adalfl_jax.RescaledLoss(**{"loss": NETWORK} | settings)


@pytest.mark.parametrize("family", [adalfl_jax.RescaledLoss, adalfl_jax.ScaledTaskLoss])
def test_a_task_loss_without_a_name_is_taken_and_cannot_be_saved(family, tmp_path):
    settings = {"loss": NETWORK, "floor": 2.0} if family is adalfl_jax.RescaledLoss else {}
    targets, outputs = jax.random.normal(jax.random.key(0), (2, 6, 3))
    own, named = (
        family(task_loss=task_loss, **settings)
        for task_loss in (lambda targets, outputs: squared_error(targets, outputs), "squared_error")
    )
    phi_params = own.init(jax.random.key(1))
    np.testing.assert_array_equal(*(jax.jit(loss.apply)(phi_params, targets, outputs) for loss in (own, named)))
    with pytest.raises(ValueError, match=rf"a {family.__name__} can be saved with a task loss that has a name"):
        adalfl_jax.save_learned_loss(tmp_path / "loss.safetensors", own, phi_params)
    adalfl_jax.save_learned_loss(tmp_path / "loss.safetensors", named, phi_params)


def test_a_configuration_bounds_any_family():
    for family in ("network", "scaled_task_loss", "weight_network"):
        setup = make_setup(tiny_config({"learned_loss.family": family, "learned_loss.ceiling": 2.0}))
        assert isinstance(setup.learned_loss, adalfl_jax.RescaledLoss)
        assert (setup.learned_loss.floor, setup.learned_loss.ceiling) == (0.0, 2.0)
    assert make_setup(tiny_config({"learned_loss.floor": 2.0})).learned_loss.ceiling is None
    assert isinstance(make_setup(tiny_config()).learned_loss, adalfl_jax.LossNetwork)
    with pytest.raises(ConfigError, match=r"learned_loss\.ceiling must be .* than the floor; got 1\.0"):
        tiny_config({"learned_loss.floor": 2.0, "learned_loss.ceiling": 1.0})
