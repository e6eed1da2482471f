import os
import subprocess
import sys

import pytest

from adalfl_jax.training.workdir import open_workdir
from tests.training.tiny import DIABETES, ROOT, SETTINGS, snapshot, tiny_config


def launch(program, workdir, *, config="digits_mlp", overrides=()):
    """Runs a program at tiny settings as a user would, and returns what it printed and how it ended."""
    settings = {**SETTINGS, **dict(overrides)}
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", f"experiments.{program}", f"--config=configs/{config}.py", f"--workdir={workdir}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "COLUMNS": "120"}
    return subprocess.run(  # noqa: S603, the command is ours
        [*command, *flags], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def assert_refused(done, text):
    assert done.returncode not in (0, None)
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_train_prints_the_table(tmp_path):
    done = launch("train", tmp_path / "run", overrides={"method": "task_loss"})
    assert done.returncode == 0, done.stderr
    assert "digits, 20 steps, seeds 0 to 1" in done.stdout
    assert "task loss" in done.stdout
    assert f"Everything is in {tmp_path / 'run'}" in done.stdout
    assert "task loss  20/20" in done.stderr  # progress leaves standard output to the table
    assert (tmp_path / "run" / "summary.json").is_file()


def test_compare_prints_every_method_and_writes_the_report(tmp_path):
    overrides = {"methods": ("task_loss", "tuned_task_loss"), "tuning.learning_rates": (0.1, 0.3)}
    done = launch("compare", tmp_path / "run", overrides=overrides)
    assert done.returncode == 0, done.stderr
    assert "task loss " in done.stdout
    assert "task loss, tuned rate" in done.stdout
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ({"num_stepss": 3}, "unknown field of the configuration 'num_stepss'; did you mean 'num_steps'?"),
        ({"inner.momentum": 1.5}, "ConfigError: config.inner.momentum must be a number in [0, 1); got 1.5"),
    ],
    ids=["misspelt", "out_of_range"],
)
def test_flag_that_cannot_be_is_refused_without_a_traceback(overrides, text, tmp_path):
    assert_refused(launch("train", tmp_path / "run", overrides=overrides), text)
    assert not (tmp_path / "run").exists()


def test_workdir_of_another_config_is_refused_and_left_alone(tmp_path):
    folder = open_workdir(tmp_path / "run", tiny_config(method="task_loss"), "train")
    before = snapshot(folder)
    done = launch("train", folder, overrides={"method": "task_loss", "num_steps": 30})
    assert_refused(done, "num_steps: 20 -> 30")
    assert snapshot(folder) == before


def test_divergence_is_told_without_a_traceback(tmp_path):
    overrides = DIABETES | {"method": "task_loss", "inner.learning_rate": 1e30, "batch_size": 30}
    done = launch("train", tmp_path / "run", config="diabetes_mlp", overrides=overrides)
    assert done.returncode == 1
    assert "DivergenceError: task_loss diverged" in done.stderr
    assert "Traceback" not in done.stderr
