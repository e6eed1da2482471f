"""The loss network: its definition, its numerics at the edges, its errors."""

import contextlib
import dataclasses
import itertools
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from adalfl_jax import LossNetwork
from adalfl_jax.learned_losses import ACTIVATIONS

PREDICTIONS = ("probabilities", "log_probabilities", "raw")


def written_out(phi, loss, targets, outputs):
    """The paper's formula in NumPy, one pair of target and prediction at a time."""

    def smooth(x):
        return np.log(np.exp(loss.beta * x) + 1) / loss.beta * (1 - loss.gamma) + loss.gamma * x

    probabilities = np.exp(outputs) / np.exp(outputs).sum(axis=1, keepdims=True)
    per_example = []
    for target, row in zip(targets, probabilities, strict=True):
        values = []
        for label, p in enumerate(row):
            hidden = np.array([float(label == target), p])
            for layer in range(len(loss.hidden_sizes)):
                hidden = smooth(hidden @ np.asarray(phi[f"layer_{layer}"]["kernel"]))
            hidden = hidden @ np.asarray(phi[f"layer_{len(loss.hidden_sizes)}"]["kernel"])
            values.append(np.log1p(np.exp(hidden))[0] if loss.output_activation == "softplus" else hidden[0])
        per_example.append(np.sum(values) if loss.reduction == "sum" else np.mean(values))
    return np.mean(per_example)


@pytest.mark.usefixtures("float64", "strict_dtypes")
@pytest.mark.parametrize("output_activation", ["identity", "softplus"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_loss_is_the_papers_formula(reduction, output_activation):
    settings = {"reduction": reduction, "output_activation": output_activation}
    loss = LossNetwork(hidden_sizes=(6, 5), beta=3.0, gamma=0.1, **settings)
    phi = loss.init(jax.random.key(0))
    targets, outputs = jnp.array([0, 3, 1]), jax.random.normal(jax.random.key(1), (3, 4))
    expected = written_out(phi, loss, np.asarray(targets), np.asarray(outputs))
    np.testing.assert_allclose(jax.jit(loss.apply)(phi, targets, outputs), expected, rtol=1e-12)


def test_labels_and_their_one_hot_form_are_the_same():
    loss = LossNetwork()
    phi = loss.init(jax.random.key(0))
    labels, outputs = jnp.array([2, 0]), jax.random.normal(jax.random.key(1), (2, 3))
    apply = jax.jit(loss.apply)
    assert apply(phi, labels, outputs) == apply(phi, jax.nn.one_hot(labels, 3), outputs)


def test_a_single_output_is_seen_through_the_sigmoid():
    loss = LossNetwork()
    phi = loss.init(jax.random.key(0))
    outputs = jnp.array([[0.3], [-2.0]])
    elements = jax.jit(loss.elementwise)(phi, jnp.array([[1.0], [0.0]]), jax.nn.sigmoid(outputs))
    np.testing.assert_allclose(jax.jit(loss.apply)(phi, jnp.array([1, 0]), outputs), elements.mean(), rtol=1e-6)


def test_one_phi_serves_any_number_of_outputs():
    loss = LossNetwork()
    phi = loss.init(jax.random.key(0))
    for num_outputs in (1, 2, 100):
        assert jnp.isfinite(jax.jit(loss.apply)(phi, jnp.zeros(4, jnp.int32), jnp.ones((4, num_outputs))))


def test_kernels_are_kaiming_normal_and_biases_zero():
    params = LossNetwork(hidden_sizes=(400, 300), use_bias=True).init(jax.random.key(0))
    for fan_in, layer in zip((2, 400, 300), params.values(), strict=True):
        std = float(layer["kernel"].std())
        assert std == pytest.approx(np.sqrt(2 / fan_in), rel=5 / np.sqrt(layer["kernel"].size))
        assert not layer["bias"].any()
    share_below = float((params["layer_1"]["kernel"] < 2 * np.sqrt(2 / 400)).mean())
    assert share_below == pytest.approx(statistics.NormalDist().cdf(2.0), abs=0.01)


def test_biases_take_part():
    loss = LossNetwork(use_bias=True)
    phi = loss.init(jax.random.key(0))
    moved = jax.tree.map(lambda leaf: leaf + 0.5 if leaf.ndim == 1 else leaf, phi)
    apply, arguments = jax.jit(loss.apply), (jnp.array([0]), jnp.zeros((1, 2)))
    assert apply(phi, *arguments) != apply(moved, *arguments)


@pytest.mark.parametrize("predictions", PREDICTIONS)
def test_values_and_two_derivatives_are_finite_at_huge_logits(predictions):
    loss = LossNetwork(predictions=predictions)
    phi = loss.init(jax.random.key(0))
    rows = list(itertools.product([1e4, 0.0, -1e4], repeat=3))
    outputs = jnp.array(rows, jnp.float32)
    targets = jnp.arange(len(rows)) % 3

    def slope(phi, outputs):
        return jax.jvp(lambda o: loss.apply(phi, targets, o), (outputs,), (jnp.ones_like(outputs),))[1]

    @jax.jit
    def everything(phi, outputs):
        return [
            jax.value_and_grad(loss.apply, argnums=(0, 2))(phi, targets, outputs),
            jax.grad(slope, argnums=(0, 1))(phi, outputs),
        ]

    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(everything(phi, outputs)))


@pytest.mark.parametrize("single_output", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("predictions", ["probabilities", "log_probabilities"])
def test_the_hessian_is_finite_at_saturated_probabilities(predictions, single_output):
    loss = LossNetwork(predictions=predictions)
    phi = loss.init(jax.random.key(0))
    outputs = jnp.array([[100.0]] if single_output else [[100.0, -100.0]], jnp.float32)  # p is exactly 1 and 0
    hessian = jax.jit(jax.hessian(lambda o, target: loss.apply(phi, target, o)))
    for target in (0, 1):
        assert jnp.isfinite(hessian(outputs, jnp.array([target]))).all()


def test_several_labels_at_once_are_each_for_itself():
    loss = LossNetwork(hidden_sizes=(5,), predictions="sigmoid")
    phi_params = loss.init(jax.random.key(0))
    targets = jnp.array([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    outputs = jax.random.normal(jax.random.key(1), targets.shape)
    apply, columns = jax.jit(loss.apply), [(targets[:, [c]], outputs[:, [c]]) for c in range(3)]
    alone = [apply(phi_params, *column) for column in columns]
    np.testing.assert_allclose(apply(phi_params, targets, outputs), sum(alone), rtol=1e-6)
    single = dataclasses.replace(loss, predictions="probabilities")  # of one output, which is a sigmoid too
    np.testing.assert_allclose(alone[0], jax.jit(single.apply)(phi_params, *columns[0]), rtol=1e-6)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("predictions", PREDICTIONS)
def test_two_derivatives_equal_finite_differences(predictions):
    loss = LossNetwork(hidden_sizes=(5, 4), predictions=predictions, use_bias=True)
    phi = loss.init(jax.random.key(0))
    targets, outputs = jnp.array([0, 2]), jax.random.normal(jax.random.key(1), (2, 3))
    check_grads(jax.jit(lambda phi, o: loss.apply(phi, targets, o)), (phi, outputs), order=2, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_serves_as_hidden_and_as_output(activation):
    loss = LossNetwork(hidden_sizes=(4,), activation=activation, output_activation=activation)
    phi = loss.init(jax.random.key(0))
    gradient = jax.jit(jax.grad(loss.apply))(phi, jnp.array([0, 1]), jnp.array([[0.2, -0.1], [1.0, 0.0]]))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("layer", ["activation", "output_activation"])
def test_a_smooth_leaky_relu_has_its_sharpness_in_every_layer(layer):
    sharp, gentle = (LossNetwork(**{"activation": "tanh", layer: "smooth_leaky_relu", "beta": x}) for x in (30.0, 1.0))
    phi, arguments = sharp.init(jax.random.key(0)), (jnp.array([0, 1]), jnp.array([[0.2, -0.1], [1.0, 0.0]]))
    assert abs(jax.jit(sharp.apply)(phi, *arguments) - jax.jit(gentle.apply)(phi, *arguments)) > 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation": "relus"}, r"unknown activation 'relus'; did you mean 'relu'.*smooth_leaky_relu.*tanh"),
        ({"output_activation": "soft"}, r"unknown output activation 'soft'.*softplus"),
        ({"reduction": "max"}, r"unknown reduction 'max'.*mean, sum"),
        (
            {"predictions": "logits"},
            r"unknown kind of predictions 'logits'.*log_probabilities, probabilities, raw, sigmoid",
        ),
        ({"beta": 0.0}, r"beta must be a number above 0; got 0.0"),
        ({"beta": float("nan")}, r"beta must be a number above 0; got nan"),
        ({"gamma": 1.0}, r"gamma must be a number in \[0, 1\); got 1.0"),
        ({"gamma": False}, r"gamma must be a number in \[0, 1\); got False"),
        ({"hidden_sizes": (40, 0)}, r"hidden_sizes must be whole numbers of at least 1; got \(40, 0\)"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LossNetwork(**settings)


def test_targets_that_do_not_fit_are_named():
    loss = LossNetwork()
    with pytest.raises(ValueError, match=r"outputs \[B, C\] = \(4, 3\) and targets \(5,\)"):
        loss.apply(loss.init(jax.random.key(0)), jnp.zeros(5, jnp.int32), jnp.zeros((4, 3)))


@pytest.mark.parametrize("predictions", PREDICTIONS)
def test_targets_of_a_regression_are_for_raw_predictions_alone(predictions):
    loss = LossNetwork(hidden_sizes=(4,), predictions=predictions)
    phi, outputs = loss.init(jax.random.key(0)), jnp.zeros((2, 1))
    targets = jnp.array([[0.5], [-1.5]])
    is_finite = predictions == "raw"
    assert jnp.isfinite(jax.jit(loss.apply)(phi, targets, outputs)) == is_finite
    assert jnp.isfinite(jax.jit(loss.apply)(phi, abs(targets) / 2, outputs))
    refused = pytest.raises(ValueError, match=r'from 0 to 1; got some from -1\.5 to 0\.5; of a regression .*"raw"')
    with contextlib.nullcontext() if is_finite else refused:
        loss.apply(phi, targets, outputs)


@pytest.mark.parametrize("shape", [(3,), (8, 1), (8, 3), (8,)])
def test_progress_is_one_number_even_where_several_would_broadcast(shape):
    loss = LossNetwork(hidden_sizes=(4,), use_progress=True)
    phi_params = loss.init(jax.random.key(0))
    with pytest.raises(ValueError, match="progress must be one number"):
        loss.apply(phi_params, jnp.zeros(8, int), jnp.ones((8, 3)), progress=jnp.ones(shape))


def test_layers_are_drawn_apart():
    params = LossNetwork(hidden_sizes=(2, 2)).init(jax.random.key(0))
    assert not np.allclose(params["layer_0"]["kernel"], params["layer_1"]["kernel"])
