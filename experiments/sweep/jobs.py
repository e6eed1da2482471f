"""Trainings as jobs of submitit: each a process of its own, which is told to save when its time is over."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adalfl_jax.training import ConfigError, PreemptionError
from adalfl_jax.training.preemption import SIGNALS, Preemption

MAX_TIMEOUTS = 1000  # after so many time limits a run is not requeued
FAILED = "failed: "  # how the last line of a log begins where the run failed
ERROR = re.compile(r"\w*Error: |out of memory: ")  # how the line of an error of ours begins
WARNING = "warning: "  # how `experiments.launch` begins the line of one
INTERRUPTED = {code for number in SIGNALS for code in (128 + number, -number)}  # how trainings end that go on
CUT_SHORT = ("CANCELLED", "NODE_FAIL", "PREEMPTED", "TIMEOUT")  # states of SLURM in which a run has not failed
POLL = 0.1  # seconds


class TrainingJob:
    """A training in a process of its own, as submitit runs it and, when its time is over, requeues it."""

    def __init__(self, command: list[str], log: Path):
        self.command, self.log = command, log
        self._pid: int | None = None
        self._is_ending = False

    def __call__(self) -> None:
        """Runs the command to its end, or to where a signal ended it and it goes on.

        Raises:
          RuntimeError: it failed, and why.
        """
        is_local = os.environ.get("SUBMITIT_EXECUTOR") == "local"
        if is_local:  # SLURM itself signals all processes of a job
            for number in (signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                    signal.signal(number, self._end)
        # SLURM may send its warning to all processes of a job. It would end the training, which so inherits it blocked.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
        group = 0 if is_local else -1  # its own, or the signals of a terminal or of `timeout` would come beside ours
        start = self.log.stat().st_size if self.log.exists() else 0
        # Several at once may share a GPU.
        environment = ({"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if is_local else {}) | dict(os.environ)
        with (
            self.log.open("a") as log,
            subprocess.Popen(self.command, stdout=log, stderr=log, process_group=group, env=environment) as process,  # noqa: S603
        ):
            self._pid = process.pid
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            code = process.wait()
        if code and code not in INTERRUPTED:
            reason = _reason(code, self.log.read_bytes()[start:].decode(errors="replace"))
            self.tell_failure(reason)
            raise RuntimeError(reason)

    def tell_failure(self, reason: str) -> None:
        """Ends the log with a line that marks the run as failed."""
        with self.log.open("a") as log:
            log.write(f"{FAILED}{reason}\n")

    def forget_failure(self) -> None:
        """Ends the log of a run that failed before with another line."""
        if last_line(self.log).startswith(FAILED):
            with self.log.open("a") as log:
                log.write("started again\n")

    def _end(self, *_) -> None:
        """Tells the training to save and end; once, since a second signal ends it at once."""
        if self._pid is not None and not self._is_ending:
            self._is_ending = True
            with contextlib.suppress(ProcessLookupError):  # it may just have ended
                os.kill(self._pid, signal.SIGTERM)

    def checkpoint(self) -> Any:
        """Lets the training save and end, and tells submitit what to run in its place; called within a signal."""
        from submitit.helpers import DelayedSubmission

        if self._pid is not None:
            self._end()
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self._pid, 0)  # not `Popen.wait`, whose lock the interrupted call may hold
        return DelayedSubmission(TrainingJob(self.command, self.log))


def _reason(code: int, printed: str) -> str:
    """Why a run failed: the signal that killed it, the line in which the last error begins, or the last one.

    An error may have further lines.
    """
    if code < 0:
        return f"it was killed by {signal.Signals(-code).name}"
    reason, in_traceback = "", False
    for line in printed.splitlines():
        if line.startswith("Traceback (most recent call last):"):
            in_traceback = True
        elif in_traceback and not line.startswith(" "):
            reason, in_traceback = line, False
        elif ERROR.match(line):
            reason = line
    return reason or (printed.splitlines() or [f"it ended with {code}"])[-1]


def last_line(log: Path) -> str:
    """What was printed last, "" where nothing was."""
    printed = log.read_text(errors="replace").splitlines() if log.exists() else []
    return printed[-1] if printed else ""


def warnings_in(log: Path) -> list[str]:
    """What a run's program warned of, each warning once."""
    printed = log.read_text(errors="replace").splitlines() if log.exists() else []
    return list(dict.fromkeys(line.removeprefix(WARNING) for line in printed if line.startswith(WARNING)))


def run_jobs(
    jobs: Sequence[TrainingJob], executor: str, resources: Mapping[str, Any], folder: Path, at_once: int
) -> None:
    """Starts trainings and waits for all of them; one that fails says so in the last line of its log.

    Args:
      jobs: the trainings.
      executor: where they run, "local", "slurm" or "debug", which is here, one after another.
      resources: what `submitit.AutoExecutor` asks for.
      folder: where submitit keeps its files.
      at_once: how many run at the same time at most, of those of this machine.

    Raises:
      ConfigError: submitit is missing, or does not take these jobs.
      PreemptionError: a signal came, and the runs of this machine have saved and ended, or those of a cluster go on.
    """
    submitter = _make_executor(executor, resources, folder)
    for job in jobs:
        job.log.parent.mkdir(exist_ok=True)
        job.forget_failure()
    print(f"runs to start: {len(jobs)}; each writes to a file in {jobs[0].log.parent}", file=sys.stderr)
    if executor == "local":
        _run_here(submitter, jobs, at_once)
        return
    submitted = _submit(submitter, jobs, executor)
    for number, (job, task) in enumerate(zip(jobs, submitted, strict=True), start=1):
        try:
            _note_break(job, task)
        except KeyboardInterrupt as interrupt:
            if executor != "slurm":
                raise
            numbers = " ".join(str(each.job_id) for each in submitted if not each.done())
            raise PreemptionError(
                signal.SIGINT,
                f"jobs {numbers} go on without this program, which --nosubmit shows the table of; cancel them before "
                "you give the same command again",
            ) from interrupt
        _tell_end(job, number, len(jobs))


def _note_break(job: TrainingJob, task: Any) -> None:
    """Waits for a job, and ends the log of its run where that broke off and could not say so."""
    try:
        error = task.exception()
    except Exception as raised:  # of submitit, for a job that was cancelled, say
        error = raised
    if error is not None and not task.state.startswith(CUT_SHORT) and not last_line(job.log).startswith(FAILED):
        job.tell_failure(f"its job broke off; see {task.paths.stderr}")


def _tell_end(job: TrainingJob, number: int, count: int) -> None:
    """Says of which run the end has come, and of how many it is the one with this number."""
    why = last_line(job.log)
    reason = f", {why}" if why.startswith(FAILED) else ""
    print(f"{number} of {count} runs ended: {job.log.stem}{reason}", file=sys.stderr, flush=True)


def _make_executor(name: str, resources: Mapping[str, Any], folder: Path) -> Any:
    try:
        import cloudpickle
        import submitit
    except ImportError as error:
        raise ConfigError('a sweep needs the package submitit; pip install ".[sweep]"') from error
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # a job need not import JAX to start a training
    try:
        executor = submitit.AutoExecutor(folder, cluster=name, slurm_max_num_timeout=MAX_TIMEOUTS)
        executor.update_parameters(**resources)
    except (AssertionError, NameError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]  # further lines list types of Python
        raise ConfigError(f"--executor={name} with {resources}: {reason}") from error
    return executor


def _submit(submitter: Any, jobs: Sequence[TrainingJob], executor: str) -> list[Any]:
    """Hands runs to submitit, whose local processes inherit SIGINT blocked: a terminal's Ctrl-C is for this one."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with submitter.batch():
            return [submitter.submit(job) for job in jobs]
    except RuntimeError as error:  # of SLURM, for a partition it does not have, say
        raise ConfigError(f"--executor={executor} takes no jobs: {error}") from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run_here(submitter: Any, jobs: Sequence[TrainingJob], at_once: int) -> None:
    """Runs trainings on this machine, so many at a time, and waits for all; at a signal for what they save.

    Raises:
      PreemptionError: a signal came.
    """
    waiting, submitted, ended = list(reversed(jobs)), [], []
    with Preemption() as preemption:
        while len(ended) < len(submitted) or waiting:
            running = [task for task in submitted if not task.done()]
            for job, task in zip(jobs, submitted, strict=False):
                if task not in running and job not in ended:
                    ended.append(job)
                    _note_break(job, task)
                    _tell_end(job, len(ended), len(jobs))
            if preemption.signal is not None:
                waiting.clear()
                for task in running:  # again and again, since one that only begins does not pass it on yet
                    os.kill(int(task.job_id), signal.SIGTERM)
            elif waiting and len(running) < at_once:
                submitted += _submit(submitter, [waiting.pop()], "local")
                continue
            time.sleep(POLL)
        if preemption.signal is not None:
            raise PreemptionError(
                preemption.signal,
                "the runs have ended; the same command goes on from what they saved",
            )
