"""What TensorFlow Datasets knows of a dataset: where it is prepared, its features, its splits. No TensorFlow."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from adalfl_jax.data.errors import DatasetError
from adalfl_jax.data.examples import Location
from adalfl_jax.data.specs import Spec
from adalfl_jax.registry import nearest_of

# In the names of datasets of characters: a mirrored one is another, or none.
CHARACTERS = ("mnist", "svhn", "cmaterdb", "omniglot", "kannada", "quickdraw", "alpha_digits")
NAME = re.compile(r"\w+(/\w[\w.\-]*)?")  # and no other, since ".." leads out of the folder of data
HELD_OUT = ("test", "validation")  # what is taken for the test split, the first there is


class Keys(NamedTuple):
    """Names of two of the features of an example."""

    image: str
    label: str


def find_spec(name: str, location: Location, others: Iterable[str] = ()) -> Spec:
    """The shapes of an image classification; of TFDS's code where it is not prepared, which has no number of examples.

    Args:
      name: of a TFDS dataset with one image and one label an example, "cifar10" say, or "name/config".
      location: where it may be prepared, and the size its images get.
      others: names to suggest beside those of TFDS when there is no such dataset.

    Raises:
      DatasetError: an unknown name, no image classification, images of several sizes and no size to bring them to, or
        a prepared dataset that is damaged or lacks a split.
    """
    folder = find_prepared(name, location.data_dir)
    builder = _builder_of_code(name, location.data_dir, others) if folder is None else open_prepared(folder)
    info = builder.info
    keys = find_keys(name, info)
    size, shape = location.image_size, tuple(info.features[keys.image].shape)
    if None in shape and not size:
        raise DatasetError(f"images of dataset {name!r} differ in size; set dataset.image_size to have them of one")
    num_train, num_test = (
        (0, 0) if folder is None else (info.splits[split].num_examples for split in choose_splits(name, builder, keys))
    )
    return Spec(
        input_shape=(size, size, shape[-1]) if size else shape,
        num_outputs=info.features[keys.label].num_classes,
        num_train=num_train,
        num_test=num_test,
        can_flip=can_flip(name),
    )


def find_prepared(name: str, data_dir: Path) -> Path | None:
    """The folder of the latest prepared version of a dataset, if there is one.

    Raises:
      DatasetError: several configurations of it are prepared, and none is named.
    """
    from tensorflow_datasets.core.utils.version import list_all_versions

    if not NAME.fullmatch(name):
        return None
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


def open_prepared(folder: Path) -> Any:
    """The builder of a prepared dataset, which reads it and has its `info`."""
    import tensorflow_datasets as tfds

    try:
        return tfds.builder_from_directory(folder)
    except Exception as error:  # whatever its parsers raise
        raise DatasetError(f"{folder} cannot be read as a TFDS dataset: {error}") from error


def check_known(name: str, others: Iterable[str] = ()) -> None:
    """Raises DatasetError for a name TFDS has no code for, with the nearest of its names and of `others`."""
    if not NAME.fullmatch(name) or name.partition("/")[0] not in known_names():
        known = sorted(others)
        if name and os.path.exists(path := os.path.expanduser(name)):
            kind = "folder" if os.path.isdir(path) else "file of another format"
            raise DatasetError(
                f"dataset {name!r} is a {kind}; of own data an .npz file is read, which np.savez(path, inputs=..., "
                "targets=...) writes"
            )
        raise DatasetError(
            f"unknown dataset {name!r}; {nearest_of(name, [*known, *known_names()])}: {', '.join(known)}, the "
            "path of an .npz file, and the image classifications of TensorFlow Datasets (mnist, cifar10, ...)"
        )


@functools.cache
def known_names() -> tuple[str, ...]:
    """Names of the datasets TFDS has code for."""
    import tensorflow_datasets as tfds

    return tuple(tfds.list_builders(with_community_datasets=False))


def find_keys(name: str, info: Any) -> Keys:
    """Which features of an example are its image and its label: the only ones, or those called so."""
    import tensorflow_datasets as tfds

    found = {}
    for kind, feature in (("image", tfds.features.Image), ("label", tfds.features.ClassLabel)):
        keys = [key for key in info.features if isinstance(info.features[key], feature)]
        if kind not in keys and len(keys) != 1:
            raise DatasetError(
                f"dataset {name!r} is no image classification that can be read: of its features "
                f"{', '.join(info.features)}, {len(keys)} are of the kind {kind!r} and none has that name; write its "
                "inputs and targets to an .npz file"
            )
        found[kind] = kind if kind in keys else keys[0]
    image = info.features[found["image"]]
    if image.np_dtype != np.uint8 or image.shape[-1] not in (1, 3, 4):
        raise DatasetError(
            f"images of dataset {name!r} are {np.dtype(image.np_dtype)} {image.shape}; only uint8 with 1, 3 or 4 "
            "channels can be read; write its inputs and targets to an .npz file"
        )
    return Keys(**found)


def choose_splits(name: str, builder: Any, keys: Keys) -> tuple[str, str]:
    """Names of the splits of a prepared dataset that are taken for training and test.

    "validation" stands in for a test split that is not there, or whose labels are kept secret (-1).
    """
    splits = builder.info.splits
    held_out = [split for split in HELD_OUT if split in splits]
    if len(held_out) == 2 and not _has_labels(builder, held_out[0], keys):
        held_out = held_out[1:]
    train, test = "train", held_out[0] if held_out else HELD_OUT[0]
    for split in (train, test):
        if split not in splits:
            raise DatasetError(
                f"dataset {name!r} has the splits {', '.join(splits) or 'none'}, and {split!r} is wanted; write inputs "
                "and targets of the splits it has to an .npz file, which is split in training and test here"
            )
    return train, test


def open_split(builder: Any, split: str, keys: Keys) -> Any:
    """The records of a split of a prepared dataset, the images in them encoded as they are."""
    import tensorflow_datasets as tfds

    return builder.as_data_source(split=split, decoders={keys.image: tfds.decode.SkipDecoding()})


def can_flip(name: str) -> bool:
    """Whether the mirror image of an image has the same label."""
    return name == "fashion_mnist" or not any(word in name for word in CHARACTERS)


def _has_labels(builder: Any, split: str, keys: Keys) -> bool:
    try:
        return int(open_split(builder, split, keys)[0][keys.label]) >= 0
    except Exception:  # an empty split, damage, another format: whoever decodes it says which
        return True


def _builder_of_code(name: str, data_dir: Path, others: Iterable[str]) -> Any:
    import tensorflow_datasets as tfds

    check_known(name, others)
    try:
        return tfds.builder(name, data_dir=data_dir)
    except Exception as error:  # of a configuration that is not there, of a package its code imports
        raise DatasetError(f"TensorFlow Datasets cannot describe {name!r}: {str(error).strip()}") from error
