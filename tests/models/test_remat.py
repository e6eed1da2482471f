"""Blocks that are computed again in the backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adalfl_jax.hypergradient.problem import equations
from adalfl_jax.models import MODELS, count_params, make_model, model_options
from adalfl_jax.task_losses import softmax_cross_entropy
from tests.models.zoo import WITH_BLOCKS, assert_close, bilevel_step, random_images, random_variables, smallest_shape


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "resnet" else pytest.mark.slow)
        for name in MODELS
        if "remat" in model_options(name)
    ],
)
def test_remat_puts_every_block_under_remat_and_keeps_little_for_the_backward_pass(name):
    """Of the program before XLA; on a CPU XLA's own order of work keeps as much memory in use with remat as without."""
    options = {"depth": 10, "width": 1} if name == "wide_resnet" else {}
    inputs = jax.ShapeDtypeStruct((8, *smallest_shape(name)), jnp.float32)
    kept = {}
    for remat in (False, True):
        model = make_model(name, smallest_shape(name), 3, remat=remat, **options)
        params, model_state = jax.eval_shape(model.init, jax.random.key(0))

        def outputs(params, model_state, inputs, model=model):
            return model.apply(params, model_state, inputs, train=True, rng_key=jax.random.key(1))[0]

        def pullback(params, *others, outputs=outputs):
            return jax.vjp(lambda params: outputs(params, *others), params)[1]  # a pytree of all it will need

        kept[remat] = count_params(jax.eval_shape(pullback, params, model_state, inputs)) - count_params(params)
    jaxpr = jax.make_jaxpr(outputs)(params, model_state, inputs)
    assert sum(equation.primitive.name == "remat2" for equation in equations(jaxpr.jaxpr)) == WITH_BLOCKS[name]
    assert kept[True] < kept[False] / 2


@pytest.mark.slow
def test_remat_adds_work_to_the_compiled_gradient():
    """That is, XLA does not merge the second computation of a block with the first."""
    work = {}
    for remat in (False, True):
        model = make_model("wide_resnet", (8, 8, 3), 3, depth=10, width=1, remat=remat)
        variables = jax.eval_shape(model.init, jax.random.key(0))

        def total(params, model_state, inputs, model=model):
            return model.apply(params, model_state, inputs, train=True, rng_key=None)[0].sum()

        inputs = jax.ShapeDtypeStruct((8, 8, 8, 3), jnp.float32)
        work[remat] = jax.jit(jax.grad(total)).lower(*variables, inputs).compile().cost_analysis()["flops"]
    assert 1.05 * work[False] < work[True] < 1.5 * work[False]


@pytest.mark.slow
def test_remat_changes_no_output_state_or_gradient_and_draws_the_same_dropout():
    results = []
    for remat in (False, True):
        model = make_model("allcnnc", smallest_shape("allcnnc"), 3, remat=remat)
        params, model_state = random_variables(model)
        inputs = random_images(smallest_shape("allcnnc"))

        def objective(params, rng_key, model=model, model_state=model_state, inputs=inputs):
            outputs, after = model.apply(params, model_state, inputs, train=True, rng_key=rng_key)
            return softmax_cross_entropy(np.arange(4) % 3, outputs), (outputs, after)

        measure = jax.jit(jax.value_and_grad(objective, has_aux=True))
        results.append(measure(params, jax.random.key(1)))
        other_key = measure(params, jax.random.key(2))
        assert not np.allclose(results[-1][0][1][0], other_key[0][1][0], rtol=1e-2)
    for part, expected in zip(results[1], results[0], strict=True):
        assert_close(part, expected, 1e-5)


@pytest.mark.parametrize("estimator", ["forward", pytest.param("unrolled", marks=pytest.mark.slow)])
def test_remat_changes_no_bilevel_step(estimator):
    for part, expected in zip(bilevel_step(estimator, remat=True), bilevel_step(estimator), strict=True):
        assert_close(part, expected, 1e-5)
