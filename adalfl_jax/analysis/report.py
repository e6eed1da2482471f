"""`report.html`: one file with the table, the pictures and the settings of a comparison."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path

import jinja2

from adalfl_jax.analysis.figures import is_error_rate
from adalfl_jax.analysis.record import TRAINED_ON, UNREAD, RunRecord, flatten

_CAPTIONS = {
    "learning_curves": (
        "Learning curves",
        """Test metric through training: the mean over seeds, and one standard deviation to either side, cut below at
        the lowest value of a seed.""",
    ),
    "loss_shapes": (
        "The shape of the learned loss",
        """The loss of one output against the prediction, when the target is 0 and when it is 1. Only slopes matter, so
        every curve has its mean removed.""",
    ),
    "gradient_scale": (
        "Implicit learning rate",
        """Left: the rate at which a step on the task loss would go equally far along the task gradient. Right: the norm
        of the learned loss's gradient over that of the task loss, on the same training examples.""",
    ),
}


def render_report(record: RunRecord, figures: Mapping[str, Path]) -> str:
    """A self-contained page of HTML: no script, no link, pictures inside.

    Args:
      record: of a run, over or not.
      figures: name -> PNG file, from `write_figures`.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("adalfl_jax.analysis", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    best = min((info["test"]["mean"] for info in record.summary["methods"].values()), default=None)
    is_rate = is_error_rate(record.summary["metric"])
    unread = UNREAD.get(record.config.get("command", ""))
    return environment.get_template("report.html.jinja").render(
        summary=record.summary,
        metric=record.summary["metric"].replace("_", " "),
        number=lambda value: _number(value, is_rate),
        unit=" %" if is_rate else "",
        best=best,
        trained_on=TRAINED_ON,
        pictures=[(*_CAPTIONS[name], _embed(figure)) for name, figure in figures.items()],
        settings=flatten({name: value for name, value in record.config.items() if name != unread}).items(),
    )


def _number(value: float, is_rate: bool) -> str:
    return f"{100 * value:.2f}" if is_rate else f"{value:.4f}"


def _embed(figure: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(figure.read_bytes()).decode()
