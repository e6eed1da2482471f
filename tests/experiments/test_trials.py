"""Trials: what is tuned, what is judged, what a reader is shown."""

import json

import joblib
import numpy as np
import pytest
import scipy.stats
from absl.testing import flagsaver
from matplotlib.axes import Axes

from experiments import launch
from experiments.tables import render_table, show_point
from experiments.trials import (
    Curves,
    Trial,
    TrialDivergedError,
    compare_trials,
    digest_of_sources,
    draw_trials,
    publish_trials,
    trials_table,
)
from tests.training.tiny import ROOT


def trial(title, offset, notes="", spread=0.0):
    """Tuned best at rate 2, judged best at rate 1, on any seeds; diverges at rate 3."""

    def run(point, seeds):
        ramp = np.add.outer([float(seed % 7) + spread * (seed % 2) for seed in seeds], np.arange(4.0))
        values = ramp + offset - point["rate"]
        valid = {1.0: 0.1, 2.0: 0.2, 3.0: np.inf}[point["rate"]]
        return Curves(np.full(len(seeds), valid), values[:, -1], values, notes)

    return Trial(title, run, ({"rate": 1.0}, {"rate": 2.0}, {"rate": 3.0}))


@pytest.fixture(scope="module")
def numbers():
    trials = {
        "plain": trial("plain", 0.0),
        "better": trial("better", 5.0, "a note", 1.0),
        "level": trial("level", 0.0, spread=5.0),
    }
    return compare_trials(trials, "plain", tuning_seeds=range(2), seeds=range(100, 104), largest_is_best=True)


def test_the_best_point_is_run_on_other_seeds_and_one_that_diverges_is_not_it(numbers):
    better = numbers["trials"]["better"]
    assert better["chosen"] == {"rate": 2.0}
    assert better["score"]["per_seed"] == [float(seed % 7) + seed % 2 + 3 + 5 - 2 for seed in range(100, 104)]
    assert json.loads(json.dumps(numbers, allow_nan=False)) == numbers


def test_differences_are_the_references_less_a_trials_and_p_values_adjusted(numbers):
    scores = {name: np.array(row["score"]["per_seed"]) for name, row in numbers["trials"].items()}
    tests = numbers["differences"]
    for name, test in tests.items():
        assert test["mean_difference"] == pytest.approx((scores["plain"] - scores[name]).mean())
    adjusted = scipy.stats.false_discovery_control([test["p_value"] for test in tests.values()])
    np.testing.assert_allclose([test["adjusted_p_value"] for test in tests.values()], adjusted)
    assert tests["better"]["adjusted_p_value"] > tests["better"]["p_value"]


def test_the_picture_has_means_and_standard_errors_at_their_steps(numbers, monkeypatch, tmp_path):
    drawn, band = {}, Axes.fill_between
    monkeypatch.setattr(
        Axes, "fill_between", lambda axes, *given, **style: drawn.setdefault(len(drawn), given) and band(axes, *given)
    )
    draw_trials(numbers, tmp_path / "curves.png", title="", xlabel="", ylabel="", every=5)
    for (steps, low, high), row in zip(drawn.values(), numbers["trials"].values(), strict=True):
        values = np.array(row["curve"])
        np.testing.assert_array_equal(steps, [5, 10, 15, 20])
        np.testing.assert_allclose((low + high) / 2, values.mean(axis=0))
        np.testing.assert_allclose((high - low) / 2, values.std(axis=0, ddof=1) / np.sqrt(len(values)))


def test_where_less_is_better_the_smallest_is_taken():
    found = compare_trials(
        {"one": trial("one", 0.0)}, "one", tuning_seeds=range(1), seeds=range(2), largest_is_best=False
    )
    assert found["trials"]["one"]["chosen"] == {"rate": 1.0}
    assert found["differences"] == {}


def test_a_trial_that_diverges_on_the_seeds_it_is_judged_on_is_told():
    def run(point, seeds):
        scores = np.array([np.nan if seed == 101 else 1.0 for seed in seeds])
        return Curves(scores, scores, scores[:, None])

    trials = {"one": Trial("one way", run, ({"rate": 1.0}, {"rate": 2.0}))}
    with pytest.raises(
        TrialDivergedError, match=r"^one way: rate 1 was best with seeds 0 to 1, and diverges with 101; "
    ):
        compare_trials(trials, "one", tuning_seeds=range(2), seeds=range(100, 103), largest_is_best=True)


@pytest.mark.filterwarnings("ignore:Persisting input arguments took")  # joblib on a disk that is busy
def test_trials_that_were_stopped_repeat_nothing_and_a_changed_setting_repeats_all(tmp_path):
    ran = []

    def make(fails_at=None):
        def run(point, seeds):
            if len(ran) == fails_at:
                raise KeyboardInterrupt
            ran.append((dict(point), list(seeds)))
            return Curves(np.ones(len(seeds)), np.ones(len(seeds)), np.ones((len(seeds), 2)))

        return {"one": Trial("one", run, ({"rate": 1.0}, {"rate": 2.0}))}

    def compare(trials, num_steps=10):
        return compare_trials(
            trials,
            "one",
            tuning_seeds=range(2),
            seeds=range(5, 8),
            largest_is_best=True,
            settings={"num_steps": num_steps},
            memory=joblib.Memory(tmp_path, verbose=0),
        )

    with pytest.raises(KeyboardInterrupt):
        compare(make(fails_at=2))
    assert ran == [({"rate": 1.0}, [0, 1]), ({"rate": 2.0}, [0, 1])]
    first = compare(make())
    assert ran[2:] == [({"rate": 1.0}, [5, 6, 7])]
    assert compare(make()) == first
    assert len(ran) == 3
    assert compare(make(), num_steps=11) == first
    assert ran[3:] == ran[:3]


@pytest.mark.filterwarnings("ignore:Persisting input arguments took")
def test_kept_curves_are_told_with_their_machine_and_not_taken_for_those_of_other_code(tmp_path, monkeypatch):
    ran = []

    def run(point, seeds):
        ran.append(point)
        return Curves(np.ones(len(seeds)), np.ones(len(seeds)), np.ones((len(seeds), 2)))

    def compare_on(machine, seeds, library="a"):
        monkeypatch.setattr("experiments.trials.describe_machine", lambda packages: machine)
        monkeypatch.setattr("experiments.trials.digest_of_sources", lambda folder: library)
        found = compare_trials(
            {"one": Trial("one", run, ({},))},
            "one",
            tuning_seeds=range(2),
            seeds=seeds,
            largest_is_best=True,
            memory=joblib.Memory(tmp_path, verbose=0),
        )
        return found["machine"]

    here, there = {"processor": "A", "cores": 2}, {"processor": "A", "cores": 8, "device": "H100"}
    assert compare_on(here, range(5, 7)) == {"processor": "A", "cores": "2"}
    assert compare_on(there, range(5, 7)) == {"processor": "A", "cores": "2"}
    assert compare_on(there, range(5, 8)) == {"processor": "A", "cores": "2 or 8", "device": "cpu or H100"}
    assert len(ran) == 3
    compare_on(there, range(5, 8), library="b")
    assert len(ran) == 5


def test_a_digest_of_sources_knows_each_module_by_name_and_content(tmp_path):
    digests = set()
    for name, text in (("a.py", "1"), ("a.py", "2"), ("b.py", "2"), ("c.txt", "3")):
        (tmp_path / name).write_text(text)
        digests.add(digest_of_sources(tmp_path))
    (tmp_path / "b.py").rename(tmp_path / "d.py")
    digests.add(digest_of_sources(tmp_path))
    assert len(digests) == 4


def test_numbers_become_a_table_and_a_picture(numbers, tmp_path):
    text = render_table(trials_table(numbers, "Title", "score"))
    assert "| better | rate 2 " in text
    assert "a note" in text
    draw_trials(numbers, tmp_path / "picture.png", title="Title", xlabel="step", ylabel="score")
    assert (tmp_path / "picture.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("program", "measure", "scale"),
    [("joint_search", "test error rate, %", 100), ("policy_gradient", "mean return through training", 1)],
)
def test_the_page_has_the_numbers_that_lie_beside_it(program, measure, scale):
    found = json.loads((ROOT / "docs" / "results" / f"{program}.json").read_text())
    text = render_table(trials_table(found, "", measure, scale)).removeprefix("****")
    assert text in (ROOT / "docs" / "results.md").read_text()


def test_a_value_is_marked_where_none_beyond_it_was_tried():
    tuning = [{"point": {"rate": rate, "eta": 0.1}} for rate in (0.3, 1.0, 3.0)]
    assert show_point({"rate": 3.0, "eta": 0.1}, tuning) == "rate 3 (edge), eta 0.1"
    assert show_point({"rate": 0.3, "eta": 0.1}, tuning) == "rate 0.3 (edge), eta 0.1"
    assert show_point({"rate": 1.0, "eta": 0.1}, tuning) == "rate 1, eta 0.1"
    assert show_point(None, []) == show_point({}, []) == ""


@pytest.mark.parametrize(
    ("content", "message"), [(None, r"FileNotFoundError: .*page.md"), ("no section", r"^the page must have")]
)
def test_a_page_without_the_section_is_told_before_anything_runs(content, message, tmp_path, verbosity):
    target = tmp_path / "page.md"
    if content is not None:
        target.write_text(content)
    with flagsaver.flagsaver():
        launch.parse_flags(["tried", f"--workdir={tmp_path}", "--compilation_cache=", f"--write={target}"])
        with pytest.raises(SystemExit, match=message):
            publish_trials("tried", lambda memory: pytest.fail("ran"), title="", measure="", xlabel="", ylabel="")


def test_a_folder_of_no_file_system_is_told_in_a_line():
    with (
        flagsaver.flagsaver((launch.WORKDIR, "gs://bucket/runs")),
        pytest.raises(SystemExit, match=r"WorkdirError: .*gs://bucket"),
    ):
        publish_trials("tried", lambda memory: pytest.fail("ran"), title="", measure="", xlabel="", ylabel="")
