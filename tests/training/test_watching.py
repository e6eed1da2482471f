"""What a run shows while it goes on: pictures of its loss, traces of its steps, Weights & Biases, a report."""

import importlib.machinery
import io
import json
import shutil
import sys
import types
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from adalfl_jax.training import (
    ConfigError,
    DivergenceError,
    PreemptionError,
    WorkdirError,
    compare,
    outputs,
    run,
    train,
    unfinished,
    weights_and_biases,
)
from adalfl_jax.training.files import lock_folder
from adalfl_jax.training.outputs import read_record
from adalfl_jax.training.setup import make_setup
from adalfl_jax.training.unfinished import read_unfinished
from adalfl_jax.training.workdir import open_workdir
from experiments import report
from tests.conftest import NO_FIGURES
from tests.training.conftest import share_programs
from tests.training.test_resume import SignalAfter
from tests.training.tiny import tiny_config

WATCHED = {
    "methods": ("tuned_task_loss", "adalfl"),
    "tuning.learning_rates": (0.1, 0.3),
    "num_steps": 20,
    "eval_every": 4,
    "offline.num_steps": 8,
    "num_seeds": 2,
    "num_loss_figures": 2,
    "profile_steps": (8, 9),
    "wandb_project": "losses",
}


class Wandb(types.ModuleType):
    """Stands in for the package of Weights & Biases: keeps what is logged, of a run that goes on too."""

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.settings, self.logged, self.axes, self.exit_codes = [], {}, set(), []

    Image = staticmethod(np.shape)

    def init(self, **settings):
        self.settings.append(settings)
        return types.SimpleNamespace(
            starting_step=len(self.logged), define_metric=self.define_metric, log=self.log, finish=self.finish
        )

    def define_metric(self, name, step_metric=None, hidden=False):
        self.axes.add((name, step_metric))

    def log(self, values, step):
        assert step >= max(self.logged, default=0)  # the same step adds to what was logged there
        self.logged.setdefault(step, {}).update(values)

    def finish(self, exit_code):
        self.exit_codes.append(exit_code)


@pytest.fixture(autouse=True, scope="module")
def parsed_flags():
    """The flags of a program that is called here."""
    flags.FLAGS.mark_as_parsed()


class Watched(NamedTuple):
    folder: Path
    wandb: Wandb
    progress: list  # where the run was broken off
    pages: list  # of the report, there and at the end


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A comparison that was broken off in its search and in AdaLFL, and what it showed."""
    config = tiny_config(WATCHED)
    seen = Watched(tmp_path_factory.mktemp("watched") / "run", Wandb(), [], [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", seen.wandb)
        share_programs({}, patch)
        patch.setattr(outputs, "animate_loss_shapes", lambda path, record: False)  # tests of reports have it
        for num_chunks in (7, 8):
            with pytest.MonkeyPatch.context() as broken:
                broken.setattr(run, "Preemption", SignalAfter(num_chunks))
                with pytest.raises(PreemptionError):
                    compare(config, seen.folder)
            seen.progress.append([tuple(part.values()) for part in read_unfinished(seen.folder).summary["progress"]])
            seen.pages.append(page_of(seen.folder))
        patch.setattr(*NO_FIGURES)  # those of the last page with a learned loss suffice
        compare(config, seen.folder)
        seen.pages.append(page_of(seen.folder))
    return seen


def page_of(folder):
    """The text of the page that the program draws."""
    with flagsaver.flagsaver((report.WORKDIR, str(folder))):
        report.main(["report"])
    return " ".join((folder / "report.html").read_text().split())


def events_of(folder, run):
    return EventAccumulator(str(folder / "tensorboard" / run), size_guidance={"images": 0}).Reload()


def test_pictures_of_the_loss_are_shown_evenly_over_each_phase(watched):
    for job, tag, steps in (("offline", "offline/learned_loss", [4, 8]), ("adalfl", "training/learned_loss", [12, 20])):
        images = events_of(watched.folder, f"{job}/seed_0").Images(tag)
        assert [image.step for image in images] == steps
        first, last = (Image.open(io.BytesIO(image.encoded_image_string)).convert("RGB") for image in images)
        assert first.size == last.size == (720, 340)
        assert first.tobytes() != last.tobytes()
        assert events_of(watched.folder, f"{job}/seed_1").Tags()["images"] == []


def test_pictures_of_a_run_are_of_its_first_seed(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(
        run, "picture_of_loss", lambda shapes, *_: shown.append(shapes.values) or np.zeros((9, 9, 3), np.uint8)
    )
    brief = {"num_steps": 4, "eval_every": 2, "offline.num_steps": 0, "num_loss_figures": 1}
    train(tiny_config(brief, method="adalfl"), tmp_path / "run")
    with np.load(tmp_path / "run" / "loss_shapes.npz") as kept:
        np.testing.assert_array_equal(shown[-1], kept["adalfl/values"][0])
        assert (kept["adalfl/values"][0] != kept["adalfl/values"][1]).any()


def test_the_chunks_that_hold_the_steps_to_profile_are_traced(watched):
    folder = watched.folder
    traced = [path.relative_to(folder / "profiles") for path in (folder / "profiles").rglob("*.xplane.pb")]
    assert sorted(str(Path(*path.parts[:2])) for path in traced) == [
        "adalfl/steps_5_to_8",
        "adalfl/steps_9_to_12",
        "offline/steps_5_to_8",
        "tuned_task_loss_0.1/steps_5_to_8",
        "tuned_task_loss_0.1/steps_9_to_12",
        "tuned_task_loss_0.3/steps_5_to_8",
        "tuned_task_loss_0.3/steps_9_to_12",
    ]
    assert {path.parts[2:4] for path in traced} == {("plugins", "profile")}  # where TensorBoard looks for them


def test_weights_and_biases_gets_means_and_pictures_once_through_resumes(watched):
    folder, wandb = watched.folder, watched.wandb
    first, *others = wandb.settings
    assert (first["project"], first["name"], first["dir"], first["resume"]) == ("losses", "run", str(folder), "allow")
    assert first["config"]["num_steps"] == 20
    assert [other["id"] for other in others] == [first["id"]] * 2
    assert wandb.exit_codes == [1, 1, 0]
    assert sorted(wandb.logged) == list(range(14))  # evaluations; pictures go with them
    assert ("adalfl/training/*", "adalfl/training/step") in wandb.axes
    rows = read_record(folder).series("adalfl", "valid/error_rate")
    values = {
        entry["adalfl/training/step"]: entry["adalfl/training/valid/error_rate"]
        for entry in wandb.logged.values()
        if "adalfl/training/valid/error_rate" in entry
    }
    assert list(values) == rows.steps.tolist()
    np.testing.assert_allclose(list(values.values()), rows.values.mean(axis=0), rtol=1e-6)
    pictures = [entry for entry in wandb.logged.values() if any(name.endswith("learned_loss") for name in entry)]
    assert [entry[name] for entry in pictures for name in entry if name.endswith("/step")] == [4, 8, 12, 20]


def test_without_its_package_weights_and_biases_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'wandb is not installed; pip install "adalfl_jax\[wandb\]"'):
        train(tiny_config(wandb_project="losses"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_where_weights_and_biases_does_not_start_the_run_says_what_to_do(tmp_path, monkeypatch):
    def refuse(**settings):
        raise RuntimeError("no account")

    wandb = Wandb()
    wandb.init = refuse
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(ConfigError, match=r"did not start \(no account\); `wandb login`, set WANDB_MODE=offline"):
        train(tiny_config(wandb_project="losses"), tmp_path / "run")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of the package
def test_weights_and_biases_itself_takes_a_run_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(tiny_config(WATCHED | {"profile_steps": ()}, method="adalfl"), tmp_path / "run")
    (kept,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    content = kept.read_bytes()
    assert b"adalfl/training/valid/error_rate" in content
    assert b"media/images" in content


# The report of a run that is not over


def test_a_run_that_is_not_over_has_a_report_that_says_how_far_it_is(watched):
    titles = ("task loss, tuned rate", "offline phase", "AdaLFL")
    expected = [(28, 0, 0), (40, 8, 12)]
    assert watched.progress == [list(zip(titles, done, (40, 8, 20), strict=True)) for done in expected]
    *pages, last = watched.pages
    assert all("This run is not over" in page and "No process works on it" in page for page in pages)
    assert ["Results so far" in page for page in pages] == [False, True]
    assert ["The shape of the learned loss" in page for page in pages] == [False, True]
    assert "0 ways to train on digits" in pages[0]
    assert "<td>12</td>" in pages[1]
    assert "This run" not in last


def test_a_run_that_goes_on_is_told_from_one_that_does_not(tmp_path):
    open_workdir(tmp_path, tiny_config(), "train")
    assert not read_unfinished(tmp_path).summary["is_running"]
    with lock_folder(tmp_path):
        assert read_unfinished(tmp_path).summary["is_running"]
        assert "This run goes on" in page_of(tmp_path)


def test_a_run_that_diverged_has_a_report_that_says_why_until_it_is_started_again(tmp_path):
    config = tiny_config({"inner.learning_rate": 1e30}, method="task_loss")
    with pytest.raises(DivergenceError) as caught:
        train(config, tmp_path / "run")
    page = page_of(tmp_path / "run")
    assert "This run diverged" in page
    assert "is not finite at training step" in page
    assert (tmp_path / "run" / "diverged.txt").read_text() == str(caught.value)
    open_workdir(tmp_path / "run", config, "train", make_setup(config).dataset.content)
    assert "This run is not over" in page_of(tmp_path / "run")


def test_what_is_half_written_is_in_no_report(tmp_path):
    open_workdir(tmp_path, tiny_config(method="task_loss"), "train")
    rows = [
        {"method": "task_loss", "phase": "training", "seed": seed, "step": step}
        | {"test/error_rate": seed / 4, "valid/error_rate": step / 16}
        for step, seed in ((0, 0), (0, 1), (2, 0), (2, 1), (4, 0))
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"method": "ta')
    summary = read_unfinished(tmp_path).summary["methods"]["task_loss"]
    assert (summary["step"], summary["test"]["per_seed"], summary["valid"]["per_seed"]) == (2, [0, 0.25], [0.125] * 2)


@pytest.mark.parametrize("valid", [(0.1, 0.3), (0.3, 0.1)])
def test_the_shapes_of_a_run_that_goes_on_are_those_of_its_best_seed(valid, tmp_path, monkeypatch):
    open_workdir(tmp_path, tiny_config(method="adalfl"), "train")
    rows = [
        {"method": "adalfl", "phase": "training", "seed": seed, "step": 0, "test/error_rate": 0.2}
        | {"valid/error_rate": valid[seed]}
        for seed in (0, 1)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(unfinished, "_shapes", lambda *_: {"adalfl/values": np.zeros((2, 1, 2, 3))})
    assert read_unfinished(tmp_path).summary["learned_loss"] == {"method": "adalfl", "seed": valid.index(0.1)}


def test_the_shapes_of_a_run_that_goes_on_are_those_of_the_last_method_that_has_some(tmp_path, monkeypatch):
    methods = ("ml3", "adalfl")
    open_workdir(tmp_path, tiny_config(methods=methods), "compare")
    measured = {"phase": "training", "step": 0, "test/error_rate": 0.2, "valid/error_rate": 0.1}
    rows = [{"method": method, "seed": seed} | measured for method in methods for seed in (0, 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shapes = {f"{method}/values": np.zeros((2, 1, 2, 3)) for method in methods}
    monkeypatch.setattr(unfinished, "_shapes", lambda *_: shapes)
    assert read_unfinished(tmp_path).summary["learned_loss"] == {"method": "adalfl", "seed": 0}


def test_rates_that_a_run_finds_are_known_at_its_end_alone(tmp_path):
    config = tiny_config({"methods": ("task_loss", "adalfl"), "inner.first_step_rate": 0.3})
    open_workdir(tmp_path, config, "compare")
    rows = [
        {
            "method": method,
            "phase": "training",
            "seed": seed,
            "step": 0,
            "test/error_rate": 0.9,
            "valid/error_rate": 0.9,
        }
        for method in config.methods
        for seed in (0, 1)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    methods = read_unfinished(tmp_path).summary["methods"]
    assert [methods[name]["learning_rate"] for name in config.methods] == [0.1, None]
    assert "AdaLFL" in page_of(tmp_path)


def test_a_search_may_end_while_its_checkpoints_are_looked_at(tmp_path, monkeypatch):
    open_workdir(tmp_path, tiny_config(methods=("tuned_task_loss",)), "compare")
    gone, kept = (tmp_path / "checkpoints" / f"tuned_task_loss_{rate}" for rate in (0.01, 0.1))
    for folder in (gone, kept):
        (folder / "4").mkdir(parents=True)
    iterdir = Path.iterdir

    def slow_iterdir(folder):
        if folder == gone:
            shutil.rmtree(folder)
        return iterdir(folder)

    monkeypatch.setattr(Path, "iterdir", slow_iterdir)
    (progress,) = read_unfinished(tmp_path).summary["progress"]
    assert progress["done"] == 4


def test_a_folder_without_a_run_has_no_report(tmp_path):
    with flagsaver.flagsaver((report.WORKDIR, str(tmp_path))), pytest.raises(SystemExit, match="holds no run"):
        report.main(["report"])


def test_a_damaged_name_of_a_run_of_weights_and_biases_is_told_in_a_line(tmp_path):
    (tmp_path / "wandb_run.json").write_text('{"id": ')
    with pytest.raises(WorkdirError, match=r"wandb_run\.json cannot be read"):
        weights_and_biases._run_id(tmp_path)
