"""Drawing a run anew, from its files."""

import pytest
from absl import flags
from absl.testing import flagsaver

from adalfl_jax.training import compare
from adalfl_jax.training.workdir import open_workdir
from experiments import report
from tests.training.tiny import tiny_config


@pytest.fixture(autouse=True)
def parsed_flags():
    """The flags of a program that is called here."""
    flags.FLAGS.mark_as_parsed()


def test_pictures_page_and_animation_are_drawn_from_the_files_alone(tmp_path, capsys):
    compare(tiny_config(methods=("task_loss", "adalfl"), num_steps=4, eval_every=2), tmp_path)
    page = (tmp_path / "report.html").read_bytes()
    for path in ((tmp_path / "report.html"), *(tmp_path / "figures").iterdir()):
        path.unlink()
    with flagsaver.flagsaver((report.WORKDIR, str(tmp_path))):
        report.main(["report"])
    assert (tmp_path / "report.html").read_bytes() == page
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names == {"learning_curves.png", "loss_shapes.png", "gradient_scale.png", "loss_shapes.gif"}
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_a_summary_that_cannot_be_read_is_told(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "summary.json").write_text("{")
    with flagsaver.flagsaver((report.WORKDIR, str(tmp_path))), pytest.raises(SystemExit, match="cannot be read"):
        report.main(["report"])


def test_a_folder_that_figures_cannot_be_written_to_is_told(tmp_path):
    folder = open_workdir(tmp_path / "run", tiny_config(method="task_loss"), "train")
    (folder / "figures").write_text("")
    with flagsaver.flagsaver((report.WORKDIR, str(folder))), pytest.raises(SystemExit, match=r"File.* exists.*figures"):
        report.main(["report"])
