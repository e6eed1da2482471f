import json
import os
import re
import runpy
import signal
import subprocess
import sys
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import app, flags
from absl.testing import flagsaver

from adalfl_jax.analysis.statistics import describe
from adalfl_jax.models import MLP, MODELS
from adalfl_jax.training import ConfigError, PreemptionError, WorkdirError
from adalfl_jax.training.workdir import open_workdir
from experiments.launch import (
    CONFIG,
    WORKDIR,
    command_line,
    parse_flags,
    print_summary,
    told_in_a_line,
)
from tests.training.tiny import DIABETES, ROOT, SETTINGS, snapshot, tiny_config

# ml_collections loads a configuration in a way that Python means to drop
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


def launch(program, workdir, *, config="digits_mlp", overrides=(), variables=()):
    """Runs a program at tiny settings as a user would, and returns what it printed and how it ended."""
    settings = {**SETTINGS, **dict(overrides)}
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", f"experiments.{program}", f"--config=configs/{config}.py", f"--workdir={workdir}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "COLUMNS": "120"}
    environment |= dict(variables)
    return subprocess.run(  # noqa: S603, the command is ours
        [*command, *flags], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def assert_refused(done, text):
    assert done.returncode not in (0, None)
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.usefixtures("without_figures", "verbosity")
def test_train_prints_the_table(tmp_path, monkeypatch, capsys):
    """Within this process, which has imported everything; sweeps and the slow tests here start it as a user would."""
    workdir = tmp_path / "a[lr=0.1][/b]"  # no markup
    fields = [f"--config.{name}={value}" for name, value in (SETTINGS | {"method": "task_loss"}).items()]
    monkeypatch.setenv("COLUMNS", "120")
    argv = ["train", f"--config={ROOT}/configs/digits_mlp.py", f"--workdir={workdir}", *fields]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(app, "run", lambda main, flags_parser: main(flags_parser(sys.argv)))  # which would end pytest
    with flagsaver.flagsaver():
        runpy.run_module("experiments.train", run_name="__main__")
    out, said = capsys.readouterr()
    assert "digits, 20 steps, seeds 0 to 1" in out
    assert "task loss" in out
    assert f"Everything is in {workdir}" in out
    assert "task loss  20/20" in said  # progress leaves standard output to the table
    found = json.loads((workdir / "summary.json").read_text())["methods"]["task_loss"]
    for split in ("valid", "test"):
        assert f"{split} error_rate" in out
        assert f"{found[split]['mean']:.4f} ± {found[split]['std']:.4f}" in out


def test_a_validation_error_of_examples_that_a_method_trains_on_is_marked(capsys):
    told = {"learning_rate": 0.1, "test": describe([0.2, 0.3]), "valid": describe([0.0, 0.125])}
    methods = {"task_loss": {"title": "task loss"} | told}
    summary = {"dataset": "digits", "metric": "error_rate", "num_steps": 5, "seeds": [0, 1], "methods": methods}
    print_summary(summary, "runs/a")
    assert "*" not in capsys.readouterr().out
    methods["fine_tuned"] = {"title": "task loss, fine-tuned", "trains_on_valid": True} | told
    print_summary(summary, "runs/a")
    printed = " ".join(capsys.readouterr().out.split())
    assert "task loss │ 0.0625 ± " in printed
    assert "task loss, fine-tuned │ *0.0625 ± 0.0884 │ 0.2500 ± 0.0707 │" in printed
    assert "* measured on examples that the method trains on" in printed


def test_the_report_is_named_where_there_is_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    summary = {"dataset": "digits", "metric": "error_rate", "num_steps": 20, "seeds": [0, 1], "methods": {}}
    print_summary(summary, str(tmp_path))
    (tmp_path / "report.html").touch()
    print_summary(summary, str(tmp_path))
    before, after = re.findall(r"Everything is in .*", capsys.readouterr().out)
    assert before == f"Everything is in {tmp_path}"
    assert after == f"{before}; open {tmp_path / 'report.html'}"


@pytest.mark.slow
def test_compare_prints_every_method_and_writes_the_report(tmp_path):
    overrides = {"methods": ("task_loss", "tuned_task_loss"), "tuning.learning_rates": (0.1, 0.3)}
    done = launch("compare", tmp_path / "run", overrides=overrides)
    assert done.returncode == 0, done.stderr
    assert "task loss " in done.stdout
    assert "task loss, tuned rate" in done.stdout
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ({"num_stepss": 3}, "unknown field of the configuration 'num_stepss'; did you mean 'num_steps'?"),
        ({"inner.momentum": 1.5}, "ConfigError: config.inner.momentum must be a number in [0, 1); got 1.5"),
    ],
    ids=["misspelt", "out_of_range"],
)
def test_flag_that_cannot_be_is_refused_without_a_traceback(overrides, text, tmp_path):
    assert_refused(launch("train", tmp_path / "run", overrides=overrides), text)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_workdir_of_another_config_is_refused_and_left_alone(tmp_path):
    folder = open_workdir(tmp_path / "run", tiny_config(method="task_loss"), "train")
    before = snapshot(folder)
    done = launch("train", folder, overrides={"method": "task_loss", "num_steps": 30})
    assert_refused(done, "num_steps: 20 -> 30")
    assert snapshot(folder) == before


@pytest.mark.slow
def test_divergence_is_told_without_a_traceback(tmp_path):
    overrides = DIABETES | {"method": "task_loss", "inner.learning_rate": 1e30, "batch_size": 30}
    done = launch("train", tmp_path / "run", config="diabetes_mlp", overrides=overrides)
    assert done.returncode == 1
    assert "DivergenceError: task_loss diverged" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("verbosity")
@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (WorkdirError("another run"), "WorkdirError: another run", ""),
        (PreemptionError(signal.SIGTERM, "saved"), 128 + signal.SIGTERM, "SIGTERM: saved\n"),
        (
            KeyboardInterrupt(),
            128 + signal.SIGINT,
            "SIGINT: ended; a run goes on from its last checkpoint by the same command.\n",
        ),
    ],
    ids=["workdir", "preemption", "interrupt"],
)
def test_what_ends_a_run_is_told_in_a_line(error, code, said, capsys):
    with pytest.raises(SystemExit) as ended, told_in_a_line():
        raise error
    assert ended.value.code == code
    assert capsys.readouterr().err == said


@pytest.mark.usefixtures("verbosity")
@pytest.mark.parametrize("library", [jnp, np])
def test_memory_that_does_not_suffice_is_told_with_what_takes_less(library):
    with pytest.raises(SystemExit) as ended, told_in_a_line():
        library.zeros(2**46)
    said, remedy = str(ended.value.code).splitlines()
    assert said.startswith("out of memory: ")
    assert len(said) > len("out of memory: ")
    assert remedy.startswith("Less is taken by a smaller batch_size or num_seeds")


@pytest.mark.usefixtures("verbosity")
def test_another_error_of_the_device_keeps_its_traceback():
    def fail(value):
        raise ValueError(value)

    with pytest.raises(jax.errors.JaxRuntimeError, match="ValueError"), told_in_a_line():
        jax.pure_callback(fail, jnp.ones(()), jnp.ones(())).block_until_ready()


@pytest.mark.usefixtures("verbosity")
@pytest.mark.parametrize(("message", "is_told"), [("Event loop is closed", False), ("no such thing", True)])
def test_writers_that_end_after_a_full_disk_say_nothing(message, is_told, monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    with told_in_a_line():
        pass
    unraisable = types.SimpleNamespace(exc_value=RuntimeError(message))
    sys.unraisablehook(unraisable)
    assert told == [unraisable] * is_told


@pytest.mark.usefixtures("verbosity")
def test_a_warning_is_told_in_a_line():
    before = warnings.formatwarning
    with told_in_a_line():
        told = warnings.formatwarning(UserWarning("checkpoint 5 is damaged"), UserWarning, "checkpoint.py", 125)
    assert told == "warning: checkpoint 5 is damaged\n"
    assert warnings.formatwarning is before


@pytest.mark.parametrize(
    ("flag", "unused"),
    [
        ("--config.seed=3", "config"),
        ("--config.seed=3", "config."),
        ("--config", "config"),
        ("-workdir=runs/one", "workdir"),
        ("--write=a.md", "write"),
        ("--config.methods=('ml3',)", "config.methods"),
        ("--config.method=ml3", "config.method"),
    ],
)
def test_a_flag_without_effect_is_refused(flag, unused):
    name = flag.lstrip("-").partition("=")[0]
    with pytest.raises(SystemExit) as ended:
        parse_flags(["program", flag], unused=("compilation_cache", unused))
    assert ended.value.code == f"--{name} has no effect on this program; leave it out"


def test_a_program_that_takes_no_fields_may_take_a_file_that_registers_a_model(monkeypatch, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from adalfl_jax.models import MLP, register_model\nfrom configs.default import get_config\n"
        'register_model("mine", MLP)\n'
    )
    monkeypatch.setitem(MODELS, "mine", None)  # to be forgotten behind this test
    with flagsaver.flagsaver():
        parse_flags(["program", f"--config={tmp_path / 'mine.py'}", "--workdir=run"], unused=("config.",))
    assert MODELS["mine"] is MLP


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config=runs/one/config.json", r"^ConfigError: .* is what a run was made with; .*configs/run\.py:FOLDER"),
        (
            "--config=configs/run.py:nowhere",
            r"cannot be loaded: nowhere holds no run: it has no config",
        ),
        ("--config.inner=0.1", r"^ConfigError: 'inner' is a section .* its fields are inner\.learning_rate, inner\.f"),
        (
            "--config.inner.learning_rat=1",
            r"unknown field .* 'inner\.learning_rat'; did you mean 'inner.learning_rate'\?$",
        ),
        ("--config.nonesuch=1", r"unknown field of the configuration 'nonesuch'; known: method, methods, "),
        (
            "--config.model.options=1",
            r"'model\.options' is a section .* fields are model\.options\.NAME$",
        ),
        ("--config.inner.lr=1", r"'inner\.lr'; known: inner\.learning_rate, inner\.first_step_rate, "),
        ("--batch_size=10", r"Unknown command line flag 'batch_size' .*\(did you mean --config\.batch_size\?\)$"),
        ("--nonesuch=10", r"Unknown command line flag 'nonesuch'.* \(--help shows the flags\)$"),
    ],
)
def test_a_flag_that_is_none_is_told_with_what_was_meant(flag, message):
    with flagsaver.flagsaver(), pytest.raises(SystemExit, match=message):
        parse_flags(["program", flag])


def test_an_option_can_be_given_where_the_file_sets_it(monkeypatch, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from configs import default\ndef get_config():\n  config = default.get_config()\n"
        "  config.model.options.dropout_rate = 0.5\n  return config\n"
    )
    monkeypatch.setattr(sys, "argv", ["program", f"--config={file}", "--config.model.options.dropout_rate=0.25"])
    with flagsaver.flagsaver():
        parse_flags(sys.argv)
        assert CONFIG.value.model.options.to_dict() == {"dropout_rate": 0.25}
    monkeypatch.setattr(sys, "argv", ["program", f"--config={file}", "--config.model.options.dropout=0.25"])
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as ended:
        parse_flags(sys.argv)
    assert ended.value.code == (
        "ConfigError: --config.model.options.dropout is an option that the file has to set first; write "
        "config.model.options.dropout = ... there"
    )


def test_an_error_in_a_file_is_no_error_of_an_option_of_the_same_name(monkeypatch, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("import math\nmath.dropout_rate_x\n")
    monkeypatch.setattr(sys, "argv", ["program", f"--config={file}", "--config.model.options.dropout_rate=0.25"])
    with (
        flagsaver.flagsaver(),
        pytest.raises(SystemExit, match=r"AttributeError: module 'math' has no attribute 'drop"),
    ):
        parse_flags(sys.argv)


def test_help_has_the_shared_flags_that_a_program_takes(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["a program"])
    with flagsaver.flagsaver():
        parse_flags(["a program"], unused=("config", "write"))
    shown = {flag.name for flag in flags.FLAGS.get_key_flags_for_module("a program")}
    assert shown == {"workdir", "compilation_cache"}


def test_the_value_of_a_flag_may_look_like_a_field():
    with flagsaver.flagsaver():
        assert parse_flags(["program", "--workdir", "config.run"]) == ["program"]
        assert WORKDIR.value == "config.run"


@pytest.mark.parametrize("jobs", [["--jobs=2"], ["--jobs", "2"], ["-jobs=2"]])
def test_the_number_of_jobs_is_no_part_of_a_published_command(jobs, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["study", "--study=recipe", *jobs, "--write=a page.md"])
    assert command_line("study") == ".venv/bin/python -m experiments.study --study=recipe '--write=a page.md'"


# The configuration


@pytest.fixture
def parse(monkeypatch):
    """The configuration that a command line makes."""

    def parsed(*arguments, config=f"{ROOT}/configs/digits_mlp.py"):
        argv = ["program", f"--config={config}", *arguments]
        monkeypatch.setattr(sys, "argv", argv)  # where the fields of a configuration are looked for
        with flagsaver.flagsaver():
            parse_flags(argv)
            return CONFIG.value

    return parsed


def test_a_tuple_that_is_given_twice_is_refused_and_not_added_up(parse):
    assert parse("--config.model.hidden_sizes=(8, 8)").model.hidden_sizes == (8, 8)
    with pytest.raises(SystemExit) as ended:
        parse("--config.model.hidden_sizes=(8,)", "--config.model.hidden_sizes", "(16,)")
    assert ended.value.code == (
        "ConfigError: --config.model.hidden_sizes must be given once; it came 2 times, leave one"
    )


def test_a_field_without_a_configuration_is_told_what_is_missing():
    with pytest.raises(SystemExit, match="ConfigError: --config=FILE must be given beside fields of it"):
        parse_flags(["program", "--workdir=runs/a", "--config.num_steps=3"])


def test_the_flags_of_a_file_are_looked_at_like_those_of_the_command_line(parse, tmp_path):
    file = tmp_path / "flags"
    file.write_text("--config.num_steps=3\n")
    assert parse(f"--flagfile={file}").num_steps == 3
    file.write_text("--config.num_step=3\n")
    with pytest.raises(SystemExit, match="ConfigError: unknown field of the configuration 'num_step'"):
        parse("--flagfile", str(file))


def test_a_flagfile_that_is_not_there_is_told_in_a_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["launch", "--flagfile=nosuch"])
    monkeypatch.delitem(sys.modules, "experiments.launch")  # which is imported anew
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as ended:
        runpy.run_module("experiments.launch", run_name="__main__")
    assert re.fullmatch(r"--flagfile cannot be read: .*'nosuch'", ended.value.code)


def test_of_a_number_that_is_given_twice_the_last_holds(parse):
    assert parse("--config.num_steps=3", "--config.num_steps=5").num_steps == 5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--config.seed=many"],
            "flag --config.seed=many: invalid literal for int() with base 10: 'many' (configs/default.py documents it)",
        ),
        (["--qqqqqqqqqq=3"], "Unknown command line flag 'qqqqqqqqqq' (--help shows the flags)"),
        (["--workdir"], "Missing value for flag --workdir (--help shows the flags)"),
    ],
)
def test_a_flag_that_cannot_be_is_told_in_a_line(arguments, said, parse):
    with pytest.raises(SystemExit) as ended:
        parse(*arguments)
    assert ended.value.code == said


def test_a_flag_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", f"--config={ROOT}/configs/digits_mlp.py"])
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as ended:
        runpy.run_module("experiments.train", run_name="__main__")
    assert ended.value.code == "--workdir must be given (--help shows the flags)"


NO_FILE = "; it must be a file with a get_config() that returns a ConfigDict, as in configs/"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def get_config(): pass", f"TypeError: get_config() takes 0 positional arguments but 1 was given{NO_FILE}"),
        ("def get_config(name): pass", f"get_config() returned None{NO_FILE}"),
        ("def get_config(name): return 3", f"AttributeError: 'int' object has no attribute 'lock'{NO_FILE}"),
        ("def get_config(name): raise ValueError(f'no size {name}')", "ValueError: no size large"),
        ("def get_config(name): raise KeyError(name)", "KeyError: 'large'"),
        ("def get_config(name):\n  raise ValueError('no size\\n  ' + name)", "ValueError: no size   large"),
        (None, f"[Errno 2] No such file or directory: '{{}}'{NO_FILE}"),
    ],
    ids=["no_argument", "nothing", "no_config", "value", "key", "several_lines", "no_file"],
)
def test_a_file_that_fails_at_what_it_is_given_is_told_in_a_line(text, said, parse, tmp_path):
    file = tmp_path / "mine.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SystemExit) as ended:
        parse(config=f"{file}:large")
    said = said.replace("{}", str(file))
    assert ended.value.code == f"ConfigError: the configuration cannot be loaded: {said}"


# Compiled programs


@pytest.mark.slow
def test_a_second_run_reads_compiled_programs_and_gives_the_same_bits(tmp_path):
    variables = {"JAX_ENABLE_COMPILATION_CACHE": "true", "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs")}
    variables["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    kept, measured = [], []
    for run in ("first", "second"):
        done = launch("train", tmp_path / run, overrides={"method": "adalfl"}, variables=variables)
        assert done.returncode == 0, done.stderr
        kept.append(sorted(path.name for path in (tmp_path / "programs").glob("*-cache")))
        files = (tmp_path / run / name for name in ("metrics.jsonl", "learned_loss.safetensors"))
        measured.append([file.read_bytes() for file in files])
    assert any("advance_resident" in name for name in kept[0])
    assert kept[0] == kept[1]
    assert measured[0] == measured[1]


@pytest.mark.usefixtures("verbosity")
def test_one_process_of_several_ends_with_its_words_and_a_status_of_failure(monkeypatch, capsys):
    def leave(status):
        raise SystemExit(status)

    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit) as ended, told_in_a_line():
        raise ConfigError("no such thing")
    assert ended.value.code == 1
    assert capsys.readouterr().err == "ConfigError: no such thing\n"
