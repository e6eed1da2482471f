"""Datasets that ship with scikit-learn as files: no network, no preparation."""

from __future__ import annotations

import sklearn.datasets

from adalfl_jax.data.splits import Dataset, make_dataset


def load_digits() -> Dataset:
    """1,797 handwritten digits, 8x8 grey levels, 10 classes (UCI Optical Recognition of Handwritten Digits)."""
    bunch = sklearn.datasets.load_digits()
    return make_dataset("digits", bunch.images[..., None], bunch.target, num_classes=10)  # pyright: ignore[reportAttributeAccessIssue]


def load_diabetes() -> Dataset:
    """442 patients, 10 measurements each, and the disease's progression after a year (Efron et al., 2004)."""
    # scikit-learn's scaled form has the test rows in its means; the raw measurements leave the scaling to us.
    bunch = sklearn.datasets.load_diabetes(scaled=False)
    return make_dataset("diabetes", bunch.data, bunch.target)  # pyright: ignore[reportAttributeAccessIssue]
