"""A run that is broken off and goes on is the run that was never broken off."""

import json
import shutil
import signal
import types

import numpy as np
import pytest

from adalfl_jax.training import DivergenceError, PreemptionError, WorkdirError, compare, run, stage, train
from adalfl_jax.training.files import lock_folder
from tests.training.same_run import assert_same_run, read_json
from tests.training.tiny import DIABETES, snapshot, tiny_config

pytestmark = [
    pytest.mark.filterwarnings("ignore:The inplace keyword"),  # tbparse's, of pandas
    pytest.mark.usefixtures("without_figures"),
]


class SignalAfter:
    """Stands in for `Preemption`: the signal comes when so many chunks are done."""

    def __init__(self, num_chunks):
        self.left = num_chunks

    def __call__(self):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    @property
    def signal(self):
        self.left -= 1
        return signal.SIGTERM if self.left == 0 else None


def run_in_pieces(program, config, folder, pieces, monkeypatch):
    """Breaks a run off after each number of chunks, and then lets it end. Returns what the errors said."""
    messages = []
    for num_chunks in pieces:
        with monkeypatch.context() as patch:
            patch.setattr(run, "Preemption", SignalAfter(num_chunks))
            with pytest.raises(PreemptionError) as caught:
                program(config, folder)
        messages.append(str(caught.value))
    program(config, folder)
    return messages


@pytest.mark.slow  # the quick set has it with processes that are killed, in tests/experiments/test_faults.py
def test_a_comparison_broken_off_in_every_phase_ends_as_an_unbroken_one(tmp_path, monkeypatch):
    overrides = {
        "methods": ("adalfl", "tuned_task_loss"),
        "tuning.learning_rates": (0.1, 1e30, 0.3),
        "batch_size": 200,  # six steps an epoch: every chunk ends within one
        "num_steps": 15,
        "eval_every": 5,
    }
    config = tiny_config(overrides)
    compare(config, tmp_path / "unbroken")
    messages = run_in_pieces(compare, config, tmp_path / "broken", (1, 2, 6), monkeypatch)
    assert_same_run(tmp_path / "unbroken", tmp_path / "broken")
    assert messages == [
        f"SIGTERM: the run ended after step 5 of {place}, saved; the same command goes on from there"
        for place in ("10, offline phase (ML3)", "15, AdaLFL", "15, task loss, rate 0.3")
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        {"hypergradient": "truncated", "estimator.window": 3, "dataset.streaming": "always"},
        {"outer.pipelined": True, "inner.schedule": "cosine", "outer.schedule": "linear"},
        {"learned_loss.start": "task_loss", "inner.first_step_rate": 0.3},
    ],
    ids=["streamed_window", "pipelined", "first_step"],
)
def test_what_a_step_remembers_is_part_of_a_checkpoint(overrides, tmp_path, monkeypatch):
    common = {"num_steps": 9, "eval_every": 3, "offline.num_steps": 0, "inner.momentum": 0.9}
    config = tiny_config(common | overrides, method="adalfl")
    train(config, tmp_path / "unbroken")
    run_in_pieces(train, config, tmp_path / "broken", (2,), monkeypatch)
    assert_same_run(tmp_path / "unbroken", tmp_path / "broken")


@pytest.mark.usefixtures("shared_programs")
def test_a_run_stopped_without_a_word_loses_what_came_after_its_last_checkpoint_alone(tmp_path, monkeypatch):
    config = tiny_config({"num_steps": 12, "eval_every": 2, "checkpoint.every_steps": 4}, method="task_loss")
    train(config, tmp_path / "unbroken")

    class Killed(BaseException):
        pass

    steps = []

    def write(self, method, phase, step, seeds, scalars):
        steps.append(step)
        if step == 10:
            raise Killed
        written(self, method, phase, step, seeds, scalars)

    written = run.MetricWriters.write
    with monkeypatch.context() as patch:
        patch.setattr(run.MetricWriters, "write", write)
        with pytest.raises(Killed):
            train(config, tmp_path / "broken")
        kept = sorted(int(path.name) for path in (tmp_path / "broken" / "checkpoints" / "task_loss").iterdir())
        assert kept == [4, 8]
        steps.clear()
        with pytest.raises(Killed):
            train(config, tmp_path / "broken")
    assert steps == [0, 2, 4, 6, 8, 10]  # all but the last are read back
    train(config, tmp_path / "broken")
    assert_same_run(tmp_path / "unbroken", tmp_path / "broken")


@pytest.fixture
def clock(monkeypatch):
    """The seconds of a clock that every evaluation moves by 10."""
    now, measure = [0.0], stage.StageRunner._measure

    def slow_measure(*arguments):
        now[0] += 10
        return measure(*arguments)

    monkeypatch.setattr(stage, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(stage.StageRunner, "_measure", slow_measure)
    return now


@pytest.mark.usefixtures("shared_programs")
@pytest.mark.parametrize("pieces", [(), (1, 1)], ids=["unbroken", "broken"])
def test_seconds_are_those_of_every_chunk_in_all_processes_and_not_of_the_time_between(
    pieces, clock, tmp_path, monkeypatch
):
    config = tiny_config({"num_steps": 6, "eval_every": 2, "num_seeds": 1}, method="task_loss")

    def train_later(*arguments):
        clock[0] += 1000
        return train(*arguments)

    run_in_pieces(train_later, config, tmp_path, pieces, monkeypatch)
    seconds = read_json(tmp_path / "summary.json")["methods"]["task_loss"]["seconds"]
    assert seconds == {"training": 40.0, "offline": 0.0}  # at the start, and after each of three chunks


@pytest.mark.usefixtures("clock", "shared_programs")
@pytest.mark.parametrize("pieces", [(), (1, 1)], ids=["unbroken", "broken"])
def test_those_of_a_search_count_the_rates_that_diverged_before_a_break(pieces, tmp_path, monkeypatch):
    config = tiny_config(
        {"num_steps": 4, "eval_every": 2, "num_seeds": 1, "tuning.learning_rates": (1e30, 0.1)},
        method="tuned_task_loss",
    )
    run_in_pieces(train, config, tmp_path, pieces, monkeypatch)
    seconds = read_json(tmp_path / "summary.json")["methods"]["tuned_task_loss"]["seconds"]["training"]
    assert seconds >= 20 + 30  # a start and a chunk of the one, a start and two of the other
    assert pieces or seconds == 50


def test_checkpoint_settings_may_change_when_a_run_goes_on(tmp_path, monkeypatch):
    settings = {"num_steps": 6, "eval_every": 2, "num_seeds": 1}
    first, second = (tiny_config(settings | {"checkpoint.keep": keep}, method="task_loss") for keep in (2, 0))
    with monkeypatch.context() as patch:
        patch.setattr(run, "Preemption", SignalAfter(2))
        with pytest.raises(PreemptionError):
            train(first, tmp_path / "run")
        patch.setattr(run, "Preemption", SignalAfter(1))
        with pytest.raises(PreemptionError, match=r"step 6 of 6, task loss, not saved, as config\.checkpoint\.k"):
            train(second, tmp_path / "run")
    assert read_json(tmp_path / "run" / "config.json")["checkpoint"]["keep"] == 0
    train(first, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 4, 6]


def test_a_finished_run_keeps_no_checkpoints(tmp_path):
    config = tiny_config({"num_steps": 1, "num_seeds": 1}, method="task_loss")
    summary = train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()
    (tmp_path / "run" / "checkpoints" / "task_loss").mkdir(parents=True)  # as a kill at the very end leaves it
    with lock_folder(tmp_path / "run"):  # the process that is about to remove them
        assert train(config, tmp_path / "run") == summary
    assert (tmp_path / "run" / "checkpoints").exists()
    assert train(config, tmp_path / "run") == summary
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_diverged_run_tried_again_diverges_from_its_last_finite_state(tmp_path):
    overrides = DIABETES | {"inner.learning_rate": 1e3, "num_steps": 60, "eval_every": 2, "num_seeds": 1}
    errors = []
    for _ in range(2):
        with pytest.raises(DivergenceError) as caught:
            train(tiny_config(overrides, method="task_loss"), tmp_path / "run")
        errors.append(caught.value)
        kept = [int(path.name) for path in (tmp_path / "run" / "checkpoints" / "task_loss").iterdir()]
        assert max(kept) == caught.value.state_step
    assert str(errors[0]) == str(errors[1])


def test_a_signal_after_the_last_chunk_is_obeyed_once_the_run_is_over(tmp_path, monkeypatch):
    config = tiny_config({"num_steps": 1, "num_seeds": 1}, method="task_loss")
    with monkeypatch.context() as patch:
        patch.setattr(run, "Preemption", SignalAfter(2))
        with pytest.raises(PreemptionError, match=r"SIGTERM: the run is over, and its results are written"):
            train(config, tmp_path / "run")
    assert train(config, tmp_path / "run") == read_json(tmp_path / "run" / "summary.json")


def test_a_run_does_not_go_on_with_other_data(tmp_path, monkeypatch):
    path, inputs = tmp_path / "mine.npz", np.random.default_rng(0).normal(size=(200, 3))
    overrides = {"dataset.name": str(path), "num_steps": 4, "eval_every": 2, "num_seeds": 1}
    config = tiny_config(overrides, method="task_loss")
    np.savez(path, inputs=inputs, targets=np.arange(200) % 2)
    with monkeypatch.context() as patch:
        patch.setattr(run, "Preemption", SignalAfter(1))
        with pytest.raises(PreemptionError):
            train(config, tmp_path / "run")
    np.savez(path, inputs=inputs + 1, targets=np.arange(200) % 2)
    with pytest.raises(WorkdirError, match=r"made on other data than config\.dataset names now"):
        train(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    train(config, tmp_path / "run")
    np.savez(path, inputs=inputs, targets=np.arange(200) % 2)
    before = snapshot(tmp_path / "run")
    with pytest.raises(WorkdirError, match=r"finished, on other data than config\.dataset names now"):
        train(config, tmp_path / "run")
    assert snapshot(tmp_path / "run") == before
