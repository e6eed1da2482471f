import errno
import importlib.metadata
import json
import re
from pathlib import Path

import pytest

from adalfl_jax.training import WorkdirError
from adalfl_jax.training.files import write_json
from adalfl_jax.training.workdir import finished_summary, open_workdir, read_records, remove_checkpoints
from tests.training.tiny import snapshot, tiny_config

SUMMARY = {"dataset": "digits", "data": "", "metric": "error_rate", "num_steps": 20, "seeds": [0, 1], "methods": {}}


@pytest.fixture
def finished(tmp_path):
    """A folder with a finished run of the tiny config."""
    folder = open_workdir(tmp_path / "run", tiny_config(), "train")
    (folder / "metrics.jsonl").write_text("{}\n")
    write_json(folder / "summary.json", SUMMARY)
    return folder


def test_new_workdir_holds_the_config_and_the_command(tmp_path):
    config = tiny_config()
    folder = open_workdir(tmp_path / "a" / "b", config, "train")
    assert json.loads((folder / "config.json").read_text()) == {"command": "train", **config.to_dict()}
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "config.json"]


def test_finished_run_gives_its_summary(finished):
    assert finished_summary(finished, tiny_config(), "train") == SUMMARY


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
    message = r"holds a run of experiments\.train, and this is experiments\.compare; choose a new folder"
    with pytest.raises(WorkdirError, match=message):
        enter(finished, tiny_config(), "compare")
    assert snapshot(finished) == before


def test_unfinished_run_keeps_its_checkpoints_and_foreign_files_alone(tmp_path):
    folder = open_workdir(tmp_path, tiny_config(), "train")
    for name in ("metrics.jsonl", "preprocessing.json", "loss_shapes.npz", "learned_loss.safetensors", "report.html"):
        (folder / name).write_text("{}\n")
    (folder / "learned_loss.safetensors.12.34.partial").write_text("half")  # of a save that was killed
    (folder / "states" / "adalfl").mkdir(parents=True)
    (folder / "states" / "adalfl" / "part").write_text("half")
    (folder / "checkpoints" / "adalfl").mkdir()
    (folder / "checkpoints" / "adalfl" / "part").write_text("kept")
    (folder / "notes.txt").write_text("mine")
    open_workdir(tmp_path, tiny_config(), "train")
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "config.json", "notes.txt"]
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "checkpoints" / "adalfl" / "part").read_text() == "kept"


def test_foreign_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    before = snapshot(tmp_path)
    with pytest.raises(WorkdirError, match=r"is not empty and holds no config\.json"):
        open_workdir(tmp_path, tiny_config(), "train")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("below", ["", "run", "deep/run"])
def test_workdir_at_or_below_a_regular_file_is_refused(tmp_path, below):
    (tmp_path / "file").write_text("mine")
    told = "cannot write to workdir" if below else "file is a file; name another"
    with pytest.raises(WorkdirError, match=told):
        open_workdir(tmp_path / "file" / below, tiny_config(), "train")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "3", "null", "{}"])
@pytest.mark.parametrize("enter", [finished_summary, open_workdir])
def test_damaged_config_file_is_refused_and_left_alone(finished, text, enter):
    (finished / "config.json").write_text(text)
    before = snapshot(finished)
    with pytest.raises(WorkdirError, match=r"config\.json cannot be read .*; bring it back, or choose a new folder"):
        enter(finished, tiny_config(), "train")
    assert snapshot(finished) == before


@pytest.mark.parametrize("text", ["{", "{}", "[]"])
def test_damaged_summary_is_refused(finished, text):
    (finished / "summary.json").write_text(text)
    with pytest.raises(WorkdirError, match=r"summary\.json cannot be read \(.*\); bring it back"):
        finished_summary(finished, tiny_config(), "train")


RESULT = {"per_seed": [0.1, 0.3], "mean": 0.2, "std": 0.1}
METHOD = {"title": "AdaLFL", "learning_rate": 0.1, "test": RESULT, "valid": RESULT, "seconds": {}}


@pytest.mark.parametrize("entry", [{}, *({"test": test} for test in (None, {}, {"mean": 0.2}))], ids=str)
def test_a_summary_whose_methods_lack_results_is_refused(finished, entry):
    rest = {name: value for name, value in METHOD.items() if name != "test"}
    write_json(finished / "summary.json", SUMMARY | {"methods": {"adalfl": METHOD, "ml3": rest | entry}})
    with pytest.raises(WorkdirError, match=r"summary\.json cannot be read \(.*\); bring it back"):
        finished_summary(finished, tiny_config(), "train")
    write_json(finished / "summary.json", SUMMARY | {"methods": {"adalfl": METHOD}})
    assert finished_summary(finished, tiny_config(), "train") == SUMMARY | {"methods": {"adalfl": METHOD}}


@pytest.mark.parametrize("line", ['{"method": "adalfl", "pha', "", "3", '{"step": 1}'])
def test_of_damaged_records_the_line_is_told(line, tmp_path):
    whole = json.dumps({"method": "adalfl", "phase": "training", "seed": 0, "step": 1})
    with pytest.raises(WorkdirError) as caught:
        read_records(tmp_path / "metrics.jsonl", [whole, whole, line + "\n", whole])
    assert str(caught.value) == (
        f"{tmp_path}/metrics.jsonl cannot be read (line 3 must be an object with method, phase, seed and step; got "
        f"{line!r}); bring it back, or choose a new folder"
    )


@pytest.mark.parametrize("name", ["config.json", "summary.json", "checkpoints/layout.json"])
def test_a_file_that_may_not_be_read_is_not_taken_for_damaged(name, finished, monkeypatch):
    opened = Path.read_text

    def refuse(self, *arguments, **options):
        if self == finished / name:
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", refuse)  # as root finds no file that it may not read
    enter = finished_summary if name == "summary.json" else open_workdir
    with pytest.raises(WorkdirError, match=rf"{name} may not be read by this user; change its permissions"):
        enter(finished, tiny_config(), "train")


def test_half_a_config_file_of_a_run_that_was_killed_is_no_foreign_file(tmp_path):
    (tmp_path / "config.json.partial").write_text("{")
    assert open_workdir(tmp_path, tiny_config(), "train") == tmp_path


def test_other_checkpoint_settings_are_no_other_run(finished):
    watched = {"num_loss_figures": 3, "profile_steps": (1, 2), "wandb_project": "losses"}
    other = tiny_config({"checkpoint.keep": 5, "checkpoint.every_seconds": 7.0, **watched})
    assert finished_summary(finished, other, "train") == SUMMARY
    open_workdir(finished, other, "train")
    assert json.loads((finished / "config.json").read_text())["checkpoint"]["keep"] == 5


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"layout": 1}, r"by adalfl_jax \S+ in layout 1, and this is \S+ with layout 4; install that version to go on"),
        ({"versions": {"adalfl_jax": "0.9.1"}}, r"by adalfl_jax 0\.9\.1 in layout 4, and this is"),
        ({"layout": None}, r"layout\.json cannot be read .*; bring it back, or choose a new folder"),
        ({"versions": {}}, r"layout\.json cannot be read"),
    ],
    ids=["layout", "version", "damaged", "empty"],
)
def test_checkpoints_of_another_version_are_refused_and_left_alone(change, text, finished):
    path = finished / "checkpoints" / "layout.json"
    write_json(path, json.loads(path.read_text()) | change)
    before = snapshot(finished)
    with pytest.raises(WorkdirError, match=text):
        open_workdir(finished, tiny_config(), "train")
    assert snapshot(finished) == before


def test_checkpoints_made_on_other_data_are_refused_before_anything_is_removed(finished):
    open_workdir(finished, tiny_config(), "train", "a1")
    open_workdir(finished, tiny_config(), "train", "b2")  # there are none yet
    (finished / "checkpoints" / "adalfl" / "10").mkdir(parents=True)
    (finished / "metrics.jsonl").write_text("{}\n")
    before = snapshot(finished)
    with pytest.raises(
        WorkdirError, match=r"on other data than config\.dataset names now \(b2 -> a1\); bring those back"
    ):
        open_workdir(finished, tiny_config(), "train", "a1")
    assert snapshot(finished) == before
    assert open_workdir(finished, tiny_config(), "train", "b2") == finished


def test_checkpoints_of_an_unknown_layout_are_refused_and_left_alone(finished):
    (finished / "checkpoints" / "layout.json").unlink()
    open_workdir(finished, tiny_config(), "train")  # there are none yet
    (finished / "checkpoints" / "layout.json").unlink()
    (finished / "checkpoints" / "adalfl" / "10").mkdir(parents=True)
    (finished / "checkpoints" / "adalfl" / "10" / "part").write_text("kept")
    before = snapshot(finished)
    with pytest.raises(WorkdirError, match=r"checkpoints of an unknown layout: it has no layout\.json; choose a new"):
        open_workdir(finished, tiny_config(), "train")
    assert snapshot(finished) == before


def test_a_folder_that_may_not_be_written_is_told_and_left_alone(finished, monkeypatch):
    before = snapshot(finished)

    def refuse(self, mode="r", *arguments, **options):
        if "w" in mode:
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, mode, *arguments, **options)

    opened = Path.open
    monkeypatch.setattr(Path, "open", refuse)  # as root finds no folder that it may not write to
    with pytest.raises(WorkdirError, match=r"cannot write to workdir .*run: .*Permission denied"):
        open_workdir(finished, tiny_config(), "train")
    monkeypatch.undo()
    assert snapshot(finished) == before


@pytest.mark.parametrize("package", ["jax", "jaxlib"])
def test_another_version_of_jax_is_told_once(package, finished):
    path = finished / "checkpoints" / "layout.json"
    values = json.loads(path.read_text())
    write_json(path, values | {"versions": values["versions"] | {package: "0.1"}})
    change = re.escape(f"may round differently: {package}: '0.1' -> '{importlib.metadata.version(package)}'")
    with pytest.warns(UserWarning, match=f"{change}$"):
        open_workdir(finished, tiny_config(), "train")
    open_workdir(finished, tiny_config(), "train")


def test_nothing_is_written_where_nothing_is_to_be_removed(tmp_path, monkeypatch):
    """As on a disk that is only read, from where a finished run is read back."""

    def refuse(path, missing_ok=False):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    remove_checkpoints(tmp_path)


def test_a_file_where_checkpoints_go_is_told(tmp_path):
    open_workdir(tmp_path, tiny_config(), "train")
    remove_checkpoints(tmp_path)
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(WorkdirError, match=r"cannot write to workdir .*checkpoints"):
        open_workdir(tmp_path, tiny_config(), "train")
