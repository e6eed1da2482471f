"""Drawing a run anew, from its files."""

import json

import pytest
from absl import flags
from absl.testing import flagsaver

from adalfl_jax.training import compare, outputs
from adalfl_jax.training.workdir import open_workdir
from experiments import report
from tests.training.tiny import tiny_config


@pytest.fixture(autouse=True)
def parsed_flags():
    """The flags of a program that is called here."""
    flags.FLAGS.mark_as_parsed()


def test_pictures_page_and_animation_are_drawn_from_the_files_alone(tmp_path, capsys):
    brief = {"model.name": "logistic", "num_steps": 4, "eval_every": 2, "offline.num_steps": 0}
    compare(tiny_config(brief, methods=("task_loss", "adalfl")), tmp_path)
    page = (tmp_path / "report.html").read_bytes()
    for path in ((tmp_path / "report.html"), *(tmp_path / "figures").iterdir()):
        path.unlink()
    with flagsaver.flagsaver((report.WORKDIR, str(tmp_path))):
        report.main(["report"])
    assert (tmp_path / "report.html").read_bytes() == page
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names == {"learning_curves.png", "loss_shapes.png", "gradient_scale.png", "loss_shapes.gif"}
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_a_run_that_ends_while_it_is_drawn_keeps_the_report_of_its_end(tmp_path, monkeypatch):
    compare(tiny_config({"num_steps": 4, "eval_every": 2}, methods=("task_loss",)), tmp_path)
    page, summary = (tmp_path / "report.html").read_bytes(), (tmp_path / "summary.json").read_text()
    (tmp_path / "summary.json").unlink()
    pages, draw = [], outputs.write_figures

    def end_meanwhile(*arguments):
        figures = draw(*arguments)
        pages.append(arguments[1].summary)
        (tmp_path / "summary.json").write_text(summary)
        return figures

    monkeypatch.setattr(outputs, "write_figures", end_meanwhile)
    with flagsaver.flagsaver((report.WORKDIR, str(tmp_path))):
        report.main(["report"])
    assert len(pages) == 2
    assert (tmp_path / "report.html").read_bytes() == page


SUMMARY = {"dataset": "digits", "data": "", "metric": "error_rate", "num_steps": 20, "seeds": [0], "methods": {}}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "[]"),
        ("config.json", '{"command": "train"'),
        ("summary.json", "{}"),
        ("summary.json", json.dumps(SUMMARY | {"methods": {"adalfl": {"title": "AdaLFL"}}})),
        ("metrics.jsonl", '{"a": 1}\n'),
        ("metrics.jsonl", "3\n"),
        ("loss_shapes.npz", "PK\x03\x04"),
    ],
)
def test_a_file_that_cannot_be_read_is_told_by_name(name, content, tmp_path):
    whole = {"config.json": '{"command": "train"}', "summary.json": json.dumps(SUMMARY), "metrics.jsonl": ""}
    for file, text in (whole | {name: content}).items():
        (tmp_path / file).write_text(text)
    with flagsaver.flagsaver((report.WORKDIR, str(tmp_path))), pytest.raises(SystemExit, match=rf"{name} cannot be r"):
        report.main(["report"])


def test_a_config_of_no_run_is_told_while_there_is_no_summary(tmp_path):
    (tmp_path / "config.json").write_text('{"command": "train"}')
    with (
        flagsaver.flagsaver((report.WORKDIR, str(tmp_path))),
        pytest.raises(SystemExit, match=r"config\.json cannot be read \(config lacks method, "),
    ):
        report.main(["report"])


def test_a_folder_that_figures_cannot_be_written_to_is_told(tmp_path):
    folder = open_workdir(tmp_path / "run", tiny_config(method="task_loss"), "train")
    (folder / "figures").write_text("")
    message = r"cannot write to workdir .*figures"
    with flagsaver.flagsaver((report.WORKDIR, str(folder))), pytest.raises(SystemExit, match=message):
        report.main(["report"])
