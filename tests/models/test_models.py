"""The zoo and its adapter."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adalfl_jax.models import MODELS, count_params, make_model
from tests.problems import make_model as make_test_model


@pytest.mark.parametrize(("name", "count"), [("logistic", 7_850), ("mlp", 1_796_010), ("lenet5", 44_426)])
def test_parameter_counts_on_mnist_are_the_papers(name, count):
    params, model_state = jax.eval_shape(make_model(name, (28, 28, 1), 10).init, jax.random.key(0))
    assert count_params(params) == count
    assert count_params(model_state) == 0


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("num_outputs", [1, 7])
def test_models_take_any_valid_input_and_any_number_of_outputs(name, num_outputs):
    model = make_model(name, (17, 20, 3), num_outputs)
    params, model_state = model.init(jax.random.key(0))
    outputs, after = model.apply(params, model_state, jnp.ones((4, 17, 20, 3)), train=True, rng_key=None)
    assert outputs.shape == (4, num_outputs)
    assert after == model_state == {}


@pytest.mark.parametrize("name", MODELS)
def test_examples_do_not_see_each_other(name):
    model = make_model(name, (16, 16, 1), 3)
    params, model_state = model.init(jax.random.key(0))
    inputs = jax.random.normal(jax.random.key(1), (5, 16, 16, 1))
    together, _ = model.apply(params, model_state, inputs, train=False, rng_key=None)
    alone = [model.apply(params, model_state, inputs[i : i + 1], train=False, rng_key=None)[0] for i in range(5)]
    np.testing.assert_allclose(together, jnp.concatenate(alone), rtol=1e-4, atol=1e-5)


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


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("mpl", (4,), 2), {}, r"unknown model 'mpl'; did you mean 'mlp'.*lenet5, logistic, mlp"),
        (("lenet5", (8, 8, 1), 10), {}, r"at least 16x16; got \(8, 8, 1\)"),
        (("lenet5", (64,), 10), {}, r"\[H, W, channels\].*got \(64,\)"),
        (("mlp", (4,), 2), {"hidden_sizes": (3, 0)}, r"at least 1 unit each; got \(3, 0\)"),
        (("mlp", (4,), 2), {"width": 3}, r"'mlp' has no option 'width'; it has hidden_sizes"),
        (("logistic", (4,), 2), {"hidden_sizes": (3,)}, r"'logistic' has no option 'hidden_sizes'; it has none"),
    ],
)
def test_what_a_model_cannot_be_is_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        make_model(*arguments, **options)
