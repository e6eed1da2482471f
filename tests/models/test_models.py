"""The zoo and its adapter.

Large models are traced here and seldom computed; `test_parity` compares what they compute.
"""

import functools
import inspect
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adalfl_jax.models import MODELS, count_params, functionalize, make_model, model_options, register_model
from adalfl_jax.models.all_cnn import AllCNNC
from adalfl_jax.task_losses import softmax_cross_entropy
from adalfl_jax.training import ConfigError
from adalfl_jax.training.setup import make_setup
from tests.models.zoo import (
    CHEAP,
    COMPUTED,
    larger_shape,
    random_images,
    random_variables,
    smallest_shape,
)
from tests.problems import make_model as make_test_model
from tests.training.tiny import tiny_config


@pytest.mark.parametrize(
    ("name", "input_shape", "options", "count"),
    [
        ("logistic", (28, 28, 1), {}, 7_850),
        ("mlp", (28, 28, 1), {}, 1_796_010),
        ("lenet5", (28, 28, 1), {}, 44_426),
        ("vgg16", (32, 32, 3), {}, 14_728_266),
        ("allcnnc", (32, 32, 3), {}, 1_372_254),
        ("squeezenet", (32, 32, 3), {}, 734_986),
        ("resnet", (32, 32, 3), {"depth": 18}, 11_173_962),
        ("wide_resnet", (32, 32, 3), {"depth": 28, "width": 10}, 36_479_194),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("resnet", (32, 32, 3), {"depth": 34}, 21_282_122),
                ("resnet", (32, 32, 3), {"depth": 50}, 23_520_842),
                ("wide_resnet", (32, 32, 3), {"depth": 16, "width": 8}, 10_961_370),
                ("wide_resnet", (32, 32, 3), {"depth": 40, "width": 4}, 8_949_210),
            )
        ),
    ],
)
def test_parameter_counts_are_those_of_the_literature(name, input_shape, options, count):
    params, model_state = jax.eval_shape(make_model(name, input_shape, 10, **options).init, jax.random.key(0))
    assert count_params(params) == count
    scales = [leaf for path, leaf in jax.tree.leaves_with_path(params) if path[-1].key == "scale"]
    assert count_params(model_state) == 2 * count_params(scales)  # a mean and a variance for every scale


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("shape_of", "num_outputs"), [(smallest_shape, 1), pytest.param(larger_shape, 7, marks=pytest.mark.slow)]
)
def test_models_take_any_valid_input_and_any_number_of_outputs(name, shape_of, num_outputs):
    model = make_model(name, shape_of(name), num_outputs)
    params, model_state = jax.eval_shape(model.init, jax.random.key(0))
    inputs = jax.ShapeDtypeStruct((4, *shape_of(name)), jnp.float32)
    for train in (True, False):
        rng_key = jax.random.key(1) if train and name == "allcnnc" else None  # the only one with dropout
        apply = functools.partial(model.apply, train=train, rng_key=rng_key)
        outputs, after = jax.eval_shape(apply, params, model_state, inputs)
        assert (outputs.shape, outputs.dtype) == ((4, num_outputs), jnp.float32)
        chex.assert_trees_all_equal_structs(after, model_state)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, model_state)


@pytest.mark.parametrize("name", COMPUTED)
def test_examples_do_not_see_each_other_in_eval_mode(name):
    model = make_model(name, smallest_shape(name), 3, **CHEAP.get(name, {}))
    inputs = random_images(smallest_shape(name))
    outputs = jax.jit(functools.partial(model.apply, train=False, rng_key=None))
    together, _ = outputs(*random_variables(model), inputs)
    others_differ, _ = outputs(*random_variables(model), np.concatenate([inputs[:1], 5 * inputs[1:]]))
    np.testing.assert_allclose(together[:1], others_differ[:1], rtol=1e-5)
    assert not np.allclose(together[1:], others_differ[1:], rtol=1e-2)


@pytest.mark.parametrize("name", COMPUTED)
def test_every_layer_learns_and_every_statistic_moves(name):
    shape = larger_shape(name)
    model = make_model(name, shape, 3, **CHEAP.get(name, {}))
    params, model_state = random_variables(model)
    inputs, targets = random_images(shape, batch_size=8), np.arange(8) % 3

    def objective(params):
        outputs, after = model.apply(params, model_state, inputs, train=True, rng_key=jax.random.key(1))
        return softmax_cross_entropy(targets, outputs), after

    gradient, after = jax.jit(jax.grad(objective, has_aux=True))(params)
    chex.assert_tree_all_finite((gradient, after))
    for path, leaf in jax.tree.leaves_with_path(gradient):
        if path[-1].key != "bias":  # batch norm takes a convolution's bias out again
            assert np.abs(leaf).max() > 1e-6, path
    for (path, before), moved in zip(jax.tree.leaves_with_path(model_state), jax.tree.leaves(after), strict=True):
        assert (np.abs(moved - before) > 0).all(), path


def test_the_mlp_is_its_formula():
    model = make_model("mlp", (4,), 2, hidden_sizes=(5, 3))
    params, _ = model.init(jax.random.key(0))
    inputs = np.asarray(jax.random.normal(jax.random.key(1), (6, 4)))
    hidden = inputs
    for layer in params["hidden"].values():
        hidden = np.maximum(hidden @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"]), 0)
    expected = hidden @ np.asarray(params["output"]["kernel"]) + np.asarray(params["output"]["bias"])
    np.testing.assert_allclose(model.apply(params, {}, inputs, train=True, rng_key=None)[0], expected, rtol=1e-4)


def test_equal_keys_give_equal_models():
    model = make_model("mlp", (4,), 2, hidden_sizes=(5,))
    chex.assert_trees_all_equal(model.init(jax.random.key(1)), model.init(jax.random.key(1)))
    first, other = (model.init(jax.random.key(seed))[0]["output"]["kernel"] for seed in (1, 2))
    assert not jnp.array_equal(first, other)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_kernels_start_with_the_variance_of_he_or_glorot_and_the_rest_at_nothing(name, every):
    """He, 2 / fan_in, before ReLU; Glorot, 2 / (fan_in + fan_out), before tanh and at the output."""
    num_outputs = 300  # so many that the two differ at the output too
    model = make_model(name, (32, 32, 3), num_outputs, **({"depth": 10, "width": 1} if name == "wide_resnet" else {}))
    variables = jax.tree.leaves_with_path(jax.eval_shape(model.init, jax.random.key(0)))
    shapes = {jax.tree_util.keystr(path): leaf.shape for path, leaf in variables}
    largest = max(shapes, key=lambda name: math.prod(shapes[name]))

    def measure(rng_key):
        values = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(model.init(rng_key))}
        return {
            path: (leaf.var(), leaf.min(), leaf.max())
            for path, leaf in values.items()
            if every or "kernel" not in path or "output" in path or path == largest
        }

    for path, (variance, least, most) in jax.jit(measure)(jax.random.key(0)).items():
        if "kernel" in path:
            size, fan_in = math.prod(shapes[path]), math.prod(shapes[path][:-1])
            fan_out = size // shapes[path][-2]
            is_glorot = name == "lenet5" or "output" in path
            expected = 2 / (fan_in + fan_out) if is_glorot else 2 / fan_in
            standard_error = math.sqrt(0.8 / size)  # of the sample variance of uniform numbers, relative
            np.testing.assert_allclose(variance, expected, rtol=4 * standard_error, err_msg=path)
            assert max(-least, most) <= math.sqrt(3 * expected) * (1 + 1e-6), path  # and no farther out
        else:
            assert least == most == (1 if "scale" in path or "var" in path else 0), path


@pytest.mark.parametrize(("name", "options"), [("lenet5", {}), ("wide_resnet", {"depth": 10, "width": 1})])
def test_the_initialization_of_pytorch_is_uniform_up_to_one_over_the_root_of_fan_in(name, options):
    model = make_model(name, (32, 32, 3), 10, initialization="pytorch", **options)
    params, model_state = jax.jit(model.init)(jax.random.key(0))
    plain = make_model(name, (32, 32, 3), 10, **options)
    chex.assert_trees_all_equal_shapes_and_dtypes((params, model_state), jax.eval_shape(plain.init, jax.random.key(0)))
    layers = {path[:-1]: leaf for path, leaf in jax.tree.leaves_with_path(params) if path[-1].key == "kernel"}
    for path, leaf in jax.tree.leaves_with_path(params):
        if path[:-1] in layers:
            bound = 1 / math.sqrt(math.prod(layers[path[:-1]].shape[:-1]))
            assert np.abs(leaf).max() <= bound, path
            np.testing.assert_allclose(leaf.var(), bound**2 / 3, rtol=4 * math.sqrt(0.8 / leaf.size), err_msg=path)
        else:
            assert leaf.min() == leaf.max() == (1 if path[-1].key == "scale" else 0), path  # of batch norm


def test_the_initialization_of_pytorch_draws_every_layer_and_every_model_anew():
    model = make_model("mlp", (9,), 9, hidden_sizes=(9,), initialization="pytorch")
    kernels = [
        layer["kernel"]
        for seed in (0, 1)
        for params in [model.init(jax.random.key(seed))[0]]
        for layer in (params["hidden"][0], params["output"])
    ]
    assert len({np.asarray(kernel).tobytes() for kernel in kernels}) == 4
    chex.assert_trees_all_equal(model.init(jax.random.key(1)), model.init(jax.random.key(1)))


def test_the_adapter_works_inside_nested_transformations():
    model = make_test_model("batch_norm")
    params, model_state = model.init(jax.random.key(0))
    inputs = jax.random.normal(jax.random.key(1), (2, 8, 5))

    def total(params, inputs):
        outputs, _ = model.apply(params, model_state, inputs, train=True, rng_key=None)
        return outputs.sum()

    def nested(params):
        return jax.vmap(lambda inputs: jax.jvp(jax.grad(total), (params, inputs), (params, inputs))[1])(inputs)

    chex.assert_tree_all_finite(jax.jit(nested)(params))


def test_batch_norm_uses_the_batch_in_train_mode_and_the_running_statistics_otherwise():
    model = make_test_model("batch_norm")
    params, model_state = model.init(jax.random.key(0))
    inputs = 3 + jax.random.normal(jax.random.key(1), (8, 5))
    trained, after = model.apply(params, model_state, inputs, train=True, rng_key=None)
    evaluated, unchanged = model.apply(params, after, inputs, train=False, rng_key=None)
    chex.assert_trees_all_equal(unchanged, after)
    assert not np.allclose(trained, evaluated, atol=1e-2)
    hidden = inputs @ params["hidden"]["kernel"] + params["hidden"]["bias"][None, :]
    np.testing.assert_allclose(after["norm"]["mean"], 0.01 * hidden.mean(axis=0), rtol=1e-4, atol=1e-6)


def test_dropout_is_drawn_from_the_key_and_off_in_eval_mode():
    model = make_test_model("dropout")
    params, model_state = model.init(jax.random.key(0))
    inputs = jnp.ones((4, 5))

    def outputs(train, seed):
        key = None if seed is None else jax.random.key(seed)
        return model.apply(params, model_state, inputs, train=train, rng_key=key)[0]

    assert jnp.array_equal(outputs(True, 1), outputs(True, 1))
    assert not jnp.array_equal(outputs(True, 1), outputs(True, 2))
    assert jnp.array_equal(outputs(False, None), outputs(False, 2))
    with pytest.raises(ValueError, match="rng_key"):
        outputs(True, None)


def test_two_layers_draw_dropout_of_their_own():
    class Both(nnx.Module):
        def __init__(self, rngs):
            self.scale = nnx.Param(jnp.ones(()))
            self.first, self.second = nnx.Dropout(0.5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, inputs):
            return jnp.stack([self.first(inputs), self.second(inputs)])

    model = functionalize(lambda rngs: Both(rngs))
    params, state = model.init(jax.random.key(0))
    (first, second), _ = model.apply(params, state, jnp.ones((4, 16)), train=True, rng_key=jax.random.key(1))
    assert not np.array_equal(first, second)


def test_layers_that_are_stacked_draw_dropout_of_their_own():
    class Stacked(nnx.Module):
        def __init__(self, rngs):
            @nnx.split_rngs(splits=2)
            @nnx.vmap(in_axes=(0,), out_axes=0)
            def make(rngs):
                return nnx.Dropout(0.5, rngs=rngs)

            self.layers = make(rngs)

        def __call__(self, inputs):
            @nnx.scan(in_axes=(0, None), out_axes=0)
            def each(layer, inputs):
                return layer(inputs)

            return each(self.layers, inputs)

    model = functionalize(Stacked)
    variables = model.init(jax.random.key(0))

    def outputs(train, seed):
        return model.apply(*variables, jnp.ones((4, 50)), train=train, rng_key=jax.random.key(seed))[0]

    first, second = outputs(True, 1)
    assert not jnp.array_equal(first, second)
    assert jnp.array_equal(outputs(True, 1)[0], first)
    assert not jnp.array_equal(outputs(True, 2)[0], first)
    assert jnp.array_equal(outputs(False, 1), jnp.ones((2, 4, 50)))


def test_a_model_of_the_zoo_with_dropout_needs_a_key_in_train_mode():
    model = make_model("allcnnc", (9, 9, 3), 3)
    variables = jax.eval_shape(model.init, jax.random.key(0))
    inputs = jax.ShapeDtypeStruct((2, 9, 9, 3), jnp.float32)
    with pytest.raises(ValueError, match="give it an rng_key"):
        jax.eval_shape(functools.partial(model.apply, train=True, rng_key=None), *variables, inputs)


def test_apply_leaves_the_state_it_is_given_as_it_is():
    """A state of numpy arrays, read from a file say, could be written to."""
    model = make_test_model("batch_norm")
    params, model_state = model.init(jax.random.key(0))
    given = jax.tree.map(np.array, model_state)
    _, after = model.apply(params, given, jnp.ones((4, 5)), train=True, rng_key=None)
    chex.assert_trees_all_equal(given, model_state)
    assert not np.array_equal(after["norm"]["mean"], given["norm"]["mean"])


@pytest.fixture
def known_here(monkeypatch):
    """What a test registers under this name is forgotten behind it."""
    monkeypatch.setitem(MODELS, "mine", None)


def gelu_mlp(input_shape, num_outputs, *, rngs, hidden_sizes, scale=2.0):
    first = nnx.Linear(*input_shape, hidden_sizes[0], rngs=rngs)
    second = nnx.Linear(hidden_sizes[0], num_outputs, rngs=rngs)
    return nnx.Sequential(first, nnx.gelu, second, lambda outputs: scale * outputs)


@pytest.mark.usefixtures("known_here")
def test_a_registered_model_is_made_by_name_and_as_any_other():
    register_model("mine", MODELS["mlp"])
    register_model("mine", gelu_mlp)  # in place of the one before
    assert model_options("mine") == ["hidden_sizes", "scale"]
    model, theirs = (make_model("mine", (4,), 3, hidden_sizes=(5,), **options) for options in ({}, {"scale": 1.0}))
    params, model_state = model.init(jax.random.key(0))
    assert count_params(params) == 4 * 5 + 5 + 5 * 3 + 3
    inputs = jax.random.normal(jax.random.key(1), (2, 4))
    outputs, others = (each.apply(params, model_state, inputs, train=True, rng_key=None)[0] for each in (model, theirs))
    chex.assert_trees_all_close(outputs, 2 * others)
    with pytest.raises(ValueError, match="model 'mine' has no option 'depth'; it has hidden_sizes, scale"):
        make_model("mine", (4,), 3, depth=18)
    with pytest.raises(ValueError, match=r"model 'mine' was made for inputs \[B, 4\]"):
        model.apply(params, model_state, inputs[:, :3], train=True, rng_key=None)


@pytest.mark.usefixtures("known_here")
def test_the_module_of_a_registered_class_may_have_any_name():
    class Linear(nnx.Module):
        def __init__(this, input_shape, num_outputs, *, rngs, scale=1.0):  # noqa: N805
            this.output, this.scale = nnx.Linear(math.prod(input_shape), num_outputs, rngs=rngs), scale

        def __call__(this, inputs):  # noqa: N805
            return this.scale * this.output(inputs.reshape(len(inputs), -1))

    register_model("mine", Linear)
    assert model_options("mine") == ["scale"]
    assert count_params(make_model("mine", (4,), 3, scale=2.0).init(jax.random.key(0))[0]) == 15


@pytest.mark.usefixtures("known_here")
def test_options_that_no_field_sets_need_a_default_or_a_value_in_a_configuration():
    def heads(input_shape, num_outputs, *, rngs, num_heads):
        return nnx.Linear(math.prod(input_shape), num_outputs * num_heads, rngs=rngs)

    register_model("mine", heads)
    assert count_params(make_model("mine", (4,), 1, num_heads=2).init(jax.random.key(0))[0]) == 10
    with pytest.raises(ConfigError, match=r"'mine' needs num_heads; give .* or set config\.model\.options\.num"):
        make_setup(tiny_config({"model.name": "mine"}))
    config = tiny_config({"model.name": "mine", "model.options": {"num_heads": 2}})
    assert count_params(config.model.make((8, 8, 1), 10).init(jax.random.key(0))[0]) == 64 * 20 + 20


@pytest.mark.usefixtures("known_here")
@pytest.mark.parametrize(
    ("name", "module", "message"),
    [
        ("mlp", gelu_mlp, "there is a model 'mlp' in this package; register yours under another name"),
        ("mine", "mlp", "model 'mine' must be a function or a class; got a str"),
        (
            "mine",
            lambda num_outputs, *, rngs: None,
            r"called as mine\(input_shape, num_outputs, rngs=rngs\)",
        ),
        ("mine", lambda input_shape, num_outputs: None, r"called as mine\(.*\): got an unexpected .* 'rngs'"),
        ("mine", lambda input_shape, num_outputs, *, rngs, **options: None, r"name each .* takes .*\*\*options"),
        ("mine", lambda input_shape, num_outputs, *, rngs, compute_dtype: None, "cannot have the option compute_dtype"),
    ],
)
def test_what_cannot_be_registered_is_refused(name, module, message):
    with pytest.raises(ValueError, match=message):
        register_model(name, module)
    assert MODELS["mine"] is None


def test_all_cnn_drops_half_of_the_units_by_default():
    assert inspect.signature(AllCNNC.__init__).parameters["dropout_rate"].default == 0.5
