"""What a dataset is, and how raw arrays become its splits."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from sklearn.model_selection import train_test_split

from adalfl_jax.types import Batch

SPLIT_SEED = 2301  # of every split, so that all runs and all releases see the same examples in the same place
TEST_FRACTION = 0.2  # where a dataset has no test split of its own
VALID_FRACTION = 0.1  # of what is left for training, as in the paper


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A supervised dataset on the device, standardised, in three disjoint splits.

    Raises:
      ValueError: shapes that do not fit together, labels out of range, values that are not finite.
    """

    name: str
    num_outputs: int  # C: classes of a classification, columns of a regression
    train: Batch  # inputs [N, ...] float32; targets [N] int32 labels, or [N, C] float32
    valid: Batch
    test: Batch

    def __post_init__(self) -> None:
        for split in ("train", "valid", "test"):
            _check_split(f"dataset {self.name!r}, split {split!r}", getattr(self, split), self.num_outputs)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return self.train.inputs.shape[1:]

    @property
    def is_classification(self) -> bool:
        """Whether targets are labels."""
        return jnp.issubdtype(self.train.targets.dtype, jnp.integer)


def make_dataset(name: str, inputs: np.ndarray, targets: np.ndarray, *, num_classes: int | None = None) -> Dataset:
    """Splits, standardises and moves raw arrays to the device.

    A fifth of the examples become the test split and a tenth of the rest the validation split, the same ones every
    time, stratified by class. Means and deviations come from the training split alone: one of each for images, one
    per column for tables and for the targets of a regression, whose metrics are thus in units of the target's
    standard deviation.

    Args:
      name: for error texts.
      inputs: images `[N, H, W, channels]` or a table `[N, columns]`.
      targets: labels `[N]`, or values `[N]` or `[N, C]`.
      num_classes: C of a classification; None for a regression.

    Raises:
      ValueError: different numbers of inputs and targets, labels out of range, values that are not finite.
    """
    is_classification = num_classes is not None
    if len(inputs) != len(targets):
        raise ValueError(f"dataset {name!r}: {len(inputs)} inputs but {len(targets)} targets")
    _check_finite(f"dataset {name!r}", inputs=inputs, targets=targets)
    if is_classification and not np.array_equal(targets, np.asarray(targets).astype(np.int32)):
        raise ValueError(f"dataset {name!r}: labels must be whole numbers; got {np.asarray(targets).dtype} values")
    inputs = np.asarray(inputs, np.float32)
    targets = np.asarray(targets, np.int32 if is_classification else np.float32)
    if not is_classification:
        targets = targets.reshape(len(targets), -1)
    rows = split_indices(targets, stratify=is_classification)
    train = rows[0]
    inputs = standardize(inputs, train, axis=(0,) if inputs.ndim == 2 else None)
    if not is_classification:
        targets = standardize(targets, train, axis=(0,))
    splits = [Batch(jnp.asarray(inputs[part]), jnp.asarray(targets[part])) for part in rows]
    return Dataset(name, num_classes if num_classes is not None else targets.shape[1], *splits)


def standardize(values: np.ndarray, train: np.ndarray, axis: tuple[int, ...] | None) -> np.ndarray:
    """Subtracts the mean and divides by the standard deviation, over `axis`, of the rows `train`.

    What does not vary among those rows is only centred.
    """
    rows = values[train].astype(np.float64)
    mean, deviation = rows.mean(axis, keepdims=True), rows.std(axis, keepdims=True)
    varies = deviation > 1e-6 * np.abs(mean)  # what float32 leaves of a constant
    return ((values - mean) / np.where(varies, deviation, 1.0)).astype(values.dtype)


def split_indices(targets: np.ndarray, *, stratify: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row numbers of the train, valid and test split: disjoint, together all rows, the same every time."""

    def cut(rows: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
        labels = targets[rows] if stratify else None
        rest, held_out = train_test_split(rows, test_size=fraction, stratify=labels, random_state=SPLIT_SEED)
        return np.asarray(rest), np.asarray(held_out)

    rest, test = cut(np.arange(len(targets)), TEST_FRACTION)
    return *cut(rest, VALID_FRACTION), test


def _check_finite(where: str, **arrays: np.ndarray) -> None:
    for kind, values in arrays.items():
        if not np.isfinite(values).all():
            rows = np.unique(np.nonzero(~np.isfinite(values))[0])
            raise ValueError(
                f"{where}: {kind} are not finite in {len(rows)} of {len(values)} examples, the first of them number "
                f"{rows[0]}; drop or fill them before training"
            )


def _check_split(where: str, split: Batch, num_outputs: int) -> None:
    inputs, targets = np.asarray(split.inputs), np.asarray(split.targets)
    if len(inputs) != len(targets) or len(inputs) == 0:
        raise ValueError(
            f"{where}: inputs [N, ...] and targets [N] or [N, C] must share N > 0; got {inputs.shape} and "
            f"{targets.shape}"
        )
    _check_finite(where, inputs=inputs, targets=targets)
    if np.issubdtype(targets.dtype, np.integer):
        if targets.ndim != 1 or targets.min() < 0 or targets.max() >= num_outputs:
            raise ValueError(
                f"{where}: labels must be [N] integers from 0 to {num_outputs - 1}; got shape {targets.shape} with "
                f"values from {targets.min()} to {targets.max()}"
            )
    elif targets.shape != (len(inputs), num_outputs):
        raise ValueError(f"{where}: targets must be [N, C] = {(len(inputs), num_outputs)}; got {targets.shape}")
