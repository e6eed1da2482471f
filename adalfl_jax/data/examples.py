"""What every source of data delivers, before it is split."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from pathlib import Path

import numpy as np


def is_image(inputs: np.ndarray) -> bool:
    """Whether inputs are images of bytes `[N, H, W, channels]`, which stay bytes."""
    return inputs.dtype == np.uint8 and inputs.ndim == 4


@dataclasses.dataclass(frozen=True)
class Examples:
    """Raw arrays of a dataset, on the host."""

    inputs: np.ndarray  # uint8 images [N, H, W, channels], tokens [N, T], or values [N, ...]
    targets: np.ndarray  # labels [N], or values [N] or [N, C]
    num_classes: int | None = None  # C of a classification; None for a regression
    test: tuple[np.ndarray, np.ndarray] | None = None  # inputs and targets of a test split of its own
    valid: tuple[np.ndarray, np.ndarray] | None = None  # the same of a validation split: labels that were checked, say
    can_flip: bool = True  # whether the mirror image of an input has the same label
    num_tokens: int = 0  # of the vocabulary, at most 256, where inputs are tokens; they stay bytes
    fill_missing: bool = False  # whether nan among the inputs stands for a missing value; it becomes the column's mean

    @property
    def num_bytes(self) -> int:
        """Bytes of all inputs on a device."""
        arrays = [np.asarray(self.inputs), *(np.asarray(split[0]) for split in (self.test, self.valid) if split)]
        return sum(array.size * (1 if is_image(array) or self.num_tokens else 4) for array in arrays)


@dataclasses.dataclass(frozen=True)
class Location:
    """Where a source keeps its files, and how it reads them."""

    data_dir: Path
    cache_dir: Path | None = None  # None: beside the data
    image_size: int = 0  # height and width images are scaled and cropped to; 0 leaves them as they are

    def prepare_command(self, name: str) -> str:
        """The shell command that prepares a dataset there."""
        python, folder = shlex.quote(sys.executable), shlex.quote(str(self.data_dir))
        return f"{python} -m adalfl_jax.data.prepare {name} --data_dir={folder}"

    def cache_file(self, folder: Path) -> Path:
        """The file decoded arrays of the data in `folder` are kept in."""
        size = f"_{self.image_size}" if self.image_size else ""
        if self.cache_dir is None:
            return folder / f"adalfl_jax{size}.safetensors"
        name = "-".join(folder.relative_to(self.data_dir).parts)
        return self.cache_dir / f"{name}{size}.safetensors"


def default_data_dir() -> Path:
    """`$TFDS_DATA_DIR`, or the folder TensorFlow Datasets uses."""
    return Path(os.environ.get("TFDS_DATA_DIR") or Path.home() / "tensorflow_datasets")
