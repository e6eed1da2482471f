"""Datasets that ship with scikit-learn as files: no network, no preparation."""

from __future__ import annotations

import sklearn.datasets

from adalfl_jax.data.examples import Examples


def load_digits() -> Examples:
    """1,797 handwritten digits, 8x8 grey levels, 10 classes (UCI Optical Recognition of Handwritten Digits)."""
    bunch = sklearn.datasets.load_digits()
    return Examples(bunch.images[..., None], bunch.target, num_classes=10, can_flip=False)  # pyright: ignore[reportAttributeAccessIssue]


def load_diabetes() -> Examples:
    """442 patients, 10 measurements each, and the disease's progression after a year (Efron et al., 2004)."""
    # scikit-learn's scaled form has the test rows in its means; the raw measurements leave the scaling to us.
    bunch = sklearn.datasets.load_diabetes(scaled=False)
    return Examples(bunch.data, bunch.target)  # pyright: ignore[reportAttributeAccessIssue]
