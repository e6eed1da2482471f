"""Predicting for the rows of a file."""

import numpy as np
import pytest
import sklearn.datasets
from absl import flags
from absl.testing import flagsaver

from adalfl_jax.training import load_model, train
from experiments import predict
from tests.training.tiny import DIABETES, tiny_config

ROWS = sklearn.datasets.load_diabetes(scaled=False).data[:7]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, module_without_figures):
    """A finished run on the diabetes data."""
    folder = tmp_path_factory.mktemp("predict") / "run"
    train(tiny_config(DIABETES, method="task_loss", num_steps=4, eval_every=4), folder)
    return folder


def run(workdir, inputs, outputs, **others):
    flags.FLAGS.mark_as_parsed()
    values = {"workdir": str(workdir), "inputs": str(inputs), "outputs": str(outputs), **others}
    with flagsaver.flagsaver(**values):
        predict.main(["predict"])


@pytest.mark.usefixtures("verbosity")
def test_rows_of_a_file_get_what_the_model_predicts(workdir, tmp_path, capsys):
    np.savez(tmp_path / "rows.npz", inputs=ROWS, names=np.array([None]))  # an array that is not read
    run(workdir, tmp_path / "rows.npz", tmp_path / "predictions", method="task_loss", seed=1)
    with np.load(tmp_path / "predictions") as file:
        np.testing.assert_array_equal(file["outputs"], load_model(workdir, seed=1).predict(ROWS))
    assert capsys.readouterr().out.endswith("predictions: outputs (7, 1) of task_loss, seed 1\n")


@pytest.mark.parametrize(
    ("inputs", "outputs", "others", "message"),
    [
        ("rows.npz", "kept.npz", {}, r"^FileExistsError: .*kept\.npz exists and stays as it is; name another file$"),
        (
            "rows.npz",
            "nosuch/new.npz",
            {},
            r"^FileNotFoundError: there is no folder .*nosuch for new\.npz; make it first",
        ),
        ("nosuch.npz", "new.npz", {}, r"^DatasetError: there is no file .*nosuch\.npz$"),
        (
            "other.npz",
            "new.npz",
            {},
            r"^DatasetError: .*other\.npz must hold an array inputs, and has none of that",
        ),
        (
            "narrow.npz",
            "new.npz",
            {},
            r"^DatasetError: .*narrow\.npz: new rows: inputs must be \[N, 10\]; got \(7, 9\)$",
        ),
        ("rows.npz", "new.npz", {"seed": 9}, r"^WorkdirError: .*holds no seed 9; it has 0, 1$"),
    ],
)
@pytest.mark.usefixtures("verbosity")
def test_what_cannot_be_done_is_told_in_a_line(inputs, outputs, others, message, workdir, tmp_path):
    (tmp_path / "kept.npz").write_text("mine")
    np.savez(tmp_path / "rows.npz", inputs=ROWS)
    np.savez(tmp_path / "narrow.npz", inputs=ROWS[:, 1:])
    np.savez(tmp_path / "other.npz", rows=ROWS)
    with pytest.raises(SystemExit, match=message):
        run(workdir, tmp_path / inputs, tmp_path / outputs, **others)
    for name in ("inputs", "outputs"):
        files = {"inputs": tmp_path / "rows.npz", "outputs": tmp_path / "new.npz"} | {name: ""}
        with pytest.raises(SystemExit, match=rf"^DatasetError: --{name} must name a file; got ''$"):
            run(workdir, **files)
    assert (tmp_path / "kept.npz").read_text() == "mine"
    assert not (tmp_path / "new.npz").exists()


@pytest.mark.usefixtures("verbosity")
def test_a_full_disk_leaves_no_file(workdir, tmp_path, monkeypatch):
    def fail(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    np.savez(tmp_path / "rows.npz", inputs=ROWS)
    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(SystemExit, match="No space left on device"):
        run(workdir, tmp_path / "rows.npz", tmp_path / "new.npz")
    assert not (tmp_path / "new.npz").exists()
