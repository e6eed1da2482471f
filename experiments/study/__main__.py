"""Compares ways of training seed for seed: what is tuned is tuned alike, and judged on seeds nothing was chosen by.

    .venv/bin/python -m experiments.study --study=noisy_labels --comparison=mnist_mlp_40

Studies:

  ablation        the form of the loss network
  behaviour       what the learned losses of clean_labels do while a model trains
  clean_labels    the paper's comparison, with a task loss that is tuned and decayed
  clean_set       training on the clean set too, at the end, with a learned loss and without
  noisy_labels    wrong labels in the training split and a small clean set, beside robust losses and learned weights
  past_the_paper  a scale from outside, floors and ceilings, progress, longer horizons, against a decayed task loss
  recipe          settings that keep AdaLFL from failing
  redrawn         noisy_labels on other splits, wrong labels and clean sets, with more seeds to tune by
  text            the next character of English text, which the paper did not try
  thrift          what a cheaper meta-gradient costs in accuracy
  transfer        a loss learned on other data or for another model, as it is and learned further

With `--jobs=N` as many processes share the runs and the cores, or a GPU. The same command on another machine, on the
same folder, shares them too, where its file system has locks.

Runs are kept in `--workdir` (runs/studies) under a digest of their configuration: a study that was stopped goes on
where it was, and a changed setting is another run. Changed code is not, within one version of the package: remove
`runs` and `offline` there to train anew. `STUDY.json` there has all numbers; with `--write` it is in the folder
`results` beside the page. Tests of differences are made anew from the errors in it whenever anything is published, and
with `--from_numbers` all tables and pictures of that page are, without any training: call it for each page of a study.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags
from rich.console import Console

from adalfl_jax.data import Dataset
from adalfl_jax.registry import lookup
from adalfl_jax.training import TrainConfig, WorkdirError
from adalfl_jax.training.files import BusyError
from adalfl_jax.training.machine import describe_machine
from adalfl_jax.training.sections import DatasetConfig
from adalfl_jax.training.setup import load_dataset, make_setup
from adalfl_jax.training.workdir import read_summary
from experiments import page
from experiments.launch import command_line, parse_flags, studies_folder, told_in_a_line
from experiments.study import (
    ablation,
    behaviour,
    clean_labels,
    clean_set,
    jobs,
    noisy_labels,
    past_the_paper,
    recipe,
    redrawn,
    text,
    thrift,
    transfer,
)
from experiments.study.arms import QUICK_SUFFIX, Arm, Comparison, Overrides, make_config, make_source_config
from experiments.study.compare import compare_arms, do_free, paired_tests
from experiments.study.runs import RUNS
from experiments.study.tables import Part, comparison_parts, save_figure


class Study(NamedTuple):
    """Comparisons, and what is shown of them."""

    comparisons: Callable[[], list[Comparison]]
    parts: Callable[[Sequence[Comparison], Mapping[str, Any]], list[Part]] = comparison_parts
    measure: Callable[[Mapping[str, Any], Path], dict[str, Any]] = lambda numbers, workdir: {}  # further numbers


STUDIES = {
    "ablation": Study(ablation.comparisons),
    "behaviour": Study(behaviour.comparisons, behaviour.parts, behaviour.measure),
    "clean_labels": Study(clean_labels.comparisons),
    "clean_set": Study(clean_set.comparisons, clean_set.parts),
    "noisy_labels": Study(noisy_labels.comparisons, noisy_labels.parts, noisy_labels.measure),
    "past_the_paper": Study(past_the_paper.comparisons),
    "recipe": Study(recipe.comparisons),
    "redrawn": Study(redrawn.comparisons, redrawn.parts),
    "text": Study(text.comparisons),
    "thrift": Study(thrift.comparisons),
    "transfer": Study(transfer.comparisons, transfer.parts),
}
FIRST_SEED = 100  # of the seeds that are compared; tuning takes those from 0
DIGITS: Overrides = {"dataset.name": "digits", "model.name": "mlp", "batch_size": 50}
QUICK: Overrides = {
    "model.hidden_sizes": (64,),
    "num_steps": 300,
    "eval_every": 50,
    "offline.num_steps": 300,
}
POLL = 2  # seconds between looks at what other processes have left
PACKAGES = ("adalfl_jax", "jax", "jaxlib", "flax", "optax")

_STUDY = flags.DEFINE_enum("study", None, list(STUDIES), "Which study.")
_COMPARISONS = flags.DEFINE_multi_string(
    "comparison", None, "Comparison of the study to make, all by default; may be repeated. A wrong name lists them."
)
_ARMS = flags.DEFINE_multi_string(
    "arm", None, "Arm to train beside the reference, all by default; may be repeated. The table leaves out the others."
)
_SEEDS = flags.DEFINE_integer(
    "num_seeds", None, "Seeds that arms are compared on, mostly 10 by default, 2 with --quick.", lower_bound=2
)
_TUNING_SEEDS = flags.DEFINE_integer(
    "num_tuning_seeds",
    None,
    "Seeds that grids are searched with, mostly 2 by default, 1 with --quick.",
    lower_bound=1,
    upper_bound=FIRST_SEED,
)
_QUICK = flags.DEFINE_bool("quick", False, "A reduced form on digits, in minutes: it shows that all works, no more.")
_FROM_NUMBERS = flags.DEFINE_bool(
    "from_numbers", False, "Make the page anew from the numbers that lie beside it; nothing is trained. Needs --write."
)
_JOBS = flags.DEFINE_integer("jobs", 1, "Processes that share the runs and the cores.", lower_bound=1)
_HELPER = flags.DEFINE_integer(
    "helper", 0, "Set by --jobs: which of the further processes this is, that train and make no tables.", lower_bound=0
)


def main(argv: list[str]) -> None:
    """Makes the comparisons, and writes the numbers after each."""
    del argv
    cores = set[int]()
    with told_in_a_line(ValueError):  # before hours of training, not after
        _check_flags()
        if _JOBS.value > 1:
            if not _HELPER.value:
                jobs.require_locks(studies_folder())
            cores = jobs.take_share(_HELPER.value, _JOBS.value)
        known = _read_numbers()
        if _FROM_NUMBERS.value:
            if not known:
                raise ValueError(f"{_path_of_numbers()} has no numbers to make a page of; run the study first")
            _publish({})
            return
        comparisons = [_reduced(comparison) if _QUICK.value else comparison for comparison in _chosen()]
        for comparison in comparisons if page.WRITE.value else ():
            _require_whole(comparison, known)
        load = functools.lru_cache(maxsize=8)(load_dataset)  # many comparisons are on the same data
        for comparison in comparisons:
            _check(comparison, load)
    with told_in_a_line():
        if _HELPER.value:
            jobs.end_with_parent()
            _make_all(comparisons)
            return
        with jobs.helpers(sys.argv[1:], _JOBS.value, studies_folder(), cores):
            _make_all(comparisons)


def _make_all(comparisons: list[Comparison]) -> None:
    """Makes one comparison after another; one that waits for other processes is passed over until they are done."""
    waiting, told = {comparison.name for comparison in comparisons}, set[str]()

    def say(text: str) -> None:
        if text not in told:  # at an earlier pass
            told.add(text)
            Console(stderr=True).print(text, markup=False)

    def make(comparison: Comparison) -> None:
        tuning_seeds, seeds = _seeds_of(comparison)
        numbers = compare_arms(comparison, studies_folder(), tuning_seeds=tuning_seeds, seeds=seeds, say=say)
        if not _HELPER.value:
            _show(comparison, comparisons, _publish({comparison.name: _described(comparison, numbers)}))
        waiting.remove(comparison.name)

    while waiting:
        try:
            do_free(make, [comparison for comparison in comparisons if comparison.name in waiting])
        except BusyError:
            say("Other processes train the runs that are left; this one waits for them.")
            time.sleep(POLL)


def _check_flags() -> None:
    if page.WRITE.value and _QUICK.value:
        raise ValueError("--quick shows that all works and makes no results for a page; leave out --write")
    if _FROM_NUMBERS.value and not page.WRITE.value:
        raise ValueError("--from_numbers makes a page anew; name it, --write=docs/results.md say")
    if _FROM_NUMBERS.value and (_COMPARISONS.value or _ARMS.value):
        raise ValueError("--from_numbers makes all tables of the page; leave out --comparison and --arm")
    page.require_section(_name(), in_parts=True)


def _name() -> str:
    """Of the study that the flags ask for."""
    return _STUDY.value or ""


def _study() -> Study:
    return STUDIES[_name()]


def _chosen() -> list[Comparison]:
    known = {comparison.name: comparison for comparison in _study().comparisons()}
    chosen = [lookup("comparison", known, name) for name in dict.fromkeys(_COMPARISONS.value or known)]
    return [comparison.select(_ARMS.value) for comparison in chosen] if _ARMS.value else chosen


def _require_whole(comparison: Comparison, known: Mapping[str, Any]) -> None:
    """Raises ValueError where arms or seeds that the page has would be lost from it."""
    published = known.get(comparison.name)
    if published is None:
        return
    (whole,) = (each for each in _study().comparisons() if each.name == comparison.name)
    left_out = {arm.name for arm in whole.arms} - {arm.name for arm in comparison.arms}
    lost = [*sorted(left_out & set(published["arms"]))]
    lost += [f"seed {seed}" for seed in published["seeds"] if seed not in _seeds_of(comparison)[1]]
    if lost:
        raise ValueError(
            f"{_path_of_numbers()} has {', '.join(lost[:5])}{', ...' if lost[5:] else ''} of {comparison.name}, which "
            "--arm or --num_seeds leaves out here and the page would lose; add them, or leave out --write"
        )


def _reduced(comparison: Comparison) -> Comparison:
    """With fewer steps and the first two points of every grid, and on digits where data are larger."""
    config = make_config(comparison, comparison.arms[0], {}, range(1))
    where = "" if _is_small(config) else "on digits, "
    title = f"{comparison.title} (quick form: {where}{QUICK['num_steps']} steps)"
    return comparison._replace(
        name=f"{comparison.name}{QUICK_SUFFIX}",
        title=title,
        arms=tuple(_reduced_arm(arm) for arm in comparison.arms),
        overrides=_reduced_overrides(config, comparison.overrides),
    )


def _reduced_arm(arm: Arm) -> Arm:
    source = arm.source
    if source is not None:
        config = make_source_config(source, range(1))
        source = source._replace(overrides=_reduced_overrides(config, source.overrides))
    return arm._replace(grid=arm.grid[:2], source=source)


def _reduced_overrides(config: TrainConfig, overrides: Overrides) -> Overrides:
    small = {} if _is_small(config) else dict(DIGITS)
    if config.model.name == "logistic":
        small.pop("model.name", None)  # it takes digits as they are
    if config.dataset.valid_examples:
        small |= {"dataset.valid_examples": 200}
    return {**overrides, **QUICK, **small}


def _is_small(config: TrainConfig) -> bool:
    return config.dataset.name in ("digits", "diabetes")


def _check(comparison: Comparison, load: Callable[[DatasetConfig], Dataset]) -> None:
    """Every configuration, and that the data, which `load` gives, are there and enough for a batch."""
    seeds, first = range(1), comparison.arms[0]
    for arm in comparison.arms:
        for point in arm.grid:
            make_config(comparison, arm, point, seeds)
    sources = [make_source_config(arm.source, seeds) for arm in comparison.arms if arm.source is not None]
    for config in {source.dataset: source for source in sources}.values():
        make_setup(config, load(config.dataset))
    for for_tuning in (False, True):
        config = make_config(comparison, first, first.grid[0], seeds, for_tuning=for_tuning)
        make_setup(config, load(config.dataset))


def _described(comparison: Comparison, numbers: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a comparison, with how they were made and what else the study measures."""
    workdir, metric = studies_folder(), make_config(comparison, comparison.arms[0], {}, range(1)).metric
    made = {"command": command_line("study"), "page": _page(), "machine": _machine_of(numbers, workdir)}
    numbers = {**made, "metric": metric, **numbers}
    return numbers | _study().measure(numbers, workdir)


def _publish(made: Mapping[str, Any]) -> dict[str, Any]:
    """Adds numbers of comparisons to those there are, writes them and, where `--write` says, the page; returns all."""
    with page.publishing(_path_of_numbers()):
        known = _tested(page.rounded(_read_numbers() | dict(made)))
        known = page.write_numbers(_path_of_numbers(), known)
        if page.WRITE.value:
            _write_page(Path(page.WRITE.value), known)
    return known


def _tested(known: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers with tests made anew from the errors, of the pairs that the study has now."""
    pairs = {comparison.name: comparison.pairs for comparison in _study().comparisons()}
    tested = {}
    for name, numbers in known.items():
        there = tuple((pair["arm"], pair["against"]) for pair in numbers["pairs"])  # in a quick form
        tested[name] = numbers | paired_tests(numbers["arms"], numbers["reference"], pairs.get(name, there))
    return tested


def _show(comparison: Comparison, comparisons: list[Comparison], known: dict[str, Any]) -> None:
    """Draws and prints what the study shows of a comparison."""
    for part in _study().parts(comparisons, known):
        if comparison.name in part.comparisons:
            save_figure(part.figure, studies_folder() / f"{part.name}.png")
            if part.tables:
                print(_section(part, known, {}), page.COLUMNS, sep="\n\n", end="\n\n")


def _machine_of(numbers: Mapping[str, Any], workdir: Path) -> dict[str, Any]:
    """What the runs of a comparison were trained on, which may be from before, or from elsewhere."""
    runs = [workdir / RUNS / arm["run"] for arm in numbers["arms"].values() if "test" in arm]
    here = describe_machine(PACKAGES)
    machines = [read_summary(run)["environment"] for run in runs] or [here]
    return page.join_machines(
        [{name: found[name] for name in (*here, "device") if name in found} for found in machines]
    )


def _seeds_of(comparison: Comparison) -> tuple[range, range]:
    """Seeds that grids are searched with, and those that arms are compared on."""
    usual = (2, 1) if _QUICK.value else (comparison.num_seeds, comparison.num_tuning_seeds)
    num_seeds, num_tuning_seeds = _SEEDS.value or usual[0], _TUNING_SEEDS.value or usual[1]
    return range(num_tuning_seeds), range(FIRST_SEED, FIRST_SEED + num_seeds)


def _read_numbers() -> dict[str, Any]:
    """The numbers there are of the study, by comparison."""
    path = _path_of_numbers()
    try:
        return dict(json.loads(path.read_text())) if path.exists() else {}
    except (OSError, TypeError, ValueError) as error:
        raise WorkdirError(f"{path} cannot be read ({error}); move it away, the runs it was made of stay") from error


def _page() -> str | None:
    """The page that `--write` names, if it names one: the comparisons of a study may be spread over several."""
    return Path(page.WRITE.value).name if page.WRITE.value else None


def _path_of_numbers() -> Path:
    return page.path_of_numbers(_name(), studies_folder())


def _write_page(target: Path, known: dict[str, Any]) -> None:
    """Puts all parts of the study that were made for this page into its section there, with their pictures."""
    there = {name: numbers for name, numbers in known.items() if numbers["page"] == target.name}
    study, made = _study(), {}
    for part in study.parts(study.comparisons(), there):
        picture = page.folder_of_pictures(target) / f"{part.name}.png"
        save_figure(part.figure, picture)
        made[part.name] = _section(part, there, {part.title: f"{picture.relative_to(target.parent)}"})
    page.renew(target, page.replace_parts, _name(), made)


def _section(part: Part, known: dict[str, Any], pictures: Mapping[str, str]) -> str:
    made = [known[name] for name in part.comparisons]
    commands = "\n".join(dict.fromkeys(numbers["command"] for numbers in made))
    machine = page.join_machines([numbers["machine"] for numbers in made])
    return f"### {part.title}\n\n{page.render_section(commands, machine, part.tables, pictures)}"


if __name__ == "__main__":
    flags.mark_flag_as_required("study")
    app.run(main, flags_parser=functools.partial(parse_flags, unused=("config",)))
