"""The numbers, tables and commands of the documents are those of the studies that made them."""

import json
import re
import subprocess

import pytest
from matplotlib.figure import Figure

from adalfl_jax.analysis.record import flatten
from adalfl_jax.training import TrainConfig
from configs import default
from experiments.study import publish
from experiments.study.arms import settings_of
from experiments.study.studies import STUDIES
from experiments.tables import rounded
from tests.training.tiny import ROOT

DOCS = ROOT / "docs"
PUBLISHED = sorted(STUDIES.keys() & {path.stem for path in DOCS.glob("results/*.json")})


def test_the_commands_of_the_documents_name_what_there_is():
    pages = [ROOT / "Makefile", ROOT / "README.md", *DOCS.glob("*.md")]
    text = "\n".join(page.read_text() for page in pages)
    commands = re.findall(r"(?:experiments\.study|\$\(STUDY\)) (--study=.+)", text)
    assert len(commands) > 20
    for command in commands:
        given = [re.findall(rf"--{flag}=(\S+)", command) for flag in ("study", "comparison", "arm")]
        (study,), comparisons, arms = given
        known = {comparison.name: comparison for comparison in STUDIES[study].comparisons()}
        for name in comparisons or known:
            known[name].select(arms)


def test_every_table_is_made_anew_by_the_command_above_it(tmp_path):
    """`make results` here has a Python that writes down what it is given."""
    told, python = tmp_path / "told", tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$*" >> {told}\n')
    python.chmod(0o755)
    (tmp_path / "venv" / "installed").touch()
    command = ["make", "results", "results-more", f"VENV={tmp_path / 'venv'}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)  # noqa: S603, the command is ours
    _, *lines = told.read_text().splitlines()  # the first installs a package
    assert all(line.endswith(" --jobs=2") for line in lines if "experiments.study" in line)
    given = [line.removesuffix(" --jobs=2") for line in lines]
    kept = [json.loads(path.read_text()) for path in DOCS.glob("results/*.json")]
    made = [part for study in kept for part in ([study] if "command" in study else study.values())]
    assert {part["command"].removeprefix(".venv/bin/python ") for part in made} <= set(given)
    assert len(set(given)) == len(given) > 20


@pytest.mark.parametrize("study", PUBLISHED)
def test_the_command_above_a_table_makes_the_arms_that_it_has(study):
    known = {comparison.name: comparison for comparison in STUDIES[study].comparisons()}
    for name, numbers in json.loads((DOCS / "results" / f"{study}.json").read_text()).items():
        given = re.findall(r"--arm=(\S+)", numbers["command"])
        arms = known[name].select(given).arms if given else known[name].arms
        assert {arm.name for arm in arms} == numbers["arms"].keys()


@pytest.mark.parametrize("study", PUBLISHED)
def test_the_pages_have_the_numbers_that_lie_beside_them(study, tmp_path, program_flags, monkeypatch):
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **settings: None)  # the pages alone are compared
    numbers = json.loads((DOCS / "results" / f"{study}.json").read_text())
    program_flags(f"--study={study}")
    assert rounded(publish._tested(study, numbers)) == numbers
    for name in {each["page"] for each in numbers.values()}:
        target = tmp_path / name
        target.write_text((DOCS / name).read_text())
        program_flags(f"--study={study}", f"--write={target}")
        publish._write_page(study, target, numbers)
        assert target.read_text() == (DOCS / name).read_text()


def test_the_defaults_are_those_that_published_settings_differ_from():
    """Where one changes, arms that left it alone are others: give them the old value, then golden/ the new one."""
    defaults = flatten(TrainConfig.from_mapping(default.get_config()).to_dict())
    kept = json.loads((ROOT / "tests" / "golden" / "default_config.json").read_text())
    assert {name: defaults[name] for name in kept} == kept


@pytest.mark.parametrize("study", PUBLISHED)
def test_published_numbers_are_of_the_settings_that_the_code_has(study):
    """But for points that a grid was widened by later."""
    known = {comparison.name: comparison for comparison in STUDIES[study].comparisons()}
    for name, numbers in json.loads((DOCS / "results" / f"{study}.json").read_text()).items():
        arms = {arm.name: arm for arm in known[name].arms}
        for arm, found in numbers["arms"].items():
            tried = [entry["point"] for entry in found["tuning"]]
            assert tried == [dict(point) for point in arms[arm].grid][: len(tried)], (name, arm)
            settings = settings_of(known[name], arms[arm], found["chosen"] or {})
            assert found["settings"] == rounded(json.loads(json.dumps(settings))), (name, arm)
            assert found["title"] == arms[arm].title
