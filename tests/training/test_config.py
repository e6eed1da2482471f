import dataclasses
import json
import operator
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adalfl_jax import data
from adalfl_jax.data import NOISE_KINDS, STREAMING
from adalfl_jax.hypergradient import ESTIMATORS
from adalfl_jax.learned_losses import configurable_families
from adalfl_jax.learned_losses.activations import ACTIVATIONS
from adalfl_jax.learned_losses.network import PREDICTIONS, REDUCTIONS
from adalfl_jax.models import COMPUTE_DTYPES, INITIALIZATIONS, MODELS
from adalfl_jax.task_losses import METRICS, TASK_LOSSES
from adalfl_jax.training import ConfigError, TrainConfig
from adalfl_jax.training.config import FAULT_POLICIES
from adalfl_jax.training.methods import METHODS
from adalfl_jax.training.optimizers import make_inner_optimizer, make_outer_optimizer
from adalfl_jax.training.sections import OUTER_SPLITS, SCHEDULES
from adalfl_jax.training.setup import make_setup
from configs import default
from tests.training.tiny import DIABETES, default_values, tiny_config, with_value


def test_default_config_builds_with_every_value_it_has():
    config = TrainConfig.from_mapping(default.get_config())
    values = json.loads(json.dumps(default_values()))
    for section in ("model", "learned_loss"):
        assert values[section].pop("options") == {}  # left out, so that digests are those of runs without options
    assert config.to_dict() == values


def test_config_round_trips_through_json():
    config = tiny_config({"inner.clip_norm": 2.0, "inner.schedule": "cosine"})
    assert TrainConfig.from_mapping(json.loads(json.dumps(config.to_dict()))) == config


def test_seeds_count_up_from_the_first():
    assert tiny_config(seed=4, num_seeds=3).seeds == (4, 5, 6)


def test_whole_number_serves_as_a_float():
    config = TrainConfig.from_mapping(with_value("inner.learning_rate", 1))
    assert config.inner.learning_rate == 1.0
    assert type(config.inner.learning_rate) is float


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("num_steps", np.int64(5)),
        ("inner.learning_rate", np.float32(0.5)),
        ("outer.pipelined", np.False_),
        ("model.hidden_sizes", [np.int32(3), 4]),
        ("model.name", np.str_("mlp")),
    ],
)
def test_numbers_of_numpy_serve_as_those_of_python(path, value):
    with_numpy = TrainConfig.from_mapping(with_value(path, value))
    plain = value.item() if isinstance(value, np.generic) else [3, 4]
    assert with_numpy == TrainConfig.from_mapping(with_value(path, plain))
    assert type(operator.attrgetter(path)(with_numpy)) is (tuple if path == "model.hidden_sizes" else type(plain))


def test_list_serves_as_a_tuple():
    assert TrainConfig.from_mapping(with_value("model.hidden_sizes", [3, 4])).model.hidden_sizes == (3, 4)


def test_section_that_is_no_section_is_refused():
    with pytest.raises(ConfigError, match=r"config\.inner must be a section of fields; got 3"):
        TrainConfig.from_mapping(with_value("inner", 3))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("num_steps", "10"),
        ("num_steps", 1.5),
        ("num_steps", True),
        ("num_steps", None),
        ("seed", 0.0),
        ("method", 3),
        ("inner.learning_rate", float("nan")),
        ("inner.learning_rate", float("inf")),
        ("inner.learning_rate", "0.1"),
        ("inner.learning_rate", True),
        ("inner.nesterov", 1),
        ("inner.clip_norm", "1"),
        ("inner.clip_norm", float("nan")),
        ("model.hidden_sizes", "100"),
        ("model.hidden_sizes", 100),
        ("model.hidden_sizes", (1.5,)),
        ("methods", "adalfl"),
        ("tuning.learning_rates", (0.1, float("inf"))),
    ],
)
def test_wrong_type_is_refused(path, value):
    got = value[-1] if isinstance(value, tuple) else value
    with pytest.raises(ConfigError, match=rf"config\.{path} must be .*; got {got!r}"):
        TrainConfig.from_mapping(with_value(path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("methods", ()),
        ("methods", ("adalfl", "adalfl")),
        ("seed", -1),
        ("seed", 2**31),
        ("num_seeds", 0),
        ("batch_size", 0),
        ("num_steps", 0),
        ("eval_every", 0),
        ("dataset.name", ""),
        ("dataset.image_size", -1),
        ("dataset.valid_fraction", 0.0),
        ("dataset.valid_fraction", 1.0),
        ("dataset.valid_examples", -1),
        ("dataset.seed", -1),
        ("dataset.label_noise", 1.0),
        ("dataset.label_noise", -0.1),
        ("dataset.imbalance", 0.5),
        ("augmentation.padding", -1),
        ("model.hidden_sizes", (8, 0)),
        ("model.remat", True),  # the default is an MLP, which has no blocks
        ("inner.learning_rate", 0.0),
        ("inner.first_step_rate", -0.1),
        ("inner.momentum", -0.1),
        ("inner.momentum", 1.0),
        ("inner.nesterov", True),  # the default has no momentum
        ("inner.weight_decay", -1e-4),
        ("inner.clip_norm", -1.0),
        ("inner.milestones", (0, 5)),
        ("inner.milestones", (5, 5)),
        ("inner.milestones", (9, 5)),
        ("inner.milestone_factor", 0.0),
        ("inner.milestone_factor", 1.5),
        ("outer.learning_rate", 0.0),
        ("offline.num_steps", -1),
        ("offline.num_inner_steps", 0),
        ("offline.learning_rate", 0.0),
        ("learned_loss.hidden_sizes", (0,)),
        ("learned_loss.beta", 0.0),
        ("learned_loss.gamma", 1.0),
        ("learned_loss.gamma", -0.1),
        ("learned_loss.weight_hidden_size", 0),
        ("learned_loss.floor", -1.0),
        ("learned_loss.ceiling", -1.0),
        ("tuning.learning_rates", ()),
        ("tuning.learning_rates", (0.1, 0.0)),
        ("tuning.learning_rates", (0.1, 0.3, 0.1)),
        ("checkpoint.every_seconds", -1.0),
        ("checkpoint.every_steps", -1),
        ("checkpoint.keep", -1),
        ("num_loss_figures", -1),
        ("profile_steps", (5,)),
        ("profile_steps", (0, 5)),
        ("profile_steps", (6, 5)),
        ("profile_steps", (2501, 2600)),  # the longest phase by default is the offline one, of 2500 steps
        ("methods", ("task_loss,adalfl",)),  # what the command line makes of names without quotes
    ],
)
def test_value_out_of_range_is_refused(path, value):
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_mapping(with_value(path, value))
    assert path.split(".")[-1] in str(caught.value)
    assert f"got {value!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("inner.momentum", 0.0),
        ("offline.num_steps", 0),
        ("learned_loss.gamma", 0.0),
        ("inner.clip_norm", 0.0),
        ("profile_steps", (2500, 2600)),
    ],
)
def test_value_at_the_edge_of_its_range_is_taken(path, value):
    TrainConfig.from_mapping(with_value(path, value))


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("num_steps", "10", "a whole number"),
        ("inner.learning_rate", "a", "a finite number that float32 holds"),
        ("inner.learning_rate", 1e-60, "a finite number that float32 holds"),
        ("inner.learning_rate", 1e40, "a finite number that float32 holds"),
        ("num_steps", 2**31, r"a whole number of at least 1, below 2\*\*31"),
        ("offline.num_steps", 2**31, r"a whole number of at least 0, below 2\*\*31"),
        ("inner.nesterov", 1, "True or False"),
        ("method", 3, "a string"),
        ("model.hidden_sizes", ("(8,a)",), "a tuple of whole numbers"),
        ("methods", "adalfl", "a tuple of strings"),
        ("inner.first_step_rate", -1.0, "a number of at least 0"),
        ("inner.nesterov", True, "False with inner.momentum 0; set that above 0 for True"),
    ],
)
def test_what_a_field_takes_is_told_in_words(path, value, expected):
    with pytest.raises(ConfigError, match=rf"^config\.{path} must be {expected}; got "):
        TrainConfig.from_mapping(with_value(path, value))


def test_clipping_and_a_first_step_of_a_given_length_are_refused_together():
    with pytest.raises(ConfigError, match=r"inner.first_step_rate must be 0 with inner.clip_norm, .*; got 0.3"):
        tiny_config({"inner.first_step_rate": 0.3, "inner.clip_norm": 1.0})


def test_seeds_beyond_what_a_key_can_hold_are_refused():
    values = with_value("seed", 2**31 - 1)
    values["num_seeds"] = 2
    with pytest.raises(ConfigError, match="seed"):
        TrainConfig.from_mapping(values)


@pytest.mark.parametrize(
    ("path", "known"),
    [
        ("method", METHODS),
        ("dataset.streaming", STREAMING),
        ("dataset.noise_kind", NOISE_KINDS),
        ("model.name", MODELS),
        ("model.initialization", INITIALIZATIONS),
        ("model.compute_dtype", COMPUTE_DTYPES),
        ("task_loss", TASK_LOSSES),
        ("metric", METRICS),
        ("inner.schedule", (*SCHEDULES, "milestones")),
        ("outer.schedule", SCHEDULES),
        ("outer.split", OUTER_SPLITS),
        ("learned_loss.family", configurable_families),
        ("learned_loss.activation", ACTIVATIONS),
        ("learned_loss.output_activation", ACTIVATIONS),
        ("learned_loss.reduction", REDUCTIONS),
        ("learned_loss.predictions", PREDICTIONS),
        ("hypergradient", ESTIMATORS),
        ("on_nonfinite", FAULT_POLICIES),
    ],
)
def test_unknown_name_is_refused_with_the_known_ones(path, known):
    with pytest.raises(ConfigError, match="'nonesuch'") as caught:
        TrainConfig.from_mapping(with_value(path, "nonesuch"))
    listed = str(caught.value).partition("nown: ")[2].split(", ")
    assert listed == sorted(known() if callable(known) else known)


def test_unknown_method_among_methods_is_refused():
    with pytest.raises(ConfigError, match="unknown method 'adalf'; did you mean 'adalfl'"):
        TrainConfig.from_mapping(with_value("methods", ("task_loss", "adalf")))


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"batch_size": 1294}, "1293 examples to draw from; take"),
        ({"batch_size": 145, "outer.split": "valid"}, "144 examples to draw from; take"),
        (
            {"batch_size": 80, "outer.split": "valid", "outer.split_fraction": 0.5},
            r"72 examples to draw from \(config.outer.split_fraction 0.5 holds others out\); take",
        ),
    ],
    ids=["train", "valid", "half_of_valid"],
)
def test_batch_larger_than_a_split_it_is_drawn_from_is_refused(overrides, told):
    with pytest.raises(ConfigError, match=rf"config\.batch_size is \d+, .* of 'digits' has only {told}"):
        make_setup(tiny_config(overrides))


def test_the_settings_of_a_corrupted_training_split_reach_the_data():
    corruption = {"dataset.label_noise": 0.4, "dataset.noise_kind": "pair", "dataset.imbalance": 5.0}
    dataset = make_setup(tiny_config(corruption | {"dataset.valid_examples": 60, "dataset.seed": 3})).dataset
    expected = data.load("digits", label_noise=0.4, noise_kind="pair", imbalance=5.0, valid_examples=60, seed=3)
    assert len(dataset.valid.targets) == 60
    assert np.array_equal(dataset.train.targets, expected.train.targets)


def test_batch_as_large_as_its_split_is_taken():
    make_setup(tiny_config({"batch_size": 144, "outer.split": "valid"}))


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ({"task_loss": "squared_error"}, "task_loss must be one of softmax_cross_entropy, "),
        (
            {"metric": "mean_squared_error"},
            "metric must be one of error_rate, top_5_error_rate, bits_per_character f",
        ),
        (
            DIABETES | {"task_loss": "softmax_cross_entropy"},
            "task_loss must be one of squared_error, absolute_error",
        ),
        (DIABETES | {"metric": "error_rate"}, "metric must be one of mean_squared_error, mean_absolute_error for dat"),
        (
            DIABETES | {"metric": "top_5_error_rate"},
            "whose targets are numbers [N, 1] (labels are integers [N]: targets.astype(int), or targets.argmax(1)",
        ),
    ],
)
def test_loss_or_metric_of_the_other_kind_of_targets_is_refused(overrides, text):
    with pytest.raises(ConfigError, match=re.escape(text)):
        make_setup(tiny_config(overrides))


def test_a_clean_set_that_is_cut_off_a_users_own_examples_is_told(tmp_path):
    inputs, targets = np.random.default_rng(0).random((60, 4), np.float32), np.arange(60) % 3
    path, own = tmp_path / "cut.npz", tmp_path / "own.npz"
    np.savez(path, inputs=inputs, targets=targets)
    np.savez(own, inputs=inputs, targets=targets, valid_inputs=inputs[:9], valid_targets=targets[:9])
    size = {"batch_size": 4, "model.name": "logistic"}
    clean_set = size | {"outer.split": "valid"}
    with pytest.warns(UserWarning, match="has no valid_inputs and valid_targets, so that split was cut off"):
        make_setup(tiny_config(clean_set | {"dataset.name": str(path)}))
    make_setup(tiny_config(clean_set | {"dataset.name": str(own)}))
    make_setup(tiny_config(clean_set | {"dataset.name": str(path), "dataset.label_noise": 0.2}))
    make_setup(tiny_config(size | {"dataset.name": str(path)}))
    np.savez(path, inputs=inputs, targets=np.linspace(0, 1, 60))  # a regression has no clean set
    make_setup(tiny_config(DIABETES | clean_set | {"dataset.name": str(path)}))


@pytest.mark.parametrize("family", ["scaled_task_loss", "weight_network"])
def test_progress_is_for_the_loss_network(family):
    message = f"learned_loss.use_progress must be False: '{family}' has no such setting; got True"
    with pytest.raises(ConfigError, match=message):
        tiny_config({"learned_loss.family": family, "learned_loss.use_progress": True})


def test_bounds_of_a_scale_alone_may_not_set_it():
    scale = {"learned_loss.family": "scaled_task_loss", "learned_loss.floor": 1.0}
    tiny_config(scale | {"learned_loss.ceiling": 2.0})
    with pytest.raises(ConfigError, match=r"learned_loss\.ceiling must be above the floor for 'scaled_task_loss'"):
        tiny_config(scale | {"learned_loss.ceiling": 1.0})


@pytest.mark.parametrize("overrides", [{"augmentation.padding": 2}, {"augmentation.flip": True}])
def test_augmentation_is_for_images(overrides):
    with pytest.raises(ConfigError, match=r"config\.augmentation is for images .*'diabetes' has inputs of \(10,\)"):
        make_setup(tiny_config(DIABETES | overrides))


def test_digits_are_not_mirrored():
    with pytest.raises(ConfigError, match=r"config\.augmentation\.flip must be False for dataset 'digits'"):
        make_setup(tiny_config({"augmentation.flip": True}))
    make_setup(tiny_config({"augmentation.padding": 1}))


def test_padding_beyond_the_images_is_refused():
    make_setup(tiny_config({"augmentation.padding": 7}))
    with pytest.raises(
        ConfigError, match=r"config\.augmentation\.padding must be smaller than the images, 8x8, .*got 8"
    ):
        make_setup(tiny_config({"augmentation.padding": 8}))


def test_options_of_other_models_are_left_out():
    config = tiny_config({"model.name": "wide_resnet", "model.depth": 10, "model.width": 3, "model.remat": True})
    params, _ = jax.eval_shape(config.model.make((8, 8, 1), 10).init, jax.random.key(0))
    assert params["output"]["kernel"].shape == (3 * 64, 10)
    with pytest.raises(ValueError, match=r"depth of 6n \+ 4"):
        tiny_config({"model.name": "wide_resnet"}).model.make((8, 8, 1), 10)


def test_milestones_are_asked_for_where_the_schedule_needs_them():
    with pytest.raises(ConfigError, match=r"inner\.milestones must be one step or more for \"milestones\"; got \(\)"):
        tiny_config({"inner.schedule": "milestones"})


def test_switches_of_what_is_not_there_are_refused():
    with pytest.raises(ConfigError, match=r"every_steps must be 0 with checkpoint\.keep 0, which keeps none"):
        tiny_config({"checkpoint.every_steps": 5, "checkpoint.keep": 0})
    for switch in ("use_bias", "use_progress"):
        with pytest.raises(ConfigError, match=rf"learned_loss\.{switch} must be False: 'scaled_task_loss' has no such"):
            tiny_config({f"learned_loss.{switch}": True, "learned_loss.family": "scaled_task_loss"})


def test_model_the_images_are_too_small_for_is_refused():
    with pytest.raises(ConfigError, match=r"at least 16x16; got \(8, 8, 1\)"):
        make_setup(tiny_config({"model.name": "lenet5"}))


def test_mlp_without_hidden_layers_is_refused():
    with pytest.raises(ConfigError, match="hidden_sizes"):
        make_setup(tiny_config({"model.hidden_sizes": ()}))


def test_a_configuration_that_is_changed_is_checked_again():
    config = tiny_config()
    for section, changes, message in (
        (config, {"num_seeds": 0}, r"config\.num_seeds must be a whole number of at least 1, below 2\*\*31; got 0"),
        (config.inner, {"momentum": 1.0}, r"config\.inner\.momentum must be a number in \[0, 1\); got 1\.0"),
        (config.mesh, {"data": -1}, r"config\.mesh\.data must be a whole number of at least 0; got -1"),
    ):
        with pytest.raises(ConfigError, match=message):
            dataclasses.replace(section, **changes)


@pytest.mark.parametrize(
    ("overrides", "shares"),
    [
        ({}, [1, 1, 1, 1]),
        ({"outer.schedule": "linear"}, [1, 0.75, 0.5, 0.25]),
        ({"outer.schedule": "cosine"}, [1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2]),
        ({"outer.schedule": "linear", "outer.every": 2}, [1, 0.5, 0, 0]),
        ({"outer.schedule": "linear", "outer.pipelined": True}, [1, 2 / 3, 1 / 3, 0]),
        ({"outer.schedule": "linear", "outer.split": "valid", "outer.joint_share": 0.75}, [1, 0, 0, 0]),
    ],
    ids=["constant", "linear", "cosine", "every second step", "pipelined", "joint"],
)
def test_eta_falls_over_the_updates_of_phi(overrides, shares):
    optimizer = make_outer_optimizer(tiny_config({"outer.learning_rate": 0.1, **overrides}, num_steps=4))
    state, moved = optimizer.init(jnp.zeros(())), []
    for _ in range(4):
        update, state = optimizer.update(jnp.ones(()), state)  # of a gradient that stays Adam's step is eta long
        moved.append(-float(update))
    np.testing.assert_allclose(moved, 0.1 * np.array(shares), rtol=1e-4, atol=1e-8)


def inner_updates(overrides, gradients, *rate_factor):
    """Parameters after each SGD step from (3, 4) at a rate of 0.5."""
    optimizer = make_inner_optimizer(tiny_config(overrides, num_steps=4), 0.5, *rate_factor)
    params = jnp.array([3.0, 4.0])
    state, path = optimizer.init(params), []
    for gradient in gradients:
        updates, state = optimizer.update(jnp.array(gradient), state, params)
        params = params + updates
        path.append(np.asarray(params))
    return path


def test_weight_decay_adds_to_the_gradient():
    (params,) = inner_updates({"inner.weight_decay": 0.1}, [[1.0, 0.0]])
    np.testing.assert_allclose(params, [3 - 0.5 * (1 + 0.3), 4 - 0.5 * 0.4], rtol=1e-6)


def test_weight_decay_goes_at_alpha_where_the_loss_goes_at_a_multiple():
    overrides = {"inner.weight_decay": 0.1, "inner.momentum": 0.5, "inner.first_step_rate": 0.3}
    first, second = inner_updates(overrides, [[1.0, 0.0], [0.0, 0.0]], jnp.float32(30))
    step = 0.5 * np.array([30 * 1 + 0.3, 0.4])
    np.testing.assert_allclose(first, [3, 4] - step, rtol=1e-6)
    np.testing.assert_allclose(second, first - (0.5 * step + 0.5 * 0.1 * first), rtol=1e-6)


def test_gradient_is_clipped_before_weight_decay():
    (params,) = inner_updates({"inner.weight_decay": 0.1, "inner.clip_norm": 1.0}, [[30.0, 40.0]])
    np.testing.assert_allclose(params, [3 - 0.5 * (0.6 + 0.3), 4 - 0.5 * (0.8 + 0.4)], rtol=1e-6)


def test_momentum_keeps_past_gradients():
    path = inner_updates({"inner.momentum": 0.5}, [[1.0, 0.0], [0.0, 0.0]])
    np.testing.assert_allclose(path[1] - path[0], [-0.25, 0.0], atol=1e-6)


def test_nesterov_looks_ahead():
    (params,) = inner_updates({"inner.momentum": 0.5, "inner.nesterov": True}, [[1.0, 0.0]])
    np.testing.assert_allclose(params, [3 - 0.5 * 1.5, 4.0], rtol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "fractions"),
    [
        ("constant", [1, 1, 1, 1, 1]),
        ("linear", [1, 0.75, 0.5, 0.25, 0]),
        ("cosine", [(1 + np.cos(np.pi * k / 4)) / 2 for k in range(5)]),
        ("milestones", [1, 0.5, 0.5, 0.25, 0.25]),
    ],
)
def test_schedule_scales_the_rate_over_num_steps(schedule, fractions):
    milestones = {"inner.milestones": (1, 3), "inner.milestone_factor": 0.5}  # a factor takes hold at its step
    path = inner_updates({"inner.schedule": schedule} | milestones, [[1.0, 0.0]] * 5)
    steps = -np.diff([3.0, *(params[0] for params in path)])
    np.testing.assert_allclose(steps, 0.5 * np.array(fractions), atol=1e-6)
