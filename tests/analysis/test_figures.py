"""Pictures of a run show its record: every line, band and label where it belongs."""

import dataclasses

import numpy as np
import pytest

from adalfl_jax.analysis import figures
from tests.analysis.test_report import TITLES, make_record


def line_of(axes, label):
    (line,) = (line for line in axes.lines if line.get_label() == label)
    return line


def test_learning_curves_are_means_with_a_deviation_to_either_side():
    record = make_record()
    (axes,) = figures.learning_curves(record).axes
    for band, (method, info) in zip(axes.collections, record.summary["methods"].items(), strict=True):
        series = record.series(method, "test/error_rate")
        line, mean = line_of(axes, info["title"]), series.values.mean(axis=0)
        np.testing.assert_array_equal(line.get_xdata(), series.steps)
        np.testing.assert_allclose(line.get_ydata(), mean)
        low, high = np.sort(band.get_paths()[0].vertices[:, 1])[[0, -1]]
        std = series.values.std(axis=0, ddof=1)
        assert high == pytest.approx((mean + std).max())
        assert low == pytest.approx(np.maximum(mean - std, series.values.min(axis=0)).min())
    assert axes.yaxis.get_major_formatter()(0.25, 0) == "25 %"


@pytest.mark.parametrize("methods", [("adalfl", "task_loss"), ("task_loss", "ml3", "adalfl")])
def test_the_legend_of_learning_curves_has_methods_in_the_order_of_the_run_and_their_colours(methods):
    record = make_record(methods=methods)
    (legend,) = figures.learning_curves(record).legends
    assert [text.get_text() for text in legend.get_texts()] == [TITLES[method] for method in methods]
    assert [line.get_color() for line in legend.get_lines()] == [figures.COLORS[method] for method in methods]


def test_a_band_ends_at_the_lowest_seed():
    record = make_record(seeds=(0, 1, 2))
    rows = [row | {"test/error_rate": 0.9 if row["seed"] == 0 else 0.1} for row in record.scalars]
    (axes,) = figures.learning_curves(dataclasses.replace(record, scalars=rows)).axes
    assert min(band.get_paths()[0].vertices[:, 1].min() for band in axes.collections) == pytest.approx(0.1)


@pytest.mark.parametrize(("lowest", "scale"), [(0.1, "log"), (0.0, "linear")])
def test_the_axis_is_logarithmic_where_every_mean_is_above_0(lowest, scale):
    record = make_record()
    rows = [row | {"test/error_rate": lowest if row["method"] == "ml3" else 0.2} for row in record.scalars]
    (axes,) = figures.learning_curves(dataclasses.replace(record, scalars=rows)).axes
    assert axes.get_yscale() == scale


def test_shapes_are_those_of_the_saved_seed_for_either_target():
    record = make_record(seeds=(4, 7))
    saved = record.summary["learned_loss"]
    for seed in (4, 7):
        chosen = dataclasses.replace(record, summary={**record.summary, "learned_loss": {**saved, "seed": seed}})
        panels = figures.loss_shapes(chosen).axes[:2]
        for target, axes in enumerate(panels):
            assert axes.get_title() == f"target {target}"
            shown = np.stack([line.get_ydata() for line in axes.lines])
            index = record.summary["seeds"].index(seed)
            np.testing.assert_array_equal(shown, record.shapes[f"{saved['method']}/values"][index, :, target])


def test_shapes_are_coloured_by_their_steps_up_to_the_last():
    first, _, bar = figures.loss_shapes(make_record(steps=(0, 10, 40))).axes
    assert bar.get_ylim() == (0, 40)
    start, between, end = (np.asarray(line.get_color()[:3]) for line in first.lines)
    assert np.linalg.norm(between - start) < np.linalg.norm(between - end)


def test_rates_of_methods_that_learn_no_loss_stand_beside_the_implicit_ones():
    record = make_record()
    left = figures.gradient_scale(record).axes[0]
    flat = {line.get_label(): line.get_ydata()[0] for line in left.lines if line.get_linestyle() == "--"}
    methods = record.summary["methods"]
    assert flat == {methods[name]["title"]: methods[name]["learning_rate"] for name in ("task_loss", "tuned_task_loss")}
    for method in ("ml3", "adalfl"):
        expected = record.series(method, "implicit_learning_rate").values.mean(axis=0)
        np.testing.assert_allclose(line_of(left, methods[method]["title"]).get_ydata(), expected)
