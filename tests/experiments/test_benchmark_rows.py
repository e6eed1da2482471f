"""What the figures of the benchmark are of: which time, over which, in which unit."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adalfl_jax.hypergradient import ESTIMATORS, ONE_INNER_STEP
from adalfl_jax.task_losses import softmax_cross_entropy
from experiments.benchmark import __main__ as program
from experiments.benchmark import checkpoints, estimators, parts, peers, problems, scaling, thrift, training_program
from experiments.benchmark.timing import Program, time_in_turn
from tests.training.tiny import tiny_config

TINY = problems.Problem("logistic", (4, 4, 1), batch_size=8, num_steps=4, num_outputs=3)
MODULES = (checkpoints, estimators, parts, scaling, thrift, training_program)
CONFIG = tiny_config(num_seeds=2, num_steps=12, eval_every=4)


@pytest.fixture(autouse=True)
def timed(monkeypatch):
    """Programs are run once, and the first is told to take 1 ms a step, the second 2, and so on."""

    def tell_times(programs, num_rounds):
        for each in programs.values():
            each.run(each.restart())
        return {name: [float(place)] * num_rounds for place, name in enumerate(programs, start=1)}

    for module in MODULES:
        monkeypatch.setattr(module, "time_in_turn", tell_times)


def medians(rows, key="ratio"):
    return [row[key].median for row in rows]


def test_milliseconds_are_of_a_step_and_without_the_restart(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def take(seconds):
        now[0] += seconds

    one = Program(restart=lambda: take(100.0), run=lambda state: take(0.5), num_steps=5)
    assert time_in_turn({"one": one}, 2) == {"one": pytest.approx([100.0, 100.0])}


def test_programs_wait_for_the_device_before_and_after_the_clock(monkeypatch):
    start, batches = problems.draw_start(TINY), problems.draw_batches(TINY, 2)
    made = problems.task_loss_program(TINY, start, batches)
    waits, wait = [], jax.block_until_ready
    monkeypatch.setattr(jax, "block_until_ready", lambda tree: waits.append(1) or wait(tree))
    state = made.restart()
    assert len(waits) == 1
    made.run(state)
    assert len(waits) == 2


def test_operations_are_counted_of_a_step_however_many_there_are():
    start = problems.draw_start(TINY)
    counted = [problems.task_loss_program(TINY, start, problems.draw_batches(TINY, count)).flops() for count in (1, 3)]
    assert counted[0] == counted[1] > 0


def test_a_bilevel_step_is_told_in_task_loss_steps():
    (row,) = scaling.sweep("size", {"tiny": TINY}, 2, 3).rows
    assert (row["task_loss_ms"], row["bilevel_ms"], row["ratio"]) == (1, 2, (2, 2, 2))


def test_the_parts_of_a_step_are_told_in_task_loss_steps(monkeypatch):
    monkeypatch.setitem(parts.PROBLEMS, "tiny", TINY)
    monkeypatch.setattr(parts, "title", lambda name: name)
    rows = parts._table("tiny", 2, 3).rows
    assert rows[0]["part"] == problems.TASK_LOSS
    assert [row["ms"] for row in rows] == medians(rows) == list(range(1, len(rows) + 1))
    start, batches = problems.draw_start(TINY), problems.draw_batches(TINY, 2)
    flops = problems.task_loss_program(TINY, start, batches).flops()
    assert rows[0]["gflop"] == pytest.approx(flops / 1e9)


def test_products_of_many_seeds_are_told_in_those_of_one():
    table = parts.products({"a": (2, 3, 3)}, 4, 3)
    assert (table.rows[0]["ms_1"], table.rows[0]["ms_4"], table.rows[0]["ratio"].median) == (1, 2, 2)
    assert parts.product_program((2, 3, 3), 2).num_steps == parts.NUM_PRODUCTS


def test_estimators_are_told_in_task_loss_steps_with_their_own_error():
    variants = {"forward": {}, "a quarter": {"meta_batch_fraction": 0.25}}
    rows = estimators.one_step("", TINY, variants, 3).rows
    assert medians(rows, "to_task_loss") == [1, 2, 3]
    assert rows[1]["error"] < 1e-4 < 0.05 < rows[2]["error"]
    assert estimators.COSTS["GFLOP"]({"flops": 2e9}) == "2"
    assert estimators.COSTS["temporary MB"]({"temporary_bytes": 3e6}) == "3"


@pytest.mark.slow
def test_k_steps_are_told_in_task_loss_steps(monkeypatch):
    plain, make = [], estimators.task_loss_program
    monkeypatch.setattr(estimators, "task_loss_program", lambda *given: plain.append(make(*given)) or plain[-1])
    rows = estimators.k_steps("", TINY, (2,), 3).rows
    assert [base.num_steps for base in plain] == [TINY.num_steps]
    assert [row["program"] for row in rows] == [name for name in ESTIMATORS if name not in ONE_INNER_STEP]
    assert medians(rows, "to_task_loss") == list(range(2, len(rows) + 2))


def test_thrift_is_what_the_rows_say(monkeypatch):
    losses, options, make = [], [], thrift.task_loss_program

    def of_the_task_loss(*given):
        losses.extend(given[3:])
        return make(*given)

    def bilevel(problem, start, batches, **given):
        options.append(given)
        return make(problem, start, batches)

    monkeypatch.setattr(thrift, "task_loss_program", of_the_task_loss)
    monkeypatch.setattr(thrift, "bilevel_program", bilevel)
    rows = thrift.costs("", TINY, 3).rows
    assert medians(rows, "to_task_loss") == list(range(1, len(rows) + 1))
    (frozen,) = losses
    targets, outputs = jnp.array([0, 1]), jnp.array([[0.3, 0.2], [0.1, 0.9]])
    assert frozen(targets, outputs) != softmax_cross_entropy(targets, outputs)
    said = dict(zip((row["program"] for row in rows[2:]), options, strict=True))
    for words, share in (("half of the batch", 0.5), ("a quarter", 0.25), ("an eighth", 0.125)):
        assert said[words] == {"meta_batch_fraction": share}
    assert said["every 4th step"] == {"outer_every": 4}


@pytest.mark.parametrize(("num_steps", "taken"), [(4, 4), (5, 8), (None, 8)])
def test_thrift_takes_whole_rounds_of_four_steps(num_steps, taken, monkeypatch):
    found = []
    monkeypatch.setitem(thrift.PROBLEMS, "tiny", TINY._replace(num_steps=7))
    monkeypatch.setattr(thrift, "title", lambda name: name)
    monkeypatch.setattr(thrift, "costs", lambda heading, problem, rounds: found.append(problem.num_steps))
    monkeypatch.setattr(thrift, "bias", lambda *given, **named: None)
    thrift.thrift_suite(["tiny"], num_steps, 3)
    assert found == [taken]


@pytest.mark.parametrize("suite", ["step", "seeds"])
def test_seeds_are_told_in_one_seed_and_estimators_in_the_task_loss(suite, monkeypatch):
    seeds = []

    def make(config, dataset, method, num_steps):
        seeds.append(config.num_seeds)
        return Program(lambda: None, lambda state: None, 1)

    monkeypatch.setattr(training_program, "make_program", make)
    if suite == "step":
        rows = training_program.step_suite(CONFIG, None, 2, 3)[0].rows
        assert set(seeds) == {1}
        assert medians(rows) == list(range(1, len(rows) + 1))
    else:
        rows = training_program.seeds_suite(CONFIG, None, 2, 3, counts=(1, 3))[0].rows
        assert seeds == [1, 3, 1, 3]
        assert medians(rows) == [1, 2, 1, 4 / 3]


def test_checkpoints_are_told_in_runs_without_and_in_seconds(monkeypatch):
    kept = []
    monkeypatch.setattr(
        checkpoints, "_make_runner", lambda *given: lambda config, workdir: kept.append(config.checkpoint)
    )
    config = dataclasses.replace(CONFIG, checkpoint=dataclasses.replace(CONFIG.checkpoint, keep=2, every_steps=0))
    rows = checkpoints.checkpoints_suite(config, None, None, 3)[0].rows
    assert [(each.keep, each.every_steps) for each in kept] == [(0, 0), (2, 0), (2, config.eval_every)]
    assert medians(rows) == [1, 2, 3]
    np.testing.assert_allclose([row["seconds"] for row in rows], [12e-3, 24e-3, 36e-3])
    assert rows[2]["num_saves"] == 3
    assert rows[2]["seconds_a_save"] == pytest.approx((36e-3 - 12e-3) / 3)


def test_peers_are_told_in_their_own_task_loss_steps_and_in_ours():
    times = {"JAX, task loss": [1.0], peers.OURS: [2.0], "PyTorch, task loss": [3.0], "PyTorch, higher": [12.0]}
    row = peers._row(times, "PyTorch, higher")
    assert (row["ms"], row["to_task_loss"].median, row["to_ours"].median) == (12, 4, 6)


def test_a_suite_gets_the_steps_rounds_problems_and_data_of_the_command_line(monkeypatch):
    given = []
    monkeypatch.setattr(peers, "peers_suite", lambda *arguments: given.append(arguments) or [])
    monkeypatch.setattr(training_program, "dataset_of", lambda config, random_data: given.append(random_data))
    monkeypatch.setattr(training_program, "step_suite", lambda *arguments: given.append(arguments[2:]) or [])
    flags = {"_STEPS": 7, "_ROUNDS": 4, "_PROBLEMS": ["mlp"], "_RANDOM_DATA": False, "CONFIG": None}
    for name, value in flags.items():
        monkeypatch.setattr(program, name, type("Flag", (), {"value": value}))
    monkeypatch.setattr(program.TrainConfig, "from_mapping", lambda values: None)
    program._run("peers")
    program._run("step")
    assert given == [(["mlp"], 7, 4), False, (7, 4)]
