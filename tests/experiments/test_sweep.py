"""Sweeps: which runs there are, and what is told of them."""

import contextlib
import csv
import itertools
import json
import sys

import jax
import numpy as np
import pytest
import scipy.stats
from absl import flags
from absl.testing import flagsaver
from ml_collections.config_flags import get_config_filename

from adalfl_jax import data
from adalfl_jax.learned_losses import save_learned_loss
from adalfl_jax.training import ConfigError, TrainConfig, train
from adalfl_jax.training.files import lock_folder
from adalfl_jax.training.start import load_start
from experiments import launch
from experiments.sweep import __main__ as program
from experiments.sweep import jobs
from experiments.sweep.grid import Point, _folder_name, make_points
from experiments.sweep.table import add_differences, results_table
from experiments.tables import render_table
from tests.training.tiny import ROOT, SETTINGS, snapshot, tiny_config, with_value

# ml_collections loads a configuration in a way that Python means to drop
pytestmark = [
    pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning"),
    pytest.mark.usefixtures("verbosity"),
]

TINY = SETTINGS | {"method": "task_loss", "num_steps": 4, "eval_every": 2}


@pytest.fixture(autouse=True)
def no_handlers(monkeypatch):
    """Without handlers of submitit's own, for whose sake it closes those of pytest."""
    monkeypatch.setenv("SUBMITIT_LOG_LEVEL", "NOCONFIG")


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Runs the program here; returns what it printed and its last words, None if it has none."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run_program(*arguments, settings=TINY, file=ROOT / "configs" / "digits_mlp.py"):
        varied = [argument.split("=")[1] for argument in arguments if argument.startswith("--vary=")]
        fields = [f"--config.{name}={value}" for name, value in settings.items() if name not in varied]
        argv = ["sweep", f"--config={file}", f"--workdir={tmp_path / 'sweep'}", *fields, *arguments]
        monkeypatch.setattr(sys, "argv", argv)  # where the fields of a configuration are looked for
        with flagsaver.flagsaver():
            ended = None
            try:
                program.main(launch.parse_flags(argv))
            except SystemExit as end:
                ended = end.code
        out, run_program.told = capsys.readouterr()
        return out, ended

    return run_program


@pytest.fixture
def started(monkeypatch):
    """No run is started; those that would be."""
    found = []
    monkeypatch.setattr(program, "_run", lambda points, root: found.extend(points))
    return found


def test_every_combination_is_a_run_of_its_own(run, started):
    out, ended = run("--vary=inner.learning_rate=0.01,0.1", "--vary=model.hidden_sizes=(4,),[5, 6]")
    assert ended is None
    assert [point.workdir.name for point in started] == [
        f"inner.learning_rate={rate},model.hidden_sizes={sizes}"
        for rate, sizes in itertools.product(("0.01", "0.1"), ("_4,_", "_5,_6_"))
    ]
    assert [point.config.model.hidden_sizes for point in started] == [(4,), (5, 6)] * 2
    assert [point.config.inner.learning_rate for point in started] == [0.01, 0.01, 0.1, 0.1]
    assert {point.config.num_steps for point in started} == {4}
    assert out.count("not begun") == 4


def test_an_option_may_be_a_number_of_numpy():
    values = with_value("model.options.dropout_rate", np.float64(0.3))
    (point,) = make_points({"model.options.dropout_rate": ["0.5"]}, values, "mine.py", "train", ROOT)
    assert point.config.model.options == {"dropout_rate": 0.5}


def test_true_and_false_are_written_as_on_the_command_line(run, started):
    run("--vary=inner.nesterov=true,False", settings=TINY | {"inner.momentum": 0.9})
    assert [point.config.inner.nesterov for point in started] == [True, False]
    assert "must be True or False; got 'maybe'" in run("--vary=inner.nesterov=maybe")[1]


def test_options_that_the_file_sets_are_varied(run, started, monkeypatch, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from configs import default\ndef get_config():\n  config = default.get_config()\n"
        "  config.model.options.dropout_rate = 0.5\n  return config\n"
    )
    _, ended = run("--vary=model.options.dropout_rate=0,0.25", file=file)
    assert ended is None
    assert [point.config.model.options for point in started] == [{"dropout_rate": 0.0}, {"dropout_rate": 0.25}]
    _, _, _, *arguments = program._command_of(started[1])
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    with flagsaver.flagsaver():
        launch.parse_flags(sys.argv)
        assert TrainConfig.from_mapping(launch.CONFIG.value) == started[1].config
    _, ended = run("--vary=model.options.dropout=0.1", file=file)
    assert ended.endswith(
        "config.model.options.dropout is an option that the file has to set first; write "
        "config.model.options.dropout = ... there"
    )
    _, ended = run("--vary=model.options.dropout_rate=0.1,none", file=file)
    assert ended.endswith("dropout_rate must be of the kind that the file sets, 0.5; got none")


def test_the_empty_text_is_a_value_as_any_other(run, started):
    run("--vary=baseline.loss=,symmetric_cross_entropy")
    assert [point.config.baseline.loss for point in started] == ["", "symmetric_cross_entropy"]


def test_runs_of_long_names_have_folders_of_their_own(run, started, tmp_path):
    sizes = [f"({', '.join(['100'] * 60 + [last])})" for last in ("4", "5")]
    _, ended = run(f"--vary=model.hidden_sizes={','.join(sizes)}", "--vary=num_steps=4")
    assert ended is None
    names = [point.workdir.name for point in started]
    assert len(set(names)) == 2
    assert {name.startswith("model.hidden_sizes=_100,_100,") and len(name) for name in names} == {200}
    assert [point.config.model.hidden_sizes[-1] for point in started] == [4, 5]


@pytest.mark.parametrize(("letter", "count"), [("a", 190), ("é", 100), ("損", 70)])
def test_long_names_that_differ_in_what_is_left_out_differ_in_the_digest_at_their_end(letter, count):
    names = [_folder_name(f"dataset.name={letter * count}{mark}") for mark in ("/", "*")]
    assert len(set(names)) == 2
    for name in names:
        assert 190 < len(name.encode()) <= 200
        assert name.startswith(f"dataset.name={letter}{letter}")


def test_a_name_that_is_just_short_enough_stays_whole():
    name = f"dataset.name={'a' * 187}"
    assert _folder_name(name) == name
    assert _folder_name(f"{name}a")[:200] != name


def test_a_run_is_started_with_its_own_configuration(run, started, monkeypatch):
    settings = TINY | {"methods": ("task_loss", "ml3"), "dataset.name": "diabetes", "inner.nesterov": False}
    run("--vary=task_loss=squared_error,huber", "--vary=inner.milestones=(),(3, 4)", settings=settings)
    for point in started:
        python, _, module, *arguments = program._command_of(point)
        assert (python, module) == (sys.executable, "experiments.train")
        monkeypatch.setattr(sys, "argv", ["train", *arguments])
        with flagsaver.flagsaver():
            launch.parse_flags(sys.argv)
            assert TrainConfig.from_mapping(launch.CONFIG.value) == point.config
            assert launch.WORKDIR.value == str(point.workdir)
            assert get_config_filename(flags.FLAGS["config"]) == str(ROOT / "configs" / "digits_mlp.py")


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ((), []),
        (("--compilation_cache=/mine",), ["--compilation_cache=/mine"]),
        (("--compilation_cache=",), ["--compilation_cache="]),
    ],
)
def test_a_run_is_of_the_program_and_with_the_compiled_programs_that_its_sweep_says(given, kept, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["sweep", "--config=configs/default.py", *given])
    values = with_value("methods", ("task_loss",))
    (point,) = make_points({"num_steps": ["4"]}, values, "configs/default.py", "compare", tmp_path)
    with flagsaver.flagsaver():
        monkeypatch.setattr(launch, "keep_compiled_programs", lambda folder: None)
        launch.parse_flags(sys.argv)
        _, _, module, config, *arguments = program._command_of(point)
    assert module == "experiments.compare"
    assert config == f"--config={ROOT / 'configs' / 'default.py'}"  # wherever its process begins
    assert [argument for argument in arguments if argument.startswith("--compilation_cache")] == kept
    assert "--config.methods=('task_loss',)" in arguments
    assert not any(argument.startswith("--config.method=") for argument in arguments)


def test_runs_start_from_the_learned_loss_that_was_there_when_the_sweep_was_given(tmp_path):
    values, path = with_value("learned_loss.start", str(tmp_path / "loss.safetensors")), tmp_path / "loss.safetensors"
    loss = tiny_config().learned_loss.make("softmax_cross_entropy")
    values["learned_loss"]["hidden_sizes"] = SETTINGS["learned_loss.hidden_sizes"]

    def points_from(seed):
        save_learned_loss(path, loss, loss.init(jax.random.key(seed)))
        return make_points({"inner.momentum": ["0.5", "0.9"]}, values, "configs/default.py", "train", tmp_path)

    first, again, other = (points_from(seed)[0].config for seed in (0, 0, 1))
    assert first == again
    assert first != other
    with pytest.raises(ConfigError, match=r"loss\.safetensors holds .* by now, and .* is wanted"):
        load_start(first)


ONE = ["--vary=num_steps=4"]
REFUSED = {
    "no_field": (["--vary=inner.learning_rat=1"], "--vary=inner.learning_rat=1: unknown field of the configuration"),
    "no_values": (["--vary=num_steps="], "--vary=num_steps= must be FIELD=VALUE,VALUE,..."),
    "half_a_bracket": (
        ["--vary=learned_loss.start=a(b,c"],
        "--vary=learned_loss.start=a(b,c must be FIELD=VALUE,VALUE",
    ),
    "only_commas": (["--vary=num_steps=,"], "num_steps=: config.num_steps must be a whole number; got ''"),
    "twice": (["--vary=num_steps=1", "--vary=num_steps=2"], "--vary=num_steps=2 must be FIELD=VALUE,VALUE,..., each"),
    "a_wrong_type": (["--vary=num_steps=many"], "num_steps=many: config.num_steps must be a whole number; got 'many'"),
    "out_of_range": (["--vary=inner.momentum=0.5,1.5"], "inner.momentum=1.5: config.inner.momentum must be a number"),
    "one_name": (["--vary=num_steps=1,1"], "several runs would be called num_steps=1"),
    "no_dataset": (["--vary=dataset.name=digits,digtis"], "unknown dataset 'digtis'; did you mean 'digits'?"),
    "nothing": ([], "--vary=FIELD=VALUE,VALUE,... must be given; experiments.train trains a single configuration"),
    "set_too": (
        ["--vary=inner.learning_rate=0.1", "--config.inner.learning_rate=0.3"],
        "--vary=inner.learning_rate=0.1 and --config.inner.learning_rate both set that field; leave one of them out",
    ),
    "the_same": (
        ["--vary=inner.momentum=0.5,0.9,0.50"],
        "the runs inner.momentum=0.5 and inner.momentum=0.50 are the same; give each value once",
    ),
    "no_resource": (
        [*ONE, "--resource=nosuch_thing=1"],
        "--executor=local with {'timeout_min': 1440, 'nosuch_thing': 1}: ",
    ),
    "unread": (["--vary=methods=('ml3',)"], "config.methods has no effect on --program=train; leave it out"),
    "set_unread": (
        [*ONE, "--program=compare", "--config.method=ml3"],
        "config.method has no effect on --program=compare; leave it out",
    ),
    "no_slurm": ([*ONE, "--executor=slurm"], "--executor=slurm with "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_run_is_refused_before_anything_is(case, run, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))  # where there is no SLURM
    arguments, text = REFUSED[case]
    out, ended = run(*arguments)
    assert ended.partition("Error: ")[2].startswith(text)
    assert out == ""
    assert not (tmp_path / "sweep" / "logs").exists()
    assert run(*arguments)[1] == ended  # what submitit left there is no other's


def test_without_submitit_the_extra_is_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert run(*ONE) == ("", 'ConfigError: a sweep needs the package submitit; pip install ".[sweep]"')


def test_a_cluster_that_takes_no_jobs_is_told(run, monkeypatch):
    class Executor:
        @contextlib.contextmanager
        def batch(self):
            yield
            raise RuntimeError("sbatch: error: invalid partition")

        def submit(self, job):
            assert job.command[2] == "experiments.train"

    monkeypatch.setattr(jobs, "_make_executor", lambda *_: Executor())
    assert run(*ONE) == ("", "ConfigError: --executor=local takes no jobs: sbatch: error: invalid partition")


@pytest.mark.parametrize("name", ["config.json", "sweep.csv", "notes.txt"])
def test_a_folder_of_other_files_is_no_folder_of_a_sweep(name, run, started, tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / name).write_text("mine")
    before = snapshot(tmp_path)
    for arguments in ((), ("--nosubmit",)):
        assert "is not empty and holds no sweep.json; choose a new folder" in run(*arguments)[1]
    assert not started
    assert snapshot(tmp_path) == before


def test_without_runs_the_table_is_shown_and_nothing_written(run, tmp_path):
    out, ended = run("--vary=num_steps=4,8", "--nosubmit")
    assert (out.count("not begun"), ended) == (2, None)
    assert not list(tmp_path.iterdir())


def test_a_workdir_that_cannot_be_written_to_is_told(run, tmp_path):
    (tmp_path / "sweep").write_text("mine")
    assert run(*ONE)[1] == f"WorkdirError: a workdir must be a folder, and {tmp_path / 'sweep'} is a file; name another"
    assert (tmp_path / "sweep").read_text() == "mine"


def train_here(points, root):
    """Trains runs in this process, and leaves the log that theirs would."""
    for point in points:
        point.log.parent.mkdir(parents=True, exist_ok=True)
        with pytest.warns(UserWarning, match="learns its loss offline") as told:
            train(point.config, point.workdir)
        point.log.write_text("".join(f"warning: {warning.message}\n" for warning in told))


@pytest.mark.usefixtures("without_figures")
@pytest.mark.parametrize("is_here", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["here", "local"])
def test_a_sweep_runs_what_is_not_finished_and_ends_in_a_table(is_here, run, tmp_path, monkeypatch):
    warned = {"method": "ml3", "offline.num_steps": 0}
    settings, root = TINY | warned | {"num_seeds": 1}, tmp_path / "sweep"
    if is_here:
        monkeypatch.setattr(program, "_run", train_here)
    out, ended = run("--vary=inner.learning_rate=0.01", "--executor=local", settings=settings)
    assert ended is None
    assert out.endswith("| 1        | finished |\n\nWarnings of a run are in its log, and in sweep.json.\n")

    def diverge(points, root):
        again.extend(points)
        points[0].log.write_text("warning: too long\nfailed: DivergenceError: task_loss diverged\n")

    again, vary = [], "--vary=inner.learning_rate=0.01,1e30"
    monkeypatch.setattr(program, "_run", diverge)
    out, _ = run(vary, settings=settings)
    assert [point.workdir.name for point in again] == ["inner.learning_rate=1e30"]
    good, bad, *_ = out.splitlines()[-4:]
    assert good.startswith("| 0.01 ")
    assert "| finished " in good
    assert "| failed: DivergenceError: task_loss diverged |" in bad
    assert run(vary, "--nosubmit", settings=settings)[0] == out
    assert len(again) == 1
    kept = snapshot(root)
    run("--vary=inner.learning_rate=0.01", "--nosubmit", settings=settings)
    assert snapshot(root) == kept
    assert "holds a run of another config" in run(vary, settings=settings | {"num_steps": 5})[1]

    rows = json.loads((root / "sweep.json").read_text())
    summary = json.loads((root / "inner.learning_rate=0.01" / "summary.json").read_text())
    assert rows[0]["test_mean"] == summary["methods"]["ml3"]["test"]["mean"]
    assert rows[0]["learning_rate"] == 0.01
    assert [[text[:30] for text in row["warnings"]] for row in rows] == [
        ["ml3 learns its loss offline al"],
        ["too long"],
    ]
    with (root / "sweep.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["inner.learning_rate"] for row in table] == ["0.01", "1e30"]
    assert float(table[0]["valid_mean"]) == rows[0]["valid_mean"]
    assert table[0]["learning_rate"] == "0.01"


ENDS = {
    "2": "import sys; print(1); sys.exit('DivergenceError: it diverged')",
    "4": "import sys; print('SIGTERM: ended after step 3, saved'); sys.exit(143)",
    "8": "import os, signal; print('step 3', flush=True); os.kill(os.getpid(), signal.SIGTERM)",
    "16": "import os, signal; print('step 3', flush=True); os.kill(os.getpid(), signal.SIGKILL)",
}


@pytest.mark.parametrize("executor", ["local", "debug"])
def test_a_run_that_fails_is_told_apart_from_one_that_was_interrupted(executor, run, monkeypatch):
    def command_of(point):
        return [sys.executable, "-c", ENDS[point.overrides["num_steps"]]]

    monkeypatch.setattr(program, "_command_of", command_of)
    vary = f"--vary=num_steps={','.join(ENDS)}"
    out, ended = run(vary, f"--executor={executor}", "--parallel=2")  # and begin the next where one ends
    assert ended == "2 of 4 runs failed; the same command starts them again"
    assert [line.split("|")[-2].strip() for line in out.splitlines()[-4:]] == [
        "failed: DivergenceError: it diverged",
        "unfinished: SIGTERM: ended after step 3, saved",
        "unfinished: step 3",
        "failed: it was killed by SIGKILL",
    ]
    told = run.told.splitlines()[1:5]
    assert [line.partition(":")[0] for line in told] == [f"{number} of 4 runs ended" for number in (1, 2, 3, 4)]
    assert sorted(line.partition(": ")[2] for line in told) == [
        "num_steps=16, failed: it was killed by SIGKILL",
        "num_steps=2, failed: DivergenceError: it diverged",
        "num_steps=4",
        "num_steps=8",
    ]
    assert run(vary, "--nosubmit") == (out, ended)


def test_a_run_that_failed_and_was_then_interrupted_has_not_failed(run, monkeypatch):
    ends = ["2", "4"]
    code = {"2": ENDS["2"], "4": "import sys; sys.exit(143)"}
    monkeypatch.setattr(program, "_command_of", lambda point: [sys.executable, "-c", code[ends.pop(0)]])
    assert run("--vary=num_steps=4")[1] == "1 of 1 runs failed; the same command starts them again"
    out, ended = run("--vary=num_steps=4")
    assert ended is None
    assert "| unfinished: started again |" in out


def test_a_job_that_breaks_off_before_it_trains_has_failed(run, monkeypatch, tmp_path):
    monkeypatch.setattr(jobs.TrainingJob, "__call__", lambda self: 1 / 0)
    out, ended = run("--vary=num_steps=4")
    assert ended == "1 of 1 runs failed; the same command starts them again"
    assert f"| failed: its job broke off; see {tmp_path / 'sweep' / 'submitit'}" in out
    assert "1 of 1 runs ended: num_steps=4, failed: its job broke off; see " in run.told


def test_a_run_that_a_process_works_on_is_left_to_it(run, started, tmp_path):
    vary, busy = "--vary=num_steps=4,8", tmp_path / "sweep" / "num_steps=4"
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text("[]")
    with lock_folder(busy):
        out, _ = run(vary)
    assert [point.workdir.name for point in started] == ["num_steps=8"]
    assert (out.count("| running "), out.count("| not begun ")) == (1, 1)
    run(vary)
    assert [point.workdir.name for point in started[1:]] == ["num_steps=4", "num_steps=8"]


def test_a_run_that_failed_and_goes_on_elsewhere_has_not_failed(run, started, tmp_path):
    workdir = tmp_path / "sweep" / "num_steps=4"
    run("--vary=num_steps=4")
    log = started[0].log
    log.parent.mkdir()
    log.write_text("failed: DivergenceError: it diverged\n")
    with lock_folder(workdir):
        out, ended = run("--vary=num_steps=4", "--nosubmit")
    assert ended is None
    assert "| running: failed: " in out
    assert run("--vary=num_steps=4", "--nosubmit")[1] == "1 of 1 runs failed; the same command starts them again"


def test_a_run_that_ends_while_the_table_is_made_is_finished(run, monkeypatch):
    ended = []
    monkeypatch.setattr(Point, "is_running", lambda point: not ended.append(point))
    monkeypatch.setattr(Point, "summary", lambda point: summary_of(point) if point in ended else None)
    out, _ = run("--vary=num_steps=4", "--nosubmit")
    assert out.splitlines()[-1].endswith("| finished |")


def test_a_grid_that_would_leave_finished_runs_out_of_the_table_is_refused(run, started, tmp_path):
    root = tmp_path / "sweep"
    run("--vary=num_steps=2,4")
    before = snapshot(root)
    for vary in ("--vary=num_steps=4,8", "--vary=inner.momentum=0.5"):
        started.clear()
        _, ended = run(vary)
        assert "sweep.json has runs of another grid, num_steps=2" in ended
        assert not started
    assert snapshot(root) == before
    run("--vary=num_steps=2,4,8")
    assert [row["run"] for row in json.loads((root / "sweep.json").read_text())] == [
        f"num_steps={number}" for number in (2, 4, 8)
    ]


def test_a_sweep_that_was_killed_at_once_still_knows_its_grid(run, started, monkeypatch):
    def killed(points, root):
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "_run", killed)
    run("--vary=num_steps=2,4")
    _, ended = run("--vary=num_steps=8")
    assert "sweep.json has runs of another grid, num_steps=2, num_steps=4" in ended


def test_a_grid_of_which_nothing_could_begin_is_forgotten(run, started, monkeypatch):
    def refused(points, root):
        raise ConfigError("no such partition")

    with monkeypatch.context() as patch:
        patch.setattr(program, "_run", refused)
        assert "no such partition" in run("--vary=num_steps=2,4")[1]
    run("--vary=num_steps=8")
    assert [point.workdir.name for point in started] == ["num_steps=8"]


def row_of(per_seed, **changes):
    found = {"test_per_seed": per_seed, "test_mean": np.mean(per_seed), "test_std": 0.1, "valid_mean": 0.2}
    shared = {"data": "digest", "metric": "error_rate", "seeds": [0, 1, 2], "state": "finished"}
    return {**shared, "valid_std": None, **found, **changes}


def test_data_are_the_same_with_other_labels_and_not_with_another_draw():
    digits = data.load("digits")
    assert data.load("digits", label_noise=0.4, imbalance=10.0).content == digits.content
    assert data.load("digits", seed=1).content != digits.content


def test_the_end_of_a_long_state_is_left_to_the_file():
    rows = [row_of([0.3, 0.2, 0.4]), {"run": "b", "state": f"failed: {'word ' * 60}"}]
    text = render_table(results_table(rows, []))
    assert "word word ... |" in text
    assert max(map(len, text.splitlines())) < 250
    assert "The whole of a long state is in sweep.json." in text
    for short in (rows[:1], [{"run": "b", "state": f"failed: {'a' * 152}"}]):
        assert "The whole" not in render_table(results_table(short, []))


def test_a_validation_metric_that_was_trained_on_is_marked_and_the_test_metric_is_not():
    row = {"run": "a", "state": "finished", "metric": "error_rate", "trains_on_valid": True}
    row |= {f"{split}_{part}": 0.25 for split in ("test", "valid") for part in ("mean", "std")}
    assert "| 0.2500 ± 0.2500 | *0.2500 ± 0.2500 |" in render_table(results_table([row], []))


def test_rows_are_compared_with_the_first_that_is_finished_seed_by_seed():
    first, better, level = [0.3, 0.2, 0.4], [0.2, 0.11, 0.29], [0.3, 0.25, 0.35]
    others = [{"seeds": [1, 2, 3]}, {"metric": "mean_squared_error"}, {"state": "finished, on other data than a"}]
    others += [{"data": "of other splits"}]
    rows = [{"state": "running"}, row_of(first), row_of(better), row_of(level), *(row_of(level, **o) for o in others)]
    add_differences(rows)
    p_values = [scipy.stats.ttest_rel(each, first).pvalue for each in (better, level)]
    assert [row.get("difference") for row in rows] == [None, None, pytest.approx(-0.1), pytest.approx(0), *[None] * 4]
    assert [row.get("adjusted_p_value") for row in rows[2:4]] == [
        pytest.approx(2 * p_values[0]),
        pytest.approx(p_values[1]),
    ]
    _, reference, best, *_ = render_table(results_table(rows, [])).splitlines()[-8:]
    assert [cell.strip() for cell in best.split("|")][4:6] == ["-0.1000", f"{2 * p_values[0]:.1g}"]
    assert [cell.strip() for cell in reference.split("|")][4:6] == ["", ""]
    add_differences([{"state": "running"}])


def summary_of(point):
    """Of a finished run, on data that changed before the one of 8 steps."""
    spread = {"mean": 0.1, "std": None, "per_seed": [0.1]}
    result = {"learning_rate": 0.1, "test": spread, "valid": spread}
    data = {2: "before", 4: "before", 8: "after"}[point.config.num_steps]
    return {"data": data, "metric": "error_rate", "seeds": [0], "methods": {"task_loss": result}}


def test_runs_on_other_data_than_the_first_are_marked(run, monkeypatch):
    monkeypatch.setattr(Point, "summary", summary_of)
    out, _ = run("--vary=num_steps=2,4,8", "--nosubmit")
    first, second, third = out.splitlines()[-3:]
    assert "| finished  " in first
    assert "| finished  " in second
    assert "| finished, on other data than num_steps=2 |" in third


def test_a_sweep_looks_for_the_splits_that_its_runs_have(tmp_path):
    """Of a file too small for those of the default."""
    np.savez(tmp_path / "small.npz", inputs=np.zeros((60, 2), np.float32), targets=np.arange(60) % 10)
    values = with_value("dataset.name", str(tmp_path / "small.npz"))
    grid = {"dataset.valid_fraction": ["0.3", "0.4"]}
    points = make_points(grid, values, "configs/default.py", "train", tmp_path)
    assert [point.config.dataset.valid_fraction for point in points] == [0.3, 0.4]
    with pytest.raises(
        data.DatasetError,
        match=r"no validation split of 5 can be cut off 48 examples, since .* need one for each of 10 classes; bring",
    ):
        make_points({"dataset.valid_fraction": ["0.1", "0.3"]}, values, "configs/default.py", "train", tmp_path)
