"""Losses and metrics against definitions written out in NumPy, and their errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adalfl_jax import task_losses
from adalfl_jax.task_losses import METRICS, TASK_LOSSES

LOGITS = np.array([[2.0, -1.0, 0.5], [0.0, 0.0, 3.0], [-2.0, 1.0, 1.5], [0.3, 0.2, 0.1]], np.float32)
LABELS = np.array([0, 2, 1, 1])
ONE_HOT = np.eye(3, dtype=np.float32)[LABELS]


def test_softmax_cross_entropy_of_labels_and_of_distributions():
    log_probabilities = LOGITS - np.log(np.exp(LOGITS).sum(axis=1, keepdims=True))
    expected = -log_probabilities[np.arange(4), LABELS].mean()
    np.testing.assert_allclose(task_losses.softmax_cross_entropy(jnp.array(LABELS), LOGITS), expected, rtol=1e-6)
    np.testing.assert_allclose(task_losses.softmax_cross_entropy(jnp.array(ONE_HOT), LOGITS), expected, rtol=1e-6)
    soft = 0.9 * ONE_HOT + 0.1 / 3
    np.testing.assert_allclose(
        task_losses.softmax_cross_entropy(jnp.array(soft), LOGITS),
        -(soft * log_probabilities).sum(axis=1).mean(),
        rtol=1e-6,
    )


def test_sigmoid_cross_entropy_of_one_and_of_many_outputs():
    def expected(targets, logits):
        p = 1 / (1 + np.exp(-logits))
        return -(targets * np.log(p) + (1 - targets) * np.log(1 - p)).mean()

    np.testing.assert_allclose(
        task_losses.sigmoid_cross_entropy(jnp.array(ONE_HOT), LOGITS), expected(ONE_HOT, LOGITS), rtol=1e-5
    )
    binary = np.array([0, 1, 1, 0])
    np.testing.assert_allclose(
        task_losses.sigmoid_cross_entropy(jnp.array(binary), LOGITS[:, :1]),
        expected(binary[:, None], LOGITS[:, :1]),
        rtol=1e-5,
    )


def test_losses_of_a_regression():
    targets, outputs = jnp.array([[0.0, 1.0], [2.0, -3.0]]), jnp.array([[0.5, 1.0], [5.0, -3.5]])
    assert task_losses.squared_error(targets, outputs) == pytest.approx((0.25 + 9 + 0.25) / 4)
    assert task_losses.absolute_error(targets, outputs) == pytest.approx((0.5 + 3 + 0.5) / 4)
    assert task_losses.huber(targets, outputs) == pytest.approx((0.125 + 2.5 + 0.125) / 4)
    assert task_losses.huber(targets, outputs, delta=2.0) == pytest.approx((0.125 + 2 * (3 - 1) + 0.125) / 4)


@pytest.mark.parametrize("targets", [LABELS, ONE_HOT], ids=["labels", "one_hot"])
def test_error_rates(targets):
    targets = jnp.array(targets)
    assert task_losses.error_rate(targets, jnp.array(LOGITS)) == 0.5
    assert task_losses.top_k_error_rate(targets, jnp.array(LOGITS), k=2) == 0.0
    assert task_losses.top_k_error_rate(targets, jnp.array(LOGITS)[:, ::-1], k=3) == 0.0


def test_the_error_rate_of_a_single_output_is_cut_at_zero():
    outputs = jnp.array([[2.0], [-1.0], [0.5], [-0.1]])
    assert task_losses.error_rate(jnp.array([1, 1, 0, 0]), outputs) == 0.5
    assert task_losses.error_rate(jnp.array([[1.0], [0.0], [1.0], [0.0]]), outputs) == 0.0


@pytest.mark.parametrize("name", TASK_LOSSES)
def test_gradients_are_finite_at_extreme_outputs(name):
    outputs = jnp.array([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]], jnp.float32)
    targets = jnp.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]], jnp.float32)
    value, gradient = jax.value_and_grad(TASK_LOSSES[name], argnums=1)(targets, outputs)
    assert jnp.isfinite(value)
    assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize("name", TASK_LOSSES)
@pytest.mark.usefixtures("float64")
def test_gradients_equal_finite_differences(name):
    outputs = jnp.array([[0.3, -1.2, 2.0], [0.1, 0.4, -0.5]])
    targets = jnp.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    jax.test_util.check_grads(lambda outputs: TASK_LOSSES[name](targets, outputs), (outputs,), order=1, rtol=1e-6)


@pytest.mark.parametrize("name", [*TASK_LOSSES, *METRICS])
@pytest.mark.parametrize("targets", [jnp.zeros((4, 2)), jnp.zeros((5,), jnp.int32), jnp.zeros((4,))])
def test_targets_that_do_not_fit_are_named_with_both_shapes(name, targets):
    function = (TASK_LOSSES | METRICS)[name]
    shape = str(targets.shape).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=rf"\[B, C\].*\(4, 7\).*targets {shape}"):
        function(targets, jnp.zeros((4, 7)))


@pytest.mark.parametrize("labels", [[0, 3, 1, 1], [0, -1, 1, 1]])
def test_labels_out_of_range_are_refused_outside_of_a_trace(labels):
    with pytest.raises(ValueError, match=r"labels must be from 0 to 2 for .* = \(4, 3\); got labels from"):
        task_losses.softmax_cross_entropy(jnp.array(labels), jnp.array(LOGITS))


def test_softmax_of_a_single_output_is_refused():
    with pytest.raises(ValueError, match="use sigmoid_cross_entropy"):
        task_losses.softmax_cross_entropy(jnp.array([0, 1]), jnp.zeros((2, 1)))


@pytest.mark.parametrize("k", [0, 4])
def test_top_k_refuses_an_impossible_k(k):
    with pytest.raises(ValueError, match=rf"k = {k}.*\(4, 3\)"):
        task_losses.top_k_error_rate(jnp.array(LABELS), jnp.array(LOGITS), k=k)
