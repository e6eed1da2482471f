"""The learned loss changing shape, as a moving picture."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.figure import Figure

from adalfl_jax.analysis.figures import COLORS, STYLE, LossShapes, prediction_label, saved_loss_shapes
from adalfl_jax.analysis.record import RunRecord

FRAMES_PER_SECOND = 8
MAX_FRAMES = 100  # evaluations that are shown, of however many
STILL_FRAMES = 12  # of the last shape, before it starts again
TRACES = 6  # earlier shapes that fade behind the present one


def animate_loss_shapes(path: Path, record: RunRecord) -> bool:
    """Draws l_phi of the saved seed, for target 0 and 1, as a GIF that repeats.

    Of more than `MAX_FRAMES` evaluations it shows so many, evenly from the first to the last.

    Args:
      path: of the GIF.
      record: of a run, over or not.

    Returns:
      Whether there was a loss network to draw.
    """
    if (shapes := saved_loss_shapes(record)) is None:
        return False
    shapes = _thinned(shapes)
    frames = [*range(len(shapes.steps)), *[len(shapes.steps) - 1] * STILL_FRAMES]
    predictions, label = record.shapes["predictions"], prediction_label(record.config["learned_loss"]["predictions"])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 2.9), layout="constrained", dpi=90)
        panels = figure.subplots(1, 2, sharey=True)
        for target, axes in enumerate(panels):
            axes.set(title=f"target {target}", xlabel=label, xlim=predictions[[0, -1]])
        panels[0].set(ylabel="$\\ell_\\phi$ less its mean", ylim=_limits(shapes.values))
        lines = [[axes.plot([], [], color=COLORS["adalfl"])[0] for _ in range(TRACES + 1)] for axes in panels]
        title = figure.suptitle("", fontsize=11, x=0.01, ha="left", weight="bold")

        def draw(frame: int) -> None:
            title.set_text(f"The loss at step {shapes.steps[frame]}")
            for target, traces in enumerate(lines):
                for age, line in enumerate(traces):
                    values = shapes.values[max(frame - age, 0), target]
                    line.set_data(predictions, values)
                    line.set(
                        alpha=1.0 if age == 0 else 0.35 * (1 - age / (TRACES + 1)), linewidth=2.4 if age == 0 else 1
                    )

        animation = FuncAnimation(figure, draw, frames=frames)  # pyright: ignore[reportArgumentType]
        animation.save(str(path), writer=PillowWriter(fps=FRAMES_PER_SECOND))
    return True


def _thinned(shapes: LossShapes) -> LossShapes:
    num_shapes = len(shapes.steps)
    kept = np.linspace(0, num_shapes - 1, min(num_shapes, MAX_FRAMES)).round().astype(int)
    return LossShapes(shapes.steps[kept], shapes.values[kept])


def _limits(values: np.ndarray) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    margin = 0.05 * (high - low) or 1.0
    return low - margin, high + margin
