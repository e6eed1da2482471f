"""Image classification from TensorFlow Datasets, read as ArrayRecord without TensorFlow."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from PIL import Image, ImageOps
from rich.console import Console
from rich.progress import track

from adalfl_jax.data.cache import Arrays, cached
from adalfl_jax.data.errors import DatasetError
from adalfl_jax.data.examples import Examples, Location
from adalfl_jax.data.specs import Spec
from adalfl_jax.registry import suggestion

CHUNK = 1000  # records a process decodes in one go
CHARACTERS = ("mnist", "svhn", "cmaterdb", "omniglot", "kannada", "quickdraw")  # a mirrored one is another, or none
HELD_OUT = ("test", "validation")  # what is taken for the test split, the first there is


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
            f"  python -m adalfl_jax.data.prepare {name} --data_dir={shlex.quote(str(location.data_dir))}\n"
            "or say where it is: dataset.data_dir in a configuration, data_dir= in Python, or the environment variable "
            "TFDS_DATA_DIR"
        )
    info = _open(folder).info
    image_key, label_key = _find_keys(name, info)
    wanted = ["train", next((split for split in HELD_OUT if split in info.splits), "test")]
    missing = [split for split in wanted if split not in info.splits]
    if missing:
        raise DatasetError(
            f"dataset {name!r} has the splits {', '.join(info.splits) or 'none'}, and {missing[0]!r} is wanted; write "
            "inputs and targets of the splits it has to an .npz file, which is split in training and test here"
        )
    shards = {split: info.splits[split].filepaths for split in wanted}
    files = [Path(path) for paths in shards.values() for path in paths]
    beginnings = {file.name: _fingerprint(file) for file in files if file.exists()}
    fingerprint = json.dumps([beginnings, image_key, label_key, location.image_size], sort_keys=True)

    def build() -> Arrays:
        arrays = {}
        for split, stored_as in zip(wanted, ("train", "test"), strict=True):
            inputs, labels = _decode_split(name, folder, split, image_key, label_key, location.image_size)
            arrays |= {f"{stored_as}_inputs": inputs, f"{stored_as}_targets": labels}
        return arrays

    arrays = cached(location.cache_file(folder), fingerprint, build)
    num_classes = info.features[label_key].num_classes
    for split, stored_as in zip(wanted, ("train", "test"), strict=True):
        labels = arrays[f"{stored_as}_targets"]
        if labels.min() < 0 or labels.max() >= num_classes:
            raise DatasetError(
                f"{folder}: labels of split {split!r} go from {labels.min()} to {labels.max()}, and features.json has "
                f"{num_classes} classes; delete the folder and prepare the dataset anew, or write the splits that have "
                "labels to an .npz file"
            )
    return Examples(
        inputs=arrays["train_inputs"],
        targets=arrays["train_targets"],
        num_classes=num_classes,
        test=(arrays["test_inputs"], arrays["test_targets"]),
        can_flip=_can_flip(name),
    )


def find_spec(name: str, location: Location, others: Iterable[str] = ()) -> Spec:
    """The shapes of a dataset, of TFDS's code where it is not prepared; then nobody knows its number of examples."""
    import tensorflow_datasets as tfds

    folder = find_prepared(name, location.data_dir)
    if folder is None:
        check_known(name, others)
    info: Any = tfds.builder(name, data_dir=location.data_dir).info if folder is None else _open(folder).info
    image_key, label_key = _find_keys(name, info)
    size, shape = location.image_size, tuple(info.features[image_key].shape)
    if None in shape and not size:
        raise DatasetError(f"images of dataset {name!r} differ in size; set dataset.image_size to have them of one")
    held_out = next((split for split in HELD_OUT if split in info.splits), None)
    return Spec(
        input_shape=(size, size, shape[-1]) if size else shape,
        num_outputs=info.features[label_key].num_classes,
        num_train=info.splits["train"].num_examples if "train" in info.splits else 0,
        num_test=info.splits[held_out].num_examples if held_out else 0,
        can_flip=_can_flip(name),
    )


def find_prepared(name: str, data_dir: Path) -> Path | None:
    """The folder of the latest prepared version of a dataset, if there is one.

    Raises:
      DatasetError: several configurations of it are prepared, and none is named.
    """
    from tensorflow_datasets.core.utils.version import list_all_versions

    folder = data_dir / name
    if versions := list_all_versions(folder):
        return folder / str(max(versions))
    configs = sorted(path.name for path in folder.iterdir() if list_all_versions(path)) if folder.is_dir() else []
    if len(configs) > 1:
        raise DatasetError(
            f"dataset {name!r} is prepared in {folder} in the configurations {', '.join(configs)}; name one, as in "
            f"{name}/{configs[0]}"
        )
    return find_prepared(f"{name}/{configs[0]}", data_dir) if configs else None  # TFDS prepares one if given none


def check_known(name: str, others: Iterable[str] = ()) -> None:
    """Raises DatasetError for a name TFDS has no code for, with the nearest of its names and of `others`."""
    if name.partition("/")[0] not in known_names():
        known = sorted(others)
        raise DatasetError(
            f"unknown dataset {name!r}; {suggestion(name, [*known, *known_names()])}Known: {', '.join(known)}, the "
            "path of an .npz file, and the image classifications of TensorFlow Datasets (mnist, cifar10, ...)"
        )


@functools.cache
def known_names() -> tuple[str, ...]:
    """Names of the datasets TFDS has code for."""
    import tensorflow_datasets as tfds

    return tuple(tfds.list_builders(with_community_datasets=False))


def _open(folder: Path) -> Any:
    import tensorflow_datasets as tfds

    try:
        return tfds.builder_from_directory(folder)
    except Exception as error:  # whatever its parsers raise
        raise DatasetError(f"{folder} cannot be read as a TFDS dataset: {error}") from error


def _find_keys(name: str, info: Any) -> tuple[str, str]:
    """Names of the image and of the label among the features of an example."""
    import tensorflow_datasets as tfds

    kinds = {"image": tfds.features.Image, "label": tfds.features.ClassLabel}
    found = {}
    for kind, feature in kinds.items():
        keys = [key for key in info.features if isinstance(info.features[key], feature)]
        if kind in keys or len(keys) == 1:
            found[kind] = kind if kind in keys else keys[0]
        else:
            raise DatasetError(
                f"dataset {name!r} is no image classification that can be read: of its features "
                f"{', '.join(info.features)}, {len(keys)} are of the kind {kind!r} and none has that name; write its "
                "inputs and targets to an .npz file"
            )
    image = info.features[found["image"]]
    if image.np_dtype != np.uint8 or image.shape[-1] not in (1, 3, 4):
        raise DatasetError(
            f"images of dataset {name!r} are {np.dtype(image.np_dtype)} {image.shape}; only uint8 with 1, 3 or 4 "
            "channels can be read; write its inputs and targets to an .npz file"
        )
    return found["image"], found["label"]


def _decode_split(
    name: str, folder: Path, split: str, image_key: str, label_key: str, image_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """All images of a split `[N, H, W, channels]` uint8 and their labels `[N]` int32."""
    num_examples = _open(folder).info.splits[split].num_examples
    if not num_examples:
        raise DatasetError(f"split {split!r} in {folder} is empty; delete the folder and prepare the dataset anew")
    starts = range(0, num_examples, CHUNK)
    jobs = (
        joblib.delayed(_decode)(
            folder, split, start, min(start + CHUNK, num_examples), image_key, label_key, image_size
        )
        for start in starts
    )
    workers = min(len(starts), os.cpu_count() or 1)
    chunks: Iterator = joblib.Parallel(n_jobs=workers, return_as="generator")(jobs)  # pyright: ignore[reportAssignmentType]
    console = Console(stderr=True)
    inputs, labels = None, np.empty(num_examples, np.int32)
    for start, (images, chunk_labels) in zip(
        starts, track(chunks, f"decoding {name} {split}", len(starts), console=console), strict=True
    ):
        if inputs is None:
            inputs = np.empty((num_examples, *images.shape[1:]), np.uint8)
        if images.shape[1:] != inputs.shape[1:]:
            raise _differing_sizes(folder, split, {images.shape[1:], inputs.shape[1:]})
        inputs[start : start + len(images)] = images
        labels[start : start + len(images)] = chunk_labels
    assert inputs is not None
    return inputs, labels


def _decode(
    folder: Path, split: str, start: int, stop: int, image_key: str, label_key: str, image_size: int
) -> tuple[np.ndarray, list[int]]:
    """Decodes the records `start` to `stop` of a split; runs in a process of its own."""
    import tensorflow_datasets as tfds

    builder = _open(folder)
    channels = builder.info.features[image_key].shape[-1]
    try:
        source = builder.as_data_source(split=split, decoders={image_key: tfds.decode.SkipDecoding()})
    except NotImplementedError as error:
        raise DatasetError(
            f"{folder} is not in ArrayRecord format; prepare the dataset anew in another folder with python -m "
            "adalfl_jax.data.prepare"
        ) from error

    def decode(record: Any) -> tuple[np.ndarray, int]:
        return _decode_image(record[image_key], channels, image_size), int(record[label_key])

    def is_damaged(index: int) -> bool:
        try:
            decode(source[index])
        except Exception:  # RuntimeError from ArrayRecord, others from the decoders of damaged records
            return True
        return False

    try:
        images, labels = zip(*map(decode, source.__getitems__(list(range(start, stop)))), strict=True)
    except Exception as error:
        shard = _shard_of(builder.info.splits[split], next(filter(is_damaged, range(start, stop)), start))
        raise DatasetError(
            f"{shard} is damaged or cut short ({error}); delete the folder {folder} and prepare the dataset anew"
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


def _can_flip(name: str) -> bool:
    return name == "fashion_mnist" or not any(word in name for word in CHARACTERS)


def _fingerprint(file: Path) -> list[Any]:
    """Size and hash of the first block of a file, which has the records' own hashes in it."""
    with file.open("rb") as stream:
        return [file.stat().st_size, hashlib.sha256(stream.read(2**16)).hexdigest()]


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
