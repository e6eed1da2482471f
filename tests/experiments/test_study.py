"""Studies on tiny runs: what is tuned, what is compared, what is kept."""

import itertools
import json
import re

import jax
import numpy as np
import pytest
from absl import flags
from matplotlib.figure import Figure

from adalfl_jax.training import ConfigError, WorkdirError
from adalfl_jax.training.machine import describe_machine
from adalfl_jax.training.setup import examples_for_a_batch, load_dataset, make_setup
from adalfl_jax.training.start import read_learned_losses
from experiments import page
from experiments.study import __main__ as program
from experiments.study import behaviour, clean_labels, noisy_labels, publish, runs, transfer
from experiments.study.arms import Arm, Comparison, Source, grid, make_config, make_source_config
from experiments.study.compare import _numbers, compare_arms
from experiments.study.quick import reduce_comparison
from experiments.study.shapes import shapes_figure
from experiments.study.studies import STUDIES, Study
from experiments.study.tables import Part, comparison_table, pairs_table
from experiments.tables import either, render_table, show_mean
from tests.training.tiny import SETTINGS, snapshot, tiny_config

TASK_LOSS = {"method": "task_loss"}
ARMS = (
    Arm("untuned", "task loss", TASK_LOSS),
    Arm("tuned", "tuned", TASK_LOSS, grid(inner__learning_rate=(0.01, 1.0, 1e6))),
    Arm("stopped", "early-stopped", TASK_LOSS, grid(inner__learning_rate=(0.01, 1.0)), early_stopping=True),
    Arm("hopeless", "diverges", TASK_LOSS, grid(inner__learning_rate=(1e30,))),
    Arm("adalfl", "AdaLFL", {"method": "adalfl"}),
)
TINY = {**SETTINGS, "num_steps": 9, "eval_every": 3, "offline.num_steps": 3}
ELSEWHERE = Arm(
    "elsewhere",
    "learned elsewhere",
    {"method": "ml3", "offline.num_steps": 0},
    source=Source("default", {**TINY, "method": "adalfl"}),
)
COMPARISON = Comparison(
    "tiny", "Tiny", "default", TINY, (*ARMS, ELSEWHERE), reference="adalfl", pairs=(("elsewhere", "untuned"),)
)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def numbers(workdir, module_without_figures):
    said = []
    found = compare_arms(COMPARISON, workdir, tuning_seeds=range(1), seeds=range(5, 8), say=said.append)
    assert len(said) == 3 + 2 + 6  # points of grids that are searched, and arms
    return found


def test_the_best_point_of_a_grid_is_trained_on_other_seeds(numbers, workdir):
    tuned = numbers["arms"]["tuned"]
    reached = {entry["point"]["inner.learning_rate"]: entry["valid"] for entry in tuned["tuning"]}
    finite = {rate: valid for rate, valid in reached.items() if valid is not None}
    assert tuned["chosen"] == {"inner.learning_rate": min(finite, key=finite.get)}
    for rate, valid in finite.items():  # of the tuning seeds, on the validation split
        config = make_config(COMPARISON, ARMS[1], {"inner.learning_rate": rate}, range(1), for_tuning=True)
        series = runs.read_record(runs.folder_of(config, workdir)).series("task_loss", "valid/error_rate")
        assert valid == series.values[:, -1].mean()
    kept = json.loads((workdir / "runs" / tuned["run"] / "config.json").read_text())
    assert (kept["seed"], kept["num_seeds"]) == (5, 3)
    assert len(tuned["test"]["per_seed"]) == 3


def test_an_arm_that_diverges_is_a_finding(numbers):
    reason = numbers["arms"]["hopeless"]["diverged"]
    assert "inner_loss is not finite" in reason
    assert reason.endswith("kept in states/task_loss_last_finite")  # in the folder of the run, wherever that is
    assert "hopeless" not in numbers["differences"]
    assert "diverged" in render_table(comparison_table(numbers, "error_rate"))


def test_early_stopping_takes_each_seed_where_its_validation_metric_was_best(numbers, workdir):
    stopped = numbers["arms"]["stopped"]
    record = runs.read_record(workdir / "runs" / stopped["run"])
    valid, test = (record.series("task_loss", f"{split}/error_rate").values for split in ("valid", "test"))
    expected = [curve[at] for curve, at in zip(test, valid.argmin(axis=1), strict=True)]
    np.testing.assert_allclose(stopped["test"]["per_seed"], expected)
    np.testing.assert_allclose(stopped["valid"]["per_seed"], valid.min(axis=1))


def test_differences_are_the_references_less_the_arms_and_their_p_values_adjusted(numbers):
    means = {name: arm["test"]["mean"] for name, arm in numbers["arms"].items() if "test" in arm}
    for name, test in numbers["differences"].items():
        assert test["mean_difference"] == pytest.approx(means["adalfl"] - means[name])
        if test["p_value"] is not None:  # where seeds differ
            assert test["p_value"] <= test["adjusted_p_value"] <= 1


def test_an_arm_starts_from_what_its_source_learned(numbers, workdir):
    learned, starts = (
        read_learned_losses(workdir / "runs" / numbers["arms"][name]["run"]) for name in ("adalfl", "elsewhere")
    )
    jax.tree.map(np.testing.assert_array_equal, starts.params, learned.params)


def test_pairs_are_tested_beside_the_reference(numbers):
    (pair,) = numbers["pairs"]
    assert (pair["arm"], pair["against"]) == ("elsewhere", "untuned")
    means = [numbers["arms"][name]["test"]["mean"] for name in ("elsewhere", "untuned")]
    assert pair["mean_difference"] == pytest.approx(means[0] - means[1])
    assert pair["adjusted_p_value"] == pair["p_value"]
    assert pair["signed_rank"]["adjusted_p_value"] == pair["signed_rank"]["p_value"]
    (table,) = pairs_table(numbers | {"metric": "error_rate"})
    *_, row = render_table(table).splitlines()
    title, difference = numbers["arms"]["untuned"]["title"], f"{100 * (means[0] - means[1]):+.2f}"
    assert re.search(
        rf"\| learned elsewhere +\| {title} +\| {re.escape(difference)} \(.+\) +\| 0\.\d+ +\| 0\.\d+ +\|$", row
    )


def test_an_arm_reaches_the_error_that_it_ends_at():
    rng = np.random.default_rng(0)
    for _ in range(100):  # seeds of 360 examples: an axis is added up in another order than its last column alone
        curve = np.stack([np.ones(10), rng.integers(0, 30, 10) / 360], axis=1).astype(np.float32)
        outcome = runs.Outcome(curve[:, -1], curve[:, -1], np.array([0, 5]), curve, {"training": 1.0, "offline": 0.0})
        assert _numbers(outcome, float(outcome.test.mean()))["steps_to_target"] == 5


def test_the_source_of_a_transfer_is_the_frozen_arm_of_its_own_comparison():
    known = {comparison.name.removeprefix("transfer_"): comparison for comparison in transfer.comparisons()}
    seeds, num_sources = range(2), 0
    for comparison in known.values():
        for arm in comparison.arms:
            if arm.source is not None:
                source = known[arm.name.rpartition("_")[0]]
                own = next(arm for arm in source.arms if arm.name == "own_frozen")
                assert make_source_config(arm.source, seeds) == make_config(source, own, {}, seeds)
                num_sources += 1
    assert num_sources == 2 * (3 * 2 + 3 * 2)  # both modes; three data with one model, three models on one data


def test_a_matrix_says_where_a_loss_from_elsewhere_differs():
    comparison = next(item for item in transfer.comparisons() if item.name == "transfer_digits_mlp")
    means = {"constant": 0.03, "own_frozen": 0.04, "mnist_mlp_frozen": 0.02, "mnist_mlp_adapted": 0.05}
    arms = {name: {"test": {"mean": mean, "std": 0.01, "per_seed": [mean, mean]}} for name, mean in means.items()}

    def test(arm, against, p_value):
        difference = means[arm] - means[against]
        return {"arm": arm, "against": against, "mean_difference": difference, "adjusted_p_value": p_value}

    tests = [
        test("mnist_mlp_frozen", "own_frozen", 0.2),
        test("mnist_mlp_frozen", "constant", 0.01),
        test("own_frozen", "constant", 0.01),
    ]
    kept = {"title": "digits", "metric": "error_rate", "seeds": [1, 2], "arms": arms, "pairs": tests}
    chosen = ["constant", "own_frozen", "mnist_mlp_frozen", "fashion_mnist_mlp_frozen"]  # other arms than were trained
    selected = comparison.select(chosen)
    (part,) = transfer.parts([selected], {comparison.name: kept})
    text = render_table(*part.tables)
    assert re.search(r"\| MNIST, MLP, as it is +\| 2\.00 ± 1\.00 \(= own, < task\)", text)
    assert re.search(r"\| its own, as it is +\| 4\.00 ± 1\.00 \(> task\)", text)
    assert len(part.tables[0].rows) == 3


def test_a_part_of_several_comparisons_says_of_each_how_it_was_made():
    machines = [{"processor": "A", "jax": "0.10"}, {"processor": "B", "device": "H100", "jax": "0.10"}]
    known = {name: {"command": name, "machine": machine} for name, machine in zip("ab", machines, strict=True)}
    text = publish._section(Part("both", "Both", ("a", "b"), Figure()), known, {})
    assert text == "### Both\n\n```sh\na\nb\n```\n\nprocessor A or B, jax 0.10, device cpu or H100."
    assert either(["A", "A or B", "B"]) == "A or B"

    chosen = [item for item in transfer.comparisons() if item.name in ("transfer_digits_mlp", "transfer_mnist_mlp")]
    empty = {"title": "", "metric": "error_rate", "arms": {}, "pairs": []}
    seeds = ([100, 109], [100, 104])
    kept = {item.name: {**empty, "seeds": each} for item, each in zip(chosen, seeds, strict=True)}
    (part,) = transfer.parts(chosen, kept)
    (table,) = part.tables
    assert "over seeds 100 to 109 or 100 to 104. " in table.notes[0]


@pytest.mark.parametrize(
    ("devices", "told"), [(("cpu", "cpu"), None), (("cpu", "H100"), "cpu or H100"), (("H100", "H100"), "H100")]
)
def test_device_and_versions_are_those_that_runs_were_trained_with(tmp_path, devices, told):
    arms = {run: {"run": run, "test": {}} for run in ("before", "now")} | {"hopeless": {"run": "lost", "diverged": ""}}
    summary = dict.fromkeys(("dataset", "data", "metric", "num_steps", "seeds")) | {"methods": {}}
    here = {name: str(fact) for name, fact in describe_machine(publish.PACKAGES).items()}
    for run, version, device in zip(("before", "now"), ("0.10.2", "0.11.0"), devices, strict=True):
        elsewhere = {"processor": f"that of {run}", "jax": version, "numpy": "2"}
        environment = here | elsewhere | ({} if device == "cpu" else {"device": device})
        page.write_numbers(tmp_path / "runs" / run / "summary.json", {**summary, "environment": environment})
    machine = publish._machine_of({"arms": arms}, tmp_path)
    there = {"processor": "that of before or that of now", "jax": "0.10.2 or 0.11.0"}
    assert machine == here | there | ({"device": told} if told else {})
    assert publish._machine_of({"arms": {}}, tmp_path) == here


def test_behaviour_is_read_from_the_runs_of_a_comparison(numbers, workdir):
    arms = numbers["arms"]
    chosen = {"linear": arms["tuned"], "ml3": arms["elsewhere"], "adalfl": arms["adalfl"]}
    given = {**numbers, "metric": "error_rate", "arms": chosen}
    measured = json.loads(json.dumps(behaviour.measure(given, workdir)))
    assert measured["best_hand_made"] == "linear"
    rate = arms["tuned"]["chosen"]["inner.learning_rate"]
    assert measured["best_schedule"] == {"steps": [0, 3, 6, 9], "rates": pytest.approx([rate] * 4)}
    record = runs.read_record(workdir / "runs" / arms["adalfl"]["run"])
    quantities = measured["behaviour"]["adalfl"]["quantities"]
    assert quantities.keys() == behaviour.QUANTITIES.keys()
    np.testing.assert_array_equal(quantities["gradient_cosine"], record.series("adalfl", "gradient_cosine").values)
    assert np.shape(quantities["smoothing"]) == np.shape(quantities["flat_output_share"]) == (3, 4)

    (part,) = behaviour.parts([COMPARISON], {"tiny": given | measured})
    text = render_table(*part.tables)
    end = np.array(quantities["smoothing"])[:, -1]
    assert re.search(rf"\| label smoothing +\| AdaLFL .* {end.mean():.3g} ± {end.std(ddof=1):.2g} +\|", text)
    assert len(part.figure.axes) == 6 + 1  # panels and a colour bar


def test_wrong_labels_show_what_was_learned_beside_hand_made_losses(numbers, workdir):
    (comparison,) = (item for item in noisy_labels.comparisons() if item.name == "mnist_mlp_40")
    kept = {**numbers, "metric": "error_rate", "title": comparison.title}
    assert len(noisy_labels.parts([comparison], {"mnist_mlp_40": kept})) == 1  # numbers without what was learned
    kept |= json.loads(json.dumps(noisy_labels.measure(kept, workdir)))
    shapes, table = noisy_labels.parts([comparison], {"mnist_mlp_40": kept})
    assert (table.name, shapes.name) == ("mnist_mlp_40", "mnist_mlp_learned_losses")
    assert shapes.figure.axes[0].get_title(loc="left") == "40 % wrong labels"
    assert len(shapes.figure.axes[1].lines) == 3 + 4  # seeds and hand-made losses
    assert not shapes.tables

    both = [item for item in noisy_labels.comparisons() if item.name in ("mnist_mlp_clean", "mnist_mlp_40")]
    shapes, *_ = noisy_labels.parts(both, {item.name: {**kept, "title": item.title} for item in both})
    error = show_mean(kept["arms"]["adalfl"]["test"], 100)
    heading, _, *rows = render_table(*shapes.tables).splitlines()[2:]
    assert heading.split(" | ")[1:] == ["clean labels", "40 % wrong labels |"]
    assert [row.split(" | ")[1].strip() for row in rows] == [error]  # of the one arm that both have


def test_a_loss_that_rises_is_drawn_rising_and_a_flat_one_flat():
    rising, flat = np.linspace(-2, 0, 99), np.ones(99)
    pulls = [-np.gradient(rising), 0 * flat]
    figure = shapes_figure({"wrong": {"values": [rising, flat], "pulls": pulls}})
    drawn = [[line.get_ydata() for line in axes.lines[:2]] for axes in figure.axes]
    np.testing.assert_allclose(drawn[0], [np.linspace(-1, 0, 99), 0 * flat], atol=1e-12)
    np.testing.assert_allclose(drawn[1], [-flat, 0 * flat])


def test_steps_to_the_target_are_the_first_at_which_the_mean_is_there(numbers):
    assert numbers["target"] == numbers["arms"]["untuned"]["test"]["mean"]
    for arm in numbers["arms"].values():
        if "curve" in arm:
            below = [
                step
                for step, error in zip(arm["steps"], np.mean(arm["curve"], 0), strict=True)
                if error <= numbers["target"]
            ]
            assert arm["steps_to_target"] == (below[0] if below else None)
    adalfl = numbers["arms"]["adalfl"]
    assert adalfl["seconds_to_target"] is None or adalfl["seconds_to_target"] >= adalfl["seconds"]["offline"]


def test_where_the_first_arm_diverges_there_is_no_target(workdir):
    comparison = COMPARISON.select(["hopeless"])
    found = compare_arms(comparison, workdir, tuning_seeds=range(1), seeds=range(5, 8), say=lambda text: None)
    assert found["target"] is None
    assert found["arms"]["adalfl"]["steps_to_target"] is None
    text = render_table(comparison_table(found, "error_rate"))
    assert "where the first arm ends" not in text
    assert "Tuned on" not in text


@pytest.mark.parametrize("name", list(STUDIES))
def test_the_quick_form_of_every_comparison_fits_its_data(name):
    for comparison in STUDIES[name].comparisons():
        reduced = reduce_comparison(comparison)
        make_setup(make_config(reduced, reduced.arms[0], {}, range(1)))


def test_the_quick_form_of_a_comparison_has_fewer_points_and_steps_on_digits():
    (full,) = (item for item in noisy_labels.comparisons() if item.name == "mnist_mlp_40")
    reduced = reduce_comparison(full._replace(arms=(*full.arms, ELSEWHERE)))
    assert reduced.name == "mnist_mlp_40_quick"
    assert max(len(arm.grid) for arm in full.arms) > 2
    assert [arm.grid for arm in reduced.arms[:-1]] == [arm.grid[:2] for arm in full.arms]
    learned = make_source_config(reduced.arms[-1].source, range(1))
    for config in (make_config(reduced, reduced.arms[0], {}, range(1)), learned):
        assert (config.dataset.name, config.num_steps, config.offline.num_steps) == ("digits", 300, 300)
        assert f"quick form: on {config.dataset.name}, {config.num_steps} steps" in reduced.title
    (on_diabetes,) = (item for item in clean_labels.comparisons() if item.name == "diabetes_mlp")
    reduced = reduce_comparison(on_diabetes)
    assert make_config(reduced, reduced.arms[0], {}, range(1)).dataset.name == "diabetes"
    assert "quick form: 300 steps" in reduced.title


def test_a_study_repeats_nothing_it_has(numbers, workdir):
    runs.run.cache_clear()  # as another process has it
    before = snapshot(workdir)
    again = compare_arms(COMPARISON, workdir, tuning_seeds=range(1), seeds=range(5, 8), say=lambda text: None)
    assert again == numbers
    assert snapshot(workdir) == before


def test_every_arm_of_every_study_is_a_configuration_at_every_point():
    for study in STUDIES.values():
        comparisons = study.comparisons()
        assert len({comparison.name for comparison in comparisons}) == len(comparisons)
        for comparison in comparisons:
            names = [arm.name for arm in comparison.arms]
            assert len(set(names)) == len(names)
            assert {comparison.reference, *itertools.chain(*comparison.pairs)} <= set(names)
            for arm in comparison.arms:
                for point in arm.grid:
                    make_config(comparison, arm, point, range(2))


def test_half_of_every_clean_set_is_enough_for_a_batch():
    for comparison in noisy_labels.comparisons():
        config = make_config(comparison, comparison.arms[0], {}, range(1), for_tuning=True)
        assert config.outer.split_fraction == 0.5
        assert examples_for_a_batch(config) <= config.dataset.valid_examples, comparison.name


@pytest.mark.parametrize("name", ["digits_mlp", "diabetes_mlp"])
def test_data_that_ship_are_enough_for_the_comparison_on_clean_labels(name):
    (comparison,) = (item for item in clean_labels.comparisons() if item.name == name)
    program._check(comparison, load_dataset)


UNFIT = {
    "half_a_clean_set": (
        {"overrides": {**TINY, "outer.split": "valid", "dataset.valid_examples": 60}},
        r"'valid' of 'digits' has only 30 examples .*split_fraction 0\.5 holds others out",
    ),
    "the_last_point": (
        {"arms": (ARMS[4], Arm("steep", "steep", TASK_LOSS, grid(inner__momentum=(0.5, 0.9, 1.5))))},
        r"inner\.momentum must be a number",
    ),
    "a_source": (
        {"arms": (ARMS[4], ELSEWHERE._replace(source=Source("default", {**TINY, "batch_size": 5000})))},
        r"batch_size is 5000, and split 'train' of 'digits' has only 1293 examples",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_could_not_be_trained_or_tuned_is_refused_before_anything_is_trained(case):
    changes, message = UNFIT[case]
    program._check(COMPARISON, load_dataset)
    with pytest.raises(ConfigError, match=message):
        program._check(COMPARISON._replace(**changes), load_dataset)


def test_tuning_holds_half_of_a_clean_set_out():
    comparison = COMPARISON._replace(overrides={**TINY, "outer.split": "valid"})
    for for_tuning, fraction in ((True, 0.5), (False, 1.0)):
        config = make_config(comparison, ARMS[0], {}, range(1), for_tuning=for_tuning)
        assert config.outer.split_fraction == fraction
        assert make_config(COMPARISON, ARMS[0], {}, range(1), for_tuning=for_tuning).outer.split_fraction == 1.0


def test_an_override_that_is_no_field_is_refused():
    arm = Arm("typo", "typo", {"inner.learning_rat": 0.1})
    with pytest.raises(ConfigError, match="learning_rat"):
        make_config(COMPARISON, arm, {}, range(1))


@pytest.fixture
def tiny_study(monkeypatch):
    monkeypatch.setitem(STUDIES, "thrift", Study(lambda: [COMPARISON]))


@pytest.mark.usefixtures("tiny_study", "without_figures")
def test_the_program_writes_numbers_a_picture_and_its_section(tmp_path, program_flags, capsys, verbosity, monkeypatch):
    target = tmp_path / "docs" / "page.md"
    target.parent.mkdir()
    target.write_text("Before\n\n<!-- tables: thrift -->\n<!-- end of tables -->\n\nAfter\n")
    program_flags("--study=thrift", "--arm=untuned", "--num_seeds=3", f"--write={target}")  # as many as compiled above
    program.main(["study"])
    text, kept = target.read_text(), json.loads((target.parent / "results" / "thrift.json").read_text())["tiny"]
    assert text.startswith("Before\n")
    assert text.endswith("After\n")
    assert "| AdaLFL " in text
    assert "early-stopped" not in text
    assert (target.parent / "images" / "page" / "tiny.png").stat().st_size > 1000
    assert kept["arms"].keys() == {"untuned", "adalfl"}
    assert kept["seeds"] == [100, 101, 102]
    assert "| AdaLFL " in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"thrift\.json has untuned of tiny, which --arm or --num_seeds leaves out"):
        publish.require_whole("thrift", COMPARISON.select(["adalfl"]), range(100, 103))
    with pytest.raises(ValueError, match=r"thrift\.json has seed 102 of tiny, which"):
        publish.require_whole("thrift", COMPARISON, range(100, 102))
    publish.require_whole("thrift", COMPARISON, range(100, 103))

    path = target.parent / "results" / "thrift.json"
    path.write_text(json.dumps({"tiny": kept | {"differences": {}, "pairs": []}}))
    target.write_text(text.replace("| AdaLFL ", "| lost "))
    flags.FLAGS["arm"].unparse()
    program_flags("--study=thrift", f"--write={target}", "--from_numbers")
    monkeypatch.setattr(program, "compare_arms", None)  # nothing is trained
    program.main(["study"])
    assert json.loads(path.read_text())["tiny"] == kept
    assert target.read_text() == text

    path.unlink()
    with pytest.raises(SystemExit, match=r"thrift\.json has no numbers to make a page of; run the study first"):
        program.main(["study"])
    assert not path.exists()


@pytest.mark.usefixtures("tiny_study")
def test_numbers_that_cannot_be_read_are_told_before_anything_is_trained(tmp_path, program_flags, verbosity):
    (tmp_path / "thrift.json").write_text('{"tiny": ')
    program_flags("--study=thrift")
    with pytest.raises(SystemExit, match=r"thrift\.json cannot be read .*; move it away"):
        program.main(["study"])
    assert [path.name for path in tmp_path.iterdir()] == ["thrift.json"]


@pytest.mark.usefixtures("tiny_study")
def test_a_helper_trains_what_all_do_and_ends_with_its_parent_and_makes_no_tables(
    tmp_path, program_flags, verbosity, monkeypatch, capsys
):
    called = []
    monkeypatch.setattr(program, "compare_arms", lambda comparison, *_, **settings: called.append(comparison.name))
    monkeypatch.setattr(program.jobs, "end_with_parent", lambda: called.append("ends with its parent"))
    monkeypatch.setattr(program.jobs, "take_share", lambda position, num_jobs: called.append((position, num_jobs)))
    program_flags("--study=thrift", "--jobs=3", "--helper=2")
    program.main(["study"])
    assert called == [(2, 3), "ends with its parent", "tiny"]
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((), (range(4), range(100, 130))),
        (("--num_seeds=5", "--num_tuning_seeds=1"), (range(1), range(100, 105))),
        (("--quick",), (range(1), range(100, 102))),
        (("--quick", "--num_seeds=3"), (range(1), range(100, 103))),
    ],
)
def test_a_comparison_has_as_many_seeds_as_it_says_where_nobody_says_otherwise(given, expected, program_flags):
    program_flags("--study=thrift", *given)
    assert program._seeds_of(COMPARISON._replace(num_seeds=30, num_tuning_seeds=4)) == expected


@pytest.mark.usefixtures("tiny_study")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--comparison=tinny",), r"unknown comparison 'tinny'; did you mean 'tiny'"),
        (("--arm=adalf",), r"unknown arm of tiny 'adalf'; did you mean 'adalfl'"),
        (("--from_numbers",), r"--from_numbers makes a page anew; name it, --write="),
        (
            ("--from_numbers", "--write=page.md", "--arm=adalfl"),
            r"makes all tables of the page; leave out --comparison",
        ),
        (("--quick", "--write=page.md"), r"--quick shows that all works.*leave out --write"),
        (("--write=no/page.md",), r"there is no page no/page\.md for --write to renew; make it first"),
    ],
)
def test_what_a_study_does_not_have_is_refused(given, message, program_flags, verbosity):
    program_flags("--study=thrift", *given)
    with pytest.raises(SystemExit, match=message):
        program.main(["study"])


def test_missing_data_is_told_with_the_command_that_gets_it_before_anything_is_trained(
    tmp_path, program_flags, verbosity, monkeypatch
):
    missing = COMPARISON._replace(name="missing", overrides={**TINY, "dataset.name": "mnist"})
    monkeypatch.setitem(STUDIES, "thrift", Study(lambda: [COMPARISON, missing]))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "nothing"))
    program_flags("--study=thrift", "--arm=untuned")
    with pytest.raises(SystemExit, match=r"adalfl_jax.data.prepare mnist"):
        program.main(["study"])
    assert not (tmp_path / "runs").exists()


def test_a_damaged_note_of_a_divergence_is_told_in_a_line(tmp_path):
    config = tiny_config()
    note = runs.folder_of(config, tmp_path).with_suffix(".diverged.json")
    note.parent.mkdir(parents=True)
    note.write_text('{"reason": ')
    with pytest.raises(WorkdirError, match=r"\.diverged\.json cannot be read"):
        runs.run(config, tmp_path)
