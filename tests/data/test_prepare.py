"""The program that prepares datasets: what is there is left alone, and what cannot be is told in a line."""

import importlib.util
import subprocess
import sys
import tomllib
from importlib.machinery import ModuleSpec

import numpy as np
import pytest
import tensorflow_datasets as tfds
from absl import app
from absl.testing import flagsaver

from adalfl_jax import data
from adalfl_jax.data import DatasetError, images, prepare
from tests.data.prepared import write_dataset
from tests.data.test_tables import downloads as downloads
from tests.data.test_tables import go_offline
from tests.training.tiny import ROOT, snapshot

READY = "cifar10 is ready: 108 train, 12 valid, 40 test examples of (8, 8, 3), 4 classes\n"


pytestmark = pytest.mark.usefixtures("verbosity")


@pytest.fixture
def run(capsys):
    """Runs the program in this process; returns what it printed and its last words, None where it ended well."""

    def run_program(*arguments):
        with flagsaver.flagsaver():
            ended = None
            try:
                prepare.main(app.parse_flags_with_usage(["prepare", *map(str, arguments)]))
            except SystemExit as end:
                ended = end.code
        return capsys.readouterr().out, ended

    return run_program


def pretend_tensorflow(monkeypatch, spec):
    """TensorFlow is installed, or is not, as far as anyone asks and whatever this machine has."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "tensorflow" else find_spec(name))


@pytest.fixture
def no_tensorflow(monkeypatch):
    pretend_tensorflow(monkeypatch, None)


class Builders:
    """Stands for what TFDS does once it has a builder: notes the builder and writes noise where it would write."""

    def __init__(self):
        self.used, self.error, self.shape = [], None, (8, 8, 3)

    def download_and_prepare(self, builder):
        self.used.append(builder)
        if self.error is not None:
            raise self.error
        folder = builder.data_path.parent
        write_dataset(folder.parent, folder.name, str(builder.version), shape=self.shape)


@pytest.fixture
def builders(monkeypatch):
    """TensorFlow is there, and nothing is downloaded."""
    fakes = Builders()
    pretend_tensorflow(monkeypatch, ModuleSpec("tensorflow", None))
    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", lambda self: fakes.download_and_prepare(self))
    return fakes


def must_not_decode(*arguments):
    raise AssertionError("what is in the file was decoded anew")


def test_a_prepared_dataset_is_decoded_once_reported_and_left_alone(tmp_path, run, no_tensorflow, monkeypatch):
    write_dataset(tmp_path)
    written = snapshot(tmp_path)
    assert run("cifar10", f"--data_dir={tmp_path}") == (READY, None)
    before = snapshot(tmp_path)
    assert before.keys() - written.keys() == {"cifar10/1.0.0/adalfl_jax.safetensors"}
    assert written.items() <= before.items()
    monkeypatch.setattr(images, "_decode", must_not_decode)
    assert run("cifar10", f"--data_dir={tmp_path}") == (READY, None)
    assert snapshot(tmp_path) == before


def test_what_is_prepared_is_what_training_loads(tmp_path, run, monkeypatch):
    write_dataset(tmp_path / "data", "beans", shape=(None, None, 3))
    settings = {"data_dir": tmp_path / "data", "cache_dir": tmp_path / "cache", "image_size": 8}
    run("beans", *(f"--{name}={value}" for name, value in settings.items()))
    monkeypatch.setattr(images, "_decode", must_not_decode)
    assert data.load("beans", **settings).input_shape == (8, 8, 3)


def test_prepare_returns_the_dataset_on_the_host(tmp_path):
    written = write_dataset(tmp_path)
    dataset = prepare.prepare("cifar10", data_dir=str(tmp_path))
    assert dataset.is_streamed
    np.testing.assert_array_equal(dataset.test.inputs, written["test"][0])


def test_image_size_and_cache_dir_are_obeyed(tmp_path, run):
    write_dataset(tmp_path / "data", "beans", shape=(None, None, 3))
    before = snapshot(tmp_path / "data")
    out, ended = run("beans", f"--data_dir={tmp_path / 'data'}", f"--cache_dir={tmp_path / 'cache'}", "--image_size=6")
    assert (out, ended) == (READY.replace("cifar10", "beans").replace("(8, 8, 3)", "(6, 6, 3)"), None)
    assert snapshot(tmp_path / "data") == before
    assert list(snapshot(tmp_path / "cache")) == ["beans-1.0.0_6.safetensors"]


def test_images_that_differ_in_size_are_refused_without_an_image_size(tmp_path, run):
    write_dataset(tmp_path, "beans", shape=(None, None, 3))
    out, ended = run("beans", f"--data_dir={tmp_path}")
    assert out == ""
    assert ended.startswith("DatasetError: images in ")
    assert "image_size" in ended


def test_data_are_looked_for_where_tensorflow_datasets_keeps_them(tmp_path, run, monkeypatch):
    write_dataset(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert run("cifar10") == (READY, None)


def test_a_tilde_is_the_home_folder(tmp_path, run, monkeypatch):
    write_dataset(tmp_path / "data")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run("cifar10", "--data_dir=~/data", "--cache_dir=~/cache") == (READY, None)
    assert list(snapshot(tmp_path / "cache")) == ["cifar10-1.0.0.safetensors"]


@pytest.mark.parametrize(
    ("name", "report"),
    [
        ("california", "california is ready: 14,860 train, 1,652 valid, 4,128 test examples of (8,), a regression\n"),
        ("crime", "crime is ready: 1,435 train, 160 valid, 399 test examples of (100,), a regression\n"),
    ],
)
def test_tables_are_downloaded_once_and_need_no_tensorflow(name, report, tmp_path, run, downloads, no_tensorflow):
    for _ in range(2):
        assert run(name, f"--data_dir={tmp_path}") == (report, None)
    assert list(snapshot(tmp_path)) == [f"{name}/adalfl_jax.safetensors"]
    assert len(downloads.calls) == 1


def test_a_table_is_kept_in_cache_dir(tmp_path, run, downloads):
    run("crime", f"--data_dir={tmp_path / 'data'}", f"--cache_dir={tmp_path / 'cache'}")
    assert list(snapshot(tmp_path)) == ["cache/crime.safetensors"]


def test_a_table_that_cannot_be_downloaded_is_told_in_a_line(tmp_path, run, monkeypatch):
    go_offline(monkeypatch)
    out, ended = run("california", f"--data_dir={tmp_path}")
    assert out == ""
    assert ended.startswith("DatasetError: dataset 'california' is not in ")
    assert "its download failed (URLError: <urlopen error Name or service not known>)" in ended
    assert snapshot(tmp_path) == {}


def test_an_npz_file_is_checked_and_described(tmp_path, run):
    file = tmp_path / "mine.npz"
    np.savez(file, inputs=np.zeros((100, 6, 5), np.uint8), targets=np.arange(100) % 4)
    report = f"{file} is ready: 72 train, 8 valid, 20 test examples of (6, 5, 1), 4 classes\n"
    assert run(file) == (report, None)
    np.savez(file, inputs=np.zeros((100, 6, 5), np.uint8), targets=np.arange(90) % 4)
    assert run(file) == ("", f"DatasetError: dataset {str(file)!r}: 100 inputs but 90 targets")
    assert run(tmp_path / "no.npz") == ("", f"DatasetError: there is no file {tmp_path / 'no.npz'}")


def test_several_names_are_prepared_in_their_order_up_to_the_first_that_cannot_be(tmp_path, run):
    write_dataset(tmp_path)
    out, ended = run("diabetes", "cifar10", "mnits", "digits", f"--data_dir={tmp_path}")
    assert out == "diabetes is ready: 317 train, 36 valid, 89 test examples of (10,), a regression\n" + READY
    assert ended.startswith("DatasetError: unknown dataset 'mnits'")


@pytest.mark.parametrize(
    ("name", "introduction"),
    [
        ("mnits", "did you mean 'mnist'? Known"),
        ("califrnia", "did you mean 'california'? Known"),
        ("mnist.npy", "did you mean 'mnist'? Known"),
        ("nothing/like/it", "known"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name, introduction, tmp_path, run, builders):
    out, ended = run(name, f"--data_dir={tmp_path}")
    assert out == ""
    assert ended.startswith(f"DatasetError: unknown dataset {name!r}; {introduction}: california, crime, diabetes")
    assert not builders.used
    assert snapshot(tmp_path) == {}


def test_no_name_is_refused_with_an_example(run):
    with pytest.raises(app.UsageError, match="name one dataset or more, for example mnist"):
        run("--image_size=8")


@pytest.mark.parametrize("flag", ["--image_size=-1", "--image_size=large", "--image_sise=8"])
def test_flags_that_cannot_be_are_refused(flag, capsys):
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as ended:
        app.parse_flags_with_usage(["prepare", "digits", flag])
    assert ended.value.code == 1
    assert "FATAL Flags parsing error" in capsys.readouterr().err


def test_without_tensorflow_the_command_that_brings_it_is_named(tmp_path, run, no_tensorflow):
    out, ended = run("mnist", f"--data_dir={tmp_path}")
    assert out == ""
    assert ended.startswith("DatasetError: preparing 'mnist' takes TensorFlow, which is not installed: ")
    assert "pip install '.[prepare]'" in ended
    assert snapshot(tmp_path) == {}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert any(requirement.startswith("tensorflow-cpu") for requirement in extras["prepare"])


@pytest.mark.parametrize(("name", "folder"), [("cifar10", "cifar10/3.0.2"), ("emnist/letters", "emnist/letters/3.1.0")])
def test_a_dataset_is_prepared_as_array_records_in_data_dir_and_once(name, folder, tmp_path, run, builders):
    for _ in range(2):
        assert run(name, f"--data_dir={tmp_path}") == (READY.replace("cifar10", name), None)
    (builder,) = builders.used
    assert builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD
    assert builder.data_path == tmp_path / folder
    assert f"{folder}/adalfl_jax.safetensors" in snapshot(tmp_path)


def test_what_was_prepared_is_not_downloaded_anew_for_another_image_size(tmp_path, run, builders):
    builders.shape = (None, None, 3)
    assert "image_size" in run("beans", f"--data_dir={tmp_path}")[1]
    out, ended = run("beans", f"--data_dir={tmp_path}", "--image_size=8")
    assert (out, ended) == (READY.replace("cifar10", "beans"), None)
    assert len(builders.used) == 1


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("no route to host"),
        OSError(28, "No space left on device"),
        tfds.download.DownloadError("Failed to get url"),
        AssertionError("Manual directory does not exist"),  # what TFDS raises of a download by hand
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_download_that_fails_is_told_with_its_reason(error, tmp_path, run, builders):
    builders.error = error
    out, ended = run("digits", "mnist", f"--data_dir={tmp_path}")
    assert out.startswith("digits is ready")
    assert "mnist" not in out
    assert ended.startswith(
        f"DatasetError: 'mnist' cannot be prepared in {tmp_path} ({type(error).__name__}: {error}); "
    )
    with pytest.raises(DatasetError) as caught:
        prepare.prepare("mnist", data_dir=str(tmp_path))
    assert caught.value.__cause__ is error


def test_a_configuration_that_is_not_there_is_refused(tmp_path, run, builders):
    out, ended = run("emnist/nosuch", f"--data_dir={tmp_path}")
    assert out == ""
    assert ended.startswith("DatasetError: TensorFlow Datasets cannot describe 'emnist/nosuch': ")
    assert not builders.used


@pytest.mark.parametrize(("name", "reason"), [("voc", "no image classification"), ("imagenet2012", "differ in size")])
def test_what_could_not_be_read_is_not_downloaded(name, reason, tmp_path, run, builders):
    out, ended = run(name, f"--data_dir={tmp_path}")
    assert out == ""
    assert ended.startswith("DatasetError: ")
    assert reason in ended
    assert not builders.used


def test_an_interrupt_ends_in_a_line(tmp_path, run, builders):
    builders.error = KeyboardInterrupt()
    assert run("cifar10", f"--data_dir={tmp_path}") == (
        "",
        "Interrupted while cifar10 was prepared; the same command does it again.",
    )


@pytest.mark.slow
def test_the_program_reports_to_standard_output_and_fails_in_a_line(tmp_path):
    write_dataset(tmp_path)
    command = [sys.executable, "-m", "adalfl_jax.data.prepare", "cifar10", "mnits", f"--data_dir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 1
    assert done.stdout == READY
    assert done.stderr.splitlines()[-1].startswith("DatasetError: unknown dataset 'mnits'; did you mean 'mnist'?")
    assert "Traceback" not in done.stderr
