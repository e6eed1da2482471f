"""Fields of configurations by name: which there are, what a misspelt one may stand for, and in which two differ."""

import copy
import json

import jax.numpy as jnp
import numpy as np
import pytest

from adalfl_jax.analysis.record import flatten
from adalfl_jax.training import ConfigError, TrainConfig
from adalfl_jax.training.fields import differing_keys, field_paths, require_path
from tests.training.tiny import default_values, with_value

OPTIONS = ("model.options.NAME", "learned_loss.options.NAME")  # none is set by default


def test_field_paths_are_the_keys_of_the_default_config():
    assert sorted(field_paths(TrainConfig)) == sorted([*flatten(default_values()), *OPTIONS])


@pytest.mark.parametrize("option", [2, 0.5, "tanh", True, (1, 2), (), ((1, "a"), (2, "b"))])
def test_an_option_is_what_json_and_a_command_line_hold(option):
    config = TrainConfig.from_mapping(with_value("model.options.dropout_rate", option))
    assert config.model.options["dropout_rate"] == option
    kept = json.loads(json.dumps(config.to_dict()))
    assert TrainConfig.from_mapping(kept) == config
    assert hash(TrainConfig.from_mapping(kept)) == hash(config)


@pytest.mark.parametrize("option", [None, float("nan"), {"a": 1}, {1}, jnp.zeros(()), ("a", None)])
def test_an_option_of_another_kind_is_refused(option):
    with pytest.raises(ConfigError, match=r"config\.model\.options\.dropout_rate must be a "):
        TrainConfig.from_mapping(with_value("model.options.dropout_rate", option))


def test_options_are_numbers_of_python_and_a_section():
    config = TrainConfig.from_mapping(with_value("model.options", {"dropout_rate": np.float32(0.5)}))
    assert type(config.model.options["dropout_rate"]) is float
    with pytest.raises(ConfigError, match=r"config\.model\.options must be a section of fields; got 3"):
        TrainConfig.from_mapping(with_value("model.options", 3))
    with pytest.raises(ConfigError, match=r"unknown option of a model 'dropout'; did you mean 'dropout_rate'\?"):
        TrainConfig.from_mapping(with_value("model.options.dropout", 0.5))
    require_path(TrainConfig, "learned_loss.options.anything")
    with pytest.raises(ValueError, match=r"unknown field of the configuration 'learned_loss\.options\.a\.b'"):
        require_path(TrainConfig, "learned_loss.options.a.b")


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [("num_step", "num_steps"), ("inner.learnin_rate", "learning_rate"), ("learned_loss.gama", "gamma")],
)
def test_unknown_key_is_refused_with_a_suggestion(misspelt, meant):
    with pytest.raises(ConfigError, match=rf"config\.{misspelt} is no field; did you mean '{meant}'\?"):
        TrainConfig.from_mapping(with_value(misspelt, 1))


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("iner.momentum", ["inner.momentum"]),
        ("inner_momentum", ["inner.momentum"]),
        ("learning_rate", ["inner.learning_rate", "outer.learning_rate", "offline.learning_rate"]),
        ("inner.hidden_sizes", ["model.hidden_sizes", "learned_loss.hidden_sizes"]),
        ("lerning_rate", ["inner.learning_rate", "outer.learning_rate", "offline.learning_rate"]),
        ("momentun", ["inner.momentum"]),
        ("seeds", ["num_seeds"]),
        ("noise", ["dataset.label_noise", "dataset.noise_kind"]),
        ("offline.steps", ["offline.num_steps", "offline.num_inner_steps"]),
    ],
)
def test_of_an_unknown_field_those_are_named_that_it_may_stand_for(path, meant):
    with pytest.raises(ValueError, match=r"did you mean ") as caught:
        require_path(TrainConfig, path)
    assert str(caught.value).endswith(f"did you mean {' or '.join(map(repr, meant))}?")


def test_of_an_unknown_field_that_is_like_none_those_beside_it_are_named():
    with pytest.raises(
        ValueError, match=r"known: offline\.num_steps, offline\.num_inner_steps, offline\.learning_rate"
    ):
        require_path(TrainConfig, "offline.eta")
    with pytest.raises(ValueError, match=r"known: method, methods, seed, num_seeds, dataset, augmentation, model, "):
        require_path(TrainConfig, "nonesuch.eta")


@pytest.mark.parametrize("path", sorted(flatten(default_values())))
def test_missing_key_is_named(path):
    values = default_values()
    *parents, leaf = path.split(".")
    section = values
    for parent in parents:
        section = section[parent]
    del section[leaf]
    with pytest.raises(ConfigError, match=rf"{'.'.join(['config', *parents])} lacks {leaf}$"):
        TrainConfig.from_mapping(values)


def test_configs_that_differ_nowhere_have_no_differing_keys():
    values = default_values()
    assert differing_keys(values, copy.deepcopy(values)) == []


def test_differing_keys_name_nested_and_absent_ones():
    left = {"a": 1, "inner": {"rate": 0.1, "old": 2}, "same": [1]}
    right = {"a": 2, "inner": {"rate": 0.1}, "same": [1]}
    assert differing_keys(left, right) == ["a: 1 -> 2", "inner.old: 2 -> '(absent)'"]
