"""What raw arrays and splits must be, each with a DatasetError that names the dataset, and what is worth a warning."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

import numpy as np

from adalfl_jax.data.errors import DatasetError
from adalfl_jax.data.examples import Examples, is_image
from adalfl_jax.types import Batch

FAR = 30.0  # times the spread of the training split that a given split may be away, or wider or narrower
ENOUGH = 1000  # examples to tell that by
COUNT_FROM_ZERO = "np.unique(targets, return_inverse=True)[1] numbers them so, over all splits together"


def clean(where: str, inputs: np.ndarray, targets: np.ndarray, examples: Examples) -> tuple[np.ndarray, np.ndarray]:
    """Raw arrays, checked, in the types a dataset has."""
    inputs, targets = np.asarray(inputs), np.asarray(targets)
    for kind, values in (("inputs", inputs), ("targets", targets)):
        check_numbers(where, kind, values)
        if values.ndim == 0:
            raise DatasetError(f"{where}: {kind} must be arrays [N, ...]; got the single number {values}")
    if inputs.ndim == 1:
        raise DatasetError(f"{where}: inputs must be [N, ...] of two axes or more; inputs[:, None] is one column")
    if len(inputs) != len(targets):
        raise DatasetError(f"{where}: {len(inputs)} inputs but {len(targets)} targets")
    if 0 in (*inputs.shape, *targets.shape):
        raise DatasetError(f"{where} is empty; got inputs {inputs.shape} and targets {targets.shape}")
    if examples.num_tokens:
        check_tokens(where, inputs, examples.num_tokens)
        inputs = inputs.astype(np.uint8)
    inputs = inputs if is_image(inputs) or examples.num_tokens else to_floats(inputs)
    if examples.fill_missing:
        check_finite(where, inputs=np.where(np.isnan(inputs), 0, inputs))
    else:
        check_finite(
            where, inputs=inputs, remedy="drop or scale them; with fill_missing=True nan becomes a column's mean"
        )
    if examples.num_classes is None:
        targets = to_floats(targets).reshape(len(targets), -1)
        check_finite(where, targets=targets)
        return inputs, targets
    check_finite(where, targets=targets)
    if np.issubdtype(targets.dtype, np.floating) and (targets != np.round(targets)).any():
        raise DatasetError(f"{where}: labels must be whole numbers; got {targets.dtype} values")
    if examples.num_classes == 1:
        found = (
            "num_classes is 1; two classes have labels 0 and 1" if targets.max() > 0 else "all labels here are of one"
        )
        raise DatasetError(f"{where}: a classification has two classes or more, and {found}")
    _check_labels(where, targets, examples.num_classes)
    return inputs, targets.astype(np.int32)


def check_alike(
    where: str, train: tuple[np.ndarray, np.ndarray], split: str, other: tuple[np.ndarray, np.ndarray]
) -> None:
    """Inputs and targets of a given split have the shapes and the kind of those for training."""
    types = ["uint8" if x.dtype == np.uint8 else "numbers" for x, _ in (train, other)]
    shapes = [(x.shape[1:], y.shape[1:]) for x, y in (train, other)]
    described = [f"inputs {x} {kind} and targets {y}" for (x, y), kind in zip(shapes, types, strict=True)]
    if described[0] != described[1]:
        raise DatasetError(f"{where}: training examples have {described[0]}, {split} examples {described[1]}")


def check_split(where: str, split: Batch, num_outputs: int) -> None:
    """A split of a `Dataset` holds examples, finite and with targets that fit the outputs."""
    inputs, targets = split.inputs, np.asarray(split.targets)
    if len(inputs) != len(targets) or len(inputs) == 0:
        raise DatasetError(
            f"{where}: inputs [N, ...] and targets [N] or [N, C] must share N > 0; got {inputs.shape} and "
            f"{targets.shape}"
        )
    if inputs.dtype != np.uint8:
        check_finite(where, inputs=np.asarray(inputs))
    check_finite(where, targets=targets)
    if np.issubdtype(targets.dtype, np.integer):
        _check_labels(where, targets, num_outputs)
    elif targets.shape != (len(inputs), num_outputs):
        raise DatasetError(f"{where}: targets must be [N, C] = {(len(inputs), num_outputs)}; got {targets.shape}")


def check_numbers(where: str, kind: str, values: np.ndarray) -> None:
    """Values are real numbers or booleans."""
    if not (np.issubdtype(values.dtype, np.number) or values.dtype == np.bool_) or np.iscomplexobj(values):
        remedy = "; np.unique(targets, return_inverse=True)[1] numbers the names of classes"
        raise DatasetError(f"{where}: {kind} must be numbers; got {values.dtype} values{remedy * (kind == 'targets')}")


def check_finite(where: str, *, remedy: str = "drop, fill or scale them", **arrays: np.ndarray) -> None:
    """Arrays, by what they are called, hold nothing but numbers that float32 has."""
    for kind, values in arrays.items():
        if not np.issubdtype(values.dtype, np.floating):
            continue
        with np.errstate(over="ignore"):
            is_finite = np.isfinite(values.astype(np.float32))
        if not is_finite.all():
            rows = np.unique(np.nonzero(~is_finite)[0])
            raise DatasetError(
                f"{where}: {kind} are not finite, or not in float32, in {len(rows)} of {len(values)} examples, the "
                f"first of them at index {rows[0]}; {remedy}"
            )


def check_tokens(where: str, inputs: np.ndarray, num_tokens: int) -> None:
    """Inputs are rows of tokens, from 0 to `num_tokens` - 1."""
    fits = inputs.ndim == 2 and np.issubdtype(inputs.dtype, np.integer) and 0 < num_tokens <= 256
    if not fits or inputs.min() < 0 or inputs.max() >= num_tokens:
        raise DatasetError(
            f"{where}: tokens must be [N, T] integers below num_tokens, which is at most 256; got {inputs.dtype} "
            f"{inputs.shape} up to {inputs.max()} and num_tokens {num_tokens}"
        )


def _check_labels(where: str, labels: np.ndarray, num_classes: int) -> None:
    if labels.ndim != 1 or labels.size == 0 or labels.min() < 0 or labels.max() >= num_classes:
        span = f"values from {labels.min()} to {labels.max()}" if labels.size else "no values"
        remedy = ""
        if labels.ndim == 2:
            of_rows = (
                "; targets.argmax(1) makes labels of one-hot rows"
                if _is_one_hot(labels)
                else "; several labels for each example are for a loop of your own"
            )
            remedy = "; targets[:, 0] is one column" if labels.shape[1] == 1 else of_rows
        elif labels.size and (labels.min() < 0 or labels.min() == labels.max() - num_classes + 1):
            remedy = f"; {COUNT_FROM_ZERO}"
        elif labels.size and labels.max() >= num_classes:
            remedy = "; if there are more classes, say how many with num_classes"
        raise DatasetError(
            f"{where}: labels must be [N] integers from 0 to {num_classes - 1}; got shape {labels.shape} with {span}"
            f"{remedy}"
        )


def _is_one_hot(targets: np.ndarray) -> bool:
    """Whether every row of targets `[N, C]`, C above 1, is 1 at one place and 0 elsewhere."""
    return targets.shape[1] > 1 and bool(((targets == 0) | (targets == 1)).all() and (targets.sum(axis=1) == 1).all())


def to_floats(values: np.ndarray) -> np.ndarray:
    """Converts to float32 if that holds every number of the type, or else to float64."""
    return values.astype(np.float32 if np.can_cast(values.dtype, np.float32) else np.float64)


def warn_of_empty_classes(where: str, labels: np.ndarray, given: Mapping[str, np.ndarray]) -> None:
    """Warns of classes without an example.

    Args:
      where: for the text.
      labels: of the training split. Those below the largest are looked for; larger ones were asked for.
      given: labels of splits that were not cut off the training examples, by their names. Those of the training split
        are looked for.
    """
    empty = np.flatnonzero(np.bincount(labels) == 0)
    if len(empty):
        warnings.warn(
            f"{where}: no training example has {_named(empty)}, where the largest is {labels.max()}. Labels are "
            f"expected to count the classes from 0; {COUNT_FROM_ZERO}",
            stacklevel=2,
        )
    for split, others in given.items():
        missing = np.setdiff1d(labels, others)
        if len(missing):
            warnings.warn(
                f"{where}: no {split} example has {_named(missing)}, which training examples have; what is measured, "
                "or learned, on that split leaves them out",
                stacklevel=2,
            )


def _named(labels: np.ndarray) -> str:
    return f"label {', '.join(map(str, labels[:5]))}{', ...' * (len(labels) > 5)}"


def warn_of_constant_targets(where: str, targets: np.ndarray) -> None:
    """Warns of columns of a regression's targets in which there is nothing to learn, nor a unit for errors."""
    constant = np.flatnonzero(targets.min(axis=0) == targets.max(axis=0))
    if len(constant):
        warnings.warn(
            f"{where}: all training targets are the same in column {', '.join(map(str, constant[:5]))}"
            f"{', ...' * (len(constant) > 5)}, counted from 0; their errors are in no unit, leave the column out",
            stacklevel=2,
        )


def warn_of_one_hot_targets(where: str, targets: np.ndarray) -> None:
    """Warns of targets of a regression that look like the classes of a classification."""
    if _is_one_hot(targets):
        warnings.warn(
            f"{where}: targets are one-hot rows, and are taken for the numbers of a regression; the labels of a "
            "classification are integers [N], as targets.argmax(1) makes them",
            stacklevel=2,
        )


def warn_of_channels_first(where: str, images: np.ndarray) -> None:
    """Warns of images that look like `[channels, H, W]`: as high as there are colours, with too many channels."""
    if images.shape[1] in (1, 3) and images.shape[3] > 4:
        warnings.warn(
            f"{where}: images are [N, H, W, channels], so those of {images.shape} have {images.shape[3]} channels; "
            "where channels come first, write inputs.transpose(0, 2, 3, 1)",
            stacklevel=2,
        )


def warn_of_other_units(
    where: str, kind: str, values: np.ndarray, train: np.ndarray, own: Mapping[str, np.ndarray]
) -> None:
    """Warns of a given split that lies far from the training split in most columns, by the middle 90 % of each."""

    def middle(rows: np.ndarray) -> np.ndarray:  # [2, C]
        part = values[rows[:: math.ceil(len(rows) / ENOUGH)]].astype(np.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of a column without any value
            return np.nanquantile(part if values.ndim == 2 else part.reshape(-1, 1), (0.05, 0.95), axis=0)

    if not own:
        return
    low, high = middle(train)
    varies = high > low
    for split, rows in own.items():
        bottom, top = middle(rows)
        width, there = (high - low)[varies], (top - bottom)[varies]
        is_moved = np.abs(top + bottom - high - low)[varies] > 2 * FAR * width
        # A rare value that no row of a small split has leaves a column without any width.
        is_far = is_moved | (there > FAR * width) | ((there > 0) & (there < width / FAR))
        if is_far.size and is_far.mean() > 0.5:
            column = np.flatnonzero(varies)[is_far.argmax()]
            of_column = f" of column {column}" if values.ndim == 2 else ""
            warnings.warn(
                f"{where}: the middle 90 % of the {split} {kind}{of_column} are from {bottom[column]:.3g} to "
                f"{top[column]:.3g}, for training from {low[column]:.3g} to {high[column]:.3g}; give all splits the "
                "same units",
                stacklevel=2,
            )
