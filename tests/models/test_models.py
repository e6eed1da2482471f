"""The zoo and its adapter.

Large models are traced here and seldom computed; `test_parity` compares what they compute.
"""

import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax.flatten_util import ravel_pytree

import adalfl_jax
from adalfl_jax.hypergradient.problem import equations
from adalfl_jax.models import MODELS, count_params, functionalize, make_model, model_options
from adalfl_jax.task_losses import softmax_cross_entropy
from tests.problems import Convolutional
from tests.problems import make_model as make_test_model

MIN_SIZES = {"lenet5": 16, "vgg16": 32, "allcnnc": 9, "squeezenet": 8, "resnet": 8, "wide_resnet": 4}
WITH_BLOCKS = {"vgg16": 5, "allcnnc": 3, "squeezenet": 11, "resnet": 8, "wide_resnet": 3}  # name -> number of blocks
CHEAP = {"logistic": {}, "mlp": {"hidden_sizes": (20, 10)}, "lenet5": {}, "wide_resnet": {"depth": 10, "width": 1}}

COMPUTED = [pytest.param(name, marks=[] if name in CHEAP else [pytest.mark.slow]) for name in MODELS]
"""All models, for tests that compute them; a model that takes long to compile is left to the slow tests."""


def smallest_shape(name, channels=3):
    return (MIN_SIZES[name], MIN_SIZES[name], channels) if name in MIN_SIZES else (1,)


def larger_shape(name):
    return (MIN_SIZES.get(name, 1) + 3, MIN_SIZES.get(name, 1) + 10, 2)


def random_variables(model, seed=0, dtype=np.float32):
    """Parameters and state drawn on the host, none of them trivially 0 or 1; the model's own takes long to compile."""
    generator = np.random.default_rng(seed)

    def draw(path, leaf):
        kind = path[-1].key
        if kind == "kernel":
            values = generator.normal(scale=math.sqrt(2 / math.prod(leaf.shape[:-1])), size=leaf.shape)
        elif kind in ("scale", "var"):
            values = generator.uniform(0.5, 1.5, leaf.shape)
        else:
            assert kind in ("bias", "mean"), path
            values = generator.normal(scale=0.2, size=leaf.shape)
        return values.astype(dtype)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(model.init, jax.random.key(0)))


def random_images(shape, batch_size=4, seed=1):
    return np.random.default_rng(seed).normal(size=(batch_size, *shape)).astype(np.float32)


def assert_close(actual, expected, tolerance):
    """Equal trees but for `tolerance` times the largest entry; some gradients are zero but for rounding."""
    limit = tolerance * max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    chex.assert_trees_all_close(actual, expected, rtol=0, atol=limit)


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


# Remat


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


@functools.cache
def bilevel_step(estimator, remat=False, compute_dtype="float32"):
    """(theta, phi, metrics, hypergradient) after a step of a small convolutional network and its loss."""
    model = functionalize(lambda rngs: Convolutional(3, 3, rngs=rngs, remat=remat), compute_dtype=compute_dtype)
    loss, inner, outer = adalfl_jax.LossNetwork(hidden_sizes=(8, 8)), optax.sgd(0.1, 0.9, nesterov=True), optax.sgd(1.0)
    step = adalfl_jax.make_bilevel_step(
        model.apply, loss.apply, softmax_cross_entropy, inner, outer, hypergradient=estimator
    )
    theta = adalfl_jax.Theta.create(*random_variables(model), inner)
    phi = adalfl_jax.Phi.create(loss.init(jax.random.key(0)), outer)
    targets = np.arange(32) % 3
    batch = adalfl_jax.BilevelBatch(*((random_images((8, 8, 3), 32, seed), targets) for seed in (1, 2)))
    theta, after, metrics = jax.jit(step)(theta, phi, batch)
    return theta, after, metrics, optax.tree.sub(phi.params, after.params)


@pytest.mark.parametrize("estimator", ["forward", pytest.param("unrolled", marks=pytest.mark.slow)])
def test_remat_changes_no_bilevel_step(estimator):
    for part, expected in zip(bilevel_step(estimator, remat=True), bilevel_step(estimator), strict=True):
        assert_close(part, expected, 1e-5)


# Computing in bfloat16


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


# What is refused


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
        (("wide_resnet", (8, 8, 3), 2), {"width": 0}, r"a width of at least 1; got depth 16, width 0"),
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


@pytest.mark.parametrize("make_module", [linen.Dense(3), lambda rngs: linen.Dense(3)])
def test_modules_of_linen_are_told_what_to_do(make_module):
    with pytest.raises(ValueError, match=r"Dense is one of flax\.linen, .* call them in an `apply_fn` of your own"):
        functionalize(make_module)


def test_what_is_made_is_a_module():
    with pytest.raises(ValueError, match=r"a function that makes a flax\.nnx module; it made a dict"):
        functionalize(lambda rngs: {"kernel": rngs.params()})  # pyright: ignore[reportArgumentType]


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
