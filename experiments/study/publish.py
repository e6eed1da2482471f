"""What a study leaves: its numbers as JSON, and tables and pictures of them on a page where `--write` names one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adalfl_jax.training import WorkdirError
from adalfl_jax.training.machine import describe_machine
from adalfl_jax.training.workdir import read_summary
from experiments import page
from experiments.launch import command_line, studies_folder
from experiments.study.arms import Comparison, make_config
from experiments.study.compare import paired_tests
from experiments.study.runs import RUNS
from experiments.study.studies import STUDIES
from experiments.study.tables import Part, save_figure
from experiments.tables import rounded

PACKAGES = ("adalfl_jax", "jax", "jaxlib", "flax", "optax")


def read_numbers(study: str) -> dict[str, Any]:
    """The numbers there are, by comparison.

    Raises:
      WorkdirError: their file cannot be read.
    """
    path = _path_of_numbers(study)
    try:
        return dict(json.loads(path.read_text())) if path.exists() else {}
    except (OSError, TypeError, ValueError) as error:
        raise WorkdirError(f"{path} cannot be read ({error}); move it away, the runs it was made of stay") from error


def require_whole(study: str, comparison: Comparison, seeds: range) -> None:
    """Raises ValueError where the page has arms or seeds of a comparison that would be lost from it."""
    published = read_numbers(study).get(comparison.name)
    if published is None:
        return
    (whole,) = (each for each in STUDIES[study].comparisons() if each.name == comparison.name)
    left_out = {arm.name for arm in whole.arms} - {arm.name for arm in comparison.arms}
    lost = [*sorted(left_out & set(published["arms"]))]
    lost += [f"seed {seed}" for seed in published["seeds"] if seed not in seeds]
    if lost:
        raise ValueError(
            f"{_path_of_numbers(study)} has {', '.join(lost[:5])}{', ...' if lost[5:] else ''} of {comparison.name}, "
            "which --arm or --num_seeds leaves out here and the page would lose; add them, or leave out --write"
        )


def publish(study: str, comparison: Comparison, numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the numbers of a comparison to those there are of its study, which it returns, and to the page."""
    workdir, metric = studies_folder(), make_config(comparison, comparison.arms[0], {}, range(1)).metric
    on_page = Path(page.WRITE.value).name if page.WRITE.value else None  # a study may be spread over several
    made = {"command": command_line("study"), "page": on_page, "machine": _machine_of(numbers, workdir)}
    made |= {"metric": metric, **numbers}
    return _publish(study, {comparison.name: made | STUDIES[study].measure(made, workdir)})


def publish_again(study: str) -> None:
    """Makes the page anew from the numbers there are.

    Raises:
      ValueError: there are none.
    """
    if not read_numbers(study):
        raise ValueError(f"{_path_of_numbers(study)} has no numbers to make a page of; run the study first")
    _publish(study, {})


def show(study: str, comparison: Comparison, comparisons: Sequence[Comparison], known: Mapping[str, Any]) -> None:
    """Draws and prints what a study shows of a comparison."""
    for part in STUDIES[study].parts(comparisons, known):
        if comparison.name in part.comparisons:
            save_figure(part.figure, studies_folder() / f"{part.name}.png")
            if part.tables:
                print(_section(part, known, {}), page.COLUMNS, sep="\n\n", end="\n\n")


def _publish(study: str, made: Mapping[str, Any]) -> dict[str, Any]:
    path = _path_of_numbers(study)
    with page.publishing(path):
        known = page.write_numbers(path, _tested(study, rounded(read_numbers(study) | dict(made))))
        if page.WRITE.value:
            _write_page(study, Path(page.WRITE.value), known)
    return known


def _tested(study: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers with tests made anew from the errors, of the pairs that the study has now."""
    pairs = {comparison.name: comparison.pairs for comparison in STUDIES[study].comparisons()}
    tested = {}
    for name, numbers in known.items():
        there = tuple((pair["arm"], pair["against"]) for pair in numbers["pairs"])  # in a quick form
        tested[name] = numbers | paired_tests(numbers["arms"], numbers["reference"], pairs.get(name, there))
    return tested


def _machine_of(numbers: Mapping[str, Any], workdir: Path) -> dict[str, Any]:
    """What the runs of a comparison were trained on, which may be from before, or from elsewhere."""
    runs = [workdir / RUNS / arm["run"] for arm in numbers["arms"].values() if "test" in arm]
    here = describe_machine(PACKAGES)
    machines = [read_summary(run)["environment"] for run in runs] or [here]
    return page.join_machines(
        [{name: found[name] for name in (*here, "device") if name in found} for found in machines]
    )


def _path_of_numbers(study: str) -> Path:
    return page.path_of_numbers(study, studies_folder())


def _write_page(study: str, target: Path, known: Mapping[str, Any]) -> None:
    """Puts all parts that were made for this page into the section of the study there, with their pictures."""
    there = {name: numbers for name, numbers in known.items() if numbers["page"] == target.name}
    made = {}
    for part in STUDIES[study].parts(STUDIES[study].comparisons(), there):
        picture = page.folder_of_pictures(target) / f"{part.name}.png"
        save_figure(part.figure, picture)
        made[part.name] = _section(part, there, {part.title: f"{picture.relative_to(target.parent)}"})
    page.renew(target, page.replace_parts, study, made)


def _section(part: Part, known: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    made = [known[name] for name in part.comparisons]
    commands = "\n".join(dict.fromkeys(numbers["command"] for numbers in made))
    machine = page.join_machines([numbers["machine"] for numbers in made])
    return f"### {part.title}\n\n{page.render_section(commands, machine, part.tables, pictures)}"
