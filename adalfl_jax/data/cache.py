"""Decoded arrays in one file that is verified each time it is read.

The file is in safetensors format. Its metadata hold a SHA-256 of the arrays and a fingerprint of what they were made
from, so damage and a changed source are noticed.
"""

from __future__ import annotations

import hashlib
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from adalfl_jax.atomic import move_into_place, partial_of
from adalfl_jax.data.errors import DatasetError

Arrays = dict[str, np.ndarray]
REMEDY = "set dataset.cache_dir (or cache_dir=) to a folder with room that can be written to"


def cached(path: Path, fingerprint: str, build: Callable[[], Arrays]) -> Arrays:
    """The arrays in the file `path`, built and written first where it is missing, damaged or of another fingerprint.

    Raises:
      DatasetError: what `build` raises, or a file that cannot be written.
    """
    if path.exists():
        try:
            arrays = _read(path, fingerprint)
        except (SafetensorError, OSError, ValueError) as error:
            warnings.warn(f"{path} is damaged and is built anew: {error}", stacklevel=2)
        else:
            if arrays is not None:
                return arrays
    partial = _open_partial(path)  # before what is to be written is built, which may take hours
    try:
        arrays = {name: np.ascontiguousarray(array) for name, array in build().items()}
        _write(path, partial, fingerprint, arrays)
    finally:
        partial.unlink(missing_ok=True)
    return arrays


def _read(path: Path, fingerprint: str) -> Arrays | None:
    with safe_open(path, framework="np") as file:
        metadata = file.metadata() or {}
        if metadata.get("fingerprint") != fingerprint:
            return None
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, the file is no dictionary
    if metadata.get("sha256") != digest_of_arrays(arrays):
        raise ValueError("its checksum is not that of its contents")
    return arrays


def _open_partial(path: Path) -> Path:
    """A new file beside `path` that gets that name once it is whole, so that no half-written file ever has it."""
    partial = partial_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch(exist_ok=False)
    except OSError as error:
        raise DatasetError(f"{path} cannot be written ({error}); {REMEDY}") from error
    return partial


def _write(path: Path, partial: Path, fingerprint: str, arrays: Arrays) -> None:
    needed = sum(array.nbytes for array in arrays.values()) + 2**16
    try:
        free = shutil.disk_usage(path.parent).free
        if free < needed:
            raise DatasetError(
                f"{path} needs {needed / 1e6:.1f} MB and its disk has {free / 1e6:.1f} MB left; {REMEDY}"
            )
        save_file(arrays, partial, metadata={"fingerprint": fingerprint, "sha256": digest_of_arrays(arrays)})
        partial.chmod(0o644)  # others who share the folder may read it, whatever the umask is
        move_into_place(partial, path)
    except (SafetensorError, OSError) as error:
        raise DatasetError(f"{path} cannot be written ({error}); {REMEDY}") from error


def digest_of_arrays(arrays: Arrays) -> str:
    """SHA-256 of names, types, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
