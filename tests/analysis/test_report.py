import base64
import dataclasses
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image, ImageSequence

from adalfl_jax.analysis import animation, figures
from adalfl_jax.analysis.figures import write_figures
from adalfl_jax.analysis.record import RunRecord
from adalfl_jax.analysis.report import render_report
from adalfl_jax.analysis.statistics import adjust_p_values, describe, paired_difference
from adalfl_jax.training.methods import METHODS

TITLES = {"task_loss": "task loss", "tuned_task_loss": "task loss, tuned rate", "ml3": "ML3", "adalfl": "AdaLFL"}
NASTY = "<script>alert('x')</script>"


def make_record(
    seeds=(0, 1, 2), metric="error_rate", methods=tuple(TITLES), saved="adalfl", steps=(0, 10, 20), rate=0.1
):
    """A record as a run leaves it, with a drawn number for everything measured."""
    rng = np.random.default_rng(0)
    scalars, infos = [], {}
    for method in methods:
        values = rng.uniform(0.05, 0.5, len(seeds)).tolist()
        infos[method] = {
            "title": TITLES[method],
            "learning_rate": 0.01,
            "test": describe(values),
            "valid": describe([0.6 - value for value in values]),
            "seconds": {"training": 1.5, "offline": 0.0},
            **({"tuning": {"0.01": 0.2, "0.1": 0.1}} if method == "tuned_task_loss" else {}),
        }
        for seed in seeds:
            for step in steps:
                row = {"method": method, "phase": "training", "seed": seed, "step": step}
                row[f"test/{metric}"] = float(rng.uniform(0.05, 0.5))
                if method in ("ml3", "adalfl"):
                    row |= {"gradient_scale": float(rng.uniform()), "implicit_learning_rate": rate}
                scalars.append(row)
    summary = {
        "dataset": "digits",
        "metric": metric,
        "num_steps": 20,
        "seeds": list(seeds),
        "methods": infos,
        "comparisons": [
            {"method": methods[-1], "against": name}
            | paired_difference(infos[name]["test"]["per_seed"], infos[methods[-1]]["test"]["per_seed"])
            for name in methods[:-1]
        ],
        "environment": {"python": "3.11", "device": "cpu"},
    }
    adjust_p_values(summary["comparisons"])
    shapes = {}
    if saved is not None:
        summary["learned_loss"] = {"method": saved, "seed": seeds[0]}
        shapes = {
            "predictions": np.linspace(0, 1, 11),
            f"{saved}/steps": np.array(steps),
            f"{saved}/values": rng.normal(size=(len(seeds), len(steps), 2, 11)),
        }
    config = {"dataset": NASTY, "num_steps": 20, "learned_loss": {"predictions": "probabilities"}}
    return RunRecord(config, summary, scalars, shapes)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Text of a report with every figure."""
    folder, record = tmp_path_factory.mktemp("report"), make_record()
    (folder / "report.html").write_text(render_report(record, write_figures(folder / "figures", record)))
    return (folder / "report.html").read_text()


class Reader(HTMLParser):
    """Collects the tags with their attributes and the text of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_report_is_self_contained(page):
    assert "http://" not in page
    assert "https://" not in page
    sources = [attributes["src"] for _, attributes in Reader(page).tags if "src" in attributes]
    assert len(sources) == 3
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert all(base64.b64decode(source.partition(",")[2]).startswith(b"\x89PNG") for source in sources)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in Reader(page).tags}


def test_report_names_every_method_and_comparison(page):
    text = Reader(page).text
    assert all(title in text for title in TITLES.values())
    assert all(f"AdaLFL less {title}" in text for name, title in TITLES.items() if name != "adalfl")


def test_p_values_of_the_report_are_adjusted_for_their_number(page):
    tests = make_record().summary["comparisons"]
    assert all(row["adjusted_p_value"] != row["p_value"] for row in tests[:-1])
    for row in tests:
        assert f"<td>{row['adjusted_p_value']:.3g}</td></tr>" in page


def test_report_marks_a_validation_metric_of_examples_that_a_method_trains_on(page, tmp_path):
    assert "*" not in Reader(page).text
    record = make_record()
    record.summary["methods"]["ml3"]["trains_on_valid"] = True
    (tmp_path / "report.html").write_text(render_report(record, {}))
    marked = Reader((tmp_path / "report.html").read_text()).text
    assert f"*{record.summary['methods']['ml3']['valid']['mean'] * 100:.2f}" in marked
    assert marked.count("*") == 2
    assert "* measured on examples that the method trains on" in marked


@pytest.mark.parametrize(
    ("command", "read", "unread"), [("compare", "methods", "method"), ("train", "method", "methods")]
)
def test_report_leaves_out_the_setting_that_its_program_does_not_read(command, read, unread):
    record = make_record()
    config = {**record.config, "command": command, "method": "adalfl", "methods": ["ml3"]}
    shown = render_report(dataclasses.replace(record, config=config), {})
    assert f"<code>{read}</code>" in shown
    assert f"<code>{unread}</code>" not in shown


def test_report_escapes_html_in_settings(page):
    assert "<script" not in page
    assert NASTY in Reader(page).text


def test_report_gives_rates_in_percent(page):
    info = make_record().summary["methods"]["adalfl"]["test"]
    assert f"{100 * info['mean']:.2f} ± {100 * info['std']:.2f}" in Reader(page).text


def test_report_gives_other_metrics_in_their_unit(tmp_path):
    record = make_record(metric="mean_squared_error")
    (tmp_path / "report.html").write_text(render_report(record, {}))
    info = record.summary["methods"]["adalfl"]["test"]
    assert f"{info['mean']:.4f} ± {info['std']:.4f}" in Reader((tmp_path / "report.html").read_text()).text


def test_report_marks_the_best_method_alone(page):
    means = {info["title"]: info["test"]["mean"] for info in make_record().summary["methods"].values()}
    rows = re.findall(r'<tr class="best"><td>(.*?)</td>', page)
    assert rows == [min(means, key=means.__getitem__)]


def test_report_lists_the_tuning_table(page):
    assert "0.01 → 20.00" in Reader(page).text
    assert "0.1 → 10.00" in Reader(page).text


def test_report_of_one_seed_has_no_spread_and_no_test(tmp_path):
    record = make_record(seeds=(5,))
    (tmp_path / "report.html").write_text(render_report(record, write_figures(tmp_path / "figures", record)))
    text = Reader((tmp_path / "report.html").read_text()).text
    assert text.count("±") == 1  # in the head of the table
    assert "nan" not in text


def test_report_of_one_method_compares_nothing(tmp_path):
    record = make_record(methods=("task_loss",), saved=None)
    (tmp_path / "report.html").write_text(render_report(record, {}))
    assert "Seed against seed" not in (tmp_path / "report.html").read_text()


def test_figures_are_drawn_for_what_was_measured(tmp_path):
    full = write_figures(tmp_path / "full", make_record())
    assert set(full) == {"learning_curves", "loss_shapes", "gradient_scale"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in full.values())
    bare = write_figures(tmp_path / "bare", make_record(methods=("task_loss",), saved=None))
    assert set(bare) == {"learning_curves"}


def test_figures_of_one_seed_are_drawn(tmp_path):
    assert len(write_figures(tmp_path / "figures", make_record(seeds=(3,)))) == 3


@pytest.mark.parametrize(("rate", "steps"), [(-0.1, (0, 20)), (0.0, (0, 10, 20)), (0.1, (0, 20))])
def test_implicit_learning_rate_of_any_sign_is_drawn(rate, steps, tmp_path):
    record = make_record(steps=steps, rate=rate)  # a warning that nothing can be drawn fails this
    assert "gradient_scale" in write_figures(tmp_path / "figures", record)


def test_the_animation_has_a_frame_for_each_of_few_evaluations_and_rests_on_the_last(tmp_path):
    path = tmp_path / "loss.gif"
    assert animation.animate_loss_shapes(path, make_record())
    with Image.open(path) as image:
        assert image.format == "GIF"
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]
        assert image.info["duration"] >= 1000 / animation.FRAMES_PER_SECOND - 10
    assert len(frames) >= 3  # equal frames at the end are merged by Pillow
    assert not np.array_equal(frames[0], frames[1])


def test_of_many_evaluations_the_animation_shows_some_from_the_first_to_the_last(tmp_path, monkeypatch):
    titles, set_text = [], Text.set_text
    monkeypatch.setattr(Text, "set_text", lambda self, text: (titles.append(text), set_text(self, text)))
    monkeypatch.setattr(animation, "MAX_FRAMES", 4)
    animation.animate_loss_shapes(tmp_path / "loss.gif", make_record(steps=range(0, 100, 10)))
    shown = dict.fromkeys(title for title in titles if str(title).startswith("The loss"))
    assert list(shown) == [f"The loss at step {step}" for step in (0, 30, 60, 90)]


def test_without_a_loss_network_there_is_no_animation(tmp_path):
    assert not animation.animate_loss_shapes(tmp_path / "loss.gif", make_record(saved=None))
    assert not (tmp_path / "loss.gif").exists()


def test_every_method_has_a_colour():
    assert figures.COLORS.keys() == METHODS.keys()  # or the run of one without would fail at its end


def test_error_rates_are_drawn_in_percent_on_an_axis_that_can_be_read():
    figure = figures.learning_curves(make_record())
    assert figure is not None
    figure.canvas.draw()
    (axes,) = figure.axes
    low, high = axes.get_ylim()
    labels = [
        tick.get_text()
        for tick, place in zip(axes.get_yticklabels(), axes.get_yticks(), strict=True)
        if low <= place <= high
    ]
    assert len(labels) > 1
    assert all(re.fullmatch(r"\d+(\.\d+)? %", label) for label in labels)
