"""Training splits made worse on purpose: rare classes and wrong labels, drawn the same way every time.

Draws are made of the raw stream of a bit generator, the one part of NumPy's random numbers that no release changes.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from adalfl_jax.arguments import is_number
from adalfl_jax.data.errors import DatasetError
from adalfl_jax.registry import require_known

NOISE_KINDS = ("symmetric", "pair", "removed")


@dataclasses.dataclass(frozen=True)
class Corruption:
    """What is done to the training split of a classification: first classes lose examples, then labels are made wrong.

    Attributes:
      label_noise: share of the labels that are wrong, in [0, 1).
      noise_kind: "symmetric", any other class is as likely, "pair", class c becomes c + 1 and the last the first, or
        "removed", the examples whose labels are wrong with the other kinds are left out.
      imbalance: examples of the largest class for one of the smallest, 1 or more; 1 leaves the classes as they are.

    Raises:
      DatasetError: a value out of its range, or no number.
      ValueError: an unknown kind of noise.
    """

    label_noise: float = 0.0
    noise_kind: str = "symmetric"
    imbalance: float = 1.0

    def __post_init__(self) -> None:
        if not (is_number(self.label_noise) and 0 <= self.label_noise < 1):
            raise DatasetError(f"label_noise must be a share of the labels in [0, 1); got {self.label_noise!r}")
        if not (is_number(self.imbalance) and self.imbalance >= 1):
            raise DatasetError(f"imbalance must be a finite number of at least 1; got {self.imbalance!r}")
        require_known("noise_kind", NOISE_KINDS, self.noise_kind)

    def check(self, where: str, num_classes: int | None) -> None:
        """Raises DatasetError if something is to be done to data without classes (None), or with one alone."""
        if (self.label_noise or self.imbalance > 1) and (num_classes is None or num_classes < 2):
            what = "a regression" if num_classes is None else "of one class"
            raise DatasetError(
                f"{where} is {what}, and label_noise and imbalance are for classifications of two classes or more; "
                f"leave them at 0 and 1; got {self.label_noise} and {self.imbalance}"
            )

    def apply(
        self, where: str, labels: np.ndarray, rows: np.ndarray, num_classes: int, *, seed: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Corrupts the rows of the training split.

        Args:
          where: for error texts.
          labels: of all examples, `[N]`.
          rows: numbers of those in the training split.
          num_classes: C.
          seed: of the draws.

        Returns:
          The rows that are left, and the labels `[N]`, some of them wrong at these rows.

        Raises:
          DatasetError: an imbalance that leaves a class without an example, or no example that is left.
        """
        if self.imbalance > 1:
            rows = rows[long_tailed_rows(where, labels[rows], num_classes, imbalance=self.imbalance, seed=seed)]
        if self.label_noise > 0 and self.noise_kind == "removed":
            rows = np.delete(rows, _wrong_rows(len(rows), self.label_noise, seed))
            if len(rows) == 0:
                raise DatasetError(f"{where}: a label_noise of {self.label_noise} leaves no example; make it smaller")
        elif self.label_noise > 0:
            labels = labels.copy()
            labels[rows] = wrong_labels(
                labels[rows], num_classes, share=self.label_noise, kind=self.noise_kind, seed=seed
            )
        return rows, labels

    def estimate_size(self, num_examples: int, num_classes: int) -> int:
        """Examples that are left of a training split, if its classes are equally large.

        Raises:
          DatasetError: a class would have none left.
        """
        if self.imbalance > 1:
            sizes = np.full(num_classes, num_examples / num_classes)
            num_examples = int(long_tailed_sizes("the dataset", sizes, self.imbalance).sum())
        removed = round(self.label_noise * num_examples) if self.noise_kind == "removed" else 0
        return num_examples - removed


UNCORRUPTED = Corruption()


def wrong_labels(labels: np.ndarray, num_classes: int, *, share: float, kind: str, seed: int) -> np.ndarray:
    """Labels of which `round(share * N)` are others.

    With one seed the wrong labels of a smaller share are among those of a larger, the same ones.

    Args:
      labels: `[N]`, from 0 to C - 1.
      num_classes: C, at least 2.
      share: in [0, 1].
      kind: "symmetric" or "pair".
      seed: of the draws.

    References:
      "symmetric" and "pair" noise: Han et al., "Co-teaching", arXiv 1804.06872.
    """
    wrong = _wrong_rows(len(labels), share, seed)
    offsets = np.ones(len(labels), labels.dtype)
    if kind == "symmetric":
        offsets += (_draw(seed, "offsets", len(labels)) % (num_classes - 1)).astype(labels.dtype)
    corrupted = labels.copy()
    corrupted[wrong] = (labels[wrong] + offsets[wrong]) % num_classes
    return corrupted


def _wrong_rows(num_labels: int, share: float, seed: int) -> np.ndarray:
    """Numbers of the rows whose labels are wrong, in no order."""
    return _order(seed, "wrong labels", num_labels)[: round(share * num_labels)]


def long_tailed_rows(where: str, labels: np.ndarray, num_classes: int, *, imbalance: float, seed: int) -> np.ndarray:
    """Row numbers, in ascending order, that leave the classes the sizes of `long_tailed_sizes`, drawn at random."""
    sizes = long_tailed_sizes(where, np.bincount(labels, minlength=num_classes), imbalance)
    order = _order(seed, "kept examples", len(labels))
    kept = [order[labels[order] == label][:size] for label, size in enumerate(sizes)]
    return np.sort(np.concatenate(kept))


def long_tailed_sizes(where: str, sizes: np.ndarray, imbalance: float) -> np.ndarray:
    r"""Sizes of the classes that fall exponentially from the first to the last, by the factor `imbalance` in all.

    .. math:: n_c = n_0\, r^{-c/(C-1)}, \qquad r = \text{imbalance}

    rounded, with the largest n_0 that every class has enough examples for.

    Args:
      where: for error texts.
      sizes: of the classes now, `[C]` with C of at least 2.
      imbalance: r, above 1.

    Raises:
      DatasetError: a class that has no example, or would have none left.

    References:
      Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", arXiv 1901.05555.
    """
    profile = imbalance ** (-np.arange(len(sizes)) / (len(sizes) - 1))
    largest = (sizes / profile).min()
    left = np.round(largest * profile).astype(int)
    if left.min() < 1:
        empty = left.argmin() if sizes.min() else sizes.argmin()
        raise DatasetError(
            f"{where}: imbalance = {imbalance:g} leaves class {empty} without an example, where classes have from "
            f"{sizes.min():g} to {sizes.max():g}; take a smaller imbalance, or examples of every class"
        )
    return left


def _order(seed: int, purpose: str, size: int) -> np.ndarray:
    """A permutation of `size` row numbers."""
    return np.argsort(_draw(seed, purpose, size), kind="stable")


def _draw(seed: int, purpose: str, size: int) -> np.ndarray:
    """`size` random 64-bit integers, others for every purpose."""
    return np.random.PCG64([seed, *purpose.encode()]).random_raw(size)
