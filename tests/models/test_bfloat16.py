"""Computing in bfloat16, with parameters in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from adalfl_jax.hypergradient.problem import equations
from adalfl_jax.models import MODELS, make_model
from tests.models.zoo import (
    assert_close,
    bilevel_step,
    random_images,
    random_variables,
    smallest_shape,
)


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_reaches_every_layer(name):
    """Batch norm must not promote what follows it to the float32 of its statistics."""
    model = make_model(name, smallest_shape(name), 3, compute_dtype="bfloat16")
    variables = jax.eval_shape(model.init, jax.random.key(0))
    num_kernels = sum(path[-1].key == "kernel" for path, _ in jax.tree.leaves_with_path(variables))
    for train in (True, False):
        apply = functools.partial(model.apply, train=train, rng_key=jax.random.key(1))
        jaxpr = jax.make_jaxpr(apply)(*variables, jax.ShapeDtypeStruct((2, *smallest_shape(name)), jnp.float32))
        products = [
            equation for equation in equations(jaxpr.jaxpr) if equation.primitive.name in ("convolution", "dot_general")
        ]
        assert len(products) == num_kernels
        assert {variable.aval.dtype.name for equation in products for variable in equation.invars} == {"bfloat16"}


def test_bfloat16_leaves_parameters_statistics_losses_and_gradients_in_float32():
    for leaf in jax.tree.leaves(bilevel_step("forward", compute_dtype="bfloat16")):
        assert leaf.dtype == jnp.float32


def test_bfloat16_outputs_are_near_those_of_float32():
    outputs, states = {}, {}
    for compute_dtype in ("bfloat16", "float32"):
        model = make_model("wide_resnet", (8, 8, 3), 3, depth=10, width=1, compute_dtype=compute_dtype)
        apply = jax.jit(functools.partial(model.apply, train=True, rng_key=None))
        outputs[compute_dtype], states[compute_dtype] = apply(
            *random_variables(model), random_images((8, 8, 3), batch_size=32)
        )
        assert outputs[compute_dtype].dtype == jnp.float32
    assert not np.array_equal(outputs["bfloat16"], outputs["float32"])
    assert_close(outputs["bfloat16"], outputs["float32"], 3e-2)
    assert_close(states["bfloat16"], states["float32"], 3e-2)


def test_the_meta_gradient_in_bfloat16_points_where_that_in_float32_does():
    steps = bilevel_step("forward", compute_dtype="bfloat16"), bilevel_step("forward")
    half, full = (ravel_pytree(hypergradient)[0] for *_, hypergradient in steps)
    assert half @ full > 0.99 * jnp.linalg.norm(half) * jnp.linalg.norm(full)
    assert not np.array_equal(half, full)
