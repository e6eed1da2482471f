"""Files and folders: written whole, held by one process at a time, and with errors that say what to do."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adalfl_jax.atomic import replace_file

_GLANCE, _POLL = 0.2, 0.01  # seconds; `is_locked` takes the lock for a moment, in which a run must be able to start


class WorkdirError(OSError):
    """A folder that cannot take this run; the text says why and what to do."""


class BusyError(WorkdirError):
    """A folder that another process works on."""


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raises WorkdirError, with the name of a file of a run, for whatever fails while it is read."""
    try:
        yield
    except PermissionError as error:
        raise WorkdirError(f"{path} may not be read by this user; change its permissions") from error
    except Exception as error:  # whatever parsers raise on damaged files
        raise WorkdirError(f"{path} cannot be read ({error}); bring it back, or choose a new folder") from error


@contextlib.contextmanager
def writing(workdir: Path) -> Iterator[None]:
    """Raises WorkdirError, with the name of a folder, for whatever cannot be written to it."""
    try:
        yield
    except WorkdirError:
        raise
    except OSError as error:
        raise WorkdirError(f"cannot write to workdir {workdir}: {error}") from error


def resolve_folder(path: str | os.PathLike[str]) -> Path:
    """The folder that a user named, as an absolute path.

    Raises:
      WorkdirError: an empty name, or that of a bucket or a file.
    """
    name = os.fspath(path)
    if not name.strip():
        raise WorkdirError(f"a workdir must be named; got {name!r}")
    if re.match(r"\w{2,}:/", name):  # a letter would be a drive
        raise WorkdirError(f"a workdir must be a folder of this machine, where a bucket may be mounted; got {name!r}")
    folder = Path(name).expanduser().resolve()
    if os.path.isfile(folder):  # False where that may not be looked at
        raise WorkdirError(f"a workdir must be a folder, and {name} is a file; name another")
    return folder


@contextlib.contextmanager
def lock_folder(path: str | os.PathLike[str], *, patience: float = _GLANCE) -> Iterator[None]:
    """Keeps other processes off the folder, which is made where it does not exist; a killed one lets go of it.

    Systems and file systems without locks keep nobody off.

    Args:
      path: the folder.
      patience: seconds to wait for another process.

    Raises:
      BusyError: another process works on it.
      WorkdirError: it cannot be made.
    """
    workdir = resolve_folder(path)
    with writing(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        folder = os.open(workdir, os.O_RDONLY)
    try:
        with contextlib.suppress(ImportError):
            _lock(workdir, folder, patience)
        yield
    finally:
        os.close(folder)


def _lock(workdir: Path, folder: int, patience: float) -> None:
    import fcntl  # not on every system

    deadline = time.monotonic() + patience
    while True:
        try:
            return fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise BusyError(f"another process works on {workdir}; let it end, or choose a new folder") from error
            time.sleep(_POLL)
        except OSError:  # not on every file system
            return None


def is_locked(path: str | os.PathLike[str]) -> bool:
    """Whether a process holds the folder; False where the system cannot tell, as across nodes without shared locks.

    Raises:
      WorkdirError: the folder cannot be looked at.
    """
    try:
        with lock_folder(path):
            return False
    except BusyError:
        return True


def read_json(path: Path, *keys: str) -> dict[str, Any]:
    """The object in a JSON file of a run, which has these keys.

    Raises:
      WorkdirError: the file cannot be read, or holds something else.
    """
    with reading(path):
        found = json.loads(path.read_text())
        if not isinstance(found, dict) or not found.keys() >= set(keys):
            raise ValueError(f"it must be an object with {', '.join(keys)}")
        return found


def write_json(path: Path, value: Any, *, indent: int | None = 2) -> None:
    """Writes JSON, as `write_text` does."""
    write_text(path, json.dumps(value, indent=indent, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8, as `replace_file` does."""
    replace_file(path, text.encode())


def keep_on_disk(*paths: Path) -> None:
    """Waits until files that were written, where they exist, would be there after a power cut too."""
    for path in paths:
        if path.exists():
            with path.open("rb") as file:
                os.fsync(file.fileno())
