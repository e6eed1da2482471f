"""Inputs, options and modules that make no model, and what they are told."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from adalfl_jax.models import functionalize, make_model
from adalfl_jax.models.all_cnn import AllCNNC
from adalfl_jax.models.initializers import redraw_as_pytorch
from tests.models.zoo import (
    MIN_SIZES,
)


@pytest.mark.parametrize("name", MIN_SIZES)
def test_images_are_taken_from_a_smallest_size_on_and_nothing_else(name):
    size = MIN_SIZES[name]
    make_model(name, (size, size, 3), 10)
    for shape in ((size - 1, size, 3), (size, size - 1, 3), (size, size), (size * size * 3,), (1, size, size, 3)):
        message = f"{name} takes images [H, W, channels] of at least {size}x{size}; got {shape}"
        with pytest.raises(ValueError, match=re.escape(message)):
            make_model(name, shape, 10)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("mpl", (4,), 2), {}, r"unknown model 'mpl'; did you mean 'mlp'.*allcnnc, lenet5, logistic, mlp.*wide_resnet"),
        (("mlp", (4,), 2), {"hidden_sizes": (3, 0)}, r"at least 1 unit each; got \(3, 0\)"),
        (("mlp", (4,), 2), {"hidden_sizes": 100}, r"at least 1 unit each; got 100"),
        (("mlp", (4,), 2), {"hidden_sizes": (3.5,)}, r"at least 1 unit each; got \(3.5,\)"),
        (("mlp", (4,), 2), {"width": 3}, r"'mlp' has no option 'width'; it has hidden_sizes"),
        (("logistic", (4,), 2), {"hidden_sizes": (3,)}, r"'logistic' has no option 'hidden_sizes'; it has none"),
        (("lenet5", (16, 16, 1), 2), {"remat": True}, r"'lenet5' has no option 'remat'; it has none"),
        (("vgg16", (32, 32, 3), 2), {"depth": 19}, r"'vgg16' has no option 'depth'; it has remat"),
        (("resnet", (8, 8, 3), 2), {"width": 2}, r"'resnet' has no option 'width'; it has depth, remat"),
        (("resnet", (8, 8, 3), 2), {"depth": 19}, r"resnet has a depth of 18, 34, 50; got 19"),
        (("wide_resnet", (8, 8, 3), 2), {"depth": 17}, r"depth of 6n \+ 4 .*10, 16, 22.*got depth 17, width 8"),
        (("wide_resnet", (8, 8, 3), 2), {"depth": 4}, r"with n of at least 1 .*got depth 4, width 8"),
        (("wide_resnet", (8, 8, 3), 2), {"width": 0}, r"a width .* of at least 1; got depth 16, width 0"),
        (("wide_resnet", (8, 8, 3), 2), {"width": 1.5}, r"a width that is a whole number.*got depth 16, width 1\.5"),
        (("resnet", (8, 8, 3), 2), {"depth": "18"}, r"resnet has a depth of 18, 34, 50; got '18'"),
        (("resnet", (8, 8, 0), 2), {}, r"inputs and has outputs; got \(8, 8, 0\) and 2"),
        (("mlp", (4,), 0), {}, r"inputs and has outputs; got \(4,\) and 0"),
        (("mlp", (4,), 2.5), {}, r"inputs and has outputs; got \(4,\) and 2.5"),
        (("mlp", 4, 3), {}, r"input_shape must be the shape of one example, \(4,\) .* say; got 4"),
        (("mlp", (4,), 2), {"initialization": "torch"}, r"unknown initialization 'torch'; did you mean 'pytorch'"),
        (("mlp", (4,), 2), {"compute_dtype": "float15"}, r"unknown compute_dtype 'float15'.*bfloat16, float32"),
    ],
)
def test_what_a_model_cannot_be_is_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        make_model(*arguments, **options)


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, "half"])
def test_a_share_of_dropped_units_is_below_one(rate):
    with pytest.raises(ValueError, match=rf"dropout_rate must be .*; got '?{rate}"):
        AllCNNC((16, 16, 3), 10, rngs=nnx.Rngs(0), dropout_rate=rate)


@pytest.mark.parametrize("params", [jnp.ones((3, 2)), [jnp.ones((3, 2))], {"scale": jnp.ones(3)}, {}])
def test_parameters_without_a_layer_are_not_redrawn(params):
    with pytest.raises(ValueError, match=r'nested dictionaries with a "kernel" .*; got'):
        redraw_as_pytorch(jax.random.key(0), params)


class Scaled(nnx.Module):
    """Multiplies its inputs by what is not learned."""

    def __init__(self, scale):
        self.scale = scale()

    def __call__(self, inputs):
        scale = self.scale[0] if isinstance(self.scale, nnx.List) else self.scale
        return inputs * scale[None, :]


class Talkative(nnx.Module):
    """Sows what it is given and, if it is asked to, makes a variable on the way."""

    def __init__(self, remembers):
        self.count, self.remembers = nnx.Variable(jnp.zeros(())), remembers

    def __call__(self, inputs):
        self.sow(nnx.Intermediate, "seen", inputs)
        self.count[...] += 1
        if self.remembers:
            self.last = nnx.Variable(inputs)
        return inputs


@pytest.mark.filterwarnings("ignore:Using 'Module.sow")
def test_what_a_module_sows_is_dropped_and_a_state_that_grows_is_refused():
    model = functionalize(lambda rngs: Talkative(remembers=False))
    start = model.init(jax.random.key(0))
    _, model_state = jax.jit(lambda *start: model.apply(*start, jnp.ones((2, 3)), train=True, rng_key=None))(*start)
    chex.assert_trees_all_equal(model_state, {"count": jnp.ones(())})
    model = functionalize(lambda rngs: Talkative(remembers=True))
    with pytest.raises(
        ValueError, match=r"makes its variables when it is made.*\{'count': \(\)\} before .*'last': \(2, 3\)"
    ):
        model.apply(*model.init(jax.random.key(0)), jnp.ones((2, 3)), train=True, rng_key=None)


@pytest.mark.parametrize("make_module", [linen.Dense, linen.Dense(3), lambda rngs: linen.Dense(3)])
def test_modules_of_linen_are_told_what_to_do(make_module):
    with pytest.raises(ValueError, match=r"Dense is one of flax\.linen, .* call them in an `apply_fn` of your own"):
        functionalize(make_module)


class WithoutStreams(nnx.Module):
    def __init__(self):
        self.scale = nnx.Param(jnp.ones(()))


@pytest.mark.parametrize(
    ("make_module", "message"),
    [
        (WithoutStreams, r"with one nnx\.Rngs, which <class .*WithoutStreams'> is not made for: .* `lambda rngs: MLP"),
        (nnx.Linear, r"which <class .*Linear'> is not made for: missing a required"),
        (functools.partial(nnx.Linear, 4, 3), r"which functools\.partial\(<class .*Linear'>, 4, 3\) is not made for"),
        (lambda: WithoutStreams(), r"which <function .*<lambda>.* is not made for: too many"),
        ("mlp", r"takes a function that makes the module, .*; got 'mlp'"),
    ],
)
def test_what_makes_a_module_is_called_with_streams_alone(make_module, message):
    with pytest.raises(ValueError, match=message):
        functionalize(make_module)


def test_what_is_made_is_a_module():
    with pytest.raises(ValueError, match=r"a function that makes a flax\.nnx module; it made a dict"):
        functionalize(lambda rngs: {"kernel": rngs.params()})  # pyright: ignore[reportArgumentType]


class Masked(nnx.Linear):
    def __call__(self, inputs, mask, *, scale=1.0):
        return scale * super().__call__(inputs) * mask


def test_a_module_of_several_arguments_is_told_of_pytrees():
    with pytest.raises(ValueError, match=r"module\(inputs\), which Masked is not .*argument: 'mask'. Several inputs"):
        functionalize(lambda rngs: Masked(4, 3, rngs=rngs))


def with_a_mask(call):
    @functools.wraps(call)
    def masked(self, inputs):
        return call(self, inputs, jnp.ones((1, 3)))

    return masked


def test_a_module_that_gives_itself_what_else_it_takes_is_called():
    class Given(Masked):
        __call__ = with_a_mask(Masked.__call__)

    model = functionalize(lambda rngs: Given(4, 3, rngs=rngs))
    outputs, _ = model.apply(*model.init(jax.random.key(0)), jnp.ones((2, 4)), train=True, rng_key=None)
    assert outputs.shape == (2, 3)


def test_a_module_in_place_of_a_function_is_named():
    with pytest.raises(ValueError, match=r"takes a function that makes the module.*got the module Linear itself"):
        functionalize(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("name", ["mlp", "lenet5", "resnet"])
@pytest.mark.parametrize("shape", [(2, 784), (2, 28, 28), (28, 28, 1), (2, 28, 28, 3), (2, 32, 32, 1)])
def test_inputs_of_another_shape_are_refused(name, shape):
    model = make_model(name, (28, 28, 1), 3)
    params, state = jax.eval_shape(model.init, jax.random.key(0))
    with pytest.raises(
        ValueError, match=rf"model '{name}' was made for inputs \[B, 28, 28, 1\]; got {re.escape(str(shape))}"
    ):
        jax.eval_shape(functools.partial(model.apply, train=False, rng_key=None), params, state, jnp.ones(shape))


@pytest.mark.parametrize("dtype", ["uint8", "int32"])
def test_bytes_are_told_to_be_normalised(dtype):
    model = make_model("mlp", (4,), 3, hidden_sizes=(5,))
    with pytest.raises(ValueError, match=rf"got inputs \(2, 4\) of {dtype}. Give it `dataset.normalize\(inputs\)`"):
        model.apply(*model.init(jax.random.key(0)), jnp.ones((2, 4), dtype), train=True, rng_key=None)


def test_a_module_keeps_arrays_in_variables_or_in_numpy():
    for scale in (lambda: nnx.Variable(jnp.arange(3.0)), lambda: np.arange(3, dtype=np.float32)):
        model = functionalize(lambda rngs, scale=scale: Scaled(scale))
        outputs, _ = model.apply(*model.init(jax.random.key(0)), jnp.ones((2, 3)), train=True, rng_key=None)
        np.testing.assert_array_equal(outputs, [[0, 1, 2]] * 2)
    for scale, name in ((lambda: jnp.arange(3.0), "'scale'"), (lambda: nnx.List([jnp.arange(3.0)]), "0")):
        with pytest.raises(ValueError, match=rf"attribute {name} of the module is an array of JAX.*nnx\.Variable"):
            functionalize(lambda rngs, scale=scale: Scaled(scale))


@pytest.mark.parametrize(
    "given", [{"gain": jnp.ones(4), "offset": jnp.zeros(4)}, {"bias": jnp.zeros(1), "scale": jnp.ones(4)}, jnp.ones(4)]
)
def test_parameters_of_other_names_or_shapes_are_refused(given):
    model = functionalize(lambda rngs: nnx.LayerNorm(4, rngs=rngs))
    _, model_state = model.init(jax.random.key(0))
    with pytest.raises(ValueError, match=r"params are not those of this model: expected .*'scale': \(4,\).*; got"):
        model.apply(given, model_state, jnp.ones((2, 4)), train=True, rng_key=None)
