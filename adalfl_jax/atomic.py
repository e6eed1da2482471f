"""Files that are whole or not there."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file in one move, so that a reader never sees half of it, even after a power cut.

    Of several writers the last one wins. One that is killed leaves a file whose name ends in ".partial".
    """
    partial = partial_of(path)
    try:
        partial.write_bytes(content)
        move_into_place(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def partial_of(path: Path) -> Path:
    """Where to write what is to become a file, beside it; no other writer, on any host, draws the same name."""
    return path.with_name(f"{path.name}.{os.getpid()}.{secrets.randbits(32)}.partial")


def move_into_place(partial: Path, path: Path) -> None:
    """Gives a file that is whole its name, once it is on the disk."""
    with partial.open("r+b") as file:
        os.fsync(file.fileno())
    partial.replace(path)
