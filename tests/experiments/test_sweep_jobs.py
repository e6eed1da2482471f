"""The processes of a sweep: what they leave when they fail, at a signal and when their time is over."""

import os
import pickle
import select
import signal
import subprocess
import sys
import types

import cloudpickle
import pytest

from adalfl_jax.training import PreemptionError
from experiments.sweep import jobs
from experiments.sweep.jobs import TrainingJob
from tests.training.tiny import ROOT


@pytest.fixture(autouse=True)
def no_handlers(monkeypatch):
    """Without handlers of submitit's own, for whose sake it closes those of pytest."""
    monkeypatch.setenv("SUBMITIT_LOG_LEVEL", "NOCONFIG")


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("print('before'); sys.exit('ConfigError: it cannot be')", "ConfigError: it cannot be"),
        (
            "sys.exit('WorkdirError: it is of another config:\\n  num_steps: 4 -> 8')",
            "WorkdirError: it is of another config:",
        ),
        ("sys.exit('out of memory: 1 TB\\nLess is taken by a smaller batch_size')", "out of memory: 1 TB"),
        ("raise ValueError('one\\ntwo')", "ValueError: one"),
        (
            "import zipfile\ntry: {}['a']\nexcept KeyError: raise zipfile.BadZipFile('no zip')",
            "zipfile.BadZipFile: no zip",
        ),
        ("assert False", "AssertionError"),
        ("print('FutureError: old'); import os; os.kill(os.getpid(), 9)", "it was killed by SIGKILL"),
        ("print('Error'); print('step 3'); sys.exit(3)", "step 3"),
        ("sys.exit(3)", "it ended with 3"),
    ],
)
def test_a_run_that_fails_tells_why(code, told, tmp_path):
    (tmp_path / "log").write_text("ConfigError: of the time before\n")
    with pytest.raises(RuntimeError) as caught:
        TrainingJob([sys.executable, "-c", f"import sys; {code}"], tmp_path / "log")()
    assert str(caught.value) == told
    assert (tmp_path / "log").read_text().endswith(f"\nfailed: {told}\n")


@pytest.mark.parametrize("ending", ["sys.exit(128 + {})", "os.kill(os.getpid(), {})"], ids=["told", "killed"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_a_signal_ended_has_not_failed_and_goes_on(number, ending, tmp_path):
    code = f"import os, signal, sys; signal.signal({number:d}, signal.SIG_DFL); {ending.format(int(number))}"
    TrainingJob([sys.executable, "-c", code], tmp_path / "log")()
    assert (tmp_path / "log").read_text() == ""


def test_a_job_needs_neither_jax_nor_this_library_to_start(tmp_path):
    jobs._make_executor("debug", {}, tmp_path)
    content = cloudpickle.dumps(TrainingJob([sys.executable, "-c", "print('trains')"], tmp_path / "log"))
    (tmp_path / "job").write_bytes(content)
    program = "import pickle, sys; pickle.load(open(sys.argv[1], 'rb'))(); print(*sys.modules, sep='\\n')"
    command = [sys.executable, "-c", program, str(tmp_path / "job")]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()  # noqa: S603
    assert (tmp_path / "log").read_text() == "trains\n"
    assert not {name for name in loaded if name.partition(".")[0] in ("jax", "adalfl_jax", "experiments")}


class Queued:
    """A job of a cluster that Ctrl-C finds waiting."""

    def __init__(self, job_id):
        self.job_id = job_id

    def done(self):
        return self.job_id == "7_0"

    def exception(self):
        if not self.done():
            raise KeyboardInterrupt


def test_an_interrupt_tells_of_jobs_that_a_cluster_goes_on_with(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "_make_executor", lambda *given: None)
    monkeypatch.setattr(jobs, "_submit", lambda *given: [Queued("7_0"), Queued("7_1"), Queued("7_2")])
    trainings = [TrainingJob([], tmp_path / "logs" / f"{number}") for number in range(3)]
    with pytest.raises(KeyboardInterrupt):  # here it ends them
        jobs.run_jobs(trainings, "debug", {}, tmp_path, 1)
    with pytest.raises(PreemptionError, match=r"jobs 7_1 7_2 go on without this program.*--nosubmit.*cancel them be"):
        jobs.run_jobs(trainings, "slurm", {}, tmp_path, 1)


class Ended:
    """A job that a cluster has ended without a word of its own."""

    def __init__(self, state, is_raised):
        self.state, self.is_raised = state, is_raised
        self.paths = types.SimpleNamespace(stderr="its.err")

    def exception(self):
        error = RuntimeError("it has left no result")
        if self.is_raised:
            raise error
        return error


@pytest.mark.parametrize("is_raised", [False, True])
@pytest.mark.parametrize(
    ("state", "last"),
    [
        *((state, "step 3") for state in ("CANCELLED by 123", "NODE_FAIL", "PREEMPTED", "TIMEOUT")),
        *((state, "failed: its job broke off; see its.err") for state in ("FAILED", "OUT_OF_MEMORY")),
    ],
)
def test_a_run_that_its_cluster_cut_short_has_not_failed(state, last, is_raised, tmp_path, monkeypatch):
    job = TrainingJob([], tmp_path / "logs" / "run")
    job.log.parent.mkdir()
    job.log.write_text("step 3\n")
    monkeypatch.setattr(jobs, "_make_executor", lambda *given: None)
    monkeypatch.setattr(jobs, "_submit", lambda *given: [Ended(state, is_raised)])
    jobs.run_jobs([job], "slurm", {}, tmp_path, 1)
    assert jobs.last_line(job.log) == last


@pytest.mark.parametrize(
    ("executor", "given", "kept"), [("local", None, "false"), ("local", "1", "1"), ("slurm", None, "")]
)
def test_runs_beside_each_other_take_no_memory_of_a_gpu_in_advance(executor, given, kept, tmp_path, monkeypatch):
    monkeypatch.setenv("SUBMITIT_EXECUTOR", executor)
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE", raising=False)
    if given is not None:
        monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", given)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    code = "import os; print(os.environ.get('XLA_PYTHON_CLIENT_PREALLOCATE', ''))"
    TrainingJob([sys.executable, "-c", code], tmp_path / "log")()
    assert (tmp_path / "log").read_text() == f"{kept}\n"


# Signals

SWEEP = """
import functools, sys
from absl import app
from experiments import launch
from experiments.sweep import __main__ as sweep
sweep._command_of = lambda point: [sys.executable, "-c", {training!r}]
app.run(sweep.main, flags_parser=launch.parse_flags)
"""
ENDLESS = """
import os, signal, sys
def end(*_):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends it at once
    signal.sigtimedwait([signal.SIGUSR1], 0.5)
    sys.exit(print("saved") or 143)
signal.signal(signal.SIGTERM, end)
with open({fifo!r}, "w") as fifo:
    fifo.write(f"{{os.getpid():9}}")
while True:
    signal.pause()
"""


@pytest.mark.parametrize(
    ("number", "send"),
    [
        pytest.param(signal.SIGINT, os.killpg, marks=pytest.mark.slow),  # as a terminal does
        (signal.SIGTERM, os.kill),
        pytest.param(signal.SIGINT, os.kill, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, os.killpg, marks=pytest.mark.slow),  # as `timeout` does
    ],
    ids=["interrupt_group", "terminate", "interrupt", "terminate_group"],
)
def test_a_signal_lets_local_runs_save_and_end(number, send, tmp_path):
    fifo, root = str(tmp_path / "fifo"), tmp_path / "sweep"
    os.mkfifo(fifo)
    program = SWEEP.format(training=ENDLESS.format(fifo=fifo))
    config = f"--config={ROOT / 'configs' / 'digits_mlp.py'}"
    command = [sys.executable, "-c", program, config, f"--workdir={root}", "--vary=num_steps=4,8,16", "--parallel=2"]
    begun = os.open(fifo, os.O_RDWR)  # so that it need not wait for a writer
    with subprocess.Popen(  # noqa: S603, the command is ours
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        pids = []
        while len(pids) < 2 and select.select([begun], [], [], 300)[0]:
            pids.append(int(os.read(begun, 9)))
        send(process.pid, number)
        out, said = process.communicate()
    os.close(begun)
    assert process.returncode == 128 + number
    assert out == ""
    assert said.endswith(f"{number.name}: the runs have ended; the same command goes on from what they saved\n")
    assert "Traceback" not in said
    assert [log.read_text() for log in sorted((root / "logs").iterdir())] == ["saved\n"] * 2
    for look, pid in ((os.killpg, process.pid), *((os.kill, pid) for pid in pids)):
        with pytest.raises(ProcessLookupError):
            look(pid, 0)


HUNG_UP = """
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, {{signal.SIGTERM}})
for _ in range({times}):
    os.kill(os.getppid(), signal.SIGHUP)
    if signal.sigtimedwait({{signal.SIGTERM}}, 0.1):
        print("told to save", flush=True)
        os._exit(143)
print("goes on")
"""


@pytest.mark.parametrize(
    ("executor", "before", "printed"),
    [
        ("local", lambda *_: None, "told to save"),
        ("local", signal.SIG_IGN, "goes on"),  # as nohup has it
        ("slurm", lambda *_: None, "goes on"),  # which signals trainings itself
    ],
    ids=["local", "nohup", "slurm"],
)
def test_a_local_run_saves_when_its_terminal_is_closed(executor, before, printed, tmp_path, monkeypatch):
    monkeypatch.setenv("SUBMITIT_EXECUTOR", executor)
    times = 50 if printed == "told to save" else 3
    kept = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM)}
    signal.signal(signal.SIGHUP, before)
    try:
        TrainingJob([sys.executable, "-c", HUNG_UP.format(times=times)], tmp_path / "log")()
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
    assert (tmp_path / "log").read_text() == f"{printed}\n"


# A time limit

TRAINING = """
import os, signal, sys
if os.path.exists(sys.argv[1]):
    sys.exit(print("goes on"))
def end(*_):
    open(sys.argv[1], "w").write("saved")
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
for process in (os.getpid(), os.getppid()):
    os.kill(process, signal.SIGUSR2)
while True:
    signal.pause()
"""


def test_a_run_whose_time_is_over_saves_and_is_handed_back_to_be_requeued(tmp_path):
    job = TrainingJob([sys.executable, "-c", TRAINING, str(tmp_path / "state")], tmp_path / "log")

    class Requeued(BaseException):
        pass

    def requeue(*_):  # what submitit does at this signal
        raise Requeued(job.checkpoint())

    before = signal.signal(signal.SIGUSR2, requeue)
    try:
        with pytest.raises(Requeued) as caught:
            job()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert (tmp_path / "state").read_text() == "saved"
    again = pickle.loads(pickle.dumps(caught.value.args[0].function))  # noqa: S301, it is ours
    assert (again.command, again.log) == (job.command, job.log)


def test_a_run_on_slurm_is_requeued_time_limit_after_time_limit(tmp_path, monkeypatch):
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, script in (("srun", "exit 0"), ("sbatch", "echo Submitted batch job 7")):
        (commands / name).write_text(f"#!/bin/sh\n{script}\n")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    submitter = jobs._make_executor("slurm", {"timeout_min": 60}, tmp_path / "submitit")
    (task,) = jobs._submit(submitter, [TrainingJob([], tmp_path / "log")], "slurm")
    submission = pickle.loads(task.paths.submitted_pickle.read_bytes())  # noqa: S301, it is ours
    assert submission._timeout_countdown >= 100  # submitit's own is 3


@pytest.mark.slow
def test_submitit_starts_it_again_where_it_was(tmp_path):
    executor = jobs._make_executor("local", {"timeout_min": 60}, tmp_path / "submitit")
    job = executor.submit(TrainingJob([sys.executable, "-c", TRAINING, str(tmp_path / "state")], tmp_path / "log"))
    assert job.result() is None
    assert (tmp_path / "log").read_text() == "goes on\n"
    said = job.stderr()
    assert "Caught signal SIGUSR2" in said
    assert "this job is preempted" in said
