"""Datasets by name: those of this package and registered ones, a user's own files, the images of TFDS."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from adalfl_jax.arguments import is_count
from adalfl_jax.data.catalog import find_spec
from adalfl_jax.data.corruption import Corruption
from adalfl_jax.data.embedded import load_diabetes, load_digits
from adalfl_jax.data.errors import DatasetError
from adalfl_jax.data.examples import Examples, Location, default_data_dir
from adalfl_jax.data.files import load_npz
from adalfl_jax.data.images import load_images
from adalfl_jax.data.specs import SPECS, Spec
from adalfl_jax.data.splits import VALID_FRACTION, Dataset, make_dataset
from adalfl_jax.data.streaming import stays_on_host
from adalfl_jax.data.tables import load_california, load_crime
from adalfl_jax.data.text import load_topics
from adalfl_jax.registry import Registry, require_known

DATASETS: Registry[Callable[[Location], Examples]] = Registry(
    "dataset",
    {
        "digits": lambda location: load_digits(),
        "diabetes": lambda location: load_diabetes(),
        "pydoc_topics": lambda location: load_topics(),
        "california": load_california,
        "crime": load_crime,
    },
    taken=SPECS,
)  # those that are not TensorFlow Datasets'
STREAMING = ("auto", "always", "never")


def load(
    name: str | os.PathLike[str],
    *,
    data_dir: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    image_size: int = 0,
    valid_fraction: float = VALID_FRACTION,
    valid_examples: int = 0,
    imbalance: float = 1.0,
    label_noise: float = 0.0,
    noise_kind: str = "symmetric",
    seed: int = 0,
    streaming: str = "auto",
) -> Dataset:
    """Loads a dataset in fixed train, valid and test splits.

    Args:
      name: "digits" or "diabetes" (they ship with scikit-learn), "pydoc_topics" (text that ships with Python),
        "california" or "crime" (downloaded once), a registered one, the path of an .npz file (`inputs`, `targets`), or
        an image classification of TensorFlow Datasets, "mnist" say, once `python -m adalfl_jax.data.prepare` has
        prepared it.
      data_dir: where datasets are prepared and downloads kept; `$TFDS_DATA_DIR` or `~/tensorflow_datasets` if None.
      cache_dir: where decoded images and tables are kept; beside the data if None.
      image_size: height and width that images of TensorFlow Datasets are scaled and cropped to; 0 for as they are.
      valid_fraction: share of the training examples that become the validation split; where the data bring one, the
        default.
      valid_examples: number of them; 0 goes by `valid_fraction`.
      imbalance: examples of the largest class for one of the smallest in the training split, 1 or more; 1 leaves the
        classes as they are, and above it they fall exponentially from the first to the last.
      label_noise: share of the training split's labels that are wrong, in [0, 1).
      noise_kind: "symmetric", any other class is as likely, "pair", class c becomes c + 1 and the last the first, or
        "removed", the examples whose labels would be wrong are left out.
      seed: of the examples that are drawn, for splits and for wrong labels, 0 or more.
      streaming: "never" puts the examples on the device, "always" leaves them on the host, and "auto" does that where
        they would fill more than a quarter of the device.

    Raises:
      DatasetError: an unknown name, or data that is not there, damaged, or does not fit; the text says what to do.
      ValueError: an unknown `noise_kind` or `streaming`.

    Example:
      >>> digits = load("digits")
      >>> digits.train.inputs.shape, digits.valid.targets.shape, digits.num_outputs
      ((1293, 8, 8, 1), (144,), 10)
    """
    require_known("streaming", STREAMING, streaming)
    name = os.fspath(name)
    location = _locate(name, data_dir, cache_dir, image_size)
    examples = load_examples(name, location)
    on_device = not stays_on_host(streaming, examples.num_bytes)
    return make_dataset(
        name,
        examples,
        valid_fraction=valid_fraction,
        valid_examples=valid_examples,
        corruption=Corruption(label_noise, noise_kind, imbalance),
        seed=seed,
        on_device=on_device,
    )


def load_spec(
    name: str | os.PathLike[str],
    *,
    data_dir: str | os.PathLike[str] | None = None,
    image_size: int = 0,
    valid_fraction: float = VALID_FRACTION,
    valid_examples: int = 0,
) -> Spec:
    """The shapes of a dataset, without its data where they are known otherwise.

    Arguments and errors are those of `load`; that a validation split can be cut off is checked where there are data.

    Example:
      >>> load_spec("cifar10").input_shape
      (32, 32, 3)
    """
    name = os.fspath(name)
    location = _locate(name, data_dir, None, image_size)
    if name in SPECS:
        spec = SPECS[name]
        size = (image_size, image_size, spec.input_shape[-1])
        return spec._replace(input_shape=size) if image_size and spec.is_image else spec
    if name in DATASETS or is_file(name):
        examples = load_examples(name, location)
        # for its errors
        make_dataset(name, examples, valid_fraction=valid_fraction, valid_examples=valid_examples, on_device=False)
        return Spec.of(examples)
    return find_spec(name, location, others=DATASETS)


def load_examples(name: str, location: Location) -> Examples:
    """The raw arrays of a dataset, as `load` finds them."""
    if name in DATASETS:
        examples = DATASETS[name](location)
        if not isinstance(examples, Examples):
            raise DatasetError(
                f"dataset {name!r}: the function that was registered must return adalfl_jax.data.Examples(inputs, "
                f"targets, ...); it returned {type(examples).__name__}"
            )
        return examples
    if is_file(name):
        return load_npz(Path(name).expanduser())
    return load_images(name, location, others=DATASETS)


def register_dataset(name: str, load_examples: Callable[[], Examples]) -> None:
    """Makes a dataset known to `load` and to configurations, whose files are a good place to call this.

    Args:
      name: any but ours; one registered before is replaced.
      load_examples: called when the dataset is used.

    Raises:
      ValueError: the name is one of ours, or there is nothing to call. Others of TFDS may be taken; yours hides them.

    Example:
      >>> import numpy as np
      >>> register_dataset("noise", lambda: Examples(np.random.rand(50, 3), np.arange(50) % 2, num_classes=2))
      >>> load("noise").input_shape
      (3,)
    """
    DATASETS.require_free(name)
    if not callable(load_examples):
        raise ValueError(
            f"dataset {name!r}: load_examples must be a function that returns Examples; got "
            f"{type(load_examples).__name__}"
        )
    DATASETS[name] = lambda location: load_examples()


def is_file(name: str) -> bool:
    """Whether a dataset's name is the path of a user's own arrays."""
    return name.lower().endswith(".npz")


def _locate(
    name: str, data_dir: str | os.PathLike[str] | None, cache_dir: str | os.PathLike[str] | None, image_size: int
) -> Location:
    if not (image_size == 0 or is_count(image_size)):
        raise DatasetError(f"image_size must be a number of pixels, or 0 for images as they are; got {image_size}")
    if image_size and (name in DATASETS or is_file(name)):
        raise DatasetError(
            f"image_size scales images of TensorFlow Datasets, and {name!r} is not one of those; leave it at 0, and "
            "bring images of your own in the size they are to have"
        )
    return Location(
        data_dir=Path(data_dir).expanduser() if data_dir else default_data_dir(),
        cache_dir=Path(cache_dir).expanduser() if cache_dir else None,
        image_size=image_size,
    )
