"""Datasets on disk as TensorFlow Datasets lays them out, tiny and written without TensorFlow."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

FEATURES = "tensorflow_datasets.core.features"
SPLITS = {"train": 120, "test": 40}
NUM_CLASSES = 4

Arrays = tuple[Any, np.ndarray]  # images [N, H, W, channels], or a list of them where sizes differ, and labels [N]


def write_dataset(
    data_dir: Path,
    name: str = "cifar10",
    version: str = "1.0.0",
    *,
    splits: Mapping[str, int] | None = None,
    shape: tuple[int | None, int | None, int] = (8, 8, 3),
    num_classes: int = NUM_CLASSES,
    num_labels: int | None = None,
    num_shards: int = 1,
    file_format: str = "array_record",
    image_key: str = "image",
    label_key: str = "label",
    features: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> dict[str, Arrays]:
    """Writes a prepared dataset of noise and returns what is in it, by split.

    Args:
      data_dir: where to.
      name: of the dataset, or "name/config".
      version: of the dataset.
      splits: examples of each; SPLITS if None.
      shape: of an image; height and width None give each image a size of its own.
      num_classes: as features.json has it.
      num_labels: how many different labels there are; all classes if None.
      num_shards: files a split is cut into.
      file_format: as dataset_info.json and the names of the files have it; the contents are ArrayRecord always.
      image_key: what the image is called.
      label_key: what the label is called.
      features: those beside the image and the label, or in their place, as features.json has them; None leaves one out.
        Texts, other images and other labels are written too.
      seed: of the noise.
    """
    rng = np.random.default_rng(seed)
    folder = data_dir / name / version
    folder.mkdir(parents=True)
    described = {image_key: image_feature(shape), label_key: label_feature(num_classes), **(features or {})}
    described = {key: feature for key, feature in described.items() if feature}
    arrays, split_infos = {}, []
    for split, size in (SPLITS if splits is None else splits).items():
        images = [_draw(rng, shape) for _ in range(size)]
        labels = rng.permutation(np.arange(size) % (num_labels or num_classes))
        records = [
            encode_example(_fill(described, split, index) | {image_key: encode_image(image), label_key: int(label)})
            for index, (image, label) in enumerate(zip(images, labels, strict=True))
        ]
        shards = np.array_split(np.arange(size), num_shards)
        for index, rows in enumerate(shards):
            path = shard_file(data_dir, name, version, split, index, num_shards, file_format)
            write_records(path, [records[row] for row in rows])
        arrays[split] = (images if None in shape else np.array(images).reshape(-1, *shape), labels)
        split_infos.append(
            {
                "name": split,
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "numBytes": str(sum(map(len, records))),
                "shardLengths": [str(len(rows)) for rows in shards],
            }
        )
    dataset, _, config = name.partition("/")
    info = {
        "description": "Noise.",
        "fileFormat": file_format,
        "name": dataset,
        "moduleName": f"tensorflow_datasets.image_classification.{dataset}",
        "splits": split_infos,
        "version": version,
        **({"configName": config} if config else {}),
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    pythonic = {"featuresDict": {"features": described}, "pythonClassName": f"{FEATURES}.features_dict.FeaturesDict"}
    (folder / "features.json").write_text(json.dumps(pythonic))
    return arrays


def shard_file(
    data_dir: Path,
    name: str = "cifar10",
    version: str = "1.0.0",
    split: str = "train",
    index: int = 0,
    num_shards: int = 1,
    file_format: str = "array_record",
) -> Path:
    """One file of a split."""
    dataset = name.partition("/")[0]
    return data_dir / name / version / f"{dataset}-{split}.{file_format}-{index:05}-of-{num_shards:05}"


def write_records(path: Path, records: Sequence[bytes]) -> None:
    """An ArrayRecord file, with the options TFDS takes."""
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def image_feature(shape: Sequence[int | None]) -> dict[str, Any]:
    """An image as features.json describes it."""
    dimensions = [str(-1 if size is None else size) for size in shape]
    return {
        "image": {"dtype": "uint8", "encodingFormat": "png", "shape": {"dimensions": dimensions}},
        "pythonClassName": f"{FEATURES}.image_feature.Image",
    }


def label_feature(num_classes: int) -> dict[str, Any]:
    """A label as features.json describes it."""
    return {
        "classLabel": {"numClasses": str(num_classes)},
        "pythonClassName": f"{FEATURES}.class_label_feature.ClassLabel",
    }


def text_feature() -> dict[str, Any]:
    """A text as features.json describes it."""
    return {"pythonClassName": f"{FEATURES}.text_feature.Text", "text": {}}


def _draw(rng: np.random.Generator, shape: tuple[int | None, int | None, int]) -> np.ndarray:
    height, width = (int(rng.integers(6, 16)) if size is None else size for size in shape[:2])
    return rng.integers(0, 256, (height, width, shape[2]), np.uint8)


def encode_image(image: np.ndarray) -> bytes:
    """A PNG file."""
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, format="PNG")
    return file.getvalue()


def encode_example(values: Mapping[str, bytes | int]) -> bytes:
    """A record."""
    example = tf_example_pb2.Example()
    for key, value in values.items():
        feature = example.features.feature[key]
        if isinstance(value, bytes):
            feature.bytes_list.value.append(value)
        else:
            feature.int64_list.value.append(value)
    return example.SerializeToString()


def _fill(described: Mapping[str, Any], split: str, index: int) -> dict[str, bytes | int]:
    """A value for each feature."""
    blank = encode_image(np.zeros((8, 8, 3), np.uint8))
    values: dict[str, bytes | int] = {}
    for key, feature in described.items():
        values[key] = blank if "image" in feature else 0 if "classLabel" in feature else f"{split}_{index}".encode()
    return values
