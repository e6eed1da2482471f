"""A comparison as a table and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from adalfl_jax.analysis.figures import COLORS, STYLE, is_error_rate
from experiments.study.arms import Comparison, field_words
from experiments.tables import Table, show_difference, show_mean, show_number, show_p_value, show_point

HIGHLIGHT = COLORS["adalfl"]  # of what a figure is about


class Part(NamedTuple):
    """What a study shows of some of its comparisons: a picture, and mostly tables."""

    name: str  # of the picture's file
    title: str  # of the picture
    comparisons: tuple[str, ...]  # names of those it is made of
    figure: Figure
    tables: tuple[Table, ...] = ()


def scale_of(metric: str) -> int:
    """The factor that a metric is shown with: error rates are shown in percent."""
    return 100 if is_error_rate(metric) else 1


def comparison_parts(comparisons: Sequence[Comparison], known: Mapping[str, Any]) -> list[Part]:
    """Tables and the learning curves of each comparison there are numbers of."""
    parts = []
    for name in (comparison.name for comparison in comparisons if comparison.name in known):
        numbers = known[name]
        tables = (comparison_table(numbers, numbers["metric"]), *pairs_table(numbers))
        parts.append(Part(name, numbers["title"], (name,), curves_figure(numbers), tables))
    return parts


def comparison_table(numbers: dict[str, Any], metric: str) -> Table:
    """One row an arm, with its difference from the reference."""
    scale = scale_of(metric)
    name, unit = metric.replace("_", " "), " %" if scale == 100 else ""
    reference = numbers["arms"][numbers["reference"]]["title"]
    rows = [{**arm, "difference": numbers["differences"].get(name)} for name, arm in numbers["arms"].items()]
    return Table(
        numbers["title"],
        {
            "arm": lambda row: row["title"],
            "tuned": lambda row: show_point(row["chosen"], row["tuning"], field_words),
            f"test {name},{unit}" if unit else f"test {name}": lambda row: (
                "diverged" if "diverged" in row else show_mean(row["test"], scale)
            ),
            "worst": lambda row: show_number(scale * max(row["test"]["per_seed"]), ".2f") if "test" in row else "",
            f"{reference} minus it": lambda row: show_difference(row["difference"], scale),
            "p": lambda row: show_p_value(row["difference"]),
            "by ranks": lambda row: show_p_value((row["difference"] or {}).get("signed_rank")),
            "effect": lambda row: show_number((row["difference"] or {}).get("effect_size"), "+.1f"),
            "steps": lambda row: show_number(row.get("steps_to_target"), "d"),
            "seconds": lambda row: show_number(row.get("seconds_to_target"), ".0f"),
            "flat": lambda row: show_number(row.get("flat_share"), ".0%"),
        },
        rows,
        (_note(numbers, name, scale, unit),),
    )


def pairs_table(numbers: dict[str, Any]) -> tuple[Table, ...]:
    """One row for each further pair of arms; no table without any."""
    scale = scale_of(numbers["metric"])
    titles = {name: arm["title"] for name, arm in numbers["arms"].items()}
    table = Table(
        f"Further differences: {numbers['title']}",
        {
            "arm": lambda row: titles[row["arm"]],
            "another": lambda row: titles[row["against"]],
            "arm minus another": lambda row: show_difference(row, scale),
            "p": show_p_value,
            "by ranks": lambda row: show_p_value(row["signed_rank"]),
        },
        numbers["pairs"],
    )
    return (table,) if numbers["pairs"] else ()


def curves_figure(numbers: dict[str, Any]) -> Figure:
    """Mean test metric of every arm through training; the legend has them as they end, the highest first."""
    scale = scale_of(numbers["metric"])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.2, 4.2), layout="constrained")
        axes = figure.subplots()
        colors = matplotlib.colormaps["tab20"]
        arms = {name: arm for name, arm in numbers["arms"].items() if "curve" in arm}
        curves = {name: scale * np.mean(arm["curve"], axis=0) for name, arm in arms.items()}
        for index, name in enumerate(sorted(curves, key=lambda name: -curves[name][-1])):
            is_reference = name == numbers["reference"]
            axes.plot(
                arms[name]["steps"][1:],  # a fresh model's error would flatten all that follows
                curves[name][1:],
                label=arms[name]["title"],
                color=HIGHLIGHT if is_reference else colors(index % 20),
                linestyle="-" if index < 20 else "--",  # there are twenty colours
                linewidth=2.4 if is_reference else 1.2,
                zorder=3 if is_reference else 2,
            )
        label = f"test {numbers['metric'].replace('_', ' ')}{', %' if scale == 100 else ''}"
        axes.set(title=numbers["title"], xlabel="training step", ylabel=label, yscale="log")
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
        figure.legend(loc="outside right center", fontsize=8)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG."""
    with matplotlib.rc_context(STYLE):
        figure.savefig(path, bbox_inches="tight")


def _note(numbers: dict[str, Any], name: str, scale: int, unit: str) -> str:
    seeds, tuned, target = numbers["seeds"], numbers["tuning_seeds"], numbers["target"]
    is_tuned = any(arm["tuning"] for arm in numbers["arms"].values())
    tuning = f"; tuned with seeds {tuned[0]} to {tuned[-1]}" if is_tuned else ""
    note = f"Seeds {seeds[0]} to {seeds[-1]}{tuning}."
    if target is not None:
        note += f" Steps and seconds to a mean test {name} of {scale * target:.2f}{unit}, where the first arm ends."
    return note


def show_pair(pair: dict[str, Any], scale: float) -> str:
    """The difference of a further pair of arms, and its p-values."""
    by_ranks = show_p_value(pair["signed_rank"])
    return f"{show_difference(pair, scale)}, p = {show_p_value(pair)}" + (f" ({by_ranks} by ranks)" if by_ranks else "")
