"""Pictures of studies show the numbers they are of."""

import numpy as np
import pytest

from adalfl_jax.analysis.measures import along_true_class
from adalfl_jax.task_losses import TASK_LOSSES
from experiments.study import transfer
from experiments.study.shapes import HAND_MADE, NUM_CLASSES, PROBABILITIES, shapes_figure
from experiments.study.tables import HIGHLIGHT, curves_figure


@pytest.mark.parametrize(("metric", "scale"), [("error_rate", 100), ("mean_squared_error", 1)])
def test_curves_are_means_at_their_steps_without_the_first(metric, scale):
    curves = {"one": [[0.9, 0.4, 0.2], [0.8, 0.2, 0.2]], "other": [[0.7, 0.6, 0.5]]}
    arms = {name: {"title": name, "steps": [0, 10, 20], "curve": curve} for name, curve in curves.items()}
    (axes,) = curves_figure({"arms": arms, "metric": metric, "reference": "one", "title": ""}).axes
    shown = {line.get_label(): line for line in axes.lines}
    for name, curve in curves.items():
        np.testing.assert_array_equal(shown[name].get_xdata(), [10, 20])
        np.testing.assert_allclose(shown[name].get_ydata(), scale * np.mean(curve, axis=0)[1:])


def test_the_legend_has_curves_as_they_end_the_highest_first():
    curves = {
        "rises": [[0.9, 0.2, 0.3]],
        "ends_highest": [[0.9, 0.3, 0.5], [0.9, 0.1, 0.3]],
        "ends_lowest": [[9, 2, 0.1]],
    }
    arms = {name: {"title": name, "steps": [0, 10, 20], "curve": curve} for name, curve in curves.items()}
    arms["diverged"] = {"title": "diverged"}
    figure = curves_figure({"arms": arms, "metric": "error_rate", "reference": "rises", "title": ""})
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["ends_highest", "rises", "ends_lowest"]
    colors = {line.get_label(): line.get_color() for line in figure.axes[0].lines}
    assert [line.get_color() for line in legend.get_lines()] == [colors[text.get_text()] for text in legend.get_texts()]
    assert colors["rises"] == HIGHLIGHT


def test_each_of_many_curves_has_a_look_of_its_own():
    arms = {f"{arm}": {"title": f"{arm}", "steps": [0, 10], "curve": [[0.9, arm / 100]]} for arm in range(1, 26)}
    (axes,) = curves_figure({"arms": arms, "metric": "error_rate", "reference": "1", "title": ""}).axes
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == 25


def test_a_diamond_is_the_mean_of_the_seeds_of_its_loss():
    errors = {"task_loss": [0.1, 0.1, 0.4], "own_frozen": [0.05, 0.06, 0.3]}  # whose medians are no means
    arms = {name: {"test": {"per_seed": values}} for name, values in errors.items()}
    numbers = {"title": "digits", "metric": "error_rate", "arms": arms}
    (axes,) = transfer._figure({name: name for name in errors}, [numbers]).axes
    for row, values in enumerate(errors.values()):
        dots, diamond = (line for line in axes.lines if set(line.get_ydata()) == {-row})
        np.testing.assert_allclose(dots.get_xdata(), 100 * np.array(values))
        assert diamond.get_marker() == "D"
        assert diamond.get_xdata() == pytest.approx([100 * np.mean(values)])


def test_hand_made_losses_are_drawn_under_their_names():
    figure = shapes_figure({"run": {"values": [PROBABILITIES], "pulls": [PROBABILITIES]}})
    lines = {line.get_label(): line for line in figure.axes[1].lines}
    for name, (label, _) in HAND_MADE.items():
        _, pulls = along_true_class(TASK_LOSSES[name], np.float32(PROBABILITIES), NUM_CLASSES)
        np.testing.assert_allclose(lines[label].get_ydata(), pulls / np.abs(pulls).max(), atol=1e-5)
