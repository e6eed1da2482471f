"""The study of what thrift costs in accuracy, on tiny runs."""

import dataclasses
import json

import pytest
from absl.testing import flagsaver

from adalfl_jax.training import ConfigError
from experiments import launch, thrift
from tests.training.tiny import quick_compilation, snapshot, tiny_config

__all__ = ["quick_compilation"]


@pytest.fixture(autouse=True)
def chosen():
    """One variant of the four."""
    with flagsaver.flagsaver():
        launch.parse_flags(["thrift", "--variant=quarter"])
        yield


def test_variants_are_compared_with_the_full_gradient_seed_for_seed(tmp_path):
    config = tiny_config({"num_steps": 6, "eval_every": 3, "offline.num_steps": 3})
    summary = thrift.run_variants(config, str(tmp_path))
    assert list(summary["methods"]) == ["full", "quarter"]
    assert list(summary["comparisons"]) == ["quarter"]
    full, quarter = (summary["methods"][name]["test"]["per_seed"] for name in ("full", "quarter"))
    difference = sum(quarter) / len(quarter) - sum(full) / len(full)
    assert summary["comparisons"]["quarter"]["mean_difference"] == pytest.approx(difference)
    assert json.loads((tmp_path / "thrift.json").read_text()) == json.loads(json.dumps(summary))
    written = json.loads((tmp_path / "quarter" / "config.json").read_text())
    assert written["outer"]["inner_fraction"] == written["outer"]["outer_fraction"] == 0.25

    before = snapshot(tmp_path / "full")
    thrift.run_variants(config, str(tmp_path))
    assert snapshot(tmp_path / "full") == before  # a finished variant is not run again


def test_an_estimator_that_has_no_thrift_is_refused_before_anything_runs(tmp_path):
    config = dataclasses.replace(tiny_config(), hypergradient="unrolled")
    with pytest.raises(ConfigError, match="hypergradient must be one of forward"):
        thrift.run_variants(config, str(tmp_path))
    assert not any(tmp_path.iterdir())
