"""What a learned loss does while a model trains: rate, direction, flatness, shape, and what of it is label smoothing.

Made of the runs of `clean_labels`: after that study, in the same workdir and with as many seeds, nothing is trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from adalfl_jax.analysis.figures import COLORS, STYLE, prediction_label
from adalfl_jax.analysis.measures import flat_share, implied_smoothing
from adalfl_jax.analysis.record import RunRecord
from adalfl_jax.data import load_spec
from adalfl_jax.training import TrainConfig
from adalfl_jax.training.optimizers import learning_rate_schedule
from adalfl_jax.training.outputs import read_record
from adalfl_jax.training.workdir import read_config
from experiments.study import clean_labels
from experiments.study.arms import Comparison
from experiments.study.runs import RUNS
from experiments.study.tables import Part
from experiments.tables import Table

HAND_MADE = ("constant", "linear", "cosine")  # arms of clean_labels
LEARNED = ("ml3", "adalfl")
QUANTITIES = {
    "implicit_learning_rate": "implicit learning rate",
    "gradient_cosine": "cosine to the task gradient",
    "flat_share": "flat, share of the range",
    "flat_output_share": "flat, share of outputs that occur",
    "smoothing": "label smoothing",
}
TIMES = {"start": 0.0, "a quarter": 0.25, "half": 0.5, "end": 1.0}  # share of the training steps


def comparisons() -> list[Comparison]:
    """Those of `clean_labels` whose outputs are classes, without the arms that are not looked at."""
    return [
        comparison.select((*HAND_MADE, *LEARNED))._replace(name=f"behaviour_{comparison.name}")
        for comparison in clean_labels.comparisons()
        if comparison.name != "diabetes_mlp"
    ]


def measure(numbers: Mapping[str, Any], workdir: Path) -> dict[str, Any]:
    """What the runs of a comparison say, as JSON holds it: by arm each quantity `[S][T]` and the shapes; a schedule."""
    arms = numbers["arms"]
    finished = {name: workdir / RUNS / arm["run"] for name, arm in arms.items() if "test" in arm}
    learned = {name: _quantities(read_record(finished[name])) for name in LEARNED if name in finished}
    made = [name for name in HAND_MADE if name in finished]
    best = min(made, key=lambda name: arms[name]["valid"]["mean"], default=None)
    schedule = None if best is None else _schedule(read_config(finished[best])[1])
    return {"behaviour": learned, "best_hand_made": best, "best_schedule": schedule}


def _quantities(record: RunRecord) -> dict[str, Any]:
    (method,) = record.summary["methods"]
    shapes, predictions = record.shapes[f"{method}/values"], record.shapes["predictions"]  # [S, T, 2, P]
    kind = record.config["learned_loss"]["predictions"]
    measured = {name: record.series(method, name) for name in QUANTITIES}
    found = {name: series.values for name, series in measured.items() if series is not None}
    found["flat_share"] = flat_share(shapes)
    num_outputs = load_spec(record.config["dataset"]["name"]).num_outputs
    found["smoothing"] = implied_smoothing(predictions, shapes, num_outputs, of_logarithms=kind == "log_probabilities")
    return {
        "steps": record.shapes[f"{method}/steps"].tolist(),
        "label": prediction_label(kind),
        "predictions": predictions.tolist(),
        "shapes": shapes.mean(axis=0).tolist(),  # [T, 2, P]
        "quantities": {name: values.tolist() for name, values in found.items()},
    }


def _schedule(config: TrainConfig) -> dict[str, list[float]]:
    """The learning rate of a run on the task loss at each of its evaluations."""
    steps = np.minimum(np.arange(0, config.num_steps + config.eval_every, config.eval_every), config.num_steps)
    share = np.broadcast_to(np.asarray(learning_rate_schedule(config)(jnp.asarray(steps))), steps.shape)
    return {"steps": steps.tolist(), "rates": (config.inner.learning_rate * share).tolist()}


def parts(comparisons: Sequence[Comparison], known: Mapping[str, Any]) -> list[Part]:
    """A table and small multiples for each comparison there are numbers of."""
    made = []
    for name in (comparison.name for comparison in comparisons if comparison.name in known):
        numbers = known[name]
        if numbers["behaviour"]:
            title = f"{numbers['title']}: what the learned loss does"
            made.append(Part(name, title, (name,), _figure(title, numbers), (_table(title, numbers),)))
    return made


def _table(title: str, numbers: Mapping[str, Any]) -> Table:
    rows = []
    if numbers["best_schedule"] is not None:
        rates = numbers["best_schedule"]["rates"]
        cells = [f"{rates[_at(share, len(rates))]:.3g}" for share in TIMES.values()]
        rows.append({"quantity": "learning rate", "arm": numbers["best_hand_made"], "cells": cells})
    for quantity, words in QUANTITIES.items():
        for arm, found in numbers["behaviour"].items():
            values = found["quantities"].get(quantity)
            cells = (
                [""] * len(TIMES) if values is None else [_cell(np.array(values), share) for share in TIMES.values()]
            )
            rows.append({"quantity": words, "arm": arm, "cells": cells})
    columns = {"": lambda row: row["quantity"], "arm": lambda row: numbers["arms"][row["arm"]]["title"]}
    columns |= {time: lambda row, index=index: row["cells"][index] for index, time in enumerate(TIMES)}
    seeds = numbers["seeds"]
    note = (
        f"Mean and standard deviation over seeds {seeds[0]} to {seeds[-1]}, at shares of the training steps. The "
        "implicit learning rate is the one at which a step on the task loss goes as far along its gradient; above it "
        "stands the rate of the task loss with the lowest validation error. A loss is flat where its slope is below a "
        "hundredth of its steepest: of all predictions, and of those on the validation split. Its label smoothing is "
        "the one whose cross-entropy is least at the same outputs."
    )
    return Table(title, columns, rows, (note,))


def _at(share: float, num_times: int) -> int:
    return round(share * (num_times - 1))


def _cell(values: np.ndarray, share: float) -> str:  # [S, T]
    chosen = values[:, _at(share, values.shape[1])]
    return f"{chosen.mean():.3g}" + (f" ± {chosen.std(ddof=1):.2g}" if len(chosen) > 1 else "")


def _figure(title: str, numbers: Mapping[str, Any]) -> Figure:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 5.6), layout="constrained")
        panels = figure.subplots(2, 3)
        for axes, quantity in zip(
            panels.flat, ("implicit_learning_rate", "gradient_cosine", "flat_output_share"), strict=False
        ):
            _draw_quantity(axes, numbers, quantity)
        _draw_quantity(panels[1, 2], numbers, "smoothing")
        if (schedule := numbers["best_schedule"]) is not None:
            label = numbers["arms"][numbers["best_hand_made"]]["title"]
            panels[0, 0].plot(schedule["steps"], schedule["rates"], "--", color="#374151", label=label)
        panels[0, 0].set_yscale("symlog", linthresh=1e-4)  # a seed's may be negative
        _draw_shapes(figure, panels[1, :2], numbers)
        handles = {label: handle for handle, label in zip(*panels[0, 0].get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
        figure.suptitle(title, x=0.01, ha="left", weight="bold", fontsize=11)
    return figure


def _draw_quantity(axes: Axes, numbers: Mapping[str, Any], quantity: str) -> None:
    axes.set(title=QUANTITIES[quantity].capitalize(), xlabel="training step")
    for arm, found in numbers["behaviour"].items():
        if quantity in found["quantities"]:
            values = np.array(found["quantities"][quantity])  # [S, T]
            mean, color = values.mean(axis=0), COLORS[arm]
            axes.plot(found["steps"], mean, color=color, label=numbers["arms"][arm]["title"])
            axes.fill_between(
                found["steps"], values.min(axis=0), values.max(axis=0), color=color, alpha=0.15, linewidth=0
            )


def _draw_shapes(figure: Figure, panels: Sequence[Axes], numbers: Mapping[str, Any]) -> None:
    """l_phi of the arm whose loss moves, the mean over seeds."""
    found = numbers["behaviour"].get("adalfl")
    if found is None:
        return
    colors = ScalarMappable(Normalize(0, found["steps"][-1]), "viridis_r")
    for target, axes in enumerate(panels):
        for step, shape in zip(found["steps"], found["shapes"], strict=True):
            axes.plot(found["predictions"], shape[target], color=colors.to_rgba(step), linewidth=1)
        axes.set(title=f"AdaLFL's loss of target {target}", xlabel=found["label"])
    figure.colorbar(colors, ax=panels[1], label="training step")
