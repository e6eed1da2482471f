"""A user's own arrays."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from adalfl_jax.data.errors import DatasetError
from adalfl_jax.data.examples import Examples
from adalfl_jax.registry import suggestion


def load_npz(path: Path) -> Examples:
    """Reads `inputs` and `targets` from an .npz file; nothing in it is unpickled.

    uint8 inputs `[N, H, W]` or `[N, H, W, channels]` are images; others are images or tables of numbers. Targets of an
    integer or boolean type are labels from 0 to the largest that occurs, or to `num_classes - 1` where the file holds
    that number too; other targets are a regression's. A test split is cut off, unless `test_inputs` and `test_targets`
    are given, and a validation split, unless `valid_inputs` and `valid_targets` are. Where it holds `fill_missing`,
    True, nan among the inputs is a missing value.

    Raises:
      DatasetError: no such file, no .npz file, a damaged one, arrays missing, misnamed or of Python objects, labels
        larger than the number of examples.
    """
    arrays = _read_examples(path)
    targets = arrays["targets"]
    num_classes = None
    if "num_classes" in arrays:
        num_classes = _whole_number(path, arrays["num_classes"])
    elif np.issubdtype(targets.dtype, np.integer) or targets.dtype == np.bool_:
        num_classes = int(targets.max(initial=0)) + 1
        if num_classes > max(2, targets.size):
            raise DatasetError(
                f"{path}: labels count the classes from 0, and with {targets.size} examples the largest is "
                f"{num_classes - 1}; number classes with np.unique(targets, return_inverse=True)[1], or say how many "
                "there are with an array num_classes"
            )
    test, valid = (
        (_with_channels(arrays[f"{split}_inputs"]), arrays[f"{split}_targets"]) if f"{split}_inputs" in arrays else None
        for split in SPLITS
    )
    inputs, fills = _with_channels(arrays["inputs"]), _flag(path, "fill_missing", arrays)
    return Examples(inputs, targets, num_classes, test, valid, fill_missing=fills)


SPLITS = ("test", "valid")
OPTIONAL = ("num_classes", "fill_missing", *(f"{split}_{kind}" for split in SPLITS for kind in ("inputs", "targets")))


def read_arrays(path: Path, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, or those of these names that it has; nothing in it is unpickled.

    Raises:
      DatasetError: no such file, no .npz file, a damaged one, arrays of Python objects.
    """
    if not path.is_file():
        where = "" if path.is_absolute() else f" in {Path.cwd()}, where this program was started"
        raise DatasetError(f"there is no file {path}{where}")
    try:
        path.open("rb").close()
    except PermissionError as error:
        raise DatasetError(f"{path} may not be read by this user; change its permissions") from error
    if not zipfile.is_zipfile(path):
        raise DatasetError(
            f"{path} is no .npz file, or one that is cut short; write it with np.savez(path, inputs=...)"
        )
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            # an array whose header is damaged may end before its checksum is compared, so all are compared first
            if (damaged := file.zip.testzip()) is not None:
                raise ValueError(f"the checksum of {damaged} is not that of its contents")
            return {name: file[name] for name in file.files if names is None or name in names}
    except Exception as error:  # whatever zipfile, zlib and NumPy's parser raise
        if "Object arrays" in str(error):
            raise DatasetError(
                f"{path} holds arrays of Python objects, which are not read since unpickling runs code; write arrays "
                "of numbers, all examples of one shape"
            ) from error
        raise DatasetError(f"{path} is damaged and cannot be read as an .npz file: {error}; write it anew") from error


def _read_examples(path: Path) -> dict[str, np.ndarray]:
    arrays = read_arrays(path)
    unknown = sorted(arrays.keys() - {"inputs", "targets", *OPTIONAL})
    missing = sorted({"inputs", "targets"} - arrays.keys())
    halved = any((f"{split}_inputs" in arrays) != (f"{split}_targets" in arrays) for split in SPLITS)
    if missing or unknown or halved:
        known = {"inputs", "targets", *OPTIONAL} - arrays.keys()
        found = "".join(f"Unknown array {name!r}; {suggestion(name, known) or 'take it out. '}" for name in unknown)
        raise DatasetError(
            f"{path} must hold the arrays inputs and targets, and may hold {', '.join(OPTIONAL)} (inputs and targets "
            f"of a split together). {found}It holds {', '.join(sorted(arrays)) or 'none'}"
        )
    return arrays


def _with_channels(inputs: np.ndarray) -> np.ndarray:
    return inputs[..., None] if inputs.dtype == np.uint8 and inputs.ndim == 3 else inputs


def _whole_number(path: Path, value: np.ndarray) -> int:
    if value.size != 1 or not np.issubdtype(value.dtype, np.integer) or value.item() < 1:
        raise DatasetError(f"{path}: num_classes must be one whole number of at least 1; got {value}")
    return value.item()


def _flag(path: Path, name: str, arrays: dict[str, np.ndarray]) -> bool:
    value = arrays.get(name, np.False_)
    if value.size != 1 or value.dtype != np.bool_:
        raise DatasetError(f"{path}: {name} must be True or False; got {value}")
    return bool(value.item())
