"""Pictures of a run, drawn from its record alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, StrMethodFormatter

from adalfl_jax.analysis.record import RunRecord, Series

COLORS = {  # of methods, in all pictures
    "task_loss": "#6b7280",
    "tuned_task_loss": "#b45309",
    "fine_tuned": "#a16207",
    "reweighting": "#6d28d9",
    "ml3": "#0e7490",
    "adalfl": "#be185d",
}
_RATE = r"$\alpha\,\langle\nabla M,\nabla L\rangle\,/\,|\nabla L|^2$"
_VISIBLE = np.linspace(0.15, 0.95, 256)  # the part of a colour map that stands out from white
STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e7eb",
    "axes.edgecolor": "#9ca3af",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "font.size": 10,
    "figure.dpi": 150,
}


def write_figures(folder: Path, record: RunRecord) -> dict[str, Path]:
    """Draws every figure the record has data for.

    Returns:
      name -> PNG file: "learning_curves", "loss_shapes", "gradient_scale".
    """
    folder.mkdir(exist_ok=True)
    drawers: dict[str, Callable[[RunRecord], Figure | None]] = {
        "learning_curves": learning_curves,
        "loss_shapes": loss_shapes,
        "gradient_scale": gradient_scale,
    }
    paths = {}
    with matplotlib.rc_context(STYLE):
        for name, draw in drawers.items():
            if (figure := draw(record)) is not None:
                paths[name] = folder / f"{name}.png"
                figure.savefig(paths[name], bbox_inches="tight")
    return paths


def learning_curves(record: RunRecord) -> Figure | None:
    """Test metric of every method over its steps: mean and standard deviation over seeds."""
    metric = record.summary["metric"]
    curves = _series_by_method(record, f"test/{metric}")
    if not curves:
        return None
    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    axes = figure.subplots()
    for method, series in curves.items():
        _draw_band(axes, record, method, series)
    axes.set(title="Test metric through training", xlabel="training step", ylabel=f"test {metric.replace('_', ' ')}")
    _set_log_scale(axes, curves)
    if is_error_rate(metric):
        axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
    figure.legend(loc="outside lower center", ncols=4)
    return figure


def is_error_rate(metric: str) -> bool:
    """Whether a metric is shown in percent."""
    return metric.endswith("error_rate")


class LossShapes(NamedTuple):
    """The learned loss of one seed through training."""

    steps: np.ndarray  # [T]
    values: np.ndarray  # [T, 2, P], for target 0 and 1


def saved_loss_shapes(record: RunRecord) -> LossShapes | None:
    """The shapes of the loss that a run saved, or None where it is no loss network."""
    saved = record.summary.get("learned_loss")
    if saved is None or f"{saved['method']}/values" not in record.shapes:
        return None
    seed = record.summary["seeds"].index(saved["seed"])
    return LossShapes(record.shapes[f"{saved['method']}/steps"], record.shapes[f"{saved['method']}/values"][seed])


def loss_shapes(record: RunRecord) -> Figure | None:
    """The learned loss of the saved seed against the prediction, from the start of training to its end."""
    if (shapes := saved_loss_shapes(record)) is None:
        return None
    saved = record.summary["learned_loss"]
    title = record.summary["methods"][saved["method"]]["title"]
    label = prediction_label(record.config["learned_loss"]["predictions"])
    return draw_loss_shapes(shapes, record.shapes["predictions"], label, f"What {title} learned, seed {saved['seed']}")


def draw_loss_shapes(shapes: LossShapes, predictions: np.ndarray, label: str, title: str) -> Figure:
    """A learned loss against the predictions `[P]`, a curve for each step."""
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    colors = ScalarMappable(Normalize(0, shapes.steps[-1]), ListedColormap(matplotlib.colormaps["magma_r"](_VISIBLE)))
    for target, axes in enumerate(panels):
        for step, curve in zip(shapes.steps, shapes.values[:, target], strict=True):
            axes.plot(predictions, curve, color=colors.to_rgba(step), linewidth=1.3)
        axes.set(title=f"target {target}", xlabel=label)
    panels[0].set_ylabel("$\\ell_\\phi$ less its mean")
    figure.colorbar(colors, ax=panels, label="training step", pad=0.02)
    figure.suptitle(title, x=0.01, ha="left", weight="bold", fontsize=11)
    return figure


def picture_of_loss(shapes: LossShapes, predictions: np.ndarray, label: str, title: str) -> np.ndarray:
    """The figure of `draw_loss_shapes` as pixels, `[H, W, 3]` bytes."""
    with matplotlib.rc_context({**STYLE, "figure.dpi": 100}):
        canvas = FigureCanvasAgg(draw_loss_shapes(shapes, predictions, label, title))
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3]


def gradient_scale(record: RunRecord) -> Figure | None:
    """How far a step on the learned loss goes: its implicit learning rate and its gradient's scale, over the steps."""
    rates = _series_by_method(record, "implicit_learning_rate")
    if not rates:
        return None
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, measured in ((left, rates), (right, _series_by_method(record, "gradient_scale"))):
        for method, series in measured.items():
            _draw_band(axes, record, method, series)
        _set_log_scale(axes, measured)
    for method, info in record.summary["methods"].items():
        if method not in rates and info["learning_rate"] is not None:
            left.axhline(info["learning_rate"], color=COLORS[method], linestyle="--", label=info["title"])
    left.set(title="Implicit learning rate", xlabel="training step", ylabel=_RATE)
    right.set(title="Scale of the gradient", xlabel="training step", ylabel=r"$|\nabla M|\,/\,|\nabla L|$")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _series_by_method(record: RunRecord, name: str) -> Mapping[str, Series]:
    found = {method: record.series(method, name) for method in record.summary["methods"]}
    return {method: series for method, series in found.items() if series is not None}


def _draw_band(axes: Axes, record: RunRecord, method: str, series: Series) -> None:
    mean = series.values.mean(axis=0)
    color = COLORS[method]
    axes.plot(series.steps, mean, color=color, label=record.summary["methods"][method]["title"], linewidth=1.8)
    if len(series.values) > 1:
        std = series.values.std(axis=0, ddof=1)
        low = np.maximum(mean - std, series.values.min(axis=0))  # the metrics have a floor
        axes.fill_between(series.steps, low, mean + std, color=color, alpha=0.15, linewidth=0)


def _set_log_scale(axes: Axes, curves: Mapping[str, Series]) -> None:
    """A logarithmic axis where every mean is positive."""
    if all((series.values.mean(axis=0) > 0).all() for series in curves.values()):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def prediction_label(kind: str) -> str:
    """The label of an axis for a kind of predictions, one of `LossNetwork.predictions`."""
    return {"log_probabilities": "predicted log-probability", "raw": "prediction"}.get(kind, "predicted probability")
