"""What was learned beside what was made by hand: losses along the probability of an example's label."""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from adalfl_jax.analysis.figures import STYLE
from adalfl_jax.analysis.measures import along_true_class
from adalfl_jax.task_losses import TASK_LOSSES
from adalfl_jax.training.start import read_learned_losses
from adalfl_jax.types import LossFn
from experiments.study.tables import HIGHLIGHT

NUM_CLASSES = 10  # of every problem that is shown
PROBABILITIES = np.linspace(0.01, 0.99, 99)
HAND_MADE: dict[str, tuple[str, Any]] = {
    "softmax_cross_entropy": ("cross-entropy", "-"),
    "smoothed_cross_entropy": ("smoothed", (0, (1, 1))),
    "generalized_cross_entropy": ("generalised", "--"),
    "symmetric_cross_entropy": ("symmetric", "-."),
}


def learned_curves(workdir: Path) -> dict[str, list[list[float]]]:
    """Of every seed of a finished run the loss `values` `[S][P]` at `PROBABILITIES`, and its `pulls` `[S][P]`."""
    found = read_learned_losses(workdir)
    values, pulls = jax.jit(jax.vmap(lambda params: _along(functools.partial(found.loss.apply, params))))(found.params)
    return {"values": values.tolist(), "pulls": pulls.tolist()}


def shapes_figure(learned: Mapping[str, Mapping[str, Any]]) -> Figure:
    """The loss, and its pull on an example, by the probability of the label: a column a run, a line a seed."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(1.4 + 2.2 * len(learned), 5.4), 4.8), layout="constrained")
        panels = figure.subplots(2, len(learned), sharex=True, sharey="row", squeeze=False)
        for (title, curves), column in zip(learned.items(), panels.T, strict=True):
            for seed, (values, pulls) in enumerate(zip(curves["values"], curves["pulls"], strict=True)):
                label = "AdaLFL, a line a seed" if seed == 0 else None
                _draw(column, values, pulls, color=HIGHLIGHT, alpha=0.5, label=label)
            for name, (label, style) in HAND_MADE.items():
                _draw(column, *_hand_made(name), color="#374151", linestyle=style, label=label)
            column[0].set(title=textwrap.fill(title, 24))
            column[1].set(xlabel="probability of the label")
        panels[0, 0].set_ylabel("loss, of 1 at .01")
        panels[1, 0].set_ylabel("pull, of its largest")
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return figure


@functools.cache
def _hand_made(name: str) -> tuple[jax.Array, jax.Array]:
    return jax.jit(lambda: _along(TASK_LOSSES[name]))()


def _along(loss_fn: LossFn) -> tuple[jax.Array, jax.Array]:
    return along_true_class(loss_fn, jnp.asarray(PROBABILITIES, jnp.float32), NUM_CLASSES)


def _draw(column: Sequence[Axes], values: ArrayLike, pulls: ArrayLike, **style: Any) -> None:
    """Of a loss only the shape: its scale is a learning rate, and its level has no gradient."""
    fall, pulls = np.asarray(values) - np.asarray(values)[-1], np.asarray(pulls)
    column[0].plot(PROBABILITIES, fall / (abs(fall[0]) or 1), linewidth=1.2, **style)  # one that rises is not mirrored
    column[1].plot(PROBABILITIES, pulls / (np.abs(pulls).max() or 1), linewidth=1.2, **style)
