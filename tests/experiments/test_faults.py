"""Programs that are killed and started again, as a machine does it, end as one that ran through.

tests/training/test_resume.py breaks runs off within a process, which takes less time.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.same_run import assert_same_run
from tests.training.tiny import ROOT, SETTINGS

pytestmark = pytest.mark.filterwarnings("ignore:The inplace keyword")  # tbparse's, of pandas

NUM_KILLS = 30
OVERRIDES = SETTINGS | {
    "methods": ("task_loss", "adalfl"),
    "num_steps": 120,
    "offline.num_steps": 80,
    "eval_every": 4,
    "checkpoint.every_steps": 12,
}


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """Where compiled programs are kept for the next start."""
    return tmp_path_factory.mktemp("programs")


def start(workdir: Path, programs: Path) -> subprocess.Popen[str]:
    flags = [f"--config.{name}={value}" for name, value in OVERRIDES.items()]
    command = [sys.executable, "-m", "experiments.compare", "--config=configs/digits_mlp.py", f"--workdir={workdir}"]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(programs),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "COLUMNS": "120",
    }
    return subprocess.Popen(  # noqa: S603, the command is ours
        [*command, *flags], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def run_to_the_end(workdir: Path, programs: Path) -> list[str]:
    """The lines of progress of a run that nothing disturbs; what a kill left is whole."""
    process = start(workdir, programs)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "damaged" not in errors
    return errors.splitlines()


def signal_at(process: subprocess.Popen[str], line: str, number: signal.Signals) -> tuple[int, str]:
    """Sends a signal once a line of progress was printed; how the program ended, and what it said after the line."""
    assert process.stderr is not None
    with process:
        for printed in process.stderr:
            if line in printed:
                break
        process.send_signal(number)
        rest = process.stderr.read()
    return process.returncode, rest


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, programs):
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    return folder, run_to_the_end(folder, programs)


@pytest.mark.slow
def test_a_run_that_is_told_to_end_and_then_killed_ends_as_an_unbroken_one(unbroken, programs, tmp_path):
    code, said = signal_at(start(tmp_path / "run", programs), "offline phase (ML3)  12/80", signal.SIGTERM)
    assert code == 128 + signal.SIGTERM
    # On a slow machine the signal may come when the offline phase is just over.
    assert re.search(r"ended after step \d+ of (80, offline phase \(ML3\)|120, AdaLFL), saved;", said), said
    assert "the same command goes on from there" in said
    assert "Traceback" not in said
    # Step 24 is saved once step 12 is written.
    code, said = signal_at(start(tmp_path / "run", programs), "AdaLFL  28/120", signal.SIGKILL)
    assert code == -signal.SIGKILL, said
    lines = run_to_the_end(tmp_path / "run", programs)
    assert "offline phase (ML3) goes on from step 80 of 80" in lines
    assert any(line.startswith("AdaLFL goes on from step") for line in lines)
    assert_same_run(unbroken[0], tmp_path / "run")


@pytest.mark.slow
def test_runs_killed_at_random_moments_end_as_an_unbroken_one(unbroken, programs, tmp_path):
    folder, lines = unbroken
    generator = random.Random(0)  # noqa: S311, no secret
    places = dict.fromkeys(("task_loss", "offline", "adalfl", "within a save"), 0)
    for kill in range(NUM_KILLS):
        workdir = tmp_path / str(kill)
        process = start(workdir, programs)
        if kill % 3:
            title, steps, *_ = generator.choice([line for line in lines if "steps/s" in line]).split("  ")
            code, _ = signal_at(process, f"{title}  {steps}", signal.SIGKILL)
        else:
            code = kill_within_a_save(process, workdir / "checkpoints", generator.randrange(1, 28))
        assert code == -signal.SIGKILL
        kept = list((workdir / "checkpoints").glob("*/*"))
        places["within a save"] += any(map(is_partial, kept))
        stages = {path.parent.name for path in kept}
        places[next(stage for stage in ("adalfl", "offline", "task_loss") if stage in stages)] += 1
        run_to_the_end(workdir, programs)
        assert_same_run(folder, workdir)
    sys.stdout.write(f"\n{NUM_KILLS} runs killed, all ended bit-equal: {places}\n")
    assert all(places.values())


@pytest.mark.slow
def test_a_disk_that_fills_up_ends_the_run_and_leaves_its_checkpoints(unbroken, programs, tmp_path):
    workdir = tmp_path / "run"
    process = start(workdir, programs)
    assert process.stderr is not None
    with process:
        next(line for line in process.stderr if "AdaLFL  24/120" in line)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (6000, 6000))  # bytes a file may have from here on
        said = process.stderr.read()
    assert process.returncode == 1
    told = r"WorkdirError: (a checkpoint could not be written to .* make room|the run in .* broke off: .* too large)"
    assert re.search(told, said)  # whichever file is too large first; threads of libraries may speak in between
    assert "offline phase (ML3) goes on from step 80 of 80" in run_to_the_end(workdir, programs)
    assert_same_run(unbroken[0], workdir)


def is_partial(path: Path) -> bool:
    """Whether a checkpoint is still being written."""
    return "orbax-checkpoint-tmp" in path.name


def kill_within_a_save(process: subprocess.Popen[str], checkpoints: Path, saves: int) -> int:
    """Kills a program as soon as the n-th new checkpoint is being written."""
    seen: set[Path] = set()
    while process.poll() is None and len(seen) < saves:
        with contextlib.suppress(OSError):
            seen.update(path for path in checkpoints.glob("*/*") if is_partial(path))
    process.kill()
    process.communicate()
    return process.returncode
