"""Images of TensorFlow Datasets: every byte arrives, and what does not is refused by name."""

import json
import shlex
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from adalfl_jax import data
from adalfl_jax.data import DatasetError, images
from adalfl_jax.data.catalog import Keys, open_prepared
from adalfl_jax.data.examples import Location
from tests.data.prepared import (
    encode_example,
    encode_image,
    image_feature,
    label_feature,
    shard_file,
    text_feature,
    write_dataset,
    write_records,
)
from tests.training.tiny import ROOT


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """Decodes here, chunk by chunk; a test that wants processes says so."""
    monkeypatch.setattr(images.joblib, "cpu_count", lambda: 1)


def rows(inputs, labels):
    """Every example as bytes, in an order that does not depend on the split."""
    return sorted((np.asarray(image).tobytes(), int(label)) for image, label in zip(inputs, labels, strict=True))


def assert_holds(dataset, written, test="test"):
    """The dataset holds what was written, each split in its place."""
    together = [
        np.concatenate([getattr(dataset.train, key), getattr(dataset.valid, key)]) for key in dataset.train._fields
    ]
    assert rows(*together) == rows(*written["train"])
    assert rows(*dataset.test) == rows(*written[test])
    np.testing.assert_array_equal(dataset.test.inputs, written[test][0])  # and these in their order too
    np.testing.assert_array_equal(dataset.test.targets, written[test][1])


@pytest.mark.parametrize("chunk", [1000, 50])
@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_are_those_that_were_written(channels, num_shards, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "CHUNK", chunk)
    written = write_dataset(
        tmp_path, shape=(8, 6, channels), num_shards=num_shards, features={"id": text_feature()}, seed=channels
    )
    dataset = data.load("cifar10", data_dir=tmp_path)
    assert_holds(dataset, written)
    assert (dataset.input_shape, dataset.num_outputs, dataset.is_classification) == ((8, 6, channels), 4, True)


@pytest.mark.slow
def test_arrays_decoded_in_processes_of_their_own_are_those_that_were_written(tmp_path, monkeypatch):
    monkeypatch.setattr(images.joblib, "cpu_count", lambda: 2)
    monkeypatch.setattr(images, "CHUNK", 35)
    written = write_dataset(tmp_path, num_shards=2)
    assert_holds(data.load("cifar10", data_dir=tmp_path), written)


@pytest.mark.slow
def test_damage_found_in_a_process_of_its_own_is_told_as_any_other(tmp_path, monkeypatch):
    monkeypatch.setattr(images.joblib, "cpu_count", lambda: 2)
    monkeypatch.setattr(images, "CHUNK", 35)
    write_dataset(tmp_path, num_shards=2)
    file = shard_file(tmp_path, index=1, num_shards=2)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DatasetError, match=f"{file} is missing, damaged"):
        data.load("cifar10", data_dir=tmp_path)


def test_images_with_an_opacity_keep_it(tmp_path):
    written = write_dataset(tmp_path, shape=(8, 8, 4))
    assert_holds(data.load("cifar10", data_dir=tmp_path), written)


def test_the_one_image_and_the_one_label_may_have_other_names(tmp_path):
    written = write_dataset(tmp_path, image_key="photo", label_key="breed", features={"id": text_feature()})
    assert_holds(data.load("cifar10", data_dir=tmp_path), written)


def test_of_several_images_the_one_called_image_is_taken(tmp_path):
    written = write_dataset(tmp_path, features={"mask": image_feature((8, 8, 3)), "coarse": label_feature(2)})
    assert_holds(data.load("cifar10", data_dir=tmp_path), written)


def test_a_tenth_of_the_training_split_validates_and_has_the_classes_in_proportion(tmp_path):
    write_dataset(tmp_path)
    dataset = data.load("cifar10", data_dir=tmp_path)
    counts = [np.bincount(split.targets).tolist() for split in (dataset.train, dataset.valid, dataset.test)]
    assert counts == [[27] * 4, [3] * 4, [10] * 4]


def test_the_validation_split_is_as_large_as_one_says(tmp_path):
    write_dataset(tmp_path)
    dataset = data.load("cifar10", data_dir=tmp_path, valid_fraction=0.4)
    assert [len(split.inputs) for split in (dataset.train, dataset.valid)] == [72, 48]


def test_images_are_bytes_on_the_device(tmp_path):
    write_dataset(tmp_path)
    dataset = data.load("cifar10", data_dir=tmp_path)
    splits = (dataset.train, dataset.valid, dataset.test)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(splits))
    assert {(split.inputs.dtype, split.targets.dtype) for split in splits} == {(jnp.dtype("uint8"), jnp.dtype("int32"))}


def test_streamed_images_are_the_same_bytes_on_the_host(tmp_path):
    write_dataset(tmp_path)
    resident, streamed = (data.load("cifar10", data_dir=tmp_path, streaming=how) for how in ("never", "always"))
    assert (resident.is_streamed, streamed.is_streamed) == (False, True)
    for split in ("train", "valid", "test"):
        for ours, theirs in zip(getattr(resident, split), getattr(streamed, split), strict=True):
            assert type(theirs) is np.ndarray
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)
    assert resident.preprocessing == streamed.preprocessing


@pytest.mark.parametrize("channels", [1, 3])
def test_mean_and_deviation_are_those_of_the_training_split_alone(channels, tmp_path):
    write_dataset(tmp_path, shape=(8, 8, channels))
    dataset = data.load("cifar10", data_dir=tmp_path)
    values = np.asarray(dataset.train.inputs).astype(np.float64).reshape(-1, channels)
    scaling = dataset.preprocessing.inputs
    np.testing.assert_allclose(scaling.mean, values.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(scaling.deviation, values.std(axis=0), rtol=1e-12)
    everything = np.concatenate([dataset.train.inputs, dataset.valid.inputs]).reshape(-1, channels)
    assert np.abs(everything.mean(axis=0) - scaling.mean).min() > 1e-3  # the test would see a leak


def test_normalized_training_images_have_mean_0_and_deviation_1_in_every_channel(tmp_path):
    write_dataset(tmp_path)
    dataset = data.load("cifar10", data_dir=tmp_path)
    normalized = dataset.normalize(dataset.train.inputs)
    assert normalized.dtype == jnp.float32
    np.testing.assert_allclose(normalized.mean(axis=(0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(normalized.std(axis=(0, 1, 2)), 1, atol=1e-5)
    one = dataset.normalize(dataset.train.inputs[0])  # any leading axes
    np.testing.assert_allclose(one, normalized[0], atol=1e-6)


def test_a_channel_that_is_constant_is_only_centred():
    constant = np.full((20, 2, 2, 1), 7, np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (20, 2, 2, 1), np.uint8)
    pictures = np.concatenate([constant, noise], axis=-1)
    dataset = data.make_dataset("mine", data.Examples(pictures, np.arange(20) % 2, num_classes=2))
    np.testing.assert_array_equal(dataset.normalize(dataset.train.inputs)[..., 0], 0)


def test_the_latest_version_is_taken(tmp_path):
    write_dataset(tmp_path, version="2.0.0", seed=1)
    latest = write_dataset(tmp_path, version="10.0.0", seed=2)  # later than 2.0.0, if not in the alphabet
    (tmp_path / "cifar10" / "11.0.0.incompleteABC").mkdir()  # where a download was cut off
    assert_holds(data.load("cifar10", data_dir=tmp_path), latest)


@pytest.mark.parametrize("splits", [("train", "validation"), ("train", "validation", "test")])
def test_validation_is_taken_where_there_is_no_test_split(splits, tmp_path):
    written = write_dataset(tmp_path, splits=dict.fromkeys(splits, 40))
    assert_holds(data.load("cifar10", data_dir=tmp_path), written, test=splits[-1])


@pytest.mark.parametrize("name", ["emnist/letters", "emnist"])
def test_a_configuration_is_found_by_its_name_or_for_want_of_another(name, tmp_path):
    written = write_dataset(tmp_path, "emnist/letters", shape=(8, 8, 1))
    assert_holds(data.load(name, data_dir=tmp_path), written)


def test_one_of_several_configurations_must_be_named(tmp_path):
    for config in ("letters", "digits"):
        write_dataset(tmp_path, f"emnist/{config}")
    with pytest.raises(
        DatasetError, match=rf"{tmp_path}/emnist in the configurations digits, letters; .*emnist/digits"
    ):
        data.load("emnist", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("name", "can_flip"),
    [
        ("mnist", False),
        ("kmnist", False),
        ("svhn_cropped", False),
        ("binary_alpha_digits", False),
        ("cifar10", True),
        ("fashion_mnist", True),
    ],
)
def test_characters_have_no_mirror_image(name, can_flip, tmp_path):
    write_dataset(tmp_path, name, shape=(4, 4, 1))
    assert data.load(name, data_dir=tmp_path).can_flip == can_flip
    assert data.load_spec(name, data_dir=tmp_path).can_flip == can_flip


def test_image_size_crops_the_longer_side_in_the_middle(tmp_path):
    written = write_dataset(tmp_path, shape=(8, 12, 3))
    dataset = data.load("cifar10", data_dir=tmp_path, image_size=8)
    np.testing.assert_array_equal(dataset.test.inputs, written["test"][0][:, :, 2:10])


def test_image_size_scales_the_shorter_side(tmp_path):
    written = write_dataset(tmp_path, shape=(24, 16, 3))
    dataset = data.load("cifar10", data_dir=tmp_path, image_size=8)
    for image, original in zip(dataset.test.inputs, written["test"][0], strict=True):
        scaled = Image.fromarray(original).resize((8, 12), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(image, np.asarray(scaled)[2:10])


def test_image_size_lets_images_of_several_sizes_through(tmp_path):
    written = write_dataset(tmp_path, shape=(None, None, 3))
    assert len({image.shape for image in written["train"][0]}) > 10
    dataset = data.load("cifar10", data_dir=tmp_path, image_size=8)
    assert [split.inputs.shape for split in (dataset.train, dataset.valid, dataset.test)] == [
        (108, 8, 8, 3),
        (12, 8, 8, 3),
        (40, 8, 8, 3),
    ]
    np.testing.assert_array_equal(dataset.test.targets, written["test"][1])


WITHOUT_TENSORFLOW = """
import importlib.util
import sys

class BrokenTensorFlow:  # there to be found, as far as anyone asks, but not to be imported
    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self) if name.partition(".")[0] == "tensorflow" else None

    def create_module(self, spec):
        raise AssertionError(f"{spec.name} is imported")

sys.meta_path.insert(0, BrokenTensorFlow())
from adalfl_jax import data
dataset = data.load("cifar10", data_dir=sys.argv[1])
assert not [name for name in sys.modules if name.partition(".")[0] == "tensorflow"]
print(dataset.train.inputs.shape)
"""


@pytest.mark.slow
def test_a_prepared_dataset_is_read_without_tensorflow(tmp_path):
    write_dataset(tmp_path)
    command = [sys.executable, "-c", WITHOUT_TENSORFLOW, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
    assert done.stdout == "(108, 8, 8, 3)\n"


def message(tmp_path, name="cifar10", **settings):
    """What a dataset that cannot be loaded is refused with."""
    with pytest.raises(DatasetError) as caught:
        data.load(name, data_dir=tmp_path, **settings)
    return str(caught.value)


def folder_of(tmp_path):
    return tmp_path / "cifar10" / "1.0.0"


def test_a_dataset_that_is_not_prepared_comes_with_the_command_that_does_it(tmp_path):
    text = message(tmp_path)
    assert f"dataset 'cifar10' is not prepared in {tmp_path}" in text
    assert f"\n  {shlex.quote(sys.executable)} -m adalfl_jax.data.prepare cifar10 --data_dir={tmp_path}\n" in text
    assert "TFDS_DATA_DIR" in text


def test_the_command_quotes_a_folder_with_a_space(tmp_path):
    assert f"--data_dir='{tmp_path}/my data'\n" in message(tmp_path / "my data")


def test_the_folder_of_tensorflow_datasets_is_where_data_are_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    written = write_dataset(tmp_path)
    assert_holds(data.load("cifar10"), written)


@pytest.mark.parametrize("name", ["../cifar10", "/cifar10", "cifar10:1.0.0", "", "cifar10/../cifar10"])
def test_a_name_that_leads_elsewhere_is_unknown(name, tmp_path):
    write_dataset(tmp_path)
    assert f"unknown dataset {name!r}" in message(tmp_path, name)


@pytest.mark.parametrize("size", [-1, 2.5])
def test_an_image_size_that_is_no_number_of_pixels_is_refused(size, tmp_path):
    write_dataset(tmp_path)
    assert f"image_size must be a number of pixels, or 0 for images as they are; got {size}" in message(
        tmp_path, image_size=size
    )


@pytest.mark.parametrize("name", ["digits", "mine.npz"])
@pytest.mark.parametrize("load", [data.load, data.load_spec])
def test_only_images_of_tensorflow_datasets_are_scaled(load, name):
    with pytest.raises(DatasetError, match=f"image_size scales images of TensorFlow Datasets, and '{name}' is not one"):
        load(name, image_size=28)


def test_images_too_large_for_memory_are_not_called_damaged(tmp_path, monkeypatch):
    def fail(*arguments):
        raise MemoryError

    write_dataset(tmp_path)
    monkeypatch.setattr(images, "_decode_image", fail)
    assert f"images of {folder_of(tmp_path)} scaled to 9x9 do not fit in memory" in message(tmp_path, image_size=9)


def test_a_misspelt_name_is_refused_with_the_nearest_and_the_known(tmp_path):
    text = message(tmp_path, "cifar_10")
    assert "unknown dataset 'cifar_10'; did you mean 'cifar10'?" in text
    assert all(known in text for known in ("california, crime, diabetes, digits", ".npz", "mnist"))


@pytest.mark.parametrize(
    ("splits", "lacking"), [(["train"], "test"), (["test"], "train"), (["train", "extra"], "test")]
)
def test_a_split_that_is_wanted_and_not_there_is_named(splits, lacking, tmp_path):
    write_dataset(tmp_path, splits=dict.fromkeys(splits, 40))
    text = message(tmp_path)
    assert f"dataset 'cifar10' has the splits {', '.join(splits)}, and '{lacking}' is wanted" in text
    assert ".npz" in text


def assert_names_the_file(text, file, folder):
    assert f"{file} is missing, damaged or cut short" in text
    assert f"move {folder} away and prepare the dataset anew" in text


@pytest.mark.parametrize("cut", [0, 1, 1000, 65535, 65536, 65537, 100_000, -65537, -65536, -1])
def test_a_file_that_is_cut_short_is_named(cut, tmp_path):
    write_dataset(tmp_path, shape=(16, 16, 3))
    file = shard_file(tmp_path)
    content = file.read_bytes()
    assert len(content) > 2 * 65536  # ArrayRecord's blocks; every cut is a real one
    file.write_bytes(content[:cut])
    assert_names_the_file(message(tmp_path), file, folder_of(tmp_path))


@pytest.mark.parametrize("harm", ["zeroed", "missing", "of text", "without records"])
def test_a_file_that_is_spoilt_is_named(harm, tmp_path):
    write_dataset(tmp_path)
    file = shard_file(tmp_path, split="test")
    size = file.stat().st_size
    file.unlink()
    if harm == "without records":
        write_records(file, [])
    elif harm != "missing":
        file.write_bytes(bytes(size) if harm == "zeroed" else b"text" * size)
    assert_names_the_file(message(tmp_path), file, folder_of(tmp_path))


@pytest.mark.parametrize("index", [0, 1, 2])
def test_of_several_files_the_damaged_one_is_named(index, tmp_path):
    write_dataset(tmp_path, num_shards=3)
    file = shard_file(tmp_path, index=index, num_shards=3)
    file.write_bytes(bytes(file.stat().st_size))
    assert_names_the_file(message(tmp_path), file, folder_of(tmp_path))


def test_a_record_that_holds_no_image_is_told_by_its_file(tmp_path):
    write_dataset(tmp_path)
    file = shard_file(tmp_path)
    write_records(file, [encode_example({"image": b"no image", "label": 0})] * 120)
    assert_names_the_file(message(tmp_path), file, folder_of(tmp_path))


def test_no_flipped_byte_gives_wrong_images(tmp_path):
    write_dataset(tmp_path, splits={"train": 12, "test": 8}, shape=(4, 4, 1))
    file, folder = shard_file(tmp_path), folder_of(tmp_path)

    def decode():
        return images._decode(folder, "train", 0, 12, Keys("image", "label"), 0)

    expected, labels = decode()
    content = np.frombuffer(file.read_bytes(), np.uint8)
    written = np.flatnonzero(content)  # most of a file this small is padding
    rng = np.random.default_rng(0)
    positions = [*written[:40], *rng.choice(written, 50, replace=False), *written[-40:], *rng.choice(len(content), 20)]
    refused = 0
    for position in positions:
        flipped = content.copy()
        flipped[position] ^= rng.integers(1, 256, dtype=np.uint8)
        file.write_bytes(flipped.tobytes())
        try:
            decoded, found = decode()
        except DatasetError as error:
            assert_names_the_file(str(error), file, folder)
            refused += 1
        else:
            np.testing.assert_array_equal(decoded, expected)
            assert found == labels
    assert refused > len(positions) / 2


def test_labels_beyond_the_classes_are_refused_with_the_folder(tmp_path):
    write_dataset(tmp_path, num_classes=4, num_labels=6)
    text = message(tmp_path)
    assert f"{folder_of(tmp_path)}: split 'train' has labels from 0 to 5, and features.json has 4 classes" in text
    assert "prepare the dataset anew" in text


def test_labels_beyond_the_classes_are_refused_before_anything_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "CHUNK", 1)
    write_dataset(tmp_path, num_classes=4, num_labels=6)
    monkeypatch.setattr(images, "cached", lambda path, fingerprint, build: build())
    assert "split 'train' has labels from" in message(tmp_path)
    assert not list(folder_of(tmp_path).glob("*.safetensors*"))


def test_validation_is_taken_where_the_labels_of_the_test_split_are_secret(tmp_path):
    written = write_dataset(tmp_path, "beans", splits={"train": 40, "validation": 30, "test": 20})
    records = [encode_example({"image": encode_image(image), "label": -1}) for image in written["test"][0]]
    write_records(shard_file(tmp_path, "beans", split="test"), records)
    assert_holds(data.load("beans", data_dir=tmp_path), written, test="validation")
    assert data.load_spec("beans", data_dir=tmp_path).num_test == 30


@pytest.mark.parametrize("chunk", [1000, 1])
def test_images_of_several_sizes_are_refused_without_an_image_size(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "CHUNK", chunk)  # found within a chunk, and between chunks
    write_dataset(tmp_path, splits={"train": 20, "test": 20}, shape=(None, None, 3))
    text = message(tmp_path)
    assert f"images in {folder_of(tmp_path)}, split 'train', differ in size (" in text
    assert "set dataset.image_size" in text


def test_shapes_of_images_of_several_sizes_are_those_of_the_image_size(tmp_path):
    write_dataset(tmp_path, "stl10", shape=(None, None, 3))
    with pytest.raises(DatasetError, match=r"'stl10' differ in size; set dataset\.image_size"):
        data.load_spec("stl10", data_dir=tmp_path)
    assert data.load_spec("stl10", data_dir=tmp_path, image_size=8).input_shape == (8, 8, 3)


def test_training_and_test_images_of_different_sizes_are_refused(tmp_path):
    write_dataset(tmp_path, shape=(8, 8, 3))
    write_dataset(tmp_path / "other", shape=(8, 9, 3))
    shard_file(tmp_path / "other", split="test").replace(shard_file(tmp_path, split="test"))
    text = message(tmp_path)
    assert "dataset 'cifar10': training examples have inputs (8, 8, 3)" in text
    assert "test examples inputs (8, 9, 3)" in text


def test_a_dataset_in_another_format_is_refused(tmp_path):
    write_dataset(tmp_path, file_format="tfrecord")
    text = message(tmp_path)
    assert f"{folder_of(tmp_path)} is not in ArrayRecord format" in text
    assert "python -m adalfl_jax.data.prepare" in text


@pytest.mark.parametrize(
    ("features", "reason"),
    [
        ({"image": None}, "of its features label, 0 are of the kind 'image'"),
        ({"label": None}, "of its features image, 0 are of the kind 'label'"),
        (
            {"image": None, "left": image_feature((8, 8, 3)), "right": image_feature((8, 8, 3))},
            "2 are of the kind 'image' and none has that name",
        ),
        ({"image": image_feature((8, 8, 2))}, "only uint8 with 1, 3 or 4 channels can be read"),
    ],
)
def test_a_dataset_that_is_no_image_classification_is_refused(features, reason, tmp_path):
    write_dataset(tmp_path, features=features)
    text = message(tmp_path)
    assert "dataset 'cifar10'" in text
    assert reason in text
    assert ".npz" in text


@pytest.mark.parametrize("file", ["dataset_info.json", "features.json"])
@pytest.mark.parametrize("text", [None, "", "{", "[]", "\0"])
def test_a_folder_without_its_description_is_named(file, text, tmp_path):
    write_dataset(tmp_path)
    if text is None:
        (folder_of(tmp_path) / file).unlink()
    else:
        (folder_of(tmp_path) / file).write_text(text)
    assert f"{folder_of(tmp_path)} cannot be read as a TFDS dataset" in message(tmp_path)


def test_an_empty_split_is_refused(tmp_path):
    write_dataset(tmp_path, splits={"train": 40, "test": 0})
    assert f"split 'test' in {folder_of(tmp_path)} is empty" in message(tmp_path)


def test_shapes_of_a_prepared_dataset_are_known_without_decoding_it(tmp_path, monkeypatch):
    write_dataset(tmp_path, "beans", shape=(8, 6, 3))
    monkeypatch.setattr(images, "_decode", None)
    spec = data.load_spec("beans", data_dir=tmp_path)
    assert spec == data.Spec((8, 6, 3), 4, 120, 40, can_flip=True)
    assert not list((tmp_path / "beans" / "1.0.0").glob("*.safetensors"))


def test_the_helper_writes_what_dataset_info_says(tmp_path):
    write_dataset(tmp_path, num_shards=3)
    info = json.loads((folder_of(tmp_path) / "dataset_info.json").read_text())
    assert [split["shardLengths"] for split in info["splits"]] == [["40"] * 3, ["14", "13", "13"]]
    assert open_prepared(folder_of(tmp_path)).info.splits["train"].num_examples == 120
    assert Location(tmp_path).cache_file(folder_of(tmp_path)).parent == folder_of(tmp_path)
