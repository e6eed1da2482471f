"""The steps of methods that train on a loss nobody learns, each against what it is by definition."""

import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
import safetensors.numpy

import adalfl_jax
from adalfl_jax import BilevelBatch, Phi, Theta, data
from adalfl_jax.bilevel import make_task_step
from adalfl_jax.data import take
from adalfl_jax.task_losses import TASK_LOSSES, softmax_cross_entropy
from adalfl_jax.training import ConfigError, TrainConfig, compare, train
from adalfl_jax.training.batches import splits_of
from adalfl_jax.training.evaluation import Evaluation
from adalfl_jax.training.initial import init_training, make_seed_keys
from adalfl_jax.training.methods import METHODS
from adalfl_jax.training.setup import examples_for_a_batch, make_setup
from adalfl_jax.training.state import RunState
from adalfl_jax.training.steps import STEPS
from tests.training.tiny import DIABETES, tiny_config, with_value

RATE, SIZE = 0.1, 50
ROBUST = "generalized_cross_entropy"


@pytest.fixture(scope="module")
def setup():
    return make_setup(tiny_config({"baseline.loss": ROBUST, "baseline.fine_tuning": 0.25, "outer.split": "valid"}))


@pytest.fixture(scope="module")
def theta(setup):
    return Theta.create(*setup.model.init(jax.random.key(0)), optax.sgd(RATE))


def batch_of(setup, step=0):
    rows = jnp.arange(SIZE)
    return BilevelBatch(take(setup.dataset.train, rows), take(setup.dataset.valid, rows), None, jnp.asarray(step))


def advance(setup, method, theta, batch):
    state, metrics = jax.jit(STEPS[method](setup, optax.sgd(RATE)))(RunState(theta, None), batch)
    return state.theta, metrics


def task_step(setup, loss_fn, theta, batch):
    return jax.jit(make_task_step(setup.model.apply, loss_fn, optax.sgd(RATE)))(theta, batch, None)


@pytest.mark.parametrize("fraction", [0.5, 0.7])
def test_what_is_held_out_of_the_outer_split_alone_is_validated_on(setup, fraction):
    held_out = make_setup(tiny_config({"outer.split": "valid", "outer.split_fraction": fraction}))
    outer_split = held_out.outer_examples
    outer, valid = (split.inputs.tolist() for split in (outer_split, held_out.dataset.valid))
    assert len(outer) == round(fraction * 144)
    whole = setup.dataset.valid.inputs.tolist()
    assert sorted(outer + valid) == sorted(whole)
    assert setup.outer_examples is setup.dataset.valid  # nothing is held out by default
    labels = (outer_split.targets, setup.dataset.valid.targets)
    shares = [jnp.bincount(targets, length=10) / len(targets) for targets in labels]
    assert jnp.abs(shares[0] - shares[1]).max() < 1 / len(outer)  # of all classes
    assert splits_of(held_out)[1] is held_out.outer_examples


def test_every_method_has_a_step():
    assert STEPS.keys() == METHODS.keys()


def test_the_task_loss_method_trains_on_the_loss_of_the_baseline(setup, theta):
    batch = batch_of(setup)
    expected, metrics = task_step(setup, TASK_LOSSES[ROBUST], theta, batch.inner)
    found, measured = advance(setup, "task_loss", theta, batch)
    chex.assert_trees_all_close(found, expected, rtol=1e-6)
    assert measured["inner_loss"] == pytest.approx(metrics.loss)


def joint_setup(share=0.25, **changes):
    return make_setup(
        tiny_config({"baseline.loss": ROBUST, "outer.split": "valid", "outer.joint_share": share}, **changes)
    )


def after_both(setup, loss_fn, theta, batch):
    """Parameters after a step along the sum of two gradients, each from a step of its own."""
    parts = ((loss_fn, batch.inner), (softmax_cross_entropy, batch.outer))
    ends = [task_step(setup, loss_fn, theta, part)[0].params for loss_fn, part in parts]
    return jax.tree.map(lambda start, one, other: one + other - start, theta.params, *ends)


@pytest.mark.parametrize(("step", "is_joint"), [(0, False), (14, False), (15, True), (19, True)])
def test_the_clean_set_joins_in_the_last_quarter_of_twenty_steps(theta, step, is_joint):
    setup = joint_setup()
    batch = batch_of(setup, step)
    robust = TASK_LOSSES[ROBUST]
    alone = task_step(setup, robust, theta, batch.inner)[0].params
    found, metrics = advance(setup, "task_loss", theta, batch)
    chex.assert_trees_all_close(found.params, after_both(setup, robust, theta, batch) if is_joint else alone, atol=1e-6)
    outputs, _ = setup.model.apply(theta.params, theta.model_state, batch.inner.inputs, train=True, rng_key=None)
    assert metrics["inner_loss"] == pytest.approx(float(robust(batch.inner.targets, outputs)), rel=1e-6)


def test_the_clean_set_may_join_from_the_first_step_on(theta):
    setup = joint_setup(1.0)
    batch = batch_of(setup)
    found, _ = advance(setup, "task_loss", theta, batch)
    chex.assert_trees_all_close(found.params, after_both(setup, TASK_LOSSES[ROBUST], theta, batch), atol=1e-6)


def reading_progress(phi_params):
    """phi whose weights of progress, zero at first, tell points of training apart."""
    first = phi_params["layer_0"]
    return {**phi_params, "layer_0": {**first, "kernel": first["kernel"].at[..., 2, :].set(1.0)}}


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.has_learned_loss])
def test_where_the_clean_set_joins_a_learned_loss_stays_as_it_is(theta, method):
    changes = {"learned_loss.use_progress": True, "outer.split": "valid", "outer.joint_share": 0.25}
    setup = make_setup(tiny_config(changes))
    phi = Phi.create(reading_progress(setup.learned_loss.init(jax.random.key(1))), optax.adam(1.0))
    step = jax.jit(STEPS[method](setup, optax.sgd(RATE)))
    batch = batch_of(setup, 15)._replace(progress=0.75)
    after, metrics = step(RunState(theta, phi), batch)

    def learned_loss(targets, outputs):
        return setup.learned_loss.apply(phi.params, targets, outputs, progress=0.75)

    chex.assert_trees_all_equal(after.phi, phi)
    chex.assert_trees_all_close(after.theta.params, after_both(setup, learned_loss, theta, batch), atol=1e-6)
    before, before_metrics = step(RunState(theta, phi), batch._replace(step=jnp.asarray(14)))
    assert metrics.keys() == before_metrics.keys()
    if method == "adalfl":
        outputs, _ = setup.model.apply(theta.params, theta.model_state, batch.outer.inputs, train=True, rng_key=None)
        assert metrics["outer_loss"] == pytest.approx(
            float(softmax_cross_entropy(batch.outer.targets, outputs)), rel=1e-6
        )
        assert metrics["hypergradient_norm"] == metrics["phi_update_ratio"] == 0 < before_metrics["hypergradient_norm"]
        assert any((one != other).any() for one, other in zip(*map(jax.tree.leaves, (before.phi, phi)), strict=True))


@pytest.mark.slow
def test_where_the_clean_set_joins_does_not_depend_on_the_length_of_chunks(tmp_path):
    changes = {"outer.split": "valid", "outer.joint_share": 0.3}
    folders = [tmp_path / str(length) for length in (2, 10)]
    ends = [
        train(tiny_config(changes, num_steps=10, eval_every=int(folder.name)), folder)["methods"]["adalfl"]["test"]
        for folder in folders
    ]
    assert ends[0] == ends[1]
    one, other = (safetensors.numpy.load_file(folder / "learned_loss.safetensors") for folder in folders)
    chex.assert_trees_all_equal(one, other)


@pytest.mark.parametrize(("step", "is_tuned"), [(0, False), (14, False), (15, True), (19, True)])
def test_fine_tuning_takes_the_last_quarter_of_twenty_steps(setup, theta, step, is_tuned):
    batch = batch_of(setup, step)
    loss_fn, part = (softmax_cross_entropy, batch.outer) if is_tuned else (TASK_LOSSES[ROBUST], batch.inner)
    found, _ = advance(setup, "fine_tuned", theta, batch)
    chex.assert_trees_all_close(found, task_step(setup, loss_fn, theta, part)[0], rtol=1e-6)


def test_fine_tuning_takes_the_last_step_of_few(theta):
    config = {"baseline.fine_tuning": 0.2, "outer.split": "valid"}
    short = make_setup(tiny_config(config, num_steps=2))
    ends = [advance(short, method, theta, batch_of(short, 1))[0] for method in ("fine_tuned", "task_loss")]
    assert any((one != other).any() for one, other in zip(*(jax.tree.leaves(end.params) for end in ends), strict=True))


@pytest.mark.parametrize("method", ["fine_tuned", "task_loss"])
def test_one_of_two_kinds_of_steps_is_computed_under_seeds(method, theta):
    setup = joint_setup()
    make = STEPS[method](setup, optax.sgd(RATE))
    seeds = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), RunState(theta, None))
    batch = batch_of(setup)
    assert "cond[" in str(jax.make_jaxpr(jax.vmap(lambda state: make(state, batch)))(seeds))


def test_reweighting_weighs_the_loss_of_the_baseline(setup, theta):
    def generalized(targets, outputs):  # q = 0.7
        return (1 - jax.nn.softmax(outputs)[jnp.arange(SIZE), targets] ** 0.7) / 0.7

    step = adalfl_jax.make_reweighting_step(setup.model.apply, generalized, softmax_cross_entropy, optax.sgd(RATE))
    batch = batch_of(setup)
    expected, metrics = jax.jit(step)(theta, batch)
    found, measured = advance(setup, "reweighting", theta, batch)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-7)
    assert 0 < measured["zero_share"] == metrics.zero_share < 1


@pytest.mark.slow
def test_all_methods_are_compared_in_one_run(tmp_path):
    methods = tuple(METHODS)
    config = tiny_config(methods=methods, num_steps=4, eval_every=2, **{"outer.split": "valid"})
    summary = compare(config, tmp_path)
    assert tuple(summary["methods"]) == methods
    assert {comparison["method"] for comparison in summary["comparisons"]} == {"adalfl"}
    errors = [info["test"]["mean"] for info in summary["methods"].values()]
    assert all(0 < error < 1 for error in errors)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("baseline.loss", "cross_entropy", r"unknown task loss 'cross_entropy'.*did you mean 'softmax_cross_entropy'"),
        ("outer.split_fraction", 0.5, r"config.outer.split_fraction must be 1.0 with outer.split \"train\"; got 0.5"),
        ("baseline.fine_tuning", 1.0, r"config.baseline.fine_tuning must be a number in \(0, 1\); got 1.0"),
        ("outer.joint_share", 0.2, r"config.outer.joint_share must be 0 with outer.split \"train\", .*; got 0.2"),
        ("outer.joint_share", 1.5, r"config.outer.joint_share must be a number in \[0, 1\]; got 1.5"),
    ],
)
def test_impossible_baselines_are_refused(path, value, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig.from_mapping(with_value(path, value))


@pytest.mark.parametrize(
    ("fraction", "message"), [(0.3, "has only 43 examples to draw from"), (0.003, "on both sides")]
)
def test_a_clean_set_that_is_too_small_to_hold_out_of_is_refused(fraction, message):
    with pytest.raises(ConfigError, match=message):
        make_setup(tiny_config({"outer.split": "valid", "outer.split_fraction": fraction}))


def test_a_share_of_the_clean_set_is_not_cut_by_what_rounds():
    share = {"outer.split": "valid", "outer.split_fraction": 0.29, "dataset.valid_examples": 100, "batch_size": 29}
    config = tiny_config(share)  # in float64 0.29 * 100 is less than 29
    assert examples_for_a_batch(config) == 100
    assert len(make_setup(config).outer_examples.inputs) == 29


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.needs_clean_set])
def test_a_method_that_needs_a_clean_set_is_refused_without(method, tmp_path):
    message = rf"config.outer.split must be \"valid\" for the method '{method}', .* clean set; got 'train'"
    for run, changes in ((train, {"method": method}), (compare, {"methods": ("task_loss", method)})):
        with pytest.raises(ConfigError, match=message):
            run(tiny_config(changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("share", "every", "first"), [(1.0, 1, 0), (0.99, 1, 0), (0.2, 9, 8)])
def test_a_loss_that_is_learned_in_no_step_is_refused(share, every, first, tmp_path):
    changes = {"outer.split": "valid", "outer.joint_share": share, "outer.every": every, "num_steps": 10}
    message = (
        "config.outer.joint_share must be so small that adalfl updates phi before the clean set joins, which it would "
        f"after {first} steps; got {share}"
    )
    for run, method in ((train, {"method": "adalfl"}), (compare, {"methods": ("task_loss", "adalfl")})):
        with pytest.raises(ConfigError, match=message):
            run(tiny_config(changes, **method), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "methods", "message"),
    [
        (
            {"outer.split": "valid", "outer.joint_share": 0.2},
            ("task_loss", "tuned_task_loss"),
            'config.outer.joint_share must be 0 for "tuned_task_loss", or outer.split_fraction below 1: it would',
        ),
        (
            {"baseline.loss": ROBUST},
            ("ml3", "adalfl"),
            'config.baseline.loss must be "" with ml3 and adalfl alone, whi',
        ),
        (
            DIABETES | {"learned_loss.predictions": "probabilities", "method": "task_loss"},
            ("task_loss", "adalfl"),
            "config.learned_loss.predictions must be 'raw' for dataset 'diabetes', whose outputs are numbers and no l",
        ),
    ],
    ids=["tuned_jointly", "unread", "probabilities"],
)
def test_methods_that_the_settings_do_not_fit_are_refused(changes, methods, message, tmp_path):
    with pytest.raises(ConfigError, match=re.escape(message)):
        compare(tiny_config(changes, methods=methods), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("without_figures")
def test_a_setting_of_methods_that_do_not_run_matters_to_none(tmp_path):
    unread = DIABETES | {"learned_loss.predictions": "probabilities", "method": "adalfl"}
    assert compare(tiny_config(unread, methods=("task_loss",)), tmp_path / "run")["methods"].keys() == {"task_loss"}


def test_a_baseline_of_another_kind_of_targets_is_refused():
    with pytest.raises(ConfigError, match=r"config\.baseline\.loss must be one of softmax_cross_entropy, "):
        make_setup(tiny_config({"baseline.loss": "squared_error"}))


def measured(overrides, progress, change=lambda phi_params: phi_params):
    """What an evaluation says of fresh models and fresh learned losses."""
    setup = make_setup(tiny_config(overrides))
    state = init_training(setup, "adalfl", make_seed_keys(setup.config.seeds))
    state = state._replace(phi=state.phi._replace(params=change(state.phi.params)))
    return Evaluation(setup).scalars(state, RATE, progress)


def test_a_loss_is_measured_at_the_point_of_training_it_is_at():
    start, end = (measured({"learned_loss.use_progress": True}, at, reading_progress) for at in (0.0, 1.0))
    for name in ("gradient_scale", "gradient_cosine", "valid_gradient_cosine", "flat_output_share"):
        assert (start[name] != end[name]).any(), name


def test_the_cosine_to_the_clean_gradient_is_that_of_validation_examples():
    found = measured({"learned_loss.family": "scaled_task_loss"}, 0.0)
    assert found["gradient_cosine"] == pytest.approx(1, abs=1e-4)
    assert (found["valid_gradient_cosine"] < 0.99).all()


def test_a_learned_loss_is_measured_on_all_classes_of_a_sorted_training_split():
    dataset = data.load("digits")
    order = jnp.argsort(dataset.train.targets)
    by_class = dataclasses.replace(dataset, train=jax.tree.map(lambda array: array[order], dataset.train))
    probe = Evaluation(make_setup(tiny_config(), by_class))._probe.train
    counts = jnp.bincount(probe.targets, length=10)
    assert counts.sum() >= 480
    assert (counts >= counts.sum() // 12).all()
