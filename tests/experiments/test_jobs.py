"""Studies that several processes train: each run by one of them, with the numbers that one process makes."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings

import pytest

from adalfl_jax.training.files import BusyError, WorkdirError, lock_folder
from experiments.study import jobs, runs
from experiments.study.arms import Arm, Comparison, grid, make_config
from experiments.study.compare import compare_arms, do_free
from tests.training.tiny import ROOT, SETTINGS

ARM = Arm("task_loss", "task loss", {"method": "task_loss"}, grid(inner__learning_rate=(0.01, 0.1)))
TINY = SETTINGS | {"model.name": "logistic", "num_steps": 2, "eval_every": 2, "checkpoint.keep": 0}
COMPARISON = Comparison(
    "tiny", "Tiny", "default", TINY, (ARM, ARM._replace(name="untuned", grid=ARM.grid[:1])), "untuned"
)
STUDY = ("--study=clean_labels", "--comparison=diabetes_mlp", "--arm=constant", "--quick")


def compared(workdir):
    return compare_arms(COMPARISON, workdir, tuning_seeds=range(1), seeds=range(5, 7), say=lambda text: None)


@pytest.mark.usefixtures("without_figures")
def test_a_run_that_another_process_trains_is_passed_over_and_read_later(tmp_path):
    runs.run.cache_clear()
    configs = [make_config(COMPARISON, ARM, point, range(1), for_tuning=True) for point in ARM.grid]
    with lock_folder(runs.folder_of(configs[0], tmp_path)), pytest.raises(BusyError, match="another process works on"):
        compared(tmp_path)
    summaries = [(runs.folder_of(config, tmp_path) / "summary.json").exists() for config in configs]
    assert summaries == [False, True]
    assert (
        len([*(tmp_path / "runs").glob("*/summary.json")]) == 2
    )  # untuned, too, and not the arm that is not tuned yet
    shared = compared(tmp_path)
    runs.run.cache_clear()
    alone = compared(tmp_path / "alone")
    for numbers in (shared, alone):
        for arm in numbers["arms"].values():
            del arm["seconds"], arm["seconds_to_target"]
    assert shared == alone


def test_what_is_free_is_done_before_it_is_told_that_something_is_not():
    done = []

    def do(item):
        if item == "busy":
            raise BusyError(item)
        done.append(item)
        return item.upper()

    with pytest.raises(BusyError):
        do_free(do, ["a", "busy", "b"])
    assert done == ["a", "b"]
    assert do_free(do, ["a", "b"]) == ["A", "B"]


@pytest.mark.parametrize(
    ("num_cores", "num_jobs", "shares"),
    [(4, 2, [[0, 1], [2, 3]]), (5, 2, [[0, 1], [2, 3, 4]]), (2, 3, [None, None, None])],
)
def test_processes_share_the_cores(num_cores, num_jobs, shares, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(num_cores)), raising=False)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "")  # brought back at the end
    for position, expected in enumerate(shares):
        taken = {}
        monkeypatch.setattr(os, "sched_setaffinity", taken.__setitem__, raising=False)
        jobs.take_share(position, num_jobs)
        assert taken == ({} if expected is None else {0: expected})


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2, reason="there are no cores to share"
)
def test_helpers_share_all_cores_and_not_those_of_the_first_process(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "")  # brought back at the end
    cores, start = os.sched_getaffinity(0), subprocess.Popen
    code = "import os, sys; print(sorted(os.sched_getaffinity(0))); sys.stdin.read()"
    monkeypatch.setattr(
        subprocess, "Popen", lambda command, **settings: start([sys.executable, "-c", code], **settings)
    )
    try:
        there_were = jobs.take_share(0, 2)
        own = os.sched_getaffinity(0)
        with jobs.helpers([], 2, tmp_path, there_were):
            assert os.sched_getaffinity(0) == own
    finally:
        os.sched_setaffinity(0, cores)
    assert there_were == cores
    assert own < cores
    assert (tmp_path / "jobs" / "1.log").read_text() == f"{sorted(cores)}\n"


def test_no_memory_of_a_gpu_is_taken_in_advance_unless_the_user_says_so(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(), raising=False)
    for given, kept in ((None, "false"), ("true", "true")):
        monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", given or "")
        if given is None:
            monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE")
        jobs.take_share(0, 2)
        assert os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == kept


def test_without_locks_there_are_no_jobs(tmp_path, monkeypatch):
    jobs.require_locks(tmp_path)
    monkeypatch.setattr(jobs, "is_locked", lambda folder: False)
    with pytest.raises(WorkdirError, match=r"--jobs needs a file system with locks, which .* is not on; leave it out"):
        jobs.require_locks(tmp_path)


def test_a_helper_that_fails_is_told_with_its_log(tmp_path, monkeypatch):
    log, start = tmp_path / "jobs" / "1.log", subprocess.Popen
    code = "import sys; sys.exit(f'no such program: {sys.argv[1:]}')"
    monkeypatch.setattr(
        subprocess, "Popen", lambda command, **settings: start([sys.executable, "-c", code, *command[1:]], **settings)
    )
    with pytest.warns(UserWarning, match=rf"a helper failed.*{log} says why"), jobs.helpers(["--stduy"], 2, tmp_path):
        pass
    assert log.read_text().startswith("no such program: ['-m', 'experiments.study', '--stduy', ")


@pytest.mark.parametrize("ending", ["", "sys.exit(143)", "os.kill(os.getpid(), signal.SIGTERM)"])
def test_helpers_that_end_when_their_parent_does_have_not_failed(ending, tmp_path, monkeypatch):
    """Whatever ends it; and a terminal's Ctrl-C, which it would save for twice, does not reach them."""
    start = subprocess.Popen
    code = f"import os, signal, sys; sys.stdin.read(); print(os.getpgid(0) == os.getpid(), flush=True); {ending}"
    monkeypatch.setattr(
        subprocess, "Popen", lambda command, **settings: start([sys.executable, "-c", code], **settings)
    )
    with warnings.catch_warnings(action="error"), pytest.raises(KeyboardInterrupt), jobs.helpers([], 3, tmp_path):
        raise KeyboardInterrupt
    assert [(tmp_path / "jobs" / f"{position}.log").read_text() for position in (1, 2)] == ["True\n"] * 2


def test_a_helper_is_told_to_save_once_its_input_is_closed_and_not_before(monkeypatch):
    told, (read, write) = [], os.pipe()
    before = signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    try:
        with os.fdopen(read) as given:
            monkeypatch.setattr(sys, "stdin", given)
            jobs.end_with_parent()
            os.write(write, b"some words")
            time.sleep(0.1)
            assert not told
            os.close(write)
            deadline = time.monotonic() + 10
            while not told and time.monotonic() < deadline:
                time.sleep(0.01)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert told == [signal.SIGTERM]


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="cores cannot be chosen here, and rounding follows them"
)
def test_two_processes_make_the_numbers_of_one(tmp_path):
    command, curves, cores = [sys.executable, "-m", "experiments.study", *STUDY], {}, os.sched_getaffinity(0)
    for name, given, allowed in (("alone", [], {min(cores)}), ("shared", ["--jobs=2"], cores)):
        os.sched_setaffinity(0, allowed)  # a process inherits it
        try:
            workdir = f"--workdir={tmp_path / name}"
            subprocess.run([*command, workdir, *given], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)  # noqa: S603
        finally:
            os.sched_setaffinity(0, cores)
        (numbers,) = json.loads((tmp_path / name / "clean_labels.json").read_text()).values()
        curves[name] = {arm: found["curve"] for arm, found in numbers["arms"].items()}
    assert curves["shared"] == curves["alone"]
    assert "steps/s" in (tmp_path / "shared" / "jobs" / "1.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_helpers_end_however_their_parent_does(number, tmp_path):
    arguments = [*STUDY, f"--workdir={tmp_path}", "--jobs=3"]
    command = [sys.executable, "-m", "experiments.study", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:  # noqa: S603
        logs = [tmp_path / "jobs" / f"{position}.log" for position in (1, 2)]
        deadline = time.monotonic() + 120
        while not all(log.exists() and "seeds" in log.read_text() for log in logs):
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                pytest.fail("helpers have not begun")
            time.sleep(0.1)
        process.send_signal(number)
    deadline = time.monotonic() + 60
    while is_anyone_at(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_anyone_at(workdir):
    found = subprocess.run(["pgrep", "-f", str(workdir)], capture_output=True, check=False)  # noqa: S603, S607
    return bool(found.stdout)
