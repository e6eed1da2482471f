"""Downloads datasets, prepares them for reading without TensorFlow, and decodes them once.

    .venv/bin/python -m adalfl_jax.data.prepare cifar10 svhn_cropped --data_dir=DIR

Datasets of TensorFlow Datasets need the extra `[prepare]`, which brings `tensorflow-cpu`; "california" and "crime"
do not.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from absl import app, flags, logging

from adalfl_jax import data
from adalfl_jax.data.catalog import find_prepared, find_spec
from adalfl_jax.data.errors import DatasetError
from adalfl_jax.data.examples import Location, default_data_dir

_DATA_DIR = flags.DEFINE_string("data_dir", None, "Where to; $TFDS_DATA_DIR or ~/tensorflow_datasets if not given.")
_CACHE_DIR = flags.DEFINE_string("cache_dir", None, "Where decoded arrays are kept; beside the data if not given.")
_IMAGE_SIZE = flags.DEFINE_integer(
    "image_size", 0, "Height and width images are scaled and cropped to; 0 for as they are.", lower_bound=0
)


def prepare(
    name: str, *, data_dir: str | None = None, cache_dir: str | None = None, image_size: int = 0
) -> data.Dataset:
    """Makes a dataset ready for `data.load`, whose arguments these are; one that is ready is left as it is.

    Raises:
      DatasetError: an unknown name, TensorFlow is missing, or a download failed.
    """
    folder = Path(data_dir).expanduser() if data_dir else default_data_dir()
    if name not in data.DATASETS and not data.is_file(name):
        _prepare_images(name, Location(folder, image_size=image_size))
    return data.load(name, data_dir=folder, cache_dir=cache_dir, image_size=image_size, streaming="always")


def _prepare_images(name: str, location: Location) -> None:
    data_dir = location.data_dir
    if find_prepared(name, data_dir) is not None:
        return
    find_spec(name, location, others=data.DATASETS)  # what could not be read is not downloaded
    if importlib.util.find_spec("tensorflow") is None:
        raise DatasetError(
            f"preparing {name!r} takes TensorFlow, which is not installed: pip install '.[prepare]' in a checkout "
            "brings it. Reading the data afterwards does not take it, so they may be prepared on another machine"
        )
    import tensorflow_datasets as tfds

    try:
        tfds.builder(name, data_dir=data_dir, file_format="array_record").download_and_prepare()
    except Exception as error:  # of the network, the disk, or a dataset that takes a download by hand
        raise DatasetError(
            f"{name!r} cannot be prepared in {data_dir} ({type(error).__name__}: {error}); it can be prepared on "
            "another machine, and the folder copied from there"
        ) from error


def main(argv: list[str]) -> None:
    """Prepares the datasets named on the command line."""
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    if len(argv) < 2:
        raise app.UsageError("name one dataset or more, for example mnist")
    for name in argv[1:]:
        try:
            dataset = prepare(name, data_dir=_DATA_DIR.value, cache_dir=_CACHE_DIR.value, image_size=_IMAGE_SIZE.value)
        except DatasetError as error:
            sys.exit(f"DatasetError: {error}")
        except KeyboardInterrupt:
            sys.exit(f"Interrupted while {name} was prepared; the same command does it again.")
        sizes = ", ".join(f"{len(getattr(dataset, split).inputs):,} {split}" for split in ("train", "valid", "test"))
        kind = f"{dataset.num_outputs} classes" if dataset.is_classification else "a regression"
        print(f"{name} is ready: {sizes} examples of {dataset.input_shape}, {kind}")  # noqa: T201, a program's answer


if __name__ == "__main__":
    app.run(main)
