import json

import pytest

from adalfl_jax.training import WorkdirError
from adalfl_jax.training.workdir import finished_summary, open_workdir, write_json
from tests.training.tiny import snapshot, tiny_config


@pytest.fixture
def finished(tmp_path):
    """A folder with a finished run of the tiny config."""
    folder = open_workdir(tmp_path / "run", tiny_config(), "train")
    (folder / "metrics.jsonl").write_text("{}\n")
    write_json(folder / "summary.json", {"methods": {}})
    return folder


def test_new_workdir_holds_the_config_and_the_command(tmp_path):
    config = tiny_config()
    folder = open_workdir(tmp_path / "a" / "b", config, "train")
    assert json.loads((folder / "config.json").read_text()) == {"command": "train", **config.to_dict()}
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_finished_run_gives_its_summary(finished):
    assert finished_summary(finished, tiny_config(), "train") == {"methods": {}}


def test_unfinished_run_has_no_summary(tmp_path):
    assert finished_summary(tmp_path, tiny_config(), "train") is None
    open_workdir(tmp_path, tiny_config(), "train")
    assert finished_summary(tmp_path, tiny_config(), "train") is None


@pytest.mark.parametrize("enter", [finished_summary, open_workdir])
def test_run_of_another_config_is_refused_with_the_keys_and_left_alone(finished, enter):
    before = snapshot(finished)
    other = tiny_config({"inner.momentum": 0.5}, num_steps=30)
    with pytest.raises(WorkdirError) as caught:
        enter(finished, other, "train")
    lines = [line.strip() for line in str(caught.value).splitlines()[1:]]
    assert lines == ["inner.momentum: 0.0 -> 0.5", "num_steps: 20 -> 30"]
    assert snapshot(finished) == before


@pytest.mark.parametrize("enter", [finished_summary, open_workdir])
def test_comparison_does_not_share_a_folder_with_a_training(finished, enter):
    before = snapshot(finished)
    with pytest.raises(WorkdirError, match="command: 'train' -> 'compare'"):
        enter(finished, tiny_config(), "compare")
    assert snapshot(finished) == before


def test_unfinished_run_starts_over_beside_foreign_files(tmp_path):
    folder = open_workdir(tmp_path, tiny_config(), "train")
    (folder / "metrics.jsonl").write_text("{}\n")
    (folder / "states" / "adalfl").mkdir(parents=True)
    (folder / "states" / "adalfl" / "part").write_text("half")
    (folder / "notes.txt").write_text("mine")
    open_workdir(tmp_path, tiny_config(), "train")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "notes.txt"]
    assert (folder / "notes.txt").read_text() == "mine"


def test_foreign_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    before = snapshot(tmp_path)
    with pytest.raises(WorkdirError, match=r"is not empty and holds no config\.json"):
        open_workdir(tmp_path, tiny_config(), "train")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("below", ["", "run", "deep/run"])
def test_workdir_at_or_below_a_regular_file_is_refused(tmp_path, below):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(WorkdirError, match="cannot write to workdir"):
        open_workdir(tmp_path / "file" / below, tiny_config(), "train")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "3", "null"])
@pytest.mark.parametrize("enter", [finished_summary, open_workdir])
def test_damaged_config_file_is_refused_and_left_alone(finished, text, enter):
    (finished / "config.json").write_text(text)
    before = snapshot(finished)
    with pytest.raises(WorkdirError, match=r"config\.json cannot be read .*; choose a new folder"):
        enter(finished, tiny_config(), "train")
    assert snapshot(finished) == before


def test_damaged_summary_is_refused(finished):
    (finished / "summary.json").write_text("{")
    with pytest.raises(WorkdirError, match=r"summary\.json"):
        finished_summary(finished, tiny_config(), "train")


def test_json_that_is_not_finite_does_not_replace_what_is_there(tmp_path):
    write_json(tmp_path / "value.json", {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "value.json", {"a": float("nan")})
    assert json.loads((tmp_path / "value.json").read_text()) == {"a": 1}
