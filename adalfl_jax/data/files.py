"""A user's own arrays."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from adalfl_jax.data.errors import DatasetError
from adalfl_jax.data.examples import Examples


def load_npz(path: Path) -> Examples:
    """Reads `inputs` and `targets` from an .npz file; nothing in it is unpickled.

    uint8 inputs `[N, H, W]` or `[N, H, W, channels]` are images; others are images or tables of numbers. Whole-number
    targets are labels from 0 to the largest that occurs, or to `num_classes - 1` where the file holds that number too;
    other targets are a regression's. A test split is cut off, unless `test_inputs` and `test_targets` are given.

    Raises:
      DatasetError: no such file, no .npz file, arrays missing, misnamed or of Python objects.
    """
    arrays = _read(path)
    targets = arrays["targets"]
    is_classification = np.issubdtype(targets.dtype, np.integer)
    num_classes = None
    if is_classification:
        num_classes = int(arrays["num_classes"]) if "num_classes" in arrays else int(targets.max(initial=0)) + 1
    test = None
    if "test_inputs" in arrays:
        test = _with_channels(arrays["test_inputs"]), arrays["test_targets"]
    return Examples(_with_channels(arrays["inputs"]), targets, num_classes, test)


OPTIONAL = ("num_classes", "test_inputs", "test_targets")


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            if not hasattr(file, "files"):
                raise DatasetError(
                    f"{path} holds a single array; write one with np.savez(path, inputs=..., targets=...)"
                )
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError as error:
        raise DatasetError(f"there is no file {path}") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, DatasetError):
            raise
        if "allow_pickle" in str(error):
            raise DatasetError(
                f"{path} holds arrays of Python objects, which are not read since unpickling runs code; write arrays "
                "of numbers, all examples of one shape"
            ) from error
        raise DatasetError(f"{path} cannot be read as an .npz file: {error}") from error
    unknown = sorted(arrays.keys() - {"inputs", "targets", *OPTIONAL})
    missing = sorted({"inputs", "targets"} - arrays.keys())
    if missing or unknown or ("test_inputs" in arrays) != ("test_targets" in arrays):
        raise DatasetError(
            f"{path} must hold the arrays inputs and targets, and may hold {', '.join(OPTIONAL)} (the last two "
            f"together); it holds {', '.join(sorted(arrays)) or 'none'}"
        )
    return arrays


def _with_channels(inputs: np.ndarray) -> np.ndarray:
    return inputs[..., None] if inputs.dtype == np.uint8 and inputs.ndim == 3 else inputs
