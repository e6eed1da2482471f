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
  weighting       Meta-Weight-Net and Learning to Reweight, decayed, as rivals of noisy_labels

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
import sys
import time
from collections.abc import Callable

from absl import app, flags
from rich.console import Console

from adalfl_jax.data import Dataset
from adalfl_jax.registry import lookup
from adalfl_jax.training.files import BusyError
from adalfl_jax.training.sections import DatasetConfig
from adalfl_jax.training.setup import load_dataset, make_setup
from experiments import page
from experiments.launch import parse_flags, studies_folder, told_in_a_line
from experiments.study import jobs, publish
from experiments.study.arms import Comparison, make_config, make_source_config
from experiments.study.compare import compare_arms, do_free
from experiments.study.quick import reduce_comparison
from experiments.study.studies import STUDIES

FIRST_SEED = 100  # of the seeds that are compared; tuning takes those from 0
POLL = 2  # seconds between looks at what other processes have left

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
        if _FROM_NUMBERS.value:
            publish.publish_again(_name())
            return
        publish.read_numbers(_name())  # for its errors
        comparisons = [reduce_comparison(comparison) if _QUICK.value else comparison for comparison in _chosen()]
        for comparison in comparisons if page.WRITE.value else ():
            publish.require_whole(_name(), comparison, _seeds_of(comparison)[1])
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
            known = publish.publish(_name(), comparison, numbers)
            publish.show(_name(), comparison, comparisons, known)
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


def _chosen() -> list[Comparison]:
    known = {comparison.name: comparison for comparison in STUDIES[_name()].comparisons()}
    chosen = [lookup("comparison", known, name) for name in dict.fromkeys(_COMPARISONS.value or known)]
    return [comparison.select(_ARMS.value) for comparison in chosen] if _ARMS.value else chosen


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


def _seeds_of(comparison: Comparison) -> tuple[range, range]:
    """Seeds that grids are searched with, and those that arms are compared on."""
    usual = (2, 1) if _QUICK.value else (comparison.num_seeds, comparison.num_tuning_seeds)
    num_seeds, num_tuning_seeds = _SEEDS.value or usual[0], _TUNING_SEEDS.value or usual[1]
    return range(num_tuning_seeds), range(FIRST_SEED, FIRST_SEED + num_seeds)


if __name__ == "__main__":
    flags.mark_flag_as_required("study")
    app.run(main, flags_parser=functools.partial(parse_flags, unused=("config",)))
