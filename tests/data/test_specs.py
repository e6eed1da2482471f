"""Shapes of datasets: those that are known without the data are those of the data."""

import copy
import functools
import socket
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds

from adalfl_jax import data
from adalfl_jax.data import Corruption, DatasetError, Examples, Spec, abstract_splits, random_dataset
from adalfl_jax.data.catalog import find_spec
from adalfl_jax.data.examples import Location
from adalfl_jax.data.specs import SPECS
from adalfl_jax.data.splits import split_indices
from tests.data.prepared import write_dataset

IMAGES = ("mnist", "fashion_mnist", "cifar10", "cifar100", "svhn_cropped")

NOISE = np.random.default_rng(0)
NUM_TRAIN, NUM_TEST = 102, 31  # no split of the former is a whole number of examples
LABELS = np.arange(NUM_TRAIN) % 4
ARRAYS = {
    "images": {"inputs": NOISE.integers(0, 256, (NUM_TRAIN, 6, 5), np.uint8), "targets": LABELS, "num_classes": 6},
    "images with a test split": {
        "inputs": NOISE.integers(0, 256, (NUM_TRAIN, 6, 5, 3), np.uint8),
        "targets": LABELS,
        "test_inputs": NOISE.integers(0, 256, (NUM_TEST, 6, 5, 3), np.uint8),
        "test_targets": np.arange(NUM_TEST) % 4,
    },
    "a table with a validation split": {
        "inputs": NOISE.normal(size=(NUM_TRAIN, 3)),
        "targets": LABELS,
        "valid_inputs": NOISE.normal(size=(17, 3)),
        "valid_targets": np.arange(17) % 4,
    },
    "a table": {"inputs": NOISE.normal(size=(NUM_TRAIN, 3)), "targets": LABELS},
    "a table of bytes": {"inputs": NOISE.integers(0, 256, (NUM_TRAIN, 7), np.uint8), "targets": LABELS},
    "a regression": {"inputs": NOISE.normal(size=(NUM_TRAIN, 3)), "targets": NOISE.normal(size=(NUM_TRAIN, 2))},
}
PREPARED = {
    "prepared": {"train": NUM_TRAIN, "test": NUM_TEST},
    "prepared without a test split": {"train": NUM_TRAIN, "validation": NUM_TEST},
}
SOURCES = ("digits", "diabetes", *PREPARED, *ARRAYS)


@pytest.fixture(autouse=True)
def connections(monkeypatch):
    """Nothing here may reach for the network, not even where a failure would be passed over."""
    attempts = []

    def refuse(*arguments):
        attempts.append(arguments)
        raise OSError("the tests have no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield attempts
    assert not attempts


def write_source(kind, tmp_path):
    """Writes data of a kind and returns their name."""
    if kind in PREPARED:
        write_dataset(tmp_path, "beans", splits=PREPARED[kind], shape=(8, 6, 3))
        return "beans"
    if kind in ARRAYS:
        return write_npz(tmp_path, **ARRAYS[kind])
    return kind


def write_npz(tmp_path, **arrays):
    np.savez(tmp_path / "mine.npz", **arrays)
    return str(tmp_path / "mine.npz")


def described(split, first_axis=0):
    """Shapes and types of the inputs and the targets of a split."""
    return [(leaf.shape[first_axis:], jnp.dtype(leaf.dtype)) for leaf in split]


@pytest.mark.parametrize("name", ["digits", "diabetes"])
def test_the_table_agrees_with_the_data_that_ship_with_scikit_learn(name, tmp_path):
    examples = data.load_examples(name, Location(tmp_path))
    assert SPECS[name]._asdict() == Spec.of(examples)._asdict()
    assert data.load_spec(name, data_dir=tmp_path) == SPECS[name]


@pytest.mark.parametrize("name", IMAGES)
def test_the_table_agrees_with_the_code_of_tensorflow_datasets(name, tmp_path):
    features = tfds.builder(name, data_dir=tmp_path).info.features
    assert SPECS[name].input_shape == features["image"].shape
    assert features["image"].np_dtype == np.uint8
    assert SPECS[name].num_outputs == features["label"].num_classes
    assert SPECS[name]._replace(num_train=0, num_test=0) == find_spec(name, Location(tmp_path))


@pytest.mark.parametrize("kind", SOURCES)
def test_shapes_are_those_of_the_examples(kind, tmp_path):
    name = write_source(kind, tmp_path)
    spec = data.load_spec(name, data_dir=tmp_path)
    assert spec._asdict() == Spec.of(data.load_examples(name, Location(tmp_path)))._asdict()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("prepared", Spec((8, 6, 3), 4, NUM_TRAIN, NUM_TEST, can_flip=True)),
        ("prepared without a test split", Spec((8, 6, 3), 4, NUM_TRAIN, NUM_TEST, can_flip=True)),
        ("images", Spec((6, 5, 1), 6, NUM_TRAIN, 0, can_flip=True)),
        ("images with a test split", Spec((6, 5, 3), 4, NUM_TRAIN, NUM_TEST, can_flip=True)),
        ("a table", Spec((3,), 4, NUM_TRAIN, 0, is_image=False, can_flip=True)),
        ("a table of bytes", Spec((7,), 4, NUM_TRAIN, 0, is_image=False, can_flip=True)),
        ("a regression", Spec((3,), 2, NUM_TRAIN, 0, is_classification=False, is_image=False, can_flip=True)),
    ],
)
def test_shapes_are_those_that_were_written(kind, expected, tmp_path):
    assert data.load_spec(write_source(kind, tmp_path), data_dir=tmp_path) == expected


@pytest.mark.parametrize("kind", SOURCES)
def test_bytes_are_those_of_the_inputs_of_all_splits(kind, tmp_path):
    name = write_source(kind, tmp_path)
    dataset = data.load(name, data_dir=tmp_path)
    num_bytes = sum(split.inputs.nbytes for split in (dataset.train, dataset.valid, dataset.test))
    assert data.load_spec(name, data_dir=tmp_path).num_bytes == num_bytes
    assert data.load_examples(name, Location(tmp_path)).num_bytes == num_bytes


@pytest.mark.parametrize("valid_fraction", [0.1, 0.35])
@pytest.mark.parametrize("kind", SOURCES)
def test_abstract_splits_have_the_shapes_and_types_of_those_that_are_loaded(kind, valid_fraction, tmp_path):
    name = write_source(kind, tmp_path)
    if data.load_spec(name, data_dir=tmp_path).num_valid:
        valid_fraction = 0.1  # a split of the data's own is of no other size
    dataset = data.load(name, data_dir=tmp_path, valid_fraction=valid_fraction)
    train, valid = abstract_splits(data.load_spec(name, data_dir=tmp_path), valid_fraction)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in (*train, *valid))
    assert [described(train), described(valid)] == [described(dataset.train), described(dataset.valid)]


@pytest.mark.parametrize("valid_fraction", [0.1, 0.07, 1 / 3])
def test_abstract_splits_are_rounded_as_the_cuts_are(valid_fraction):
    for num_examples in range(60, 110):
        spec = Spec((3,), 1, num_examples, 0, is_classification=False, is_image=False)
        cuts = split_indices("mine", np.zeros(num_examples), stratify=False, valid=valid_fraction)
        sizes = [len(split.inputs) for split in abstract_splits(spec, valid_fraction)]
        assert sizes == [len(rows) for rows in cuts[:2]], num_examples


def test_abstract_splits_have_as_many_validation_examples_as_are_asked_for():
    dataset = data.load("digits", valid_examples=100)
    sizes = [len(split.inputs) for split in abstract_splits(SPECS["digits"], 0.1, 100)]
    assert sizes == [len(dataset.train.inputs), len(dataset.valid.inputs)]
    with pytest.raises(DatasetError, match="no validation split of 1500 can be cut off 1437 examples"):
        abstract_splits(SPECS["digits"], 0.1, 1500)


def test_a_size_for_a_validation_split_that_the_data_bring_is_refused(tmp_path):
    name = write_source("a table with a validation split", tmp_path)
    spec = data.load_spec(name)
    for sizes in ({"valid_fraction": 0.2}, {"valid_examples": 8}):
        message = (
            "brings a validation split of its own, whose size valid_fraction=0.[12] and valid_examples=[08] cannot"
        )
        with pytest.raises(DatasetError, match=f"{message} change; leave them at 0.1 and 0"):
            data.load(name, **sizes)
        with pytest.raises(DatasetError, match=message):
            abstract_splits(spec, **({"valid_fraction": 0.1} | sizes))


def test_the_size_of_an_imbalanced_split_is_known_about():
    corruption = Corruption(imbalance=10.0)
    train, valid = abstract_splits(SPECS["digits"], 0.1, corruption=corruption)
    assert len(train.inputs) == pytest.approx(len(data.load("digits", imbalance=10.0).train.inputs), rel=0.05)
    assert len(valid.inputs) == 144
    with pytest.raises(DatasetError, match="is a regression"):
        abstract_splits(SPECS["diabetes"], 0.1, corruption=corruption)


def test_the_size_of_a_split_that_wrong_labels_are_removed_from_is_known():
    train, _ = abstract_splits(SPECS["digits"], 0.1, corruption=Corruption(0.2, "removed"))
    assert len(train.inputs) == len(data.load("digits", label_noise=0.2, noise_kind="removed").train.inputs)


def test_what_is_not_prepared_has_no_sizes_whatever_is_asked_for():
    spec = SPECS["mnist"]._replace(num_train=0, num_test=0)
    splits = abstract_splits(spec, 0.1, 300, Corruption(0.4, "pair", 10.0))
    assert [len(split.inputs) for split in splits] == [0, 0]


@pytest.mark.parametrize("kind", SOURCES)
def test_noise_has_the_shapes_and_types_of_the_data(kind, tmp_path):
    name = write_source(kind, tmp_path)
    loaded = data.load(name, data_dir=tmp_path)
    noise = random_dataset(name, data.load_spec(name, data_dir=tmp_path), 8)
    for split in ("train", "valid", "test"):
        ours, theirs = getattr(noise, split), getattr(loaded, split)
        assert [len(leaf) for leaf in ours] == [8, 8]
        assert described(ours, first_axis=1) == described(theirs, first_axis=1)
    for attribute in ("name", "num_outputs", "input_shape", "is_classification", "can_flip"):
        assert getattr(noise, attribute) == getattr(loaded, attribute)
    ours, theirs = noise.preprocessing, loaded.preprocessing
    for attribute in ("shape", "is_image", "num_tokens"):
        assert getattr(ours, attribute) == getattr(theirs, attribute)
    if theirs.is_image:
        one_a_channel = np.shape(theirs.inputs.mean)
        assert np.shape(ours.inputs.mean) == np.shape(ours.inputs.deviation) == one_a_channel
    assert not noise.is_streamed


def leaves_of(dataset):
    return [np.asarray(leaf) for split in (dataset.train, dataset.valid, dataset.test) for leaf in split]


@pytest.mark.parametrize("name", ["digits", "diabetes", "cifar10"])
def test_noise_is_that_of_its_seed_and_another_in_every_split(name):
    spec = SPECS[name]
    first, again, other = (leaves_of(random_dataset(name, spec, 40, seed=seed)) for seed in (0, 0, 1))
    for ours, same, different in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(ours, same)
        assert not np.array_equal(ours, different)
    for kind in (first[::2], first[1::2]):
        assert len({leaf.tobytes() for leaf in kind}) == 3
    for ours, default in zip(first, leaves_of(random_dataset(name, spec, 40)), strict=True):
        np.testing.assert_array_equal(ours, default)


@pytest.mark.parametrize("name", ["digits", "diabetes", "cifar10"])
def test_noise_is_normalised_to_mean_0_and_deviation_1(name):
    dataset = random_dataset(name, SPECS[name], 400)
    for split in (dataset.train, dataset.valid, dataset.test):
        inputs = np.asarray(dataset.normalize(split.inputs)).reshape(-1, SPECS[name].input_shape[-1])
        assert inputs.dtype == np.float32
        np.testing.assert_allclose(inputs.mean(axis=0), 0, atol=0.25)  # of 400 numbers a column at least
        np.testing.assert_allclose(inputs.std(axis=0), 1, atol=0.2)
        np.testing.assert_allclose([inputs.mean(), inputs.std()], [0, 1], atol=0.05)


def test_noise_has_every_class_and_every_byte():
    train = random_dataset("cifar10", SPECS["cifar10"], 200).train
    assert np.unique(train.targets).tolist() == list(range(10))
    assert np.unique(train.inputs).tolist() == list(range(256))


@pytest.mark.parametrize("kind", PREPARED)
def test_image_size_changes_the_shapes_of_what_it_changes_when_data_are_loaded(kind, tmp_path):
    name = write_source(kind, tmp_path)
    settings = {"data_dir": tmp_path, "image_size": 4}
    assert data.load_spec(name, **settings).input_shape == data.load(name, **settings).input_shape


@pytest.mark.parametrize("name", IMAGES)
def test_images_of_the_table_have_the_image_size_and_all_else_as_it_was(name):
    channels = SPECS[name].input_shape[-1]
    assert data.load_spec(name, image_size=16) == SPECS[name]._replace(input_shape=(16, 16, channels))
    assert data.load_spec(name) == SPECS[name]


@pytest.fixture
def registry(monkeypatch):
    """The registered datasets, as they were after the test."""
    monkeypatch.setattr(data.loading, "DATASETS", copy.copy(data.DATASETS))
    return data.loading.DATASETS


def test_a_registered_dataset_has_the_shapes_of_its_examples(registry, tmp_path):
    examples = Examples(NOISE.integers(0, 256, (50, 4, 3, 2), np.uint8), np.arange(50) % 4, num_classes=7)
    data.register_dataset("mine", lambda: examples)
    assert data.load_spec("mine", data_dir=tmp_path) == Spec((4, 3, 2), 7, 50, 0, can_flip=True)


def test_a_dataset_of_ones_own_is_registered_again_with_what_is_new(registry, tmp_path):
    for num_columns in (3, 5):
        examples = Examples(NOISE.normal(size=(50, num_columns)), np.arange(50) % 2, num_classes=2)
        data.register_dataset("mine", functools.partial(lambda made: made, examples))
        assert data.load("mine", data_dir=tmp_path).input_shape == (num_columns,)


def test_a_registered_dataset_is_not_mistaken_for_one_of_tensorflow_datasets(registry, tmp_path):
    examples = Examples(NOISE.normal(size=(50, 3)), np.arange(50) % 2, num_classes=2, can_flip=False)
    data.register_dataset("beans", lambda: examples)
    assert data.load_spec("beans", data_dir=tmp_path) == Spec((3,), 2, 50, 0, is_image=False)


def test_a_name_of_the_table_is_taken_and_examples_are_no_function(registry):
    before = dict(registry)
    for name in SPECS:
        with pytest.raises(ValueError, match=f"there is a dataset '{name}' in this package"):
            data.register_dataset(name, lambda: Examples(NOISE.normal(size=(50, 3)), LABELS[:50], num_classes=4))
    with pytest.raises(ValueError, match=r"'mine': load_examples must be a function .*; got Examples$"):
        data.register_dataset("mine", Examples(NOISE.normal(size=(50, 3)), LABELS[:50], num_classes=4))
    assert registry == before


@pytest.mark.parametrize(
    ("name", "input_shape", "num_outputs", "can_flip"),
    [
        ("cmaterdb", (32, 32, 3), 10, False),
        ("kmnist", (28, 28, 1), 10, False),
        ("emnist", (28, 28, 1), 62, False),
        ("emnist/letters", (28, 28, 1), 37, False),
        ("beans", (500, 500, 3), 3, True),
        ("stl10", (96, 96, 3), 10, True),
    ],
)
def test_a_dataset_that_is_not_prepared_has_the_shapes_of_its_code(name, input_shape, num_outputs, can_flip, tmp_path):
    unknown = Spec(input_shape, num_outputs, num_train=0, num_test=0, can_flip=can_flip)
    assert data.load_spec(name, data_dir=tmp_path) == unknown
    scaled = unknown._replace(input_shape=(16, 16, input_shape[-1]))
    assert data.load_spec(name, data_dir=tmp_path, image_size=16) == scaled
    assert not list(tmp_path.iterdir())


def test_a_dataset_whose_images_differ_in_size_needs_an_image_size(tmp_path):
    with pytest.raises(DatasetError, match=r"'imagenet2012' differ in size; set dataset\.image_size"):
        data.load_spec("imagenet2012", data_dir=tmp_path)
    expected = Spec((64, 64, 3), 1000, 0, 0, can_flip=True)
    assert data.load_spec("imagenet2012", data_dir=tmp_path, image_size=64) == expected


@pytest.mark.parametrize("name", ["voc", "coil100"])  # without a label, with several
def test_a_dataset_whose_code_has_no_image_classification_is_refused(name, tmp_path):
    with pytest.raises(DatasetError, match=f"'{name}' is no image classification that can be read"):
        data.load_spec(name, data_dir=tmp_path)


def test_a_configuration_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="emnist/nosuch"):
        data.load_spec("emnist/nosuch", data_dir=tmp_path)


def refusal(load, name, tmp_path):
    with pytest.raises(DatasetError) as caught:
        load(name, data_dir=tmp_path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("digit", "unknown dataset 'digit'; did you mean 'digits'? Known: california, crime, diabetes, digits"),
        ("mnits", "unknown dataset 'mnits'; did you mean 'mnist'?"),
        ("nothing/like/it", "unknown dataset 'nothing/like/it'; known:"),
        ("", "unknown dataset ''; known:"),
        ("nosuch.npz", "there is no file nosuch.npz"),
        (
            str(Path(__file__).parent),
            "is a folder; of own data an .npz file is read, which np.savez(path, inputs=..., targets=..",
        ),
        (__file__, "is a file of another format; of own data an .npz file is read"),
    ],
)
def test_an_unknown_name_is_refused_as_it_is_when_data_are_loaded(name, text, tmp_path):
    message = refusal(data.load_spec, name, tmp_path)
    assert text in message
    assert message == refusal(data.load, name, tmp_path)


@pytest.mark.parametrize(
    "arrays",
    [
        {"inputs": np.float32(3), "targets": LABELS},
        {"inputs": ARRAYS["a table"]["inputs"], "targets": np.float32(3)},
        {"inputs": ARRAYS["a table"]["inputs"], "targets": LABELS[:-1]},
        {"inputs": ARRAYS["a table"]["inputs"], "targets": LABELS, "num_classes": 2},
        {"inputs": LABELS.astype(str), "targets": LABELS},
        ARRAYS["images with a test split"] | {"inputs": ARRAYS["images"]["inputs"]},
    ],
    ids=["one input", "one target", "a target missing", "labels out of range", "texts", "another test split"],
)
def test_arrays_that_do_not_fit_are_refused_as_they_are_when_loaded(arrays, tmp_path):
    name = write_npz(tmp_path, **arrays)
    assert refusal(data.load_spec, name, tmp_path) == refusal(data.load, name, tmp_path)


@pytest.mark.parametrize("splits", [("train",), ("test",), ("train", "extra")])
def test_a_prepared_dataset_without_the_splits_is_refused_as_it_is_when_loaded(splits, tmp_path):
    write_dataset(tmp_path, "beans", splits=dict.fromkeys(splits, 40))
    assert refusal(data.load_spec, "beans", tmp_path) == refusal(data.load, "beans", tmp_path)
