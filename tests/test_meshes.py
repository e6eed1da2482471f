"""Steps under `jax.jit` on batches that two devices share, along axes that the compiler knows or that are typed."""

import functools

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import adalfl_jax
from adalfl_jax.models.convolution import convolve
from adalfl_jax.task_losses import softmax_cross_entropy

OPTIONS = {
    "forward": {},
    "recompute": {"hypergradient": "recompute"},
    "unrolled": {"hypergradient": "unrolled"},
    "neumann": {"hypergradient": "neumann"},
    "a part": {"meta_batch_fraction": 0.5},
    "pipelined": {"pipelined": True},
}


def apply_fn(params, model_state, inputs, *, train, rng_key):
    return jnp.tanh(inputs @ params["hidden"]) @ params["output"], model_state


def place(kind, examples, others):
    """The first divided by examples, the second whole on both devices."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(kind,))
    return (
        jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*axes)))
        for tree, axes in ((examples, ["data"]), (others, []))
    )


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *((AxisType.Explicit, name) for name in ("forward", "unrolled", "pipelined")),
        *(pytest.param(AxisType.Explicit, name, marks=pytest.mark.slow) for name in ("recompute", "neumann", "a part")),
        (AxisType.Auto, "forward"),
    ],
)
def test_a_step_on_two_devices_is_that_on_one(kind, name):
    loss, inner, outer = adalfl_jax.LossNetwork(hidden_sizes=(4,), use_bias=True), optax.sgd(0.1), optax.adam(1e-2)
    step = adalfl_jax.make_bilevel_step(apply_fn, loss.apply, softmax_cross_entropy, inner, outer, **OPTIONS[name])
    hidden_key, output_key, input_key, phi_key = jax.random.split(jax.random.key(0), 4)
    params = {"hidden": jax.random.normal(hidden_key, (5, 6)), "output": jax.random.normal(output_key, (6, 3))}
    inputs, targets = jax.random.normal(input_key, (2, 8, 5)), jnp.arange(8) % 3
    state = (
        adalfl_jax.Theta.create(params, (), inner),
        adalfl_jax.Phi.create(loss.init(phi_key), outer),
    )

    @jax.jit
    def two_steps(state, batch):  # the second of a pipelined step has something to finish
        theta, phi, _ = step(*state, batch)
        theta, phi, metrics = step(theta, phi, batch)
        return theta, phi._replace(carry=()), metrics

    batch = adalfl_jax.BilevelBatch((inputs[0], targets), (inputs[1], targets))
    divided, whole = place(kind, batch, state)
    chex.assert_trees_all_close(two_steps(whole, divided), two_steps(state, batch), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_a_convolution_on_two_devices_is_that_on_one(kind):
    images, kernel = (jax.random.normal(jax.random.key(0), shape) for shape in ((4, 6, 6, 2), (3, 3, 2, 3)))

    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def value_and_gradients(images, kernel):
        return jnp.sum(convolve(images, kernel, (1, 1), "SAME") ** 2)

    run = jax.jit(value_and_gradients)
    chex.assert_trees_all_close(run(*place(kind, images, kernel)), run(images, kernel), rtol=1e-5, atol=1e-5)
