"""Datasets by name, their splits, and sampling on the device."""

from __future__ import annotations

from collections.abc import Callable

from adalfl_jax.data.embedded import load_diabetes, load_digits
from adalfl_jax.data.sampling import epoch_indices as epoch_indices
from adalfl_jax.data.sampling import take as take
from adalfl_jax.data.splits import Dataset as Dataset
from adalfl_jax.data.splits import make_dataset as make_dataset
from adalfl_jax.registry import lookup

DATASETS: dict[str, Callable[[], Dataset]] = {"digits": load_digits, "diabetes": load_diabetes}


def load(name: str) -> Dataset:
    """Loads a dataset by name: standardised arrays on the device in fixed train, valid and test splits.

    Args:
      name: a key of `DATASETS`.

    Raises:
      ValueError: an unknown name; the text lists the known ones.

    Example:
      >>> digits = load("digits")
      >>> digits.train.inputs.shape, digits.valid.targets.shape, digits.num_outputs
      ((1293, 8, 8, 1), (144,), 10)
    """
    return lookup("dataset", DATASETS, name)()
