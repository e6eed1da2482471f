"""What the arms of studies are: what their titles say, and what published numbers were made of."""

import itertools
import re

import numpy as np
import pytest

from adalfl_jax.analysis.measures import implied_smoothing
from adalfl_jax.analysis.record import RunRecord
from experiments.study import behaviour, compare
from experiments.study.arms import Arm, Comparison, Source, grid, make_config
from experiments.study.studies import STUDIES
from tests.training.tiny import SETTINGS, tiny_config

TINY = {**SETTINGS, "outer.split": "valid"}
RATES = grid(inner__learning_rate=(0.01, 0.1))


def every_arm():
    for study in STUDIES.values():
        for comparison in study.comparisons():
            for arm in comparison.arms:
                yield comparison, arm, make_config(comparison, arm, arm.grid[0], range(1))


def test_titles_say_what_arms_do():
    for comparison, arm, config in every_arm():
        said = (comparison.name, arm.title)
        assert config.dataset.noise_kind == "removed" or "right labels alone" not in arm.title, said
        assert (config.inner.schedule == "linear") or not re.search("decayed|linear decay", arm.title), said
        assert (config.inner.schedule == "cosine") or "cosine decay" not in arm.title, said
        assert config.outer.joint_share == 1 or not arm.title.endswith(", joint"), said
        assert config.offline.num_steps == 0 or "Meta-Weight-Net" not in arm.title, said
        assert config.method == "adalfl" or "learned further" not in arm.title, said
        if re.search("the paper's η|eta 1e-5", arm.title):
            assert config.outer.learning_rate == 1e-5, said
        if arm.title == "the paper's: mean, eta 1e-5":
            assert config.learned_loss.reduction == "mean", said
        if window := re.search(r"window of (\d+)", arm.title):
            assert config.estimator.window == int(window[1]), said
        if arm.source is not None:
            assert config.offline.num_steps == 0, said


def test_titles_of_comparisons_say_how_labels_and_steps_are():
    for comparison, _, config in every_arm():
        if share := re.search(r"(\d+) % wrong labels", comparison.title):
            assert config.dataset.label_noise == int(share[1]) / 100, comparison.title
        if steps := re.search(r"([\d,]+) steps", comparison.title):
            assert config.num_steps == int(steps[1].replace(",", "")), comparison.title


def test_a_robust_loss_that_is_learned_further_is_tuned_with_more_seeds_than_others():
    counts = {comparison.name.endswith("_further"): comparison.num_tuning_seeds for comparison, *_ in every_arm()}
    assert counts[True] == 6 > counts[False] == 2


def record_of(valid, **shapes):
    """Of a run on the task loss, a row a seed and a column an evaluation, at every tenth step."""
    valid = np.asarray(valid)
    scalars = [
        {"method": "task_loss", "phase": "training", "seed": seed, "step": 10 * index}
        | {f"{split}/error_rate": float(value) for split in ("valid", "test")}
        for seed, index in itertools.product(*map(range, valid.shape))
        for value in [valid[seed, index]]
    ]
    method = {"seconds": {"training": 40.0, "offline": 5.0}}
    summary = {"metric": "error_rate", "seeds": list(range(len(valid))), "methods": {"task_loss": method}}
    return RunRecord({}, summary, scalars, shapes)


@pytest.mark.parametrize("is_early", [False, True])
def test_an_arm_is_tuned_on_what_is_held_out_and_stopped_as_it_is_later(is_early, monkeypatch, tmp_path):
    trained, sources = [], []
    monkeypatch.setattr(compare, "run", lambda config, workdir: trained.append(config) or record_of([[0.3, 0.1, 0.2]]))
    monkeypatch.setattr(compare, "started", lambda config, source, workdir: sources.append(source) or config)
    source = Source("default", {**TINY, "method": "adalfl"})
    arm = Arm("arm", "arm", {"method": "ml3", "offline.num_steps": 0}, RATES, early_stopping=is_early, source=source)
    comparison = Comparison("tiny", "Tiny", "default", TINY, (arm,), reference="arm")
    _, tried = compare._tune(comparison, arm, tmp_path, range(1), print)
    assert [entry["valid"] for entry in tried] == [0.1 if is_early else 0.2] * 2
    assert [config.outer.split_fraction for config in (*trained, *sources)] == [0.5] * 4


def test_seconds_to_the_target_are_those_of_the_offline_phase_and_a_share_of_training():
    outcome = compare.outcome_of(record_of([[0.5, 0.3, 0.2], [0.5, 0.1, 0.2]]), early_stopping=False)
    found = compare._numbers(outcome, 0.2)
    assert (found["steps_to_target"], found["seconds_to_target"]) == (10, 5 + 40 / 2)
    assert compare._numbers(outcome, 0.1)["seconds_to_target"] is None


def test_the_share_that_is_flat_is_that_of_the_end():
    predictions = np.linspace(0, 1, 50)
    start, end = predictions, np.where(predictions < 0.5, predictions, 0.5)
    values = np.stack([np.stack([[start, start], [end, end]])] * 2)  # [S, T, 2, P]
    record = record_of([[0.1, 0.1]] * 2, **{"task_loss/values": values})
    assert compare.flat_share_of(record) == pytest.approx(0.5, abs=0.03)


def test_the_hand_made_schedule_is_that_of_the_arm_that_validation_chooses(monkeypatch, tmp_path):
    errors = {"constant": (0.2, 0.1), "linear": (0.1, 0.2)}  # of validation and test
    arms = {
        name: {"run": name, "valid": {"mean": valid}, "test": {"mean": test}} for name, (valid, test) in errors.items()
    }
    config = tiny_config({"inner.schedule": "linear", "inner.learning_rate": 0.4}, num_steps=20, eval_every=5)
    monkeypatch.setattr(behaviour, "read_config", lambda folder: ("train", config))
    measured = behaviour.measure({"arms": arms}, tmp_path)
    assert measured["best_hand_made"] == "linear"
    assert measured["best_schedule"]["steps"] == [0, 5, 10, 15, 20]
    np.testing.assert_allclose(measured["best_schedule"]["rates"], [0.4, 0.3, 0.2, 0.1, 0.0], atol=1e-7)


@pytest.mark.parametrize("kind", ["probabilities", "log_probabilities"])
def test_label_smoothing_is_that_of_a_loss_of_what_it_is_a_function_of(kind, monkeypatch):
    predictions = np.linspace(-4, 0, 9) if kind == "log_probabilities" else np.linspace(0.1, 0.9, 9)
    curves = np.stack([predictions**2, -predictions])  # [2, P]
    shapes = {"task_loss/values": curves[None, None], "task_loss/steps": np.array([0]), "predictions": predictions}
    record = record_of([[0.1]], **shapes)
    config = {"learned_loss": {"predictions": kind}, "dataset": {"name": "digits"}}
    measured = behaviour._quantities(RunRecord(config, record.summary, record.scalars, record.shapes))
    expected = implied_smoothing(predictions, curves[None, None], 10, of_logarithms=kind == "log_probabilities")
    other = implied_smoothing(predictions, curves[None, None], 10, of_logarithms=kind != "log_probabilities")
    np.testing.assert_array_equal(measured["quantities"]["smoothing"], expected)
    assert (expected != other).any()
