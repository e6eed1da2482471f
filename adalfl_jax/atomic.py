"""Files that are whole or not there."""

from __future__ import annotations

import os
import threading
from pathlib import Path


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file in one move, so that a reader never sees half of it, even after a power cut.

    Of several writers the last one wins. One that is killed leaves a file whose name ends in ".partial".
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.partial")  # no other writer's
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
