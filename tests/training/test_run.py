import json
import os
import types
import weakref

import chex
import jax
import numpy as np
import pytest
import scipy.stats
from tbparse import SummaryReader

import adalfl_jax
from adalfl_jax.training import ConfigError, DivergenceError, WorkdirError, compare, run, train
from adalfl_jax.training.checkpoint import load_state, save_state
from adalfl_jax.training.initial import init_phi, init_theta, make_seed_keys
from adalfl_jax.training.results import MethodResult
from adalfl_jax.training.setup import make_setup
from adalfl_jax.training.stage import Stage
from adalfl_jax.training.state import RunState
from tests.training.tiny import DIABETES, final_state, records, snapshot, tiny_config

PNG = b"\x89PNG"
TOO_FAST = 1e30  # a learning rate at which the second step is not finite


@pytest.fixture(scope="module")
def order_on_disk():
    """The inodes of what the comparison is sure to be on the disk, in that order."""
    return []


@pytest.fixture(scope="module")
def comparison(tmp_path_factory, order_on_disk):
    """All four methods on digits: the config, its workdir and the summary."""
    config, keep = tiny_config({"tuning.learning_rates": (0.01, 0.3, TOO_FAST)}), os.fsync
    folder = tmp_path_factory.mktemp("comparison") / "run"

    def record(file):
        order_on_disk.append(os.fstat(file).st_ino)
        keep(file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", record)
        return config, folder, compare(config, folder)


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """The task loss alone."""
    config = tiny_config(method="task_loss")
    folder = tmp_path_factory.mktemp("training") / "run"
    return config, folder, train(config, folder)


def largest_change(left, right):
    return max(jax.tree.leaves(jax.tree.map(lambda a, b: float(abs(a - b).max()), left, right)))


def test_comparison_leaves_every_file(comparison):
    _, folder, _ = comparison
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "figures",
        "learned_loss.safetensors",
        "loss_shapes.npz",
        "metrics.jsonl",
        "preprocessing.json",
        "report.html",
        "states",
        "summary.json",
        "tensorboard",
    ]
    figures = {path.name: path.read_bytes()[:4] for path in (folder / "figures").iterdir()}
    assert figures == {"learning_curves.png": PNG, "loss_shapes.png": PNG, "gradient_scale.png": PNG}
    states = sorted(path.name for path in (folder / "states").iterdir())
    assert states == ["adalfl", "ml3", "task_loss", "tuned_task_loss"]


def test_training_on_the_task_loss_leaves_no_report_and_no_learned_loss(training):
    _, folder, _ = training
    names = sorted(path.name for path in folder.iterdir())
    assert names == [
        "config.json",
        "figures",
        "metrics.jsonl",
        "preprocessing.json",
        "states",
        "summary.json",
        "tensorboard",
    ]
    assert [path.name for path in (folder / "figures").iterdir()] == ["learning_curves.png"]


def test_config_file_holds_the_config_and_the_command(comparison, training):
    for command, (config, folder, _) in (("compare", comparison), ("train", training)):
        assert json.loads((folder / "config.json").read_text()) == {"command": command, **config.to_dict()}


@pytest.mark.usefixtures("without_figures")
def test_progress_says_which_stage_of_how_many_goes_on(tmp_path, capsys):
    methods = ("task_loss", "tuned_task_loss", "ml3", "adalfl")
    overrides = {"model.name": "logistic", "num_seeds": 1, "tuning.learning_rates": (0.1, 0.3)}
    config = tiny_config(overrides, methods=methods, num_steps=2, eval_every=2)
    compare(config, tmp_path / "run")
    shown = [line.partition("  ")[0] for line in capsys.readouterr().err.splitlines() if "steps/s" in line]
    assert list(dict.fromkeys(shown)) == [
        "1 of 6: task loss",
        "2 of 6: task loss, rate 0.1",
        "3 of 6: task loss, rate 0.3",
        "4 of 6: offline phase (ML3)",
        "5 of 6: ML3",
        "6 of 6: AdaLFL",
    ]


def test_summary_is_what_the_run_returns(comparison):
    config, folder, summary = comparison
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert summary["seeds"] == [0, 1]
    assert list(summary["methods"]) == list(config.methods)


def test_summary_values_agree_with_each_other(comparison):
    _, _, summary = comparison
    for info in summary["methods"].values():
        for split in ("test", "valid"):
            values = info[split]["per_seed"]
            assert len(values) == 2
            assert info[split]["mean"] == pytest.approx(np.mean(values))
            assert info[split]["std"] == pytest.approx(np.std(values, ddof=1))


def test_summary_compares_adalfl_with_every_other_method(comparison):
    _, _, summary = comparison
    assert [(row["method"], row["against"]) for row in summary["comparisons"]] == [
        ("adalfl", "task_loss"),
        ("adalfl", "tuned_task_loss"),
        ("adalfl", "ml3"),
    ]
    for row in summary["comparisons"]:
        means = [summary["methods"][row[key]]["test"]["mean"] for key in ("method", "against")]
        assert row["mean_difference"] == pytest.approx(means[0] - means[1])
    tests = [row for row in summary["comparisons"] if row["p_value"] is not None]
    assert tests
    adjusted = scipy.stats.false_discovery_control([row["p_value"] for row in tests])
    np.testing.assert_allclose([row["adjusted_p_value"] for row in tests], adjusted)


def test_metrics_hold_every_evaluation_of_every_seed(comparison):
    config, folder, summary = comparison
    rows = [row for row in records(folder) if row["phase"] == "training"]
    keys = [(row["method"], row["seed"], row["step"]) for row in rows]
    assert sorted(keys) == sorted((m, seed, step) for m in config.methods for seed in (0, 1) for step in (0, 10, 20))
    last = {(row["method"], row["seed"]): row["test/error_rate"] for row in rows if row["step"] == 20}
    for method, info in summary["methods"].items():
        assert [last[method, seed] for seed in (0, 1)] == pytest.approx(info["test"]["per_seed"])


def test_offline_phase_is_recorded_once(comparison):
    _, folder, _ = comparison
    rows = [row for row in records(folder) if row["phase"] == "offline"]
    assert [(row["method"], row["seed"], row["step"]) for row in rows] == [("offline", 0, 10), ("offline", 1, 10)]
    assert all({"train/inner_loss", "train/outer_loss", "train/hypergradient_norm"} <= set(row) for row in rows)


def test_all_methods_of_a_seed_start_from_the_same_theta(comparison):
    _, folder, _ = comparison
    start = {}
    for row in records(folder):
        if row["phase"] == "training" and row["step"] == 0:
            start.setdefault(row["seed"], set()).add((row["test/error_rate"], row["valid/error_rate"]))
    assert len(start[0]) == len(start[1]) == 1
    assert start[0] != start[1]


@pytest.mark.filterwarnings("ignore:The inplace keyword")  # tbparse's, of pandas
def test_tensorboard_holds_what_the_metrics_hold(comparison):
    _, folder, _ = comparison
    scalars = SummaryReader(str(folder / "tensorboard" / "adalfl" / "seed_1")).scalars
    shown = {(row.step, row.tag): row.value for row in scalars.itertuples()}
    written = {
        (row["step"], f"training/{name}"): value
        for row in records(folder)
        if (row["method"], row["seed"]) == ("adalfl", 1)
        for name, value in row.items()
        if name not in ("method", "phase", "seed", "step")
    }
    assert shown == pytest.approx(written)
    assert {path.name for path in (folder / "tensorboard").iterdir()} == {
        "task_loss",
        "tuned_task_loss",
        "offline",
        "ml3",
        "adalfl",
    }


def test_learned_loss_is_that_of_the_seed_with_the_best_validation_metric(comparison):
    config, folder, summary = comparison
    frozen = adalfl_jax.load_learned_loss(folder / "learned_loss.safetensors")
    best = int(np.argmin(summary["methods"]["adalfl"]["valid"]["per_seed"]))
    origin = {key: frozen.metadata[key] for key in summary["learned_loss"]}
    assert origin == summary["learned_loss"]
    assert (origin["method"], origin["seed"], origin["step"]) == ("adalfl", best, 20)
    assert frozen.metadata["config"] == config.to_dict()
    phi = final_state(config, folder, "adalfl").phi
    assert phi is not None
    chex.assert_trees_all_equal(frozen.params, jax.tree.map(lambda leaf: leaf[best], phi.params))


def test_phi_of_ml3_stays_and_that_of_adalfl_moves(comparison):
    config, folder, _ = comparison
    with np.load(folder / "loss_shapes.npz") as shapes:
        ml3, adalfl = shapes["ml3/values"], shapes["adalfl/values"]
        assert ml3.shape == adalfl.shape == (2, 3, 2, len(shapes["predictions"]))
    np.testing.assert_array_equal(ml3, np.broadcast_to(ml3[:, :1], ml3.shape))
    np.testing.assert_array_equal(ml3[:, 0], adalfl[:, 0])  # both begin where the offline phase ended
    assert (abs(adalfl[:, -1] - adalfl[:, 0]).max(axis=(1, 2)) > 1e-4).all()
    ends = [final_state(config, folder, method).phi for method in ("ml3", "adalfl")]
    assert largest_change(ends[0].params, ends[1].params) > 1e-4


def test_the_seconds_of_the_offline_phase_are_told_beside_those_of_training(comparison):
    _, _, summary = comparison
    offline = {method: info["seconds"]["offline"] for method, info in summary["methods"].items()}
    assert offline["task_loss"] == offline["tuned_task_loss"] == 0
    assert offline["ml3"] == offline["adalfl"] > 0  # they share it
    assert all(info["seconds"]["training"] > 0 for info in summary["methods"].values())


def test_tuning_keeps_the_rate_with_the_best_validation_metric(comparison):
    _, _, summary = comparison
    info = summary["methods"]["tuned_task_loss"]
    finished = {rate: value for rate, value in info["tuning"].items() if value is not None}
    assert set(info["tuning"]) - set(finished) == {"1e+30"}
    assert str(info["learning_rate"]) == min(finished, key=finished.__getitem__) == "0.3"
    assert info["tuning"]["0.3"] == pytest.approx(info["valid"]["mean"])


def test_tuning_holds_the_best_result_so_far_alone():
    made = []

    def training(method, phi, rate, observe):
        assert sum(each() is not None for each in made) <= 2  # the best and the last
        valid = np.array([abs(rate - 2.0)])
        result = MethodResult(method, rate, RunState(None, None), valid, valid, 1.0, [], [], None)
        made.append(weakref.ref(result))
        return result

    config = tiny_config({"tuning.learning_rates": (5.0, 3.0, 1.0, 4.0, 6.0, 7.0)})
    stand_in = types.SimpleNamespace(_setup=types.SimpleNamespace(config=config), _training=training)
    result = run._MethodRunner._tuned(stand_in, "tuned_task_loss")
    assert (result.learning_rate, result.seconds) == (3.0, 6.0)  # the first of equals
    assert result.tuning == {"5.0": 3.0, "3.0": 1.0, "1.0": 1.0, "4.0": 2.0, "6.0": 4.0, "7.0": 5.0}


def test_the_seconds_of_a_search_are_those_of_all_its_rates():
    def training(method, phi, rate, observe):
        if rate == 2.0:
            error = DivergenceError(method, "inner_loss", 1, 0, RunState(None, None), 0, "")
            error.seconds = 20.0
            raise error
        valid = np.array([rate])
        return MethodResult(method, rate, RunState(None, None), valid, valid, 10 * rate, [], [], None)

    config = tiny_config({"tuning.learning_rates": (1.0, 2.0, 3.0)})
    stand_in = types.SimpleNamespace(
        _setup=types.SimpleNamespace(config=config), _training=training, _writer=lambda method: None
    )
    result = run._MethodRunner._tuned(stand_in, "tuned_task_loss")
    assert result.seconds == 10 + 20 + 30  # one diverged
    assert result.tuning == {"1.0": 1.0, "2.0": None, "3.0": 3.0}


@pytest.mark.usefixtures("without_figures")
@pytest.mark.parametrize("method", ["task_loss", pytest.param("adalfl", marks=pytest.mark.slow)])
def test_vmapped_seeds_equal_single_runs(method, tmp_path):
    several = tiny_config(method=method, num_seeds=2)
    together = train(several, tmp_path / "several")["methods"][method]["test"]["per_seed"]
    state = final_state(several, tmp_path / "several", method)
    for seed in range(2):
        single = tiny_config(method=method, num_seeds=1, seed=seed)
        alone = train(single, tmp_path / f"seed_{seed}")["methods"][method]["test"]["per_seed"]
        assert alone == pytest.approx(together[seed : seed + 1], abs=1e-5)
        expected = jax.tree.map(lambda leaf, index=seed: leaf[index : index + 1], state.theta.params)
        chex.assert_trees_all_close(
            final_state(single, tmp_path / f"seed_{seed}", method).theta.params, expected, rtol=0, atol=1e-5
        )


@pytest.mark.usefixtures("without_figures")
@pytest.mark.parametrize("method", ["task_loss", pytest.param("adalfl", marks=pytest.mark.slow)])
def test_chunks_of_one_length_run_one_compiled_program(method, tmp_path, monkeypatch):
    made = []

    def spy(make):
        def wrapped(*arguments):
            made.append(make(*arguments))
            return made[-1]

        return wrapped

    for name in ("make_offline_program", "make_training_program"):
        monkeypatch.setattr(run, name, spy(getattr(run, name)))
    overrides = {"model.name": "logistic", "num_steps": 8, "eval_every": 3, "offline.num_steps": 6}
    train(tiny_config(overrides, method=method), tmp_path / "run")
    sizes = [phase.advance._cache_size() for phase in made]
    assert sizes == ([2] if method == "task_loss" else [1, 2])  # chunks of 3, 3 and 2 steps; of 3 and 3


@pytest.mark.slow
@pytest.mark.usefixtures("without_figures")
@pytest.mark.parametrize(("method", "lengths"), [("task_loss", (10, 7, 40)), ("adalfl", (10, 5))])
def test_result_does_not_depend_on_the_length_of_a_chunk(method, lengths, tmp_path):
    overrides = {"num_steps": 15, "offline.num_steps": 15, "num_seeds": 1}
    states = []
    for eval_every in lengths:
        config = tiny_config(overrides, method=method, eval_every=eval_every)
        train(config, tmp_path / str(eval_every))
        states.append(final_state(config, tmp_path / str(eval_every), method))
    for other in states[1:]:
        chex.assert_trees_all_close(other.theta.params, states[0].theta.params, rtol=0, atol=1e-6)
        if states[0].phi is not None:
            chex.assert_trees_all_close(other.phi.params, states[0].phi.params, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("without_figures")
@pytest.mark.parametrize("method", [pytest.param("task_loss", marks=pytest.mark.slow), "adalfl"])
def test_training_lowers_the_error(method, tmp_path):
    # a loss as drawn may point the wrong way; the offline phase turns it, at this rate within some hundred steps
    overrides = {"num_steps": 300, "eval_every": 300, "offline.num_steps": 300, "offline.learning_rate": 0.01}
    train(tiny_config(overrides, method=method), tmp_path / "run")
    error = {(row["seed"], row["step"]): row.get("test/error_rate") for row in records(tmp_path / "run")}
    for seed in (0, 1):
        assert error[seed, 0] > 0.7
        assert error[seed, 300] < 0.3


def test_finished_run_is_not_repeated(training):
    config, folder, summary = training
    before = snapshot(folder)
    assert train(config, folder) == summary
    assert snapshot(folder) == before


def test_a_run_that_another_process_has_just_finished_is_not_repeated(training, monkeypatch):
    config, folder, summary = training
    before, look, answers = (
        snapshot(folder),
        run.layout.finished_summary,
        iter([None]),
    )  # not finished at the first look
    monkeypatch.setattr(run.layout, "finished_summary", lambda *given: next(answers, look(*given)))
    assert train(config, folder) == summary
    assert snapshot(folder) == before
    assert not [*answers]


def test_workdir_with_another_run_is_refused_and_left_alone(training):
    _, folder, _ = training
    before = snapshot(folder)
    with pytest.raises(WorkdirError, match="num_steps: 20 -> 30"):
        train(tiny_config(method="task_loss", num_steps=30), folder)
    assert snapshot(folder) == before


def test_parts_that_do_not_fit_are_found_before_the_workdir_is_made(tmp_path):
    with pytest.raises(ConfigError, match="lenet5"):
        train(tiny_config({"model.name": "lenet5"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("without_figures")
def test_offline_phase_unrolls_several_inner_steps(tmp_path):
    one, two = (tiny_config({"offline.num_inner_steps": number}, method="ml3") for number in (1, 2))
    for name, config in (("one", one), ("two", two)):
        summary = train(config, tmp_path / name)
        assert np.isfinite(summary["methods"]["ml3"]["test"]["per_seed"]).all()
    ends = [final_state(config, tmp_path / name, "ml3").phi.params for name, config in (("one", one), ("two", two))]
    chex.assert_tree_all_finite(ends[1])
    assert largest_change(*ends) > 1e-5


@pytest.mark.slow
def test_learned_learning_rate_has_no_loss_shape(tmp_path):
    config = tiny_config({"learned_loss.family": "scaled_task_loss"}, methods=("task_loss", "adalfl"))
    summary = compare(config, tmp_path)
    assert isinstance(
        adalfl_jax.load_learned_loss(tmp_path / "learned_loss.safetensors").loss, adalfl_jax.ScaledTaskLoss
    )
    assert sorted(path.stem for path in (tmp_path / "figures").iterdir()) == ["gradient_scale", "learning_curves"]
    assert "shape of the learned loss" not in (tmp_path / "report.html").read_text()
    assert not (tmp_path / "loss_shapes.npz").exists()
    assert summary["learned_loss"]["method"] == "adalfl"
    scale = np.exp(final_state(config, tmp_path, "adalfl").phi.params["log_scale"])
    last = {row["seed"]: row for row in records(tmp_path) if (row["method"], row["step"]) == ("adalfl", 20)}
    for seed in (0, 1):  # its gradient is the task loss's, scaled
        assert last[seed]["gradient_scale"] == pytest.approx(scale[seed], rel=1e-4)
        assert last[seed]["gradient_cosine"] == pytest.approx(1, abs=1e-4)
        assert 0 < last[seed]["valid_gradient_cosine"] < 1  # that of the validation split is another


@pytest.mark.slow
@pytest.mark.usefixtures("without_figures")
def test_every_setting_of_the_inner_optimizer_together_trains(tmp_path):
    overrides = DIABETES | {
        "inner.momentum": 0.9,
        "inner.nesterov": True,
        "inner.weight_decay": 1e-3,
        "inner.clip_norm": 1.0,
        "inner.schedule": "cosine",
        "outer.split": "valid",
        "batch_size": 20,
        "num_seeds": 1,
        "offline.num_steps": 0,
        "learned_loss.use_bias": True,
    }
    config = tiny_config(overrides, method="adalfl")
    train(config, tmp_path)
    state = final_state(config, tmp_path, "adalfl")
    chex.assert_tree_all_finite(state.theta.params)
    start = init_theta(make_setup(config), make_seed_keys(config.seeds))
    assert largest_change(state.theta.params, start.params) > 1e-3


@pytest.mark.parametrize("has_phi", [False, True])
def test_saved_state_loads_as_it_was(has_phi, tmp_path):
    config = tiny_config({"inner.momentum": 0.5})
    setup, keys = make_setup(config), make_seed_keys(config.seeds)
    state = RunState(init_theta(setup, keys), init_phi(setup, keys) if has_phi else None)
    save_state(tmp_path / "state", state)
    loaded = load_state(tmp_path / "state", jax.eval_shape(lambda: state))
    assert jax.tree.structure(loaded) == jax.tree.structure(state)
    chex.assert_trees_all_equal(loaded, state)


def test_what_the_summary_says_is_whole_is_on_the_disk_before_it(comparison, order_on_disk):
    _, folder, _ = comparison
    names = ("metrics.jsonl", "loss_shapes.npz", "learned_loss.safetensors", "summary.json")
    *results, summary = (order_on_disk.index((folder / name).stat().st_ino) for name in names)
    assert all(place < summary for place in results)


@pytest.mark.usefixtures("without_figures")
@pytest.mark.parametrize(
    ("changes", "marked"),
    [
        ({"outer.split": "valid"}, {"fine_tuned"}),
        pytest.param({"outer.split": "valid", "methods": ("reweighting",)}, set(), marks=pytest.mark.slow),
        pytest.param(
            {"outer.split": "valid", "outer.joint_share": 0.5}, {"task_loss", "fine_tuned"}, marks=pytest.mark.slow
        ),
        pytest.param({"outer.split": "valid", "outer.split_fraction": 0.5}, set(), marks=pytest.mark.slow),
    ],
)
def test_a_summary_tells_who_trains_on_the_examples_of_the_validation_metric(changes, marked, tmp_path):
    changes = {"methods": ("task_loss", "fine_tuned")} | changes
    config = tiny_config(changes, num_steps=4, eval_every=2, num_seeds=1)
    methods = compare(config, tmp_path)["methods"]
    assert {name for name, info in methods.items() if info.get("trains_on_valid")} == marked


def test_rates_of_a_search_have_folders_of_their_own_however_close_they_are():
    rates = (0.1, 0.12, 0.1000001, 1e-5, 3e-4)
    stages = [Stage("tuned_task_loss", None, None, 1, rate, None) for rate in rates]
    assert len({stage.name for stage in stages}) == len(rates)


@pytest.mark.parametrize(
    ("method", "is_told"), [("task_loss", True), ("adalfl", True), ("fine_tuned", True), ("reweighting", False)]
)
def test_what_joins_at_the_end_is_trained_on_but_by_what_takes_weights_from_it_alone(method, is_told):
    config = tiny_config({"outer.split": "valid", "outer.joint_share": 0.2})
    assert config.trains_on_valid(method) is is_told
    held_out = tiny_config({"outer.split": "valid", "outer.joint_share": 0.2, "outer.split_fraction": 0.5})
    assert not held_out.trains_on_valid(method)


@pytest.mark.usefixtures("without_figures")
def test_milestones_that_no_schedule_looks_at_are_told(tmp_path):
    config = tiny_config({"inner.milestones": (5,), "inner.schedule": "cosine"}, method="task_loss")
    with pytest.warns(UserWarning, match=r"config\.inner\.milestones \(5,\) has no effect with inner\.sch"):
        run.train(config, tmp_path)
