"""What a dataset is, and how raw arrays become its splits."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.model_selection import train_test_split

from adalfl_jax.arguments import is_count, is_number
from adalfl_jax.data.cache import digest_of_arrays
from adalfl_jax.data.checks import (
    check_alike,
    check_split,
    clean,
    warn_of_channels_first,
    warn_of_constant_targets,
    warn_of_empty_classes,
    warn_of_one_hot_targets,
    warn_of_other_units,
)
from adalfl_jax.data.corruption import UNCORRUPTED, Corruption
from adalfl_jax.data.errors import DatasetError
from adalfl_jax.data.examples import Examples, is_image
from adalfl_jax.data.preprocessing import Preprocessing
from adalfl_jax.data.scaling import Scaling
from adalfl_jax.types import Batch

SPLIT_SEED = 2301  # plus that of the dataset, so that all runs and all releases see the same examples in the same place
LAST_SEED = 2**32 - 1 - SPLIT_SEED
TEST_FRACTION = 0.2  # where a dataset has no test split of its own
VALID_FRACTION = 0.1  # of what is left for training, as in the paper


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A supervised dataset in three disjoint splits, on the device or, if it is streamed, on the host.

    Images of bytes stay bytes, and so do tokens: `normalize` makes of a batch of them what a model takes. Everything
    else is standardised once, when the dataset is made; new rows are by `preprocessing.encode`, and outputs of a
    regression get the units of the target back by `preprocessing.decode`.

    Raises:
      DatasetError: shapes that do not fit together, labels out of range, values that are not finite.
    """

    name: str
    preprocessing: Preprocessing
    train: Batch  # inputs [N, ...] float32, or uint8 images or tokens; targets [N] int32 labels, or [N, C] float32
    valid: Batch
    test: Batch
    can_flip: bool = False  # whether the mirror image of an input has the same label
    has_own_valid: bool = False  # whether the data bring their validation split, so that none was cut off the examples
    content: str = ""  # digits that any change of the raw examples, or of the splits they are in, changes

    def __repr__(self) -> str:
        shapes = (f"{split}: {getattr(self, split).inputs.shape}" for split in ("train", "valid", "test"))
        return f"Dataset({self.name!r}, inputs of {', '.join(shapes)}, num_outputs={self.num_outputs})"

    def __post_init__(self) -> None:
        for split in ("train", "valid", "test"):
            where, batch = f"dataset {self.name!r}, split {split!r}", getattr(self, split)
            check_split(where, batch, self.num_outputs)
            if batch.inputs.shape[1:] != self.preprocessing.shape:
                shape = self.preprocessing.shape
                raise DatasetError(f"{where}: inputs must be of the shape {shape} each; got {batch.inputs.shape}")

    @property
    def num_outputs(self) -> int:
        """C: classes of a classification, columns of a regression."""
        return self.preprocessing.num_outputs

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example, as a model takes it."""
        return self.preprocessing.input_shape

    @property
    def is_classification(self) -> bool:
        """Whether targets are labels."""
        return jnp.issubdtype(self.train.targets.dtype, jnp.integer)

    @property
    def is_streamed(self) -> bool:
        """Whether examples stay in host memory rather than on the device."""
        return isinstance(self.train.inputs, np.ndarray)

    def normalize(self, inputs: jax.Array) -> jax.Array:
        """Inputs of the splits as a model takes them, float32; see `Preprocessing.normalize`."""
        return self.preprocessing.normalize(inputs)


def make_dataset(
    name: str,
    examples: Examples,
    *,
    valid_fraction: float = VALID_FRACTION,
    valid_examples: int = 0,
    corruption: Corruption = UNCORRUPTED,
    seed: int = 0,
    on_device: bool = True,
) -> Dataset:
    """Splits and standardises raw arrays.

    Where there is no test split a fifth of the examples become one; then, where there is no validation split,
    `valid_fraction` of the rest become it, or `valid_examples` of them. They are drawn by class, the same ones every
    time for a seed. The training split alone is then corrupted, if it is asked for. Means and deviations come from what
    is left of it alone: one a channel for images of bytes, one of each for other images, one a column for tables and
    for the targets of a regression, whose metrics are thus in units of the target's standard deviation.

    Args:
      name: for error texts.
      examples: the raw arrays.
      valid_fraction: in (0, 1); with a validation split among the examples, the default.
      valid_examples: number of examples of the validation split; 0 goes by `valid_fraction`.
      corruption: what is done to the training split; nothing by default.
      seed: of the examples that are drawn, for splits and for corruption, 0 or more.
      on_device: whether to move the arrays to the device; if not they stay NumPy's.

    Raises:
      DatasetError: different numbers of inputs and targets, labels out of range, values that are not finite, splits too
        small to be stratified, settings out of range or without effect, corruption of a regression or that leaves a
        class empty, a column without any value.
    """
    where, num_classes = f"dataset {name!r}", examples.num_classes
    corruption.check(where, num_classes)
    size = valid_size(where, valid_fraction, valid_examples, is_given=examples.valid is not None)
    if not is_seed(seed):
        raise DatasetError(f"{where}: seed must be a whole number from 0 to {LAST_SEED}; got {seed!r}")
    inputs, targets, (train, valid, test) = _arrange(where, examples, size, seed)
    arrays = {"inputs": inputs, "targets": targets, "train": train, "valid": valid, "test": test}
    arrays["kind"] = np.array([num_classes or 0, examples.num_tokens])  # which no array tells
    content = digest_of_arrays(arrays)[:12]  # before rounding that libraries may change
    own = {split: rows for split, rows in (("valid", valid), ("test", test)) if getattr(examples, split) is not None}
    if num_classes is not None:
        right = targets  # a wrong label makes an example of a class that has none
        train, targets = corruption.apply(where, right, train, num_classes, seed=SPLIT_SEED + seed)
        if not examples.num_tokens:  # a rare character may only occur in another part of a text
            warn_of_empty_classes(where, right[train], {split: right[rows] for split, rows in own.items()})
    inputs, targets, preprocessing = _standardize(where, examples, inputs, targets, train, own)
    convert = jnp.asarray if on_device else np.asarray
    splits = [Batch(convert(inputs[part]), convert(targets[part])) for part in (train, valid, test)]  # pyright: ignore[reportArgumentType]
    return Dataset(
        name,
        preprocessing,
        *splits,
        can_flip=examples.can_flip,
        has_own_valid=examples.valid is not None,
        content=content,
    )


def _standardize(
    where: str,
    examples: Examples,
    inputs: np.ndarray,
    targets: np.ndarray,
    train: np.ndarray,
    own: Mapping[str, np.ndarray],
) -> tuple[np.ndarray, np.ndarray, Preprocessing]:
    """Inputs and targets of all splits as a `Dataset` holds them, and what was made of them, by the training split.

    Args:
      where: for error texts.
      examples: what the arrays are.
      inputs: of all splits.
      targets: of all splits.
      train: rows of the training split.
      own: rows of splits that were not cut off the training examples, by their names.
    """
    inputs_scaling = targets_scaling = None
    if is_image(inputs):
        warn_of_channels_first(where, inputs)
        inputs_scaling = Scaling.of_bytes(inputs[train])
    elif not examples.num_tokens:
        inputs_scaling = Scaling.of(where, inputs[train], fill_missing=examples.fill_missing)
        warn_of_other_units(where, "inputs", inputs, train, own)
        inputs = inputs_scaling.apply(inputs)
    if examples.num_classes is None:
        targets_scaling = Scaling.of(where, targets[train])
        warn_of_constant_targets(where, targets[train])
        warn_of_one_hot_targets(where, targets[train])
        warn_of_other_units(where, "targets", targets, train, own)
        targets = targets_scaling.apply(targets)
    preprocessing = Preprocessing(
        shape=inputs.shape[1:],
        num_outputs=examples.num_classes if examples.num_classes is not None else targets.shape[1],
        inputs=inputs_scaling,
        targets=targets_scaling,
        is_image=is_image(inputs),
        num_tokens=examples.num_tokens,
    )
    return inputs, targets, preprocessing


def is_seed(value: Any) -> bool:
    """Whether splits can be drawn with a seed: a whole number from 0 to `LAST_SEED`."""
    return isinstance(value, Integral) and not isinstance(value, bool) and 0 <= int(value) <= LAST_SEED


def valid_size(where: str, fraction: float, num_examples: int, *, is_given: bool) -> float | int | None:
    """The size of the validation split: a share, a whole number of examples, or None where there is one already."""
    if not (is_number(fraction) and 0 < fraction < 1):
        raise DatasetError(f"{where}: valid_fraction must be a number between 0 and 1; got {fraction!r}")
    if not (num_examples == 0 or is_count(num_examples)):
        raise DatasetError(f"{where}: valid_examples must be a number of examples, or 0 for none; got {num_examples!r}")
    if is_given and (num_examples or fraction != VALID_FRACTION):
        raise DatasetError(
            f"{where} brings a validation split of its own, whose size valid_fraction={fraction} and "
            f"valid_examples={num_examples} cannot change; leave them at {VALID_FRACTION} and 0"
        )
    return None if is_given else num_examples or fraction


def _arrange(
    where: str, examples: Examples, size: float | int | None, seed: int
) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Inputs and targets of all examples, checked, and the row numbers of the train, valid and test split."""
    inputs, targets = clean(where, examples.inputs, examples.targets, examples)
    stratify = examples.num_classes is not None
    train, *cut_off = split_indices(
        where,
        targets,
        stratify=stratify,
        valid=size,
        test=None if examples.test else TEST_FRACTION,
        seed=seed,
    )
    arrays: list[tuple[np.ndarray, np.ndarray]] = [(inputs, targets)]
    held_out = []
    for split, given, rows in zip(("valid", "test"), (examples.valid, examples.test), cut_off, strict=True):
        if given is not None:
            added = clean(f"{where}, {split}", *given, examples)
            check_alike(where, arrays[0], split, added)
            rows = np.arange(len(added[0])) + sum(len(part) for part, _ in arrays)
            arrays.append(added)
        held_out.append(rows)
    if len(arrays) > 1:
        inputs, targets = (np.concatenate(parts) for parts in zip(*arrays, strict=True))
    valid, test = held_out
    return inputs, targets, (train, valid, test)


def split_indices(
    where: str,
    targets: np.ndarray,
    *,
    stratify: bool,
    valid: float | int | None = VALID_FRACTION,
    test: float | None = TEST_FRACTION,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row numbers of the train, valid and test split: disjoint, together all rows, the same every time for a seed.

    `valid` is a share of what the test split leaves, or a whole number of examples; None cuts nothing off.
    """
    rest, none = np.arange(len(targets)), np.arange(0)
    cut = functools.partial(_cut, where, targets, stratify=stratify, seed=SPLIT_SEED + seed)
    for_valid = "a validation split of your own, or another valid_fraction or valid_examples"
    rest, test_rows = (
        (rest, none) if test is None else cut(rest, split="test", size=test, remedy="or a test split of your own")
    )
    rest, valid_rows = (rest, none) if valid is None else cut(rest, split="validation", size=valid, remedy=for_valid)
    return rest, valid_rows, test_rows


def representative_rows(targets: jax.Array | np.ndarray, count: int) -> np.ndarray:
    """Row numbers `[count]` of examples that stand for all: the same every time, each class by its share of the labels.

    They are shuffled, and do not go by the order of the examples, which may be sorted by class.

    Args:
      targets: labels `[N]` integers, or numbers `[N, C]`.
      count: of rows, in 0, ..., N.
    """
    targets = np.asarray(targets)
    shuffled = np.random.default_rng(SPLIT_SEED).permutation(len(targets))
    by_class = shuffled
    if np.issubdtype(targets.dtype, np.integer):
        by_class = shuffled[np.argsort(targets[shuffled], kind="stable")]
    evenly = np.arange(count) * len(targets) // max(count, 1)
    return shuffled[np.isin(shuffled, by_class[evenly])]


def _cut(
    where: str,
    targets: np.ndarray,
    rows: np.ndarray,
    *,
    stratify: bool,
    seed: int,
    split: str,
    size: float | int,
    remedy: str,
) -> tuple[np.ndarray, np.ndarray]:
    """What is left of some rows, and what is cut off them."""
    labels = targets[rows] if stratify else None
    try:
        rest, held_out = train_test_split(rows, test_size=size, stratify=labels, random_state=seed)
    except ValueError as error:
        needs = "one must be left"
        if labels is not None:
            num_classes = len(np.unique(labels))
            needs = f"what is cut off and what is left need one for each of {num_classes} classes"
            if 10 * num_classes > len(labels):
                remedy += "; whole numbers are labels, so for a regression let targets be floats, targets.astype(float)"
        count = math.ceil(size * len(rows)) if isinstance(size, float) else size
        raise DatasetError(
            f"{where}: no {split} split of {count} can be cut off {len(rows)} examples, since {needs}; bring more "
            f"examples{' of each class' if stratify else ''}, {remedy}"
        ) from error
    return np.asarray(rest), np.asarray(held_out)
