"""What a study consists of: comparisons, each of arms, each a configuration with some fields set and some tuned."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from adalfl_jax.analysis.record import flatten
from adalfl_jax.registry import require_known
from adalfl_jax.training import TrainConfig

HELD_IN = 0.5  # share of a validation split that arms are trained on while they are tuned
QUICK_SUFFIX = "_quick"  # the end of the names of comparisons in their quick form
Overrides = Mapping[str, Any]  # dotted name of a field -> value


class Source(NamedTuple):
    """A run of ML3 or AdaLFL, whose seeds leave the losses they learned to those of an arm."""

    config: str  # NAME of configs/NAME.py
    overrides: Overrides


class Arm(NamedTuple):
    """One way of training.

    Where the grid has more than one point, the point with the best mean validation metric of the tuning seeds is
    taken, of several that tie the first, and trained anew on the seeds of the comparison.
    """

    name: str
    title: str
    overrides: Overrides = MappingProxyType({})
    grid: tuple[Overrides, ...] = (MappingProxyType({}),)
    early_stopping: bool = False  # whether a seed is judged where its validation metric was best, not at the end
    source: Source | None = None  # where phi starts, if it was learned elsewhere


class Comparison(NamedTuple):
    """Arms on one problem, seed for seed."""

    name: str
    title: str
    config: str  # NAME of configs/NAME.py
    overrides: Overrides
    arms: tuple[Arm, ...]
    reference: str  # the arm whose difference from each other arm is tested
    pairs: tuple[tuple[str, str], ...] = ()  # arms, and others that they are tested against too
    num_seeds: int = 10  # that the arms are compared on
    num_tuning_seeds: int = 2  # that grids are searched with

    def select(self, names: Iterable[str]) -> Comparison:
        """The comparison with some of its arms, the reference among them.

        Raises:
          ValueError: it has no arm of such a name.
        """
        wanted = {*names, self.reference}
        for name in wanted:
            require_known(f"arm of {self.name}", (arm.name for arm in self.arms), name)
        pairs = tuple(pair for pair in self.pairs if wanted.issuperset(pair))
        return self._replace(arms=tuple(arm for arm in self.arms if arm.name in wanted), pairs=pairs)


def suffix_of(comparisons: Iterable[Comparison]) -> str:
    """`QUICK_SUFFIX` where comparisons are quick forms, and nothing otherwise."""
    return QUICK_SUFFIX if any(comparison.name.endswith(QUICK_SUFFIX) for comparison in comparisons) else ""


def fields(**values: Any) -> Overrides:
    """Overrides by keyword: `inner__learning_rate` stands for the field "inner.learning_rate"."""
    return {name.replace("__", "."): value for name, value in values.items()}


def grid(**values: Iterable[Any]) -> tuple[Overrides, ...]:
    """Every combination of values of `fields`."""
    names = fields(**values)
    return tuple(dict(zip(names, point, strict=True)) for point in itertools.product(*values.values()))


def make_config(
    comparison: Comparison, arm: Arm, point: Overrides, seeds: range, *, for_tuning: bool = False
) -> TrainConfig:
    """The configuration of an arm at a point of its grid.

    For tuning half of a validation split that arms train on is held out: an error on what was trained on says nothing.

    Raises:
      ConfigError: an override that is no field, or a value out of its range.
    """
    overrides = {**comparison.overrides, **arm.overrides, **point}
    return _build(comparison.config, overrides, seeds, for_tuning=for_tuning)


def make_source_config(source: Source, seeds: range, *, for_tuning: bool = False) -> TrainConfig:
    """The configuration of a run that learned losses come from, for the same seeds."""
    return _build(source.config, source.overrides, seeds, for_tuning=for_tuning)


def _build(name: str, overrides: Overrides, seeds: range, *, for_tuning: bool) -> TrainConfig:
    config = importlib.import_module(f"configs.{name}").get_config()
    with config.unlocked():
        config.update_from_flattened_dict(dict(overrides))
    if for_tuning and config.outer.split == "valid":
        config.outer.split_fraction = HELD_IN
    config.update(seed=seeds.start, num_seeds=len(seeds), methods=(config.method,))
    return TrainConfig.from_mapping(config)


def settings_of(comparison: Comparison, arm: Arm, point: Overrides) -> dict[str, Any]:
    """What the configuration of an arm has other than `configs/default.py`, as JSON holds it; seeds aside.

    Returns:
      Dotted names of fields and their values; under "source" those of the run that its learned losses come from.
    """
    made = {"": make_config(comparison, arm, point, range(1))}
    if arm.source is not None:
        made["source."] = make_source_config(arm.source, range(1))
    # "methods" repeats the method.
    usual = flatten(_build("default", {}, range(1), for_tuning=False).to_dict())
    return {
        f"{prefix}{name}": value
        for prefix, config in made.items()
        for name, value in flatten(config.to_dict()).items()
        if name != "methods" and value != usual.get(name)
    }


def field_words(name: str) -> str:
    """A field as a reader is shown it: "inner.learning_rate" is "learning rate", and that of phi is the outer one."""
    return name.removeprefix("inner.").replace(".", " ").replace("_", " ")
