"""The benchmark: every suite in a tiny form, what it refuses, and a page of which a section alone changes."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest
from absl.testing import flagsaver

from adalfl_jax.hypergradient import ESTIMATORS
from adalfl_jax.training import ConfigError
from adalfl_jax.training.machine import describe_machine
from experiments import launch, page
from experiments.benchmark import __main__ as program
from experiments.benchmark import (
    checkpoints,
    estimators,
    idle,
    parts,
    problems,
    scaling,
    thrift,
    timing,
    training_program,
)
from experiments.benchmark.flops import count_flops, on_a_cpu
from experiments.tables import Table, render_table
from tests.training.tiny import ROOT, tiny_config

# ml_collections loads a configuration in a way that Python means to drop
pytestmark = [
    pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning"),
    pytest.mark.usefixtures("verbosity"),
]

TINY = problems.Problem("logistic", (4, 4, 1), batch_size=6, num_steps=2, num_outputs=3)
TABLE = Table("Steps", {"step": lambda row: row["name"], "ms": lambda row: f"{row['ms']:.1f}"}, [])
ROWS = [{"name": "task loss", "ms": 1.25}, {"name": "bilevel", "ms": 12.0, "ratio": timing.Ratio(9.6, 9, 10)}]
PAGE = """# Costs

<!-- tables: peers -->
<!-- end of tables -->

Between.

<!-- tables: seeds mnist_mlp -->
old
<!-- end of tables -->

After.
"""


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs the program here; returns what it printed and its last words, None if it has none."""

    def run_program(*arguments):
        argv = ["benchmark", *arguments]
        monkeypatch.setattr(sys, "argv", argv)  # where the fields of a configuration are looked for
        with flagsaver.flagsaver():
            ended = None
            try:
                program.main(launch.parse_flags(argv))
            except SystemExit as end:
                ended = end.code
        return capsys.readouterr().out, ended

    return run_program


def test_programs_are_run_in_turn_each_from_a_state_of_its_own():
    calls = []

    def program(name):
        return timing.Program(lambda: f"{name} anew", calls.append, num_steps=2)

    times = timing.time_in_turn({"a": program("a"), "b": program("b")}, 3)
    assert calls == ["a anew", "b anew"] * 4  # one round to warm up
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}


def test_a_ratio_is_taken_within_a_round():
    times = {"a": [1.0, 10.0, 2.0], "b": [2.0, 30.0, 2.0]}
    assert timing.ratio(times, "b", "a") == (2.0, 1.0, 3.0)
    assert str(timing.ratio(times, "b", "a")) == "2.00 (1.00 to 3.00)"
    assert timing.median(times, "a") == 2.0


def test_a_program_takes_the_steps_a_loop_takes():
    start, batches = problems.draw_start(TINY), problems.draw_batches(TINY, 3)
    step, state = problems.bilevel_step_of(TINY, start, batches, problems.optax.adam(problems.OUTER_RATE))
    ours = problems.bilevel_program(TINY, start, batches)
    assert ours.num_steps == 3
    (final, _) = ours.run(ours.restart())
    for index in range(3):
        state, _ = jax.jit(step)(state, jax.tree.map(lambda leaf, index=index: jnp.asarray(leaf[index]), batches))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), final, state)
    again, _ = ours.run(ours.restart())  # the state is donated, and the start is not
    jax.tree.map(np.testing.assert_array_equal, final, again)


def test_the_body_of_a_loop_counts_as_often_as_it_runs():
    def looped(matrix, rows):
        def outer(total, row):
            return jax.lax.scan(lambda total, _: (total + row @ matrix, None), total, length=3)[0], None

        return jax.lax.scan(outer, jnp.zeros(50), rows)[0]

    def unrolled(matrix, rows):
        return sum((row @ matrix for row in rows for _ in range(3)), start=jnp.zeros(50))

    matrix = jnp.ones((50, 50))
    for num_rows in (1, 4):
        rows = jnp.ones((num_rows, 50))
        assert count_flops(jax.jit(looped), matrix, rows) == pytest.approx(
            count_flops(unrolled, matrix, rows), rel=0.02
        )
        assert count_flops(looped, matrix, rows) == pytest.approx(num_rows * 3 * 2 * 50 * 50, rel=0.03)


def test_without_a_cpu_to_count_for_it_is_told_how_to_get_one(monkeypatch):
    def missing(*, backend):
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr(jax, "local_devices", missing)
    with pytest.raises(ConfigError, match=r"JAX has none \(Unknown backend cpu\); .* JAX_PLATFORMS=cuda,cpu"):
        on_a_cpu()


@pytest.mark.slow
def test_every_estimator_has_a_row_or_is_said_to_be_left_out(monkeypatch):
    some = {name: ESTIMATORS[name] for name in ("forward", "checkpointed", "truncated")}
    monkeypatch.setattr(estimators, "ESTIMATORS", some)
    variants = {name: {"hypergradient": name} for name in some}
    one = estimators.one_step("one", TINY, variants, 1)
    assert [row["program"] for row in one.rows][:2] == ["task loss", "forward"]
    assert {row["program"]: row["error"] for row in one.rows}["forward"] < 1e-4
    many = estimators.k_steps("many", TINY, (2,), 1)
    assert {row["num_inner_steps"] for row in many.rows} == {2}
    for table in (one, many):
        text = render_table(table)
        assert [name for name in some if name not in text] == []
    assert "`forward`" in many.notes[0]


def test_arithmetic_and_memory_grow_with_the_inner_steps():
    start, large = problems.draw_start(TINY), TINY._replace(batch_size=100)
    one, four = (
        problems.bilevel_program(large, start, problems.draw_batches(large, 1, count), hypergradient="unrolled")
        for count in (1, 4)
    )
    assert 2 < four.flops() / one.flops() < 4  # beside the inner steps there is an outer pass
    assert four.temporary_bytes > one.temporary_bytes


def test_growth_is_drawn(tmp_path):
    rows = [
        {"program": name, "num_inner_steps": count, "ms": count, "temporary_bytes": 1e6 * count}
        for name in ("unrolled", "other")
        for count in (1, 2)
    ]
    tables = [Table("MLP", estimators.ONE_STEP, []), Table("MLP", estimators.K_STEPS, rows)]
    estimators.draw_growth(tables, tmp_path / "images" / "growth.png")
    assert (tmp_path / "images" / "growth.png").stat().st_size > 1000


def test_sizes_are_swept():
    table = scaling.sweep("outputs C", {"3": TINY, "5": TINY._replace(num_outputs=5)}, 2, 1)
    assert [row["value"] for row in table.rows] == ["3", "5"]
    assert all(row["ratio"].median > 0 for row in table.rows)


def test_parts_of_a_step_are_taken_alone_and_more_is_more_arithmetic():
    start, batches = problems.draw_start(TINY), problems.draw_batches(TINY, 2)
    programs = parts.part_programs(TINY, start, batches)
    names = ("f on the inner batch", "f and Jᵀc on the inner batch", "the same, and J w by a difference")
    flops = [programs[name].flops() for name in names]
    assert flops == sorted(flops)
    assert 0 < flops[0] < flops[-1]


def test_products_of_seeds_are_timed_against_those_of_one():
    table = parts.products({"x W": (6, 4, 3)}, 3, 3)
    text = render_table(table)
    assert text.startswith("**Products of matrices, 3 seeds at once**")
    assert "3 seeds, ms" in text
    assert table.rows[0]["ratio"].median > 0


def test_the_problems_are_those_of_the_titles_and_the_grid_varies_one_size():
    assert set(problems.TITLES) == set(problems.PROBLEMS)
    for swept in scaling.GRID.values():
        assert scaling.MLP in swept.values()


def test_steps_of_a_configuration_are_timed_by_the_estimators_that_train_it(monkeypatch):
    monkeypatch.setattr(training_program, "ESTIMATORS", ["forward", "nosuch"])
    config = tiny_config()
    dataset = training_program.dataset_of(config, random_data=False)
    (table,) = training_program.step_suite(config, dataset, 2, 1)
    assert [row["program"] for row in table.rows] == ["task loss", "AdaLFL, forward"]
    assert table.notes == ("Left out, since they do not train this configuration: `nosuch`.",)
    assert table.title == "digits, mlp, batch 50"


@pytest.mark.slow
def test_seeds_of_a_configuration_are_timed_on_noise():
    config = tiny_config()
    dataset = training_program.dataset_of(config, random_data=True)
    assert len(dataset.train.inputs) == 1797
    (table,) = training_program.seeds_suite(config, dataset, 2, 1, counts=(1, 3))
    assert [row["base"] for row in table.rows] == ["task loss, 1 seed"] * 2 + ["AdaLFL, 1 seed"] * 2
    assert "AdaLFL, 3 seeds" in render_table(table)


def test_what_a_checkpoint_takes_is_told_if_it_can_be_told_from_the_spread():
    row = {"num_saves": 20, "seconds_a_save": 0.03}
    told = "make a run longer by 30.0 ms each (the median over the rounds), 0.01 % of the 300 seconds between two."
    assert checkpoints._note(row, 300.0).endswith(told)
    assert checkpoints._note(row | {"seconds_a_save": -0.005}, 300.0).endswith("is lost in the spread of the runs.")


@pytest.mark.slow
def test_checkpoints_are_timed_in_whole_runs():
    config = tiny_config({"num_steps": 6, "eval_every": 2, "num_seeds": 1})
    (table,) = checkpoints.checkpoints_suite(config, training_program.dataset_of(config, random_data=False), 5, 3)
    assert [row["checkpoints"] for row in table.rows] == [
        "none",
        "every 300 s and at the end",
        "after every evaluation",
    ]
    assert table.title == "digits, mlp, batch 50, 1 seeds, 5 steps"
    assert table.rows[2]["num_saves"] == 3
    assert table.notes == (checkpoints._note(table.rows[2], 300.0),)
    assert render_table(table).count("1.00 (1.00 to 1.00)") == 1


def test_a_table_lines_up():
    assert render_table(TABLE._replace(rows=ROWS, notes=("A note.",))) == (
        "**Steps**\n\n| step      | ms   |\n|-----------|------|\n| task loss | 1.2  |\n| bilevel   | 12.0 |\n\nA note."
    )


def test_a_section_has_the_command_and_the_machine():
    text = page.render_section("python -m x", {"cores": 2, "jax": "1"}, [TABLE], {TABLE.title: "images/x.png"})
    assert text.startswith("```sh\npython -m x\n```\n\ncores 2, jax 1.\n\n**Steps**")
    assert text.endswith("![Steps](images/x.png)")


@pytest.mark.parametrize("name", ["peers", "seeds mnist_mlp"])
def test_one_section_is_replaced_and_the_rest_stays(name):
    replaced = page.replace_section(PAGE, name, "new | \\1")
    start = f"<!-- tables: {name} -->\n"
    before, _, rest = PAGE.partition(start)
    after = rest.partition(page.END)[2]
    assert replaced == f"{before}{start}new | \\1\n\n{page.END}{after}"
    assert page.replace_section(replaced, name, "new | \\1") == replaced


@pytest.mark.parametrize(
    ("text", "name", "count"),
    [
        (PAGE, "seeds", 0),
        (PAGE + PAGE, "peers", 2),
        (PAGE.replace(f"{page.END}\n\nBetween", "Between"), "peers", 0),
    ],
    ids=["missing", "twice", "without_an_end"],
)
def test_a_page_without_the_section_is_refused(text, name, count):
    with pytest.raises(ValueError, match=f"one section '{name}' and has {count}"):
        page.replace_section(text, name, "new")


def test_the_machine_is_described(monkeypatch):
    monkeypatch.setattr(idle, "WINDOW", 0.1)
    facts = describe_machine(("jax", "no-such-package"))
    assert facts["jax"] == jax.__version__
    assert "no-such-package" not in facts
    assert facts["cores"] >= 1
    assert facts["processor"]
    assert 0 <= idle.busy_cores() <= psutil.cpu_count()  # the whole machine, which may have more than this process


@pytest.fixture
def busy(monkeypatch):
    """Cores of four at work: one number after the other, then the last for ever. A look is over at once."""
    left, clock = [0.0], [0.0]

    def percent(interval):
        clock[0] += interval
        return 25 * (left.pop(0) if len(left) > 1 else left[0])

    monkeypatch.setattr("psutil.cpu_count", lambda: 4)
    monkeypatch.setattr("psutil.cpu_percent", percent)
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    return left


@pytest.fixture
def suites(monkeypatch, busy):
    """No suite is run, and the machine is idle; each has the table above."""
    tables = [TABLE._replace(rows=ROWS)]
    monkeypatch.setattr(scaling, "scaling_suite", lambda num_steps, num_rounds: tables)
    monkeypatch.setattr(training_program, "seeds_suite", lambda *arguments: tables)


def test_tables_are_printed_and_written_with_their_command(run, suites, tmp_path):
    target = tmp_path / "page.md"
    target.write_text(PAGE.replace("seeds mnist_mlp", "seeds digits_mlp").replace("peers", "scaling"))
    config = f"--config={ROOT / 'configs' / 'digits_mlp.py'}"
    flags = ("--suite=seeds", "--suite=scaling", config, f"--write={target}", f"--json={tmp_path / 'figures.json'}")
    out, ended = run(*flags)
    assert ended is None
    written = target.read_text()
    assert "\nold\n" not in written
    assert "\n\nBetween.\n\n" in written
    command = f".venv/bin/python -m experiments.benchmark {' '.join(flags)}"
    assert written.count(command) == out.count(command) == 2
    assert written.count("| bilevel   | 12.0 |") == 2
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["command"] == command
    assert set(figures["suites"]) == {"seeds digits_mlp", "scaling"}
    assert figures["suites"]["scaling"]["tables"]["Steps"][1]["ratio"] == {"median": 9.6, "least": 9, "most": 10}


def test_a_page_waits_for_an_idle_machine_and_is_left_alone_on_a_busy_one(run, suites, busy, tmp_path):
    target = tmp_path / "page.md"
    before = PAGE.replace("peers", "scaling")
    target.write_text(before)
    busy[:] = [1.5]
    _, ended = run("--suite=scaling", f"--write={target}")
    assert ended.startswith(
        "BusyMachineError: 1.5 cores of this machine are at work, after 300 seconds; no more than 0.2"
    )
    assert target.read_text() == before
    busy[:] = [1.5, 1.0, 0.7, 0.1]
    assert run("--suite=scaling", f"--write={target}")[1] is None
    assert "busy cores before 0.1." in target.read_text()


def test_tables_are_shown_of_a_busy_machine(run, suites, busy):
    busy[:] = [1.5]
    out, ended = run("--suite=scaling")
    assert ended is None
    assert "busy cores before 1.5." in out


CONFIG = f"--config={ROOT / 'configs' / 'digits_mlp.py'}"
REFUSED = {
    "a_config_is_missing": ([], "UsageError: suite 'step' times the training of a configuration; add --config="),
    "a_config_is_too_much": (["--suite=scaling", CONFIG], "UsageError: --config and --random_data are of"),
    "random_data_are_too_much": (["--suite=scaling", "--random_data"], "UsageError: --config and --random_data are of"),
    "a_problem_is_too_much": (["--suite=scaling", "--problem=mlp"], "UsageError: --problem is of the suites peers, "),
    "the_page_is_missing": (
        ["--suite=scaling", "--write=nosuch.md"],
        "UsageError: --write=nosuch.md: there is no page nosuch.md",
    ),
    "the_json_s_folder_is_missing": (
        ["--suite=scaling", "--json=nosuch/figures.json"],
        "UsageError: --json=nosuch/figures.json must be a file in a folder that is there and may be written to",
    ),
    "the_json_is_a_folder": (["--suite=scaling", f"--json={ROOT}"], f"UsageError: --json={ROOT} must be a file in a "),
    "the_section_is_missing": (["--suite=scaling", f"--write={ROOT / 'README.md'}"], "UsageError: --write="),
    "a_stray_word": (["scaling"], "unexpected arguments ['scaling']"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_flags_that_do_not_go_together_are_refused(case, run, suites):
    arguments, text = REFUSED[case]
    out, ended = run(*arguments)
    assert ended.startswith(text)
    assert out == ""


@pytest.mark.parametrize(
    "flag", ["--suite=nosuch", "--problem=nosuch", "--rounds=2", "--steps=0", "--nosuch=1", "--rounds=many"]
)
def test_a_flag_that_cannot_be_is_refused(flag, run):
    out, ended = run(flag)
    assert flag.strip("-").partition("=")[0] in ended
    assert ended.endswith("(--help shows the flags)")
    assert out == ""


def test_what_is_compared_with_must_be_installed(run, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    out, ended = run("--suite=peers")
    assert ended.startswith("MissingPeerError: suite 'peers' compares with torch and higher, not installed here; ")
    assert out == ""


def test_the_page_of_the_documents_has_a_section_for_every_suite():
    text = (ROOT / "docs" / "performance.md").read_text()
    for name in program.NAMES:
        assert f"<!-- tables: {name}" in text


@pytest.mark.slow
def test_the_program_is_run_by_the_name_of_the_package():
    command = [sys.executable, "-m", "experiments.benchmark", "--helpshort"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603
    assert "Measures what a step costs" in done.stdout


def test_thrift_is_timed_variant_by_variant(monkeypatch):
    some = ("a quarter", "every 4th step", "pipelined, finite difference")
    monkeypatch.setattr(thrift, "VARIANTS", {name: thrift.VARIANTS[name] for name in some})
    table = thrift.costs("Tiny", TINY._replace(num_steps=4), 3)
    assert [row["program"] for row in table.rows] == [problems.TASK_LOSS, "learned loss, frozen", *some]
    assert all(row["ms"] > 0 for row in table.rows)


def test_without_batch_norm_parts_of_a_batch_give_its_gradient_in_the_mean(monkeypatch):
    monkeypatch.setattr(thrift, "FRACTIONS", ((0.5, 0.5), (1.0, 0.25)))
    table = thrift.bias("Tiny", TINY, num_orders=2)
    assert [(row["inner"], row["outer"]) for row in table.rows] == [(0.5, 0.5), (1.0, 0.25)]
    for row in table.rows:
        assert row["bias"] < 1e-5
        assert row["error"] < 1e-5
        assert row["noise"] > 0.1


def test_what_is_measured_of_a_part_is_what_a_step_on_it_takes():
    start, batch = problems.draw_start(TINY), problems.draw_batches(TINY, 1)
    apply_fn, optimizer = TINY.make_model().apply, problems.optax.sgd(problems.INNER_RATE)
    task = thrift.BilevelProblem(apply_fn, problems.LOSS.apply, thrift.softmax_cross_entropy, optimizer)
    theta = thrift.Theta.create(start.params, start.model_state, optimizer)
    single, _ = thrift.over_rotations(task, theta, start.phi_params, problems.first_batch(batch), (0.5, 0.25))
    gradient = problems.phi_gradient(TINY, start, batch, meta_batch_fraction=(0.5, 0.25))
    np.testing.assert_allclose(single[0], thrift.ravel_pytree(gradient)[0], rtol=1e-4, atol=1e-7)
