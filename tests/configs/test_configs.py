import importlib
from pathlib import Path

import numpy as np
import pytest

import configs
from adalfl_jax.training import TrainConfig, compare
from adalfl_jax.training.setup import make_setup
from tests.training.tiny import SETTINGS
from tests.training.tiny import quick_compilation as quick_compilation

NAMES = sorted(path.stem for path in Path(configs.__file__).parent.glob("*.py") if path.stem != "__init__")


def get_config(name):
    return importlib.import_module(f"configs.{name}").get_config()


def test_there_are_configs_to_check():
    assert {"default", "digits_mlp", "diabetes_mlp"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_config_builds_and_its_parts_fit(name):
    make_setup(TrainConfig.from_mapping(get_config(name)))


@pytest.mark.parametrize("name", NAMES)
def test_config_is_locked_against_unknown_keys(name):
    with pytest.raises(AttributeError, match="num_step"):
        get_config(name).num_step = 3


DISTINCT = {get_config(name).to_json(): name for name in NAMES}  # one run serves files that say the same


@pytest.mark.parametrize("name", DISTINCT.values())
def test_config_takes_one_step_of_each_of_its_methods(name, tmp_path):
    config = get_config(name)
    config.update_from_flattened_dict(
        {
            "num_steps": 1,
            "num_seeds": 1,
            "offline.num_steps": 1,
            "tuning.learning_rates": config.tuning.learning_rates[:1],
            "model.hidden_sizes": SETTINGS["model.hidden_sizes"],
            "learned_loss.hidden_sizes": SETTINGS["learned_loss.hidden_sizes"],
        }
    )
    summary = compare(TrainConfig.from_mapping(config), tmp_path)
    assert tuple(summary["methods"]) == config.methods
    assert all(np.isfinite(info["test"]["mean"]) for info in summary["methods"].values())
