"""The shapes of a dataset, known without its data."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adalfl_jax.data.corruption import UNCORRUPTED, Corruption
from adalfl_jax.data.errors import DatasetError
from adalfl_jax.data.examples import Examples, is_image
from adalfl_jax.data.preprocessing import Preprocessing
from adalfl_jax.data.scaling import Scaling
from adalfl_jax.data.splits import TEST_FRACTION, Dataset, valid_size
from adalfl_jax.types import Batch


class Spec(NamedTuple):
    """What a model and a step depend on."""

    input_shape: tuple[int, ...]
    num_outputs: int
    num_train: int  # examples of the training split, with those a validation split is cut off
    num_test: int  # 0 where the test split is cut off the training split
    is_classification: bool = True
    is_image: bool = True  # of bytes
    can_flip: bool = False
    num_valid: int = 0  # 0 where the validation split is cut off the training split
    num_tokens: int = 0  # of the vocabulary, where inputs are tokens

    @classmethod
    def of(cls, examples: Examples) -> Spec:
        """The shapes of examples that are there."""
        inputs, targets = np.asarray(examples.inputs), np.asarray(examples.targets)
        is_classification = examples.num_classes is not None
        return cls(
            input_shape=inputs.shape[1:],
            num_outputs=examples.num_classes or targets.reshape(len(targets), -1).shape[1],
            num_train=len(inputs),
            num_test=len(examples.test[0]) if examples.test else 0,
            is_classification=is_classification,
            is_image=is_image(inputs),
            can_flip=examples.can_flip,
            num_valid=len(examples.valid[0]) if examples.valid else 0,
            num_tokens=examples.num_tokens,
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of all inputs on a device."""
        return (
            (self.num_train + self.num_valid + self.num_test)
            * math.prod(self.input_shape)
            * (1 if self.is_of_bytes else 4)
        )

    @property
    def is_of_bytes(self) -> bool:
        """Whether inputs stay bytes on the device."""
        return self.is_image or self.num_tokens > 0


SPECS = {
    "digits": Spec((8, 8, 1), 10, 1797, 0, is_image=False),
    "diabetes": Spec((10,), 1, 442, 0, is_classification=False, is_image=False, can_flip=True),
    "california": Spec((8,), 1, 20640, 0, is_classification=False, is_image=False, can_flip=True),
    "crime": Spec((100,), 1, 1994, 0, is_classification=False, is_image=False, can_flip=True),
    "mnist": Spec((28, 28, 1), 10, 60000, 10000),
    "fashion_mnist": Spec((28, 28, 1), 10, 60000, 10000, can_flip=True),
    "cifar10": Spec((32, 32, 3), 10, 50000, 10000, can_flip=True),
    "cifar100": Spec((32, 32, 3), 100, 50000, 10000, can_flip=True),
    "svhn_cropped": Spec((32, 32, 3), 10, 73257, 26032),
}


def random_dataset(name: str, spec: Spec, num_examples: int, *, seed: int = 0) -> Dataset:
    """Noise in the shapes of a dataset, `num_examples` in every split: for a dry run, and for tests without data."""
    rng = np.random.default_rng(seed)

    def split() -> Batch:
        shape = (num_examples, *spec.input_shape)
        inputs = (
            rng.integers(0, spec.num_tokens or 256, shape, np.uint8)
            if spec.is_of_bytes
            else rng.normal(size=shape).astype(np.float32)
        )
        targets = (
            rng.integers(0, spec.num_outputs, num_examples, np.int32)
            if spec.is_classification
            else rng.normal(size=(num_examples, spec.num_outputs)).astype(np.float32)
        )
        return Batch(jnp.asarray(inputs), jnp.asarray(targets))

    channels = spec.input_shape[-1]
    scaling = Scaling((127.5,) * channels, (73.9,) * channels) if spec.is_image else Scaling(0.0, 1.0)
    preprocessing = Preprocessing(
        shape=spec.input_shape,
        num_outputs=spec.num_outputs,
        inputs=None if spec.num_tokens else scaling,
        is_image=spec.is_image,
        num_tokens=spec.num_tokens,
    )
    return Dataset(
        name,
        preprocessing,
        split(),
        split(),
        split(),
        can_flip=spec.can_flip,
        has_own_valid=spec.num_valid > 0,
    )


def abstract_splits(
    spec: Spec, valid_fraction: float, valid_examples: int = 0, corruption: Corruption = UNCORRUPTED
) -> tuple[Batch, Batch]:
    """Shapes and types of the training and the validation split, without values.

    With an imbalance the size of the training split is an estimate, which takes the classes for equally large.

    Raises:
      DatasetError: a validation split as large as the training split, a size for one that the data bring, or corruption
        that the data cannot have.
    """
    valid_size("the dataset", valid_fraction, valid_examples, is_given=spec.num_valid > 0)  # for its errors
    num_left = spec.num_train - (0 if spec.num_test else math.ceil(TEST_FRACTION * spec.num_train))
    num_cut = 0 if spec.num_valid else min(valid_examples, spec.num_train) or math.ceil(valid_fraction * num_left)
    num_valid, num_train = spec.num_valid or num_cut, num_left - num_cut
    if spec.num_train and num_train < 1:
        raise DatasetError(f"no validation split of {valid_examples} can be cut off {num_left} examples")
    corruption.check("the dataset", spec.num_outputs if spec.is_classification else None)
    if spec.num_train:
        num_train = corruption.estimate_size(num_train, spec.num_outputs)

    def split(size: int) -> Batch:
        dtype = jnp.uint8 if spec.is_of_bytes else jnp.float32
        inputs = jax.ShapeDtypeStruct((size, *spec.input_shape), dtype)
        targets = (
            jax.ShapeDtypeStruct((size,), jnp.int32)
            if spec.is_classification
            else jax.ShapeDtypeStruct((size, spec.num_outputs), jnp.float32)
        )
        return Batch(inputs, targets)  # pyright: ignore[reportArgumentType]

    return split(num_train), split(num_valid)
