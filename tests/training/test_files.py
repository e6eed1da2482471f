"""Files written whole, and folders that one process holds."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adalfl_jax.training import WorkdirError
from adalfl_jax.training.files import is_locked, lock_folder, write_json
from adalfl_jax.training.workdir import open_workdir, remove_checkpoints
from tests.training.tiny import tiny_config


def test_json_that_is_not_finite_does_not_replace_what_is_there(tmp_path):
    write_json(tmp_path / "value.json", {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "value.json", {"a": float("nan")})
    assert json.loads((tmp_path / "value.json").read_text()) == {"a": 1}


def test_several_may_write_a_file_at_a_time(tmp_path):
    def write(number):
        for _ in range(50):
            write_json(tmp_path / "value.json", [number] * 1000)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert json.loads((tmp_path / "value.json").read_text()) in [[number] * 1000 for number in range(4)]
    assert [path.name for path in tmp_path.iterdir()] == ["value.json"]


@pytest.mark.parametrize("name", ["", " ", "gs://bucket/run", Path("s3://bucket/run")])
@pytest.mark.parametrize(
    "use",
    [
        lambda name: lock_folder(name).__enter__(),
        lambda name: open_workdir(name, tiny_config(), "train"),
        is_locked,
        remove_checkpoints,
    ],
)
def test_what_is_no_folder_of_this_machine_is_refused(name, use, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = "folder of this machine, .* bucket .*" if str(name).strip() else "named"
    with pytest.raises(WorkdirError, match=rf"must be a? ?{expected}; got '{name}'"):
        use(name)
    assert not list(tmp_path.iterdir())


def test_two_processes_do_not_work_on_one_folder(tmp_path):
    with lock_folder(tmp_path / "run"):
        with lock_folder(tmp_path / "other"):
            pass
        with (
            pytest.raises(WorkdirError, match=r"another process works on .*run; let it end"),
            lock_folder(tmp_path / "run"),
        ):
            pass
    with lock_folder(tmp_path / "run"):
        open_workdir(tmp_path / "run", tiny_config(), "train")


def test_a_run_starts_while_a_report_looks_whether_it_does(tmp_path, monkeypatch):
    refused, sleep = threading.Event(), time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: (refused.set(), sleep(seconds)))

    def start() -> None:
        with lock_folder(tmp_path, patience=60):  # a run has less, which a slow machine might use up
            pass

    with ThreadPoolExecutor() as pool:
        with lock_folder(tmp_path):  # as `is_locked` does
            run = pool.submit(start)
            assert refused.wait(timeout=60)
        run.result(timeout=60)


def test_a_folder_that_cannot_be_held_is_told(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(WorkdirError, match=r"must be a folder, and .*file is a file; name another"):
        lock_folder(tmp_path / "file").__enter__()
    with pytest.raises(
        WorkdirError, match=r"must be a folder, and .*file is a file; name another"
    ):  # rather than that a process works on it
        is_locked(tmp_path / "file")
