"""Several processes that train the runs of one study.

All of them go through the same arms in the same order, and each passes over the runs that another one works on. One
makes the tables; the others are its helpers, which end with it, however it ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence, Set
from pathlib import Path

from adalfl_jax.training.files import BusyError, WorkdirError, is_locked, lock_folder

LOGS = "jobs"  # folder of what helpers print
ENDED = (0, -signal.SIGTERM, 128 + signal.SIGTERM)  # how helpers end that have not failed


def require_locks(workdir: Path) -> None:
    """Raises WorkdirError where a folder that one process works on is not closed to another."""
    with contextlib.suppress(BusyError), lock_folder(workdir / LOGS):
        if not is_locked(workdir / LOGS):
            raise WorkdirError(f"--jobs needs a file system with locks, which {workdir} is not on; leave it out")


def take_share(position: int, num_jobs: int) -> set[int]:
    """Keeps this process to its share of the cores, before JAX counts them, and takes no memory of a GPU in advance.

    Where there are fewer cores than jobs, or the system cannot tell, all processes use all cores.

    Returns:
      The cores there were, for `helpers` to share in their turn; none where the system cannot tell.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    if len(cores) >= num_jobs:
        os.sched_setaffinity(0, cores[position * len(cores) // num_jobs : (position + 1) * len(cores) // num_jobs])
    return set(cores)


@contextlib.contextmanager
def _allowed(cores: Set[int]) -> Iterator[None]:
    """Processes that are started here may run on these cores, whatever this one keeps to."""
    if not cores:
        yield
        return
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, own)


@contextlib.contextmanager
def helpers(arguments: Sequence[str], num_jobs: int, workdir: Path, cores: Set[int] = frozenset()) -> Iterator[None]:
    """Starts `num_jobs` - 1 further processes, and at the end lets them save what they are at, and waits for them.

    Args:
      arguments: the command line of the study; a helper is given `--helper=POSITION` too.
      num_jobs: of all processes together.
      workdir: of the study; each helper prints to a file in its folder `LOGS`.
      cores: all that processes share, from `take_share`.
    """
    with contextlib.ExitStack() as started:
        processes: dict[Path, subprocess.Popen] = {}
        for position in range(1, num_jobs):
            path = workdir / LOGS / f"{position}.log"
            path.parent.mkdir(parents=True, exist_ok=True)
            log = started.enter_context(path.open("w"))
            command = [sys.executable, "-m", "experiments.study", *arguments, f"--helper={position}"]
            # In a group of its own, a helper is not reached by a terminal's Ctrl-C, which it would save for twice.
            with _allowed(cores):
                processes[path] = started.enter_context(
                    subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, process_group=0)  # noqa: S603
                )
        try:
            yield
        finally:
            for process in processes.values():
                assert process.stdin is not None
                process.stdin.close()
            for path, process in processes.items():
                if process.wait() not in ENDED:
                    warnings.warn(f"a helper failed, and other processes did its work; {path} says why", stacklevel=3)


def end_with_parent() -> None:
    """Sends SIGTERM to this helper, which saves and ends, once its standard input is closed: by or with its parent."""

    def wait() -> None:
        while os.read(sys.stdin.fileno(), 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="parent", daemon=True).start()
