"""Losses learned elsewhere: on other data for the same model, or for other models on the same data.

What is handed on is what ML3 learned, seed for seed. It trains the new model as it is, or AdaLFL learns it further from
there. It is tested against the loss that was learned at home and went the same way, and against the tuned task loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from adalfl_jax.analysis.figures import COLORS, STYLE
from experiments.study.arms import Arm, Comparison, Overrides, Source, grid, suffix_of
from experiments.study.tables import Part, scale_of
from experiments.tables import SIGNIFICANT, Row, Table, either, is_level, show_mean

TASK_LOSS = "constant"  # the arm
MODES: dict[str, tuple[str, Overrides]] = {
    "frozen": ("as it is", {"method": "ml3"}),
    "adapted": ("learned further", {"method": "adalfl"}),
}
SETTING: Overrides = {
    "batch_size": 100,
    "outer.learning_rate": 3e-4,
    "model.initialization": "he_glorot",  # of all, since the scale of a learned loss is that of the initial weights
}


class Problem(NamedTuple):
    """Data and a model; losses are exchanged where one of them is the same."""

    data: str
    model: str
    config: str
    overrides: Overrides = MappingProxyType({})

    @property
    def title(self) -> str:
        return f"{self.data}, {self.model}"


PROBLEMS = {
    "mnist_logistic": Problem("MNIST", "logistic regression", "mnist_logistic", {"num_steps": 5000, "eval_every": 250}),
    "mnist_mlp": Problem("MNIST", "MLP", "mnist_mlp", {"model.hidden_sizes": (256,)}),
    "mnist_lenet5": Problem("MNIST", "LeNet-5", "mnist_lenet5", {"num_steps": 2000, "eval_every": 200}),
    "fashion_mnist_mlp": Problem(
        "Fashion-MNIST",
        "MLP",
        "fashion_mnist_mlp",
        {"model.hidden_sizes": (256,), "num_steps": 5000, "eval_every": 250},
    ),
    "digits_mlp": Problem("digits", "MLP", "digits_mlp", {"model.hidden_sizes": (128,)}),
}


def comparisons() -> list[Comparison]:
    """One for each problem that losses are brought to."""
    return [_comparison(name, problem) for name, problem in PROBLEMS.items()]


def _comparison(name: str, problem: Problem) -> Comparison:
    arms = [
        Arm("task_loss", "task loss", {"method": "task_loss"}),
        Arm(TASK_LOSS, "task loss, tuned", {"method": "task_loss"}, grid(inner__learning_rate=(0.01, 0.03, 0.1, 0.3))),
    ]
    pairs = []
    for mode, (title, overrides) in MODES.items():
        own = Arm(f"own_{mode}", f"its own, {title}", overrides)
        foreign = [
            Arm(
                f"{source_name}_{mode}",
                f"{source.title}, {title}",
                {**overrides, "offline.num_steps": 0},
                source=Source(source.config, {**SETTING, **source.overrides, "method": "ml3"}),
            )
            for source_name, source in PROBLEMS.items()
            if source != problem and (source.data == problem.data or source.model == problem.model)
        ]
        arms += [own, *foreign]
        pairs += [(arm.name, own.name) for arm in foreign]
        pairs += [(arm.name, TASK_LOSS) for arm in (own, *foreign)]
    overrides = {**SETTING, **problem.overrides}
    return Comparison(
        f"transfer_{name}", problem.title, problem.config, overrides, tuple(arms), "own_adapted", tuple(pairs)
    )


def parts(comparisons: Sequence[Comparison], known: Mapping[str, Any]) -> list[Part]:
    """The matrix of what was learned where and brought where."""
    targets = [comparison for comparison in comparisons if comparison.name in known]
    arms = {arm.name: arm for comparison in targets for arm in comparison.arms}
    names = tuple(comparison.name for comparison in targets)
    numbers = [known[name] for name in names]
    trained = {name for target in numbers for name in target["arms"]}
    rows = ["task_loss", TASK_LOSS, *(f"{whose}_{mode}" for mode in MODES for whose in ("own", *PROBLEMS))]
    titles = {name: arms[name].title for name in rows if name in arms and name in trained}
    title = "Losses learned here and elsewhere"
    return [
        Part(f"transfer{suffix_of(targets)}", title, names, _figure(titles, numbers), (_table(title, titles, numbers),))
    ]


def _table(title: str, titles: Mapping[str, str], targets: list[dict[str, Any]]) -> Table:
    rows = [{"title": text, "arm": name} for name, text in titles.items()]

    def column(numbers: dict[str, Any]):
        return lambda row: _cell(numbers, row["arm"])

    columns = {"the loss of": lambda row: row["title"]}
    columns |= {f"on {numbers['title']}": column(numbers) for numbers in targets}
    seeds = either(f"{numbers['seeds'][0]} to {numbers['seeds'][-1]}" for numbers in targets)
    note = (
        f"Mean and standard deviation of the test error rate, %, over seeds {seeds}. In brackets are "
        "the differences from its own loss that went the same way and from the tuned task loss: < lower, > higher, = "
        f"none at p < {SIGNIFICANT}, of paired t-tests, adjusted for their number in a column (Benjamini and "
        "Hochberg)."
    )
    return Table(title, columns, rows, (note,))


def _cell(numbers: dict[str, Any], name: str) -> str:
    arm = numbers["arms"].get(name)
    if arm is None:
        return ""
    if "test" not in arm:
        return "diverged"
    scale = scale_of(numbers["metric"])
    signs = [
        f"{_sign(pair)} {'task' if pair['against'] == TASK_LOSS else 'own'}"
        for pair in numbers["pairs"]
        if pair["arm"] == name
    ]
    return show_mean(arm["test"], scale) + (f" ({', '.join(signs)})" if signs else "")


def _sign(test: Row) -> str:
    if is_level(test):
        return "="
    return "<" if test["mean_difference"] < 0 else ">"


def _figure(titles: Mapping[str, str], targets: list[dict[str, Any]]) -> Figure:
    """A panel for each target: every seed, and the mean, of every loss."""
    heights = {name: -index for index, name in enumerate(titles)}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.8 + 2.1 * len(targets), 0.9 + 0.24 * len(titles)), layout="constrained")
        panels = np.atleast_1d(figure.subplots(1, len(targets), sharey=True))
        for axes, numbers in zip(panels, targets, strict=True):
            scale = scale_of(numbers["metric"])
            for name in (name for name in titles if "test" in numbers["arms"].get(name, {})):
                values = scale * np.array(numbers["arms"][name]["test"]["per_seed"])
                is_own = name.startswith("own_")
                color = COLORS["adalfl" if is_own else "task_loss" if name in ("task_loss", TASK_LOSS) else "ml3"]
                axes.plot(values, np.full(len(values), heights[name]), ".", color=color, alpha=0.35, markersize=4)
                axes.plot(values.mean(), heights[name], "D", color=color, markersize=5)
            axes.set_title(numbers["title"].partition(" (")[0].replace(", ", ",\n"), fontsize=9)
            axes.set_xlabel(f"test {numbers['metric'].replace('_', ' ')}{', %' if scale == 100 else ''}")
            axes.grid(axis="y", visible=False)
        panels[0].set_yticks(list(heights.values()), list(titles.values()), fontsize=8)
    return figure
