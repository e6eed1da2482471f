import dataclasses
import importlib
import re
from pathlib import Path

import numpy as np
import pytest

import configs
from adalfl_jax import data
from adalfl_jax.training import TrainConfig, compare
from adalfl_jax.training.setup import make_setup
from adalfl_jax.training.workdir import open_workdir
from configs import run
from tests.training.tiny import SETTINGS, tiny_config

HERE = ("digits", "diabetes", "pydoc_topics")
FILES = {path.stem for path in Path(configs.__file__).parent.glob("*.py")}
NAMES = sorted(FILES - {"__init__", "run"})  # `run` is what another run had


def get_config(name):
    return importlib.import_module(f"configs.{name}").get_config()


def test_there_is_a_config_for_every_row_of_the_paper():
    mnist, fashion = ["logistic", "mlp", "lenet5"], ["mlp", "lenet5"]
    rows = {"default", "digits_mlp", "diabetes_mlp", "california_mlp", "crime_mlp", "cifar100_wrn28_10", "svhn_wrn16_8"}
    rows |= {f"mnist_{model}" for model in mnist} | {f"fashion_mnist_{model}" for model in fashion}
    rows |= {f"cifar10_{model}" for model in ("vgg16", "allcnnc", "resnet18", "squeezenet")}
    assert rows <= set(NAMES)


def random_setup(name, num_examples, changes=()):
    """A config on noise in the shapes of its dataset."""
    config = get_config(name)
    config.update_from_flattened_dict(dict(changes))
    config = TrainConfig.from_mapping(config)
    spec = data.load_spec(config.dataset.name)
    return make_setup(config, data.random_dataset(config.dataset.name, spec, num_examples))


@pytest.mark.parametrize("name", NAMES)
def test_config_builds_and_its_parts_fit(name):
    random_setup(name, num_examples=128)


@pytest.mark.parametrize("name", NAMES)
def test_config_is_locked_against_unknown_keys(name):
    with pytest.raises(AttributeError, match="num_step"):
        get_config(name).num_step = 3


def test_the_configuration_of_a_run_is_read_back_whole_and_may_be_varied(tmp_path):
    changes = {
        "inner.milestones": (5, 10),
        "inner.schedule": "milestones",
        "dataset.label_noise": 0.25,
        "methods": ("ml3",),
    }
    made_with = tiny_config(changes)
    config = run.get_config(str(open_workdir(tmp_path / "a run", made_with, "compare")))
    assert TrainConfig.from_mapping(config) == made_with
    with pytest.raises(AttributeError, match="num_step"):
        config.num_step = 3
    config.num_steps = 40
    assert TrainConfig.from_mapping(config) == dataclasses.replace(made_with, num_steps=40)


@pytest.mark.parametrize("name", NAMES)
def test_the_docstring_of_a_config_says_how_to_run_it_how_long_that_takes_and_what_to_expect(name):
    if name == "default":
        return
    text = importlib.import_module(f"configs.{name}").__doc__
    assert f"python -m experiments.compare --config=configs/{name}.py --workdir=runs/{name}" in text
    dataset = get_config(name).dataset.name
    assert dataset in HERE or f"python -m adalfl_jax.data.prepare {dataset}" in text
    assert re.search(r"(?i)takes|minutes|seconds|hours|days", text)
    assert re.search(r"(?i)expect|report|not run", text)


# One run serves files that say the same.
EMBEDDED = {get_config(name).to_json(): name for name in NAMES if get_config(name).dataset.name in HERE[:2]}


@pytest.mark.slow  # the quick set has the parts above, the runs of tests/training and a step in test_steps
@pytest.mark.usefixtures("without_figures")
@pytest.mark.parametrize("name", EMBEDDED.values())
def test_config_whose_data_are_here_takes_one_step_of_each_of_its_methods(name, tmp_path):
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
