"""The mean and the standard deviation of the training split, and what they make of numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from adalfl_jax.data.errors import DatasetError


@dataclasses.dataclass(frozen=True)
class Scaling:
    """Standardises numbers in their own units, and gives those that are standardised their units back.

    Example:
      >>> scaling = Scaling(mean=(20.0, 0.5), deviation=(10.0, 0.25))
      >>> scaling.apply([[30.0, 0.0]]).tolist(), scaling.invert([[1.0, -2.0]]).tolist()
      ([[1.0, -2.0]], [[30.0, 0.0]])

    Raises:
      ValueError: a mean and a deviation of another number of columns, or numbers that are not finite or no deviation.
    """

    mean: tuple[float, ...] | float  # [C], one a column, or one of all numbers
    deviation: tuple[float, ...] | float  # standard deviations; 1 where nothing varies
    fill_missing: bool = False  # whether nan stands for a missing value; it becomes the mean

    def __post_init__(self) -> None:
        if np.shape(self.mean) != np.shape(self.deviation):
            raise ValueError(f"mean and deviation must be of as many columns; got {self.mean} and {self.deviation}")
        if not (np.isfinite(self.mean).all() and np.isfinite(self.deviation).all() and np.min(self.deviation) > 0):
            raise ValueError(f"means and deviations must be finite, and these above 0; got {self}")

    @classmethod
    def of(cls, where: str, values: np.ndarray, *, fill_missing: bool = False) -> Scaling:
        """That of a training split: by column of a table `[N, C]`, of all numbers together in any other shape.

        What does not vary is only centred. Missing values (nan) take no part.

        Args:
          where: for error texts.
          values: float32 or float64, as they were read: what varies little beside its mean, as times of day in seconds
            since 1970 do, would be rounded away.
          fill_missing: whether `apply` fills missing values.

        Raises:
          DatasetError: a column without any value.
        """
        axis = 0 if values.ndim == 2 else None
        if (is_empty := np.atleast_1d(np.isnan(values).all(axis))).any():
            columns = ", ".join(map(str, np.flatnonzero(is_empty)))
            raise DatasetError(f"{where}: no training example has a value in column {columns}, counted from 0; drop it")
        precision = np.finfo(values.dtype).eps
        values = values.astype(np.float64)
        mean, deviation = np.nanmean(values, axis), np.nanstd(values, axis)
        # Of a constant the mean, and so the deviation, has an error of its own.
        varies = (deviation > 8 * precision * np.abs(mean)) & (np.nanmax(values, axis) > np.nanmin(values, axis))
        deviation = np.where(varies, deviation, 1.0)
        statistics = (tuple(value.tolist()) if value.ndim else value.item() for value in (mean, deviation))
        return cls(*statistics, fill_missing=fill_missing)

    @classmethod
    def of_bytes(cls, images: np.ndarray) -> Scaling:
        """The scaling of uint8 images `[N, H, W, channels]`, by channel; a constant channel is only centred."""
        levels = np.arange(256.0)
        means, deviations = [], []
        for channel in range(images.shape[-1]):
            # block by block: bincount takes a copy of its input in 8-byte integers
            blocks = (images[start : start + 1000, ..., channel] for start in range(0, len(images), 1000))
            counts = sum(np.bincount(block.ravel(), minlength=256) for block in blocks)
            share = counts / images[..., channel].size
            mean = float(share @ levels)
            means.append(mean)
            deviations.append(float(np.sqrt(share @ (levels - mean) ** 2)) or 1.0)
        return cls(tuple(means), tuple(deviations))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Scaling:
        """What `dataclasses.asdict` was made of, be it by way of JSON, which has lists for tuples.

        Raises:
          KeyError, TypeError, ValueError: other values.
        """
        statistics = (values["mean"], values["deviation"])
        mean, deviation = (tuple(value) if isinstance(value, list) else value for value in statistics)
        return cls(mean, deviation, values["fill_missing"])

    def apply(self, values: Any) -> np.ndarray:
        """Numbers `[..., C]` in their own units as the splits hold them: float32, `(values - mean) / deviation`.

        A missing value (nan) becomes 0 with `fill_missing`, and stays missing without.

        Raises:
          DatasetError: another number of columns.
        """
        with np.errstate(over="ignore"):  # what float32 does not hold is refused with its row
            scaled = ((self._check(values) - self.mean) / self.deviation).astype(np.float32)
        return np.where(np.isnan(scaled), np.float32(0), scaled) if self.fill_missing else scaled

    def invert(self, values: Any) -> np.ndarray:
        """Standardised numbers `[..., C]`, outputs of a model say, in their own units: float64.

        Raises:
          DatasetError: another number of columns.
        """
        return self._check(values).astype(np.float64) * self.deviation + self.mean

    def _check(self, values: Any) -> np.ndarray:
        values = np.asarray(values)
        if isinstance(self.mean, tuple) and values.shape[-1:] != (len(self.mean),):
            raise DatasetError(
                f"there must be {len(self.mean)} columns, as the examples have; got shape {values.shape}"
            )
        return values
