"""The convolution of the models, in all its forms, against the one of XLA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

from adalfl_jax.models.convolution import BAND_COLUMNS, PATCH_OUTPUTS, convolve
from adalfl_jax.models.layers import conv

NUMBERS = ("NHWC", "HWIO", "NHWC")
CASES = {  # inputs, kernel, strides, padding
    "first of LeNet-5": ((2, 28, 28, 1), (5, 5, 1, 6), (1, 1), "VALID"),
    "second of LeNet-5": ((2, 12, 12, 6), (5, 5, 6, 16), (1, 1), "VALID"),
    "stem": ((2, 32, 32, 3), (3, 3, 3, 64), (1, 1), ((1, 1), (1, 1))),
    "strided": ((2, 32, 32, 4), (3, 3, 4, 20), (2, 2), ((1, 1), (1, 1))),
    "band with strides": ((3, 9, 7, 2), (3, 2, 2, 5), (2, 3), ((1, 0), (2, 1))),
    "SAME": ((2, 8, 9, 2), (3, 4, 2, 40), (2, 1), "SAME"),
    "1x1": ((2, 16, 16, 8), (1, 1, 8, 24), (2, 2), "VALID"),
    "kernel as large as the image": ((2, 5, 5, 3), (5, 5, 3, 4), (1, 1), "VALID"),
}


def native(inputs, kernel, strides, padding):
    return jax.lax.conv_general_dilated(inputs, kernel, strides, padding, dimension_numbers=NUMBERS)


def draw(name):
    (inputs_shape, kernel_shape, *settings), rng = CASES[name], np.random.default_rng(0)
    arrays = [jnp.array(rng.normal(size=shape), jnp.float32) for shape in (inputs_shape, kernel_shape)] * 2
    ours, theirs = (
        functools.partial(function, strides=settings[0], padding=settings[1])
        for function in (functools.partial(convolve, dimension_numbers=NUMBERS), native)
    )
    return ours, theirs, arrays[:2], [jnp.flip(array) for array in arrays[2:]]


def test_cases_are_of_every_form():
    shapes = [native(*map(jnp.zeros, case[:2]), *case[2:]).shape[1:] for case in CASES.values()]
    wide = [height * width for height, width, num_out in shapes if width * num_out > BAND_COLUMNS]
    assert len(wide) < len(shapes)
    assert {size >= PATCH_OUTPUTS for size in wide} == {True, False}


@pytest.mark.parametrize("name", CASES)
def test_outputs_gradients_and_tangents_are_those_of_the_native_convolution(name):
    ours, theirs, primals, tangents = draw(name)

    def everything(function):
        outputs, pullback = jax.vjp(function, *primals)
        return outputs, pullback(jnp.cos(outputs)), jax.jvp(function, primals, tangents)[1]

    results = (jax.jit(functools.partial(everything, function))() for function in (ours, theirs))
    for mine, expected in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(mine, expected, rtol=1e-5, atol=1e-5 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ["second of LeNet-5", "strided"])
def test_products_have_the_precision_of_where_the_model_is_traced(name, platform):
    ours, _, primals, _ = draw(name)

    def within(precision, num_seeds):
        def differentiate(inputs, kernel):
            with jax.default_matmul_precision(precision):
                return jax.grad(lambda *arrays: (ours(*arrays) ** 2).sum(), (0, 1))(inputs, kernel)

        many = [jnp.stack([array] * num_seeds) for array in primals]
        text = jax.jit(jax.vmap(differentiate)).trace(*many).lower(lowering_platforms=(platform,)).as_text()
        lines = [line for line in text.splitlines() if "dot_general" in line or "stablehlo.convolution" in line]
        return [line.count("HIGHEST") == 2 for line in lines]

    for num_seeds in (1, 2):
        assert len(within("highest", num_seeds)) >= 3
        assert all(within("highest", num_seeds))
        assert not any(within("default", num_seeds))


@pytest.mark.usefixtures("float64", "strict_dtypes")
@pytest.mark.parametrize("name", ["band with strides", "1x1"])
def test_two_derivatives_of_a_convolution_equal_finite_differences(name):
    ours, _, primals, _ = draw(name)
    check_grads(jax.jit(ours), [array.astype(jnp.float64) for array in primals], order=2, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["second of LeNet-5", "stem"])
def test_kernels_under_vmap_give_what_each_gives_alone(name):
    ours, _, (inputs, kernel), _ = draw(name)
    images, kernels = jnp.stack([inputs, -2 * inputs]), jnp.stack([kernel, kernel + 1], axis=2)

    def everything(images, kernel):
        outputs, pullback = jax.vjp(ours, images, kernel)
        return outputs, pullback(jnp.cos(outputs))

    together = jax.jit(jax.vmap(everything, (0, 2)))(images, kernels)
    for index in range(2):
        alone = jax.jit(everything)(images[index], kernels[:, :, index])
        for mine, expected in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(mine[index], expected, rtol=1e-5, atol=1e-5 * float(jnp.abs(expected).max()))


def test_wide_kernels_under_vmap_make_no_patches_of_their_images():
    """Patches are nine times the images."""
    images, kernels = jnp.zeros((2, 4, 32, 32, 64)), jnp.zeros((2, 3, 3, 64, 64))
    together = jax.jit(jax.vmap(functools.partial(convolve, strides=(1, 1), padding="SAME"), (0, 0)))
    assert together.lower(images, kernels).compile().memory_analysis().temp_size_in_bytes < 2 * images.nbytes


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("name", ["stem", "first of LeNet-5"])
def test_the_type_is_kept(name, dtype):
    ours, _, primals, _ = draw(name)
    assert jax.eval_shape(ours, *(array.astype(dtype) for array in primals)).dtype == dtype


@pytest.mark.parametrize(("platform", "is_dilated"), [("cpu", True), ("cuda", False), ("tpu", False)])
def test_the_platform_a_program_is_lowered_for_chooses_the_form(platform, is_dilated):
    """Of the kernel's gradient: on a CPU a convolution over the batch, in the layout of the forward pass."""
    module = conv(3, 64, 3, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(module)

    def gradient(params, inputs):
        return jax.grad(lambda params: nnx.merge(graphdef, params)(inputs).sum())(params)

    lowered = jax.jit(gradient).trace(params, jnp.ones((2, 8, 8, 3))).lower(lowering_platforms=(platform,))
    assert ("[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]" in lowered.as_text()) == is_dilated


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding": "VALID", "feature_group_count": 2}, r"no groups, dilation.*got {'feature_group_count': 2}"),
        ({"padding": "VALID", "rhs_dilation": (2, 2)}, r"no groups, dilation.*got {'rhs_dilation': \(2, 2\)}"),
        ({"padding": "VALID", "precision": "highest"}, r"precision or type of results; got {'precision': 'highest'}"),
        ({"padding": "same"}, r'padding must be "VALID", "SAME" or pairs of numbers; got \'same\''),
        ({"padding": ((0, 0), (-6, 0))}, r"kernel of \(3, 3\) is larger than images of \(8, 8\).*no output"),
    ],
)
def test_what_it_cannot_do_is_refused(options, message):
    inputs, kernel = jnp.ones((1, 8, 8, 2)), jnp.ones((3, 3, 1, 2))
    with pytest.raises(ValueError, match=message):
        convolve(inputs, kernel, (1, 1), **options)


def test_a_convolution_is_evaluated_and_differentiated_without_jit():
    ours, theirs, arrays, _ = draw("first of LeNet-5")
    wanted = jax.grad(lambda *arrays: jnp.sum(theirs(*arrays) ** 2), argnums=(0, 1))(*arrays)
    with jax.disable_jit():
        outputs = ours(*arrays)
        found = jax.grad(lambda *arrays: jnp.sum(ours(*arrays) ** 2), argnums=(0, 1))(*arrays)
    np.testing.assert_allclose(outputs, theirs(*arrays), rtol=1e-4, atol=1e-4)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-3)
