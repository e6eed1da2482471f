"""Image classification from TensorFlow Datasets, read as ArrayRecord without TensorFlow."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from PIL import Image, ImageOps
from rich.console import Console
from rich.progress import track

from adalfl_jax.data.cache import Arrays, cached
from adalfl_jax.data.catalog import (
    Keys,
    can_flip,
    check_known,
    choose_splits,
    find_keys,
    find_prepared,
    open_prepared,
    open_split,
)
from adalfl_jax.data.errors import DatasetError
from adalfl_jax.data.examples import Examples, Location

CHUNK = 1000  # records a process decodes in one go
DECODING = 1  # its version; another one is another fingerprint
SAMPLES, SAMPLE_BYTES = 64, 2**16  # of a file of records, what its fingerprint is taken of


def load_images(name: str, location: Location, others: Iterable[str] = ()) -> Examples:
    """Reads a prepared dataset: its split "train", and "test" or, for want of that, "validation".

    The first time images are decoded, in parallel, and kept in one file beside the data (`Location.cache_file`).

    Args:
      name: of a TFDS dataset with one image and one label an example, "cifar10" say, or "name/config".
      location: where it was prepared.
      others: names to suggest beside those of TFDS when there is no such dataset.

    Raises:
      DatasetError: an unknown name; a dataset that is not prepared, without these splits, damaged, in another format,
        or with images of several sizes.
    """
    folder = find_prepared(name, location.data_dir)
    if folder is None:
        check_known(name, others)
        raise DatasetError(
            f"dataset {name!r} is not prepared in {location.data_dir}; prepare it with\n"
            f"  {location.prepare_command(name)}\n"
            "or say where it is: dataset.data_dir in a configuration, data_dir= in Python, or the environment variable "
            "TFDS_DATA_DIR"
        )
    builder = open_prepared(folder)
    info = builder.info
    keys = find_keys(name, info)
    splits = choose_splits(name, builder, keys)

    def build() -> Arrays:
        arrays = {}
        for split, stored_as in zip(splits, ("train", "test"), strict=True):
            inputs, labels = _decode_split(name, folder, split, keys, location.image_size)
            arrays |= {f"{stored_as}_inputs": inputs, f"{stored_as}_targets": labels}
        return arrays

    fingerprint = json.dumps([DECODING, _fingerprint(info, splits), *keys, location.image_size], sort_keys=True)
    arrays = cached(location.cache_file(folder), fingerprint, build)
    return Examples(
        inputs=arrays["train_inputs"],
        targets=arrays["train_targets"],
        num_classes=info.features[keys.label].num_classes,
        test=(arrays["test_inputs"], arrays["test_targets"]),
        can_flip=can_flip(name),
    )


def _decode_split(name: str, folder: Path, split: str, keys: Keys, image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """All images of a split `[N, H, W, channels]` uint8 and their labels `[N]` int32."""
    info = open_prepared(folder).info
    num_examples, num_classes = info.splits[split].num_examples, info.features[keys.label].num_classes
    if not num_examples:
        raise DatasetError(f"split {split!r} in {folder} is empty; {_anew(folder)}")
    starts = range(0, num_examples, CHUNK)
    jobs = (
        joblib.delayed(_decode)(folder, split, start, min(start + CHUNK, num_examples), keys, image_size)
        for start in starts
    )
    workers = min(len(starts), joblib.cpu_count())
    chunks: Iterator = joblib.Parallel(n_jobs=workers, return_as="generator")(jobs)  # pyright: ignore[reportAssignmentType]
    console = Console(stderr=True)
    inputs, labels = None, np.empty(num_examples, np.int32)
    for start, (images, chunk_labels) in zip(
        starts, track(chunks, f"decoding {name} {split}", len(starts), console=console), strict=True
    ):
        if inputs is None:
            inputs = np.empty((num_examples, *images.shape[1:]), np.uint8)
        if min(chunk_labels) < 0 or max(chunk_labels) >= num_classes:
            raise DatasetError(
                f"{folder}: split {split!r} has labels from {min(chunk_labels)} to {max(chunk_labels)}, and "
                f"features.json has {num_classes} classes; {_anew(folder)}, or write the splits that have labels to an "
                ".npz file"
            )
        if images.shape[1:] != inputs.shape[1:]:
            raise _differing_sizes(folder, split, {images.shape[1:], inputs.shape[1:]})
        inputs[start : start + len(images)] = images
        labels[start : start + len(images)] = chunk_labels
    assert inputs is not None
    return inputs, labels


def _decode(
    folder: Path, split: str, start: int, stop: int, keys: Keys, image_size: int
) -> tuple[np.ndarray, list[int]]:
    """Decodes the records `start` to `stop` of a split; runs in a process of its own."""
    builder = open_prepared(folder)
    channels = builder.info.features[keys.image].shape[-1]
    try:
        source = open_split(builder, split, keys)
    except NotImplementedError as error:
        raise DatasetError(
            f"{folder} is not in ArrayRecord format; prepare the dataset anew in another folder with python -m "
            "adalfl_jax.data.prepare"
        ) from error

    def decode(record: Any) -> tuple[np.ndarray, int]:
        return _decode_image(record[keys.image], channels, image_size), int(record[keys.label])

    def is_damaged(index: int) -> bool:
        try:
            decode(source[index])
        except Exception:  # RuntimeError from ArrayRecord, others from the decoders of damaged records
            return True
        return False

    try:
        images, labels = zip(*map(decode, source.__getitems__(list(range(start, stop)))), strict=True)
    except MemoryError as error:
        raise DatasetError(f"images of {folder} scaled to {image_size}x{image_size} do not fit in memory") from error
    except Exception as error:
        shard = _shard_of(builder.info.splits[split], next(filter(is_damaged, range(start, stop)), start))
        raise DatasetError(
            f"{shard} is missing, damaged or cut short ({type(error).__name__}: {error}); {_anew(folder)}"
        ) from error
    shapes = {image.shape for image in images}
    if len(shapes) > 1:
        raise _differing_sizes(folder, split, shapes)
    return np.stack(images), list(labels)


def _decode_image(encoded: bytes, channels: int, image_size: int) -> np.ndarray:
    """Bytes of a PNG or JPEG file to `[H, W, channels]` uint8.

    With an `image_size` the shorter side is scaled to it and the longer one cropped in the middle.
    """
    with Image.open(io.BytesIO(encoded)) as file:
        image = file.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels])
    if image_size:
        image = ImageOps.fit(image, (image_size, image_size), method=Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(image.height, image.width, channels)


def _fingerprint(info: Any, splits: Iterable[str]) -> dict[str, list[Any]]:
    """Size of every file of records, and the hash of samples spread over it, which are all of it up to 4 MiB."""

    def of(file: Path) -> list[Any]:
        size, digest = file.stat().st_size, hashlib.sha256()
        with file.open("rb") as stream:
            for start in range(0, size, max(SAMPLE_BYTES, size // SAMPLES)):
                stream.seek(start)
                digest.update(stream.read(SAMPLE_BYTES))
        return [size, digest.hexdigest()]

    files = [Path(path) for split in splits for path in info.splits[split].filepaths]
    return {file.name: of(file) for file in files if file.exists()}


def _anew(folder: Path) -> str:
    return f"move {folder} away and prepare the dataset anew"


def _shard_of(split_info: Any, record: int) -> str:
    """The file that holds a record."""
    ends = np.cumsum(split_info.shard_lengths)
    return str(split_info.filepaths[int(np.searchsorted(ends, record, side="right"))])


def _differing_sizes(folder: Path, split: str, shapes: set[tuple[int, ...]]) -> DatasetError:
    some = " and ".join("x".join(map(str, shape)) for shape in sorted(shapes)[:2])
    return DatasetError(
        f"images in {folder}, split {split!r}, differ in size ({some}); set dataset.image_size (or image_size=) to "
        "have them scaled and cropped to one"
    )
