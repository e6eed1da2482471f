"""Losses and metrics against definitions written out in NumPy, and their errors."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

import adalfl_jax
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


SOFT = 0.7 * ONE_HOT + 0.3 * np.array([0.5, 0.5, 0.0], np.float32)  # one class of nothing


def probabilities(logits):
    exponentials = np.exp(np.asarray(logits, np.float64))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def generalized(targets, p):
    return (targets * (1 - p**0.7) / 0.7).sum(axis=1).mean()


def symmetric(targets, p):
    with np.errstate(divide="ignore"):
        log_targets = np.maximum(np.log(targets), -4.0)
    return (-0.1 * (targets * np.log(p)).sum(axis=1) - (p * log_targets).sum(axis=1)).mean()


def smoothed(targets, p):
    return -((0.9 * targets + 0.1 / targets.shape[1]) * np.log(p)).sum(axis=1).mean()


ROBUST = {
    "generalized_cross_entropy": generalized,
    "symmetric_cross_entropy": symmetric,
    "smoothed_cross_entropy": smoothed,
}


@pytest.mark.parametrize("name", ROBUST)
def test_robust_losses_are_those_of_their_papers(name):
    function, definition = TASK_LOSSES[name], ROBUST[name]
    expected = definition(ONE_HOT, probabilities(LOGITS))
    np.testing.assert_allclose(function(jnp.array(LABELS), jnp.array(LOGITS)), expected, rtol=1e-6)
    np.testing.assert_allclose(function(jnp.array(ONE_HOT), jnp.array(LOGITS)), expected, rtol=1e-6)
    np.testing.assert_allclose(
        function(jnp.array(SOFT), jnp.array(LOGITS)), definition(SOFT, probabilities(LOGITS)), rtol=1e-6
    )


def test_the_generalised_loss_lies_between_cross_entropy_and_the_probability_of_error():
    labels, logits = jnp.array(LABELS), jnp.array(LOGITS)
    wrong = 1 - probabilities(LOGITS)[np.arange(4), LABELS].mean()
    np.testing.assert_allclose(task_losses.generalized_cross_entropy(labels, logits, q=1.0), wrong, rtol=1e-6)
    near = task_losses.generalized_cross_entropy(labels, logits, q=1e-4)
    np.testing.assert_allclose(near, task_losses.softmax_cross_entropy(labels, logits), rtol=1e-3)


def test_settings_of_robust_losses_are_taken():
    labels, logits = jnp.array(LABELS), jnp.array(LOGITS)
    cross_entropy = task_losses.softmax_cross_entropy(labels, logits)
    np.testing.assert_allclose(task_losses.smoothed_cross_entropy(labels, logits, smoothing=0.0), cross_entropy)
    one_sided = task_losses.symmetric_cross_entropy(labels, logits, alpha=2.0, beta=0.0)
    np.testing.assert_allclose(one_sided, 2 * cross_entropy, rtol=1e-6)
    reverse = task_losses.symmetric_cross_entropy(labels, logits, alpha=0.0, log_zero=-7.0)
    wrong = 1 - probabilities(LOGITS)[np.arange(4), LABELS].mean()
    np.testing.assert_allclose(reverse, 7 * wrong, rtol=1e-6)


@pytest.mark.parametrize("share", [1e-9, 1e-30])
def test_a_share_of_a_target_that_is_nearly_0_weighs_as_one_that_is(share):
    loss = functools.partial(task_losses.symmetric_cross_entropy, alpha=0.0)
    outputs = jnp.array([[0.5, -1.0]])
    nearly, exactly = (loss(jnp.array([target]), outputs) for target in ([share, 1 - share], [0.0, 1.0]))
    np.testing.assert_allclose(nearly, exactly, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("log_zero", [-20.0, -100.0])
def test_the_symmetric_loss_is_finite_however_little_a_zero_is(log_zero, dtype):
    labels, logits = jnp.array(LABELS), jnp.array(LOGITS, dtype)
    loss = functools.partial(task_losses.symmetric_cross_entropy, labels, alpha=0.0, log_zero=log_zero)
    value, gradient = jax.jit(jax.value_and_grad(loss))(logits)
    wrong = 1 - probabilities(LOGITS)[np.arange(4), LABELS].mean()
    np.testing.assert_allclose(value, -log_zero * wrong, rtol=1e-5 if dtype == jnp.float32 else 0.05)
    assert jnp.isfinite(gradient).all()


# Logits of +-1000 leave probabilities of exactly 0 and 1. Label 0 is right, label 1 wrong, in as many examples.
SATURATED = jnp.array([[1000.0, -1000.0, -1000.0]] * 2, jnp.float32)


@pytest.mark.parametrize(
    ("name", "value", "slope"),
    [
        ("generalized_cross_entropy", 1 / 0.7, 0.0),
        ("symmetric_cross_entropy", 0.1 * 2000 + 4, 0.1),
        ("smoothed_cross_entropy", 2000 * (0.9 + 0.1 / 3) + 2000 * 0.1 / 3, 0.9),
    ],
)
def test_robust_losses_are_right_where_probabilities_are_saturated(name, value, slope):
    """The value and slope are of the wrong label; smoothing leaves the third class its share at both labels."""
    loss, gradient = jax.jit(jax.value_and_grad(TASK_LOSSES[name], argnums=1))(jnp.array([0, 1]), SATURATED)
    third = 0.1 / 3 if name == "smoothed_cross_entropy" else 0.0
    right = 2 * third * 2000
    np.testing.assert_allclose(loss, (right + value) / 2, rtol=1e-6)
    of_right = [2 * third, -third, -third]
    of_wrong = [slope + 2 * third, -slope - third, -third]
    np.testing.assert_allclose(2 * gradient, [of_right, of_wrong], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        *(
            ("generalized_cross_entropy", {"q": q}, rf"q must be a number in \(0, 1\]; got {q}")
            for q in (0.0, -1.0, 1.5, True)
        ),
        ("smoothed_cross_entropy", {"smoothing": 1.1}, r"smoothing must be a number in \[0, 1\]; got 1.1"),
        ("smoothed_cross_entropy", {"smoothing": "0.1"}, r"smoothing must be a number.*got '0.1'"),
        ("symmetric_cross_entropy", {"alpha": -1.0}, "alpha must be a number of at least 0; got -1.0"),
        ("symmetric_cross_entropy", {"beta": float("nan")}, "beta must be a number of at least 0; got nan"),
        ("symmetric_cross_entropy", {"log_zero": 4.0}, "log_zero must be a number below 0; got 4.0"),
    ],
)
def test_settings_out_of_their_range_are_refused(name, setting, message):
    with pytest.raises(ValueError, match=message):
        TASK_LOSSES[name](jnp.array(LABELS), jnp.array(LOGITS), **setting)


@pytest.mark.parametrize("name", ["softmax_cross_entropy", "symmetric_cross_entropy", "generalized_cross_entropy"])
def test_a_class_that_is_ruled_out_costs_a_distribution_without_a_share_of_it_nothing(name):
    outputs, labels = jnp.array([[0.0, -jnp.inf, 1.0]]), jnp.array([0])
    differentiate = jax.value_and_grad(TASK_LOSSES[name], argnums=1)
    found = [differentiate(targets, outputs) for targets in (labels, jnp.eye(3)[labels])]
    assert np.isfinite(found[0][0])
    chex.assert_trees_all_close(*found, rtol=1e-6)


@pytest.mark.parametrize("targets", [[1], [[0.5, 0.5, 0.0]]], ids=["label", "distribution"])
def test_a_class_that_is_ruled_out_costs_a_target_of_it_all_there_is(targets):
    assert task_losses.softmax_cross_entropy(jnp.array(targets), jnp.array([[0.0, -jnp.inf, 1.0]])) == jnp.inf


def test_an_output_that_is_ruled_out_costs_a_target_of_zero_nothing():
    outputs, targets = jnp.array([[0.0, -jnp.inf, jnp.inf]]), jnp.array([[1.0, 0.0, 1.0]])
    value, gradient = jax.value_and_grad(task_losses.sigmoid_cross_entropy, argnums=1)(targets, outputs)
    np.testing.assert_allclose(value, np.log(2) / 3, rtol=1e-6)
    np.testing.assert_allclose(gradient, [[-1 / 6, 0, 0]], rtol=1e-6)
    assert task_losses.sigmoid_cross_entropy(1 - targets, outputs) == jnp.inf


def test_sigmoid_cross_entropy_is_that_of_optax():
    outputs, targets = jax.random.normal(jax.random.key(0), (2, 5, 3))
    targets = jax.nn.sigmoid(targets)
    expected = optax.sigmoid_binary_cross_entropy(outputs, targets).mean()
    np.testing.assert_array_equal(task_losses.sigmoid_cross_entropy(targets, outputs), expected)


def test_targets_of_zero_may_be_learned_too():
    """A share that is 0 has the derivative -log p, and one of a class that is ruled out none."""
    outputs = jnp.array([[1.0, 2.0, 3.0, -jnp.inf]])
    targets = jnp.array([[0.0, 1.0, 0.0, 0.0]]) + 1e-6  # within the bounds, at which the derivative of a clip is halved
    found = jax.grad(TASK_LOSSES["softmax_cross_entropy"])(targets.at[0, 3].set(0.0), outputs)
    expected = -jax.nn.log_softmax(outputs)[0, :3]
    np.testing.assert_allclose(found[0, :3], expected, rtol=1e-5)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("delta", [0.0, -1.0, None])
def test_a_huber_loss_has_a_width(delta):
    with pytest.raises(ValueError, match=f"delta must be a number above 0; got {delta}"):
        task_losses.huber(jnp.array(ONE_HOT), jnp.array(LOGITS), delta=delta)


@pytest.mark.parametrize(
    ("name", "targets", "settings"),
    [
        ("smoothed_cross_entropy", LABELS, {"smoothing": 0.2}),
        ("generalized_cross_entropy", LABELS, {"q": 0.6}),
        ("symmetric_cross_entropy", LABELS, {"alpha": 0.3, "beta": 0.8, "log_zero": -3.0}),
        ("huber", ONE_HOT, {"delta": 0.7}),
    ],
)
def test_settings_may_be_learned(name, targets, settings, float64):
    def loss(settings):
        return TASK_LOSSES[name](jnp.array(targets), jnp.array(LOGITS, float), **settings)

    check_grads(loss, (settings,), order=1, modes=("rev",), eps=1e-6)
    np.testing.assert_allclose(jax.jit(loss)(settings), loss(settings), rtol=1e-12)


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
    assert task_losses.error_rate(jnp.array([0]), jnp.zeros((1, 1))) == 0.0  # and 0 itself stands for class 0


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
    check_grads(lambda outputs: TASK_LOSSES[name](targets, outputs), (outputs,), order=1, rtol=1e-6)


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


@pytest.mark.parametrize("label", [3, -1])
@pytest.mark.parametrize("dtype", [np.int32, np.int8])
@pytest.mark.parametrize("name", ["softmax_cross_entropy", "sigmoid_cross_entropy", *ROBUST])
def test_labels_out_of_range_make_a_loss_nan_inside_a_trace(name, dtype, label):
    differentiate = jax.jit(jax.value_and_grad(TASK_LOSSES[name], argnums=1))
    loss, gradient = differentiate(jnp.array([0, label, 1, 1], dtype), LOGITS)
    assert jnp.isnan(loss)
    assert jnp.isnan(gradient[1]).all()
    assert jnp.isfinite(jnp.concatenate([gradient[:1], gradient[2:]])).all()


@pytest.mark.parametrize("target", [-1.0, 2.0])
def test_a_sigmoid_takes_no_target_that_is_no_probability(target):
    targets = jnp.array(ONE_HOT).at[1, 0].set(target)
    with pytest.raises(ValueError, match=r"targets must be from 0 to 1; got some from "):
        task_losses.sigmoid_cross_entropy(targets, LOGITS)
    assert jnp.isnan(jax.jit(task_losses.sigmoid_cross_entropy)(targets, LOGITS))


@pytest.mark.parametrize("name", ["softmax_cross_entropy", "sigmoid_cross_entropy", *ROBUST])
@pytest.mark.parametrize("rounding", [2**-7, -1e-7])
def test_targets_may_be_outside_by_rounding(name, rounding):
    targets = jnp.array(ONE_HOT) + rounding
    most = 1 if name == "sigmoid_cross_entropy" else np.inf
    expected = TASK_LOSSES[name](jnp.clip(targets, 0, most), LOGITS)
    for loss_fn in (TASK_LOSSES[name], jax.jit(TASK_LOSSES[name])):
        np.testing.assert_allclose(loss_fn(targets, LOGITS), expected, rtol=1e-5)
    with pytest.raises(ValueError, match="targets must be"):
        TASK_LOSSES[name](targets - 0.06, LOGITS)


@pytest.mark.parametrize("name", ["softmax_cross_entropy", *ROBUST])
def test_a_softmax_takes_no_target_of_a_regression(name):
    targets = jnp.array(ONE_HOT).at[1, 0].set(-2.0)
    with pytest.raises(ValueError, match=r"targets must be 0 or more; got some from -"):
        TASK_LOSSES[name](targets, LOGITS)
    assert jnp.isnan(jax.jit(TASK_LOSSES[name])(targets, LOGITS))


@pytest.mark.parametrize("name", ["softmax_cross_entropy", "sigmoid_cross_entropy", *ROBUST])
def test_labels_of_few_bits_may_have_more_classes_than_they_can_count(name):
    outputs = jax.random.normal(jax.random.key(0), (2, 300))
    few, many = (jax.jit(TASK_LOSSES[name])(jnp.array([3, 255], dtype), outputs) for dtype in (jnp.uint8, jnp.int32))
    assert jnp.isfinite(few)
    assert few == many


@pytest.mark.parametrize("num_outputs", [1, 3])
def test_the_error_rate_of_what_is_no_number_is_none(num_outputs):
    outputs = jnp.zeros((4, num_outputs)).at[2, 0].set(jnp.nan)
    assert jnp.isnan(task_losses.error_rate(jnp.zeros(4, int), outputs))


@pytest.mark.parametrize("name", ["softmax_cross_entropy", *ROBUST])
def test_softmax_of_a_single_output_is_refused(name):
    with pytest.raises(ValueError, match="use sigmoid_cross_entropy"):
        TASK_LOSSES[name](jnp.array([0, 1]), jnp.zeros((2, 1)))


@pytest.mark.parametrize("k", [0, 4])
def test_top_k_refuses_an_impossible_k(k):
    with pytest.raises(ValueError, match=rf"k = {k}.*\(4, 3\)"):
        task_losses.top_k_error_rate(jnp.array(LABELS), jnp.array(LOGITS), k=k)


@pytest.mark.parametrize("num_outputs", [1, 3])
def test_under_jit_the_error_of_a_label_without_a_class_is_nan(num_outputs):
    outputs = jnp.ones((2, num_outputs))
    assert jax.jit(task_losses.error_rate)(jnp.array([1, 0]), outputs) >= 0
    for label in (-1, 7):
        assert jnp.isnan(jax.jit(task_losses.error_rate)(jnp.array([label, 0]), outputs))


@pytest.mark.parametrize("loss_fn", [task_losses.squared_error, task_losses.absolute_error])
def test_outputs_that_are_whole_numbers_are_refused_rather_than_targets_rounded(loss_fn):
    with pytest.raises(ValueError, match="outputs of a regression must be floats; got int32"):
        loss_fn(jnp.full((3, 1), 0.5), jnp.zeros((3, 1), jnp.int32))


@pytest.mark.parametrize("name", [*TASK_LOSSES, *METRICS])
def test_of_pytrees_it_is_told_to_choose(name):
    loss = (TASK_LOSSES | METRICS)[name]
    targets, outputs = {"labels": jnp.zeros(4, int)}, {"logits": jnp.zeros((4, 3))}
    for given in ((targets, outputs), (targets["labels"], outputs), (targets, outputs["logits"])):
        with pytest.raises(ValueError, match=r"one array of targets and one of outputs; .*Got targets .*\(4,\)"):
            loss(*given)


def test_of_pytrees_a_learned_loss_tells_the_same():
    loss = adalfl_jax.LossNetwork((4,))
    with pytest.raises(ValueError, match="one array of targets and one of outputs"):
        loss.apply(loss.init(jax.random.key(0)), jnp.zeros(4, int), {"logits": jnp.zeros((4, 3))})
