"""A loss that starts as the task loss."""

import functools

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from adalfl_jax import LossNetwork, fit_to_task_loss
from adalfl_jax.fitting import draw_targets_and_outputs
from adalfl_jax.task_losses import softmax_cross_entropy, squared_error


@functools.partial(jax.jit, static_argnums=0)
def gradient(loss_fn, targets, outputs):
    return jax.grad(lambda f: loss_fn(targets, f))(outputs).ravel()


@pytest.mark.parametrize(
    ("task_loss", "predictions", "is_classification", "cosine"),
    [(softmax_cross_entropy, "probabilities", True, 0.93), (squared_error, "raw", False, 0.97)],
)
def test_a_fitted_loss_has_the_gradients_of_the_task_loss(task_loss, predictions, is_classification, cosine):
    loss = LossNetwork(hidden_sizes=(20, 20), use_bias=True, predictions=predictions)
    options = {"is_classification": is_classification}
    start = loss.init(jax.random.key(0))
    fitted = jax.jit(
        lambda params, key: fit_to_task_loss(
            loss, params, task_loss, key, num_outputs=4, num_steps=700, batch_size=64, **options
        )
    )(start, jax.random.key(1))
    targets, outputs = draw_targets_and_outputs(jax.random.key(2), 500, 4, **options)
    expected = gradient(task_loss, targets, outputs)
    found = gradient(lambda y, f: loss.apply(fitted, y, f), targets, outputs)
    before = gradient(lambda y, f: loss.apply(start, y, f), targets, outputs)
    assert found @ expected > cosine * jnp.linalg.norm(found) * jnp.linalg.norm(expected)
    assert jnp.linalg.norm(found - expected) < 0.5 * jnp.linalg.norm(before - expected)


def per_example(targets, outputs):
    return jnp.square(outputs).sum(axis=1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"loss": LossNetwork().apply}, r"^loss must be a learned loss with init and apply, as .*; got <bound method"),
        ({"loss": LossNetwork}, r"got <class '.*LossNetwork'>"),
        ({"phi_params": LossNetwork()}, r"^phi_params must be parameters, as loss\.init makes; got LossNetwork"),
        ({"phi_params": {"scale": 1}}, r"^phi_params\['scale'\] is int32, which has no gradient; make it floats$"),
        ({"task_loss_fn": "squared_error"}, r"^task_loss_fn must be a function; got 'squared_error'; adalfl_jax"),
        ({"task_loss_fn": lambda outputs: 0.0}, r"^task_loss_fn is called as task_loss_fn\(targets, outputs\)"),
        ({"task_loss_fn": lambda logits, labels: 0.0}, r"named the other way round, logits before labels"),
        ({"task_loss_fn": per_example}, r"task_loss_fn must return one float, .*; got .*float32\[256\]"),
        ({"task_loss_fn": lambda a, b: optax.softmax_cross_entropy_with_integer_labels(a, b).mean()}, "does not take"),
        ({"task_loss_fn": lambda t, o: optax.l2_loss(o, t).mean()}, "a loss does not take .*; is_classification says"),
        ({"task_loss_fn": lambda t, o: (o.argmax(-1) == t).mean()}, "^task_loss_fn has a gradient of 0 by .*to fit$"),
        ({"task_loss_fn": lambda targets, outputs: targets.max()}, r"task_loss_fn must return one float, .*int32\[\]"),
        ({"task_loss_fn": lambda targets, outputs: jnp.sqrt(outputs).mean()}, "^task_loss_fn has no finite gradient"),
        (
            {"is_classification": False},
            r"a loss does not take .*is_classification .*: targets must be from 0 to 1; got some from -",
        ),
        ({"rng_key": 0}, r"^rng_key must be one key, as jax\.random\.key\(0\) makes; got 0$"),
    ],
)
def test_what_cannot_be_fitted_is_told(changed, message):
    loss = LossNetwork()
    given = {
        "loss": loss,
        "phi_params": loss.init(jax.random.key(0)),
        "task_loss_fn": softmax_cross_entropy,
        "rng_key": jax.random.key(0),
    }
    with pytest.raises(ValueError, match=message):
        fit_to_task_loss(**given | changed, num_outputs=3)


@pytest.mark.parametrize(
    "setting",
    [
        {"num_outputs": 0},
        {"num_steps": 0},
        {"batch_size": 2.5},
        {"learning_rate": -1.0},
        {"is_classification": "regression"},
    ],
)
def test_settings_out_of_their_range_are_refused(setting):
    (name, value), *_ = setting.items()
    loss = LossNetwork()
    with pytest.raises(ValueError, match=rf"^{name} must be .*; got {value!r}"):
        fit_to_task_loss(
            loss,
            loss.init(jax.random.key(0)),
            softmax_cross_entropy,
            jax.random.key(0),
            **{"num_outputs": 3} | setting,
        )


@pytest.mark.parametrize(("num_outputs", "labels"), [(1, [0, 1]), (3, [0, 1, 2])])
def test_every_class_is_drawn_and_a_single_output_has_two(num_outputs, labels):
    targets, _ = draw_targets_and_outputs(jax.random.key(0), 64, num_outputs, is_classification=True)
    assert jnp.unique(targets).tolist() == labels


def test_a_fit_is_adam_on_fresh_draws_at_a_rate_that_falls():
    loss, num_steps, size = LossNetwork(hidden_sizes=(2,)), 3, 4
    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, num_steps))

    def mismatch(phi_params, rng_key):
        targets, outputs = draw_targets_and_outputs(rng_key, size, 3, is_classification=True)
        learned = jax.grad(loss.apply, argnums=2)(phi_params, targets, outputs)
        return size * ((learned - jax.grad(softmax_cross_entropy, argnums=1)(targets, outputs)) ** 2).sum()

    @jax.jit
    def by_hand(phi_params, rng_key):
        def step(carry, key):
            phi_params, state = carry
            updates, state = optimizer.update(jax.grad(mismatch)(phi_params, key), state)
            return (optax.apply_updates(phi_params, updates), state), None

        start = phi_params, optimizer.init(phi_params)
        return jax.lax.scan(step, start, jax.random.split(rng_key, num_steps))[0][0]

    start, key = loss.init(jax.random.key(0)), jax.random.key(1)
    settings = {"num_outputs": 3, "num_steps": num_steps, "batch_size": size, "learning_rate": 0.1}
    found = jax.jit(lambda *given: fit_to_task_loss(loss, given[0], softmax_cross_entropy, given[1], **settings))
    chex.assert_trees_all_close(found(start, key), by_hand(start, key), rtol=1e-4, atol=1e-5)


def test_a_fit_leaves_the_weights_of_progress_at_zero():
    loss = LossNetwork(hidden_sizes=(2,), use_progress=True)
    start, settings = loss.init(jax.random.key(0)), {"num_outputs": 3, "num_steps": 2, "batch_size": 4}
    fit = jax.jit(lambda *given: fit_to_task_loss(loss, given[0], softmax_cross_entropy, given[1], **settings))
    kernel = fit(start, jax.random.key(1))["layer_0"]["kernel"]
    assert not kernel[2].any()
    assert (kernel[:2] != start["layer_0"]["kernel"][:2]).any()
