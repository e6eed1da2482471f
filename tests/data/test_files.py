"""A user's own .npz: read as it is, or refused by name; nothing in it runs."""

import os
import pathlib
import warnings

import numpy as np
import pytest

from adalfl_jax import data
from adalfl_jax.data import DatasetError, files
from adalfl_jax.data.files import load_npz

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (60, 6, 5, 3), np.uint8)
TABLE = RNG.normal(size=(60, 4))
LABELS = np.arange(60) % 3
FLOATS = np.where(RNG.random((60, 6, 5, 1)) < 0.5, 0.0, RNG.random((60, 6, 5, 1)))  # images in [0, 1]
HEAVY = np.concatenate([RNG.random((59, 4)), np.full((1, 4), 1e6)])


@pytest.fixture
def file(tmp_path):
    return tmp_path / "mine.npz"


def save(path, **arrays):
    np.savez(path, **({"inputs": TABLE, "targets": LABELS} | arrays))


def message(path):
    with pytest.raises(DatasetError) as caught:
        data.load(str(path))
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_arrays_are_those_that_were_written(write, file):
    write(file, inputs=IMAGES, targets=LABELS)
    examples = load_npz(file)
    np.testing.assert_array_equal(examples.inputs, IMAGES)
    np.testing.assert_array_equal(examples.targets, LABELS)
    assert (examples.num_classes, examples.test) == (3, None)


def test_bytes_are_images_and_grey_ones_get_a_channel(file):
    for inputs, shape in ((IMAGES, (6, 5, 3)), (IMAGES[..., 0], (6, 5, 1))):
        save(file, inputs=inputs)
        dataset = data.load(str(file))
        assert dataset.train.inputs.dtype == np.uint8
        assert dataset.input_shape == shape


def test_a_table_of_bytes_is_a_table(file):
    save(file, inputs=IMAGES.reshape(60, -1))
    dataset = data.load(str(file))
    assert (dataset.train.inputs.dtype, dataset.input_shape) == (np.float32, (90,))


@pytest.mark.parametrize(("targets", "num_outputs"), [(TABLE[:, 0], 1), (TABLE[:, :2], 2)])
def test_targets_of_numbers_are_a_regression(targets, num_outputs, file):
    save(file, targets=targets)
    dataset = data.load(str(file))
    assert (dataset.is_classification, dataset.num_outputs) == (False, num_outputs)


def test_truth_values_are_labels(file):
    save(file, targets=LABELS == 1)
    dataset = data.load(file)
    assert (dataset.is_classification, dataset.num_outputs) == (True, 2)
    assert dataset.train.targets.dtype == np.int32
    assert float(dataset.train.targets.mean()) == pytest.approx(1 / 3, abs=0.01)


def test_the_ending_may_be_in_capitals(tmp_path):
    with (tmp_path / "MINE.NPZ").open("wb") as stream:
        np.savez(stream, inputs=TABLE, targets=LABELS)
    assert data.load(tmp_path / "MINE.NPZ").input_shape == (4,)


@pytest.mark.parametrize(
    ("labels", "named"),
    [(LABELS + 1, "has label 0, where the largest is 3"), (LABELS * 9, r"1, 2, 3, 4, 5, \.\.\., where")],
)
@pytest.mark.parametrize("label_noise", [0.0, 0.9])  # which makes labels of every class
def test_labels_that_do_not_count_the_classes_from_0_are_told(file, labels, named, label_noise):
    save(file, targets=labels)
    with pytest.warns(UserWarning, match=named + r".*np\.unique\(targets, return_inverse=True\)\[1\] numbers them so"):
        data.load(file, label_noise=label_noise)


def test_a_class_whose_examples_are_removed_is_told(file):
    save(file, targets=np.repeat([0, 1, 2], [28, 4, 28]))
    with pytest.warns(UserWarning, match=r"no training example has label 1, where the largest is 2"):
        data.load(file, label_noise=0.9, noise_kind="removed")


@pytest.mark.parametrize("missing", [0, 2])
def test_a_clean_set_without_an_example_of_a_class_is_told(file, missing):
    left = missing != LABELS
    save(file, valid_inputs=TABLE[left], valid_targets=LABELS[left])
    with pytest.warns(UserWarning, match=rf"no valid example has label {missing}, which training examples have; what"):
        data.load(file)


def test_num_classes_may_exceed_the_largest_label(file):
    save(file, num_classes=7)
    more = data.load(str(file))
    assert more.num_outputs == 7
    save(file)
    assert data.load(str(file)).content != more.content  # it is other data to a run


def test_whole_numbers_of_another_type_are_labels_where_the_number_of_classes_is_given(file):
    save(file, targets=LABELS.astype(np.float64), num_classes=3)
    dataset = data.load(str(file))
    assert dataset.is_classification
    assert sorted(np.unique(dataset.train.targets)) == [0, 1, 2]


def test_a_test_split_of_ones_own_is_kept_whole_and_in_order(file):
    test = IMAGES[::-1][:20]
    save(file, inputs=IMAGES, test_inputs=test, test_targets=LABELS[:20])
    dataset = data.load(str(file))
    np.testing.assert_array_equal(dataset.test.inputs, test)
    np.testing.assert_array_equal(dataset.test.targets, LABELS[:20])
    assert [len(split.inputs) for split in (dataset.train, dataset.valid)] == [54, 6]


def test_a_clean_set_of_ones_own_is_the_validation_split_and_stays_clean(file):
    save(file, inputs=IMAGES, valid_inputs=IMAGES[:9], valid_targets=LABELS[:9])
    dataset = data.load(str(file), label_noise=0.5)
    np.testing.assert_array_equal(dataset.valid.inputs, IMAGES[:9])
    np.testing.assert_array_equal(dataset.valid.targets, LABELS[:9])
    assert [len(split.inputs) for split in (dataset.train, dataset.test)] == [48, 12]
    save(
        file, inputs=IMAGES, valid_inputs=IMAGES[:9], valid_targets=LABELS[:9], test_inputs=IMAGES, test_targets=LABELS
    )
    dataset = data.load(str(file), label_noise=0.5)
    assert [len(split.inputs) for split in (dataset.train, dataset.valid, dataset.test)] == [60, 9, 60]
    np.testing.assert_array_equal(dataset.test.targets, LABELS)
    assert (dataset.train.targets != LABELS).sum() == 30


def test_a_file_of_the_home_folder_is_found(tmp_path, monkeypatch):
    save(tmp_path / "mine.npz")
    monkeypatch.setattr(pathlib.Path, "home", lambda: tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data.load("~/mine.npz").input_shape == (4,)


class Pickled:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("name", ["inputs", "targets", "other"])
def test_objects_are_refused_and_never_unpickled(name, file, tmp_path):
    save(file, **{name: np.array([Pickled(tmp_path / "made")] * 60, object)})
    assert "holds arrays of Python objects, which are not read since unpickling runs code" in message(file)
    assert not (tmp_path / "made").exists()
    with np.load(file, allow_pickle=True) as arrays:
        _ = arrays[name]  # the file would have run it
    assert (tmp_path / "made").exists()


def test_a_pickle_with_the_name_of_an_npz_is_refused(file, tmp_path):
    np.save(file.with_suffix(".npy"), np.array([Pickled(tmp_path / "made")], object))
    file.with_suffix(".npy").rename(file)
    assert "is no .npz file, or one that is cut short" in message(file)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("arrays", "held"),
    [
        ({"x": TABLE, "y": LABELS}, "It holds x, y"),
        ({"inputs": TABLE}, "It holds inputs"),
        ({"inputs": TABLE, "targets": LABELS, "weights": LABELS}, "Unknown array 'weights'; take it out. It holds"),
        ({"inputs": TABLE, "targets": LABELS, "weights": LABELS}, "It holds inputs, targets, weights"),
        ({"inputs": TABLE, "targets": LABELS, "test_inputs": TABLE}, "It holds inputs, targets, test_inputs"),
        ({"inputs": TABLE, "targets": LABELS, "valid_targets": TABLE}, "It holds inputs, targets, valid_targets"),
        (
            {"inputs": TABLE, "targets": LABELS, "testinputs": TABLE},
            "Unknown array 'testinputs'; did you mean 'test_inputs'? It holds inputs, targets",
        ),
        ({}, "It holds none"),
    ],
)
def test_arrays_that_are_missing_or_too_many_are_named(arrays, held, file):
    np.savez(file, **arrays)
    text = message(file)
    assert (
        "must hold the arrays inputs and targets, and may hold num_classes, fill_missing, test_inputs, test_ta" in text
    )
    assert held in text


@pytest.mark.parametrize("value", [0, -3, 2.5, np.array([3, 4]), "three"])
def test_a_number_of_classes_that_is_none_is_refused(value, file):
    save(file, num_classes=value)
    assert "num_classes must be one whole number of at least 1; got" in message(file)


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({"targets": LABELS - 1}, "labels must be [N] integers from 0 to 1; got shape (60,) with values from -1 to 1"),
        ({"num_classes": 2}, "labels must be [N] integers from 0 to 1; got shape (60,) with values from 0 to 2"),
        ({"targets": LABELS[:50]}, "60 inputs but 50 targets"),
        ({"targets": LABELS + 0.5, "num_classes": 4}, "labels must be whole numbers; got float64 values"),
        ({"targets": LABELS.astype(str)}, "targets must be numbers; got <U21 values; np.unique(targets, return_inv"),
        ({"inputs": TABLE.astype(complex)}, "inputs must be numbers; got complex128 values"),
        ({"inputs": np.float64(3)}, "inputs must be arrays [N, ...]; got the single number 3.0"),
        ({"targets": np.int64(1)}, "targets must be arrays [N, ...]; got the single number 1"),
        ({"inputs": TABLE[:0], "targets": LABELS[:0]}, "is empty; got inputs (0, 4) and targets (0,)"),
        ({"inputs": TABLE[:, :0]}, "is empty; got inputs (60, 0) and targets (60,)"),
        (
            {"inputs": np.where(TABLE[7, 1] == TABLE, 1e300, TABLE)},
            "not finite, or not in float32, in 1 of 60 examples, the first of them at index 7",
        ),
        (
            {"targets": LABELS + 2**33, "num_classes": 3},
            "from 0 to 2; got shape (60,) with values from 8589934592 to 8589934594",
        ),
        ({"test_inputs": TABLE[:, :3], "test_targets": LABELS}, "test examples inputs (3,)"),
        ({"valid_inputs": TABLE[:, :3], "valid_targets": LABELS}, "valid examples inputs (3,)"),
        ({"test_inputs": TABLE, "test_targets": LABELS + 1}, "labels must be [N] integers from 0 to 2"),
        ({"inputs": np.where(TABLE > 2, np.nan, TABLE)}, "inputs are not finite, or not in float32, in"),
        (
            {"targets": np.full(60, np.inf)},
            "targets are not finite, or not in float32, in 60 of 60 examples, the first of them at index 0",
        ),
        ({"targets": np.arange(60)}, "; bring more examples of each class, or a test split of your own"),
        (
            {"targets": np.arange(60), "test_inputs": TABLE, "test_targets": LABELS},
            "; bring more examples of each class, a validation split of your own, or another valid_fraction or valid_",
        ),
        ({"targets": np.zeros(60, int)}, "a classification has two classes or more, and all labels here are of one"),
        ({"num_classes": 1}, "two classes or more, and num_classes is 1; two classes have labels 0 and 1"),
        ({"targets": LABELS * 30}, "with 60 examples the largest is 60; number classes with np.unique("),
        ({"test_inputs": TABLE, "test_targets": LABELS * 2}, "; if there are more classes, say how many with num_cla"),
        ({"test_inputs": TABLE, "test_targets": LABELS + 1}, "; np.unique(targets, return_inverse=True)[1] numbers t"),
        ({"num_classes": 3, "targets": LABELS + 1}, "from 1 to 3; np.unique(targets, return_inverse=True)[1] numbers"),
        ({"targets": LABELS[:, None]}, "got shape (60, 1) with values from 0 to 2; targets[:, 0] is one column"),
        ({"targets": np.eye(3, dtype=int)[LABELS]}, "; targets.argmax(1) makes labels of one-hot rows"),
        ({"targets": np.ones((60, 3), int)}, "; several labels for each example are for a loop of your own"),
        (
            {"targets": np.arange(60) // 2},
            "; whole numbers are labels, so for a regression let targets be floats, targets",
        ),
        ({"inputs": TABLE[:, 0]}, ": inputs must be [N, ...] of two axes or more; inputs[:, None] is one column"),
    ],
)
def test_arrays_that_do_not_fit_together_are_refused(arrays, text, file):
    save(file, **arrays)
    assert text in message(file)


def test_targets_that_are_all_the_same_are_told(file):
    save(file, targets=np.stack([np.full(60, 3.5), np.linspace(0, 1, 60)], axis=1))
    with pytest.warns(
        UserWarning, match=r"all training targets are the same in column 0, counted from 0; their errors"
    ):
        data.load(str(file))


def test_one_hot_rows_of_floats_are_told(file):
    save(file, targets=np.eye(3)[LABELS])
    with pytest.warns(UserWarning, match=r"one-hot rows, .* numbers of a regression; .* as targets\.argmax\(1\)"):
        data.load(str(file))


def test_images_with_channels_first_are_told(file):
    images = RNG.integers(0, 256, (60, 3, 8, 8), dtype=np.uint8)
    save(file, inputs=images)
    with pytest.warns(
        UserWarning, match=r"those of \(60, 3, 8, 8\) have 8 channels; .*write inputs\.transpose\(0, 2, 3, 1\)"
    ):
        data.load(str(file))
    save(file, inputs=images.transpose(0, 2, 3, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert data.load(str(file)).input_shape == (8, 8, 3)


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        (
            {"valid_inputs": 255 * TABLE, "valid_targets": LABELS},
            r"the valid inputs of column 0 are from -\d{3} to \d{3}, for training from -1",
        ),
        ({"test_inputs": TABLE / 255, "test_targets": LABELS}, "the test inputs of column 0 are from -0.00"),
        ({"valid_inputs": TABLE + 273, "valid_targets": LABELS}, "the valid inputs of column 0 are from 27"),
        ({"inputs": FLOATS, "valid_inputs": 255 * FLOATS, "valid_targets": LABELS}, "the valid inputs are from 0 to 2"),
        (
            {"targets": TABLE[:, 0], "test_inputs": TABLE, "test_targets": 1000 * TABLE[:, 0]},
            "the test targets of column 0 are from -.*e",
        ),
    ],
)
def test_a_split_in_other_units_is_told(arrays, told, file):
    save(file, **arrays)
    with pytest.warns(UserWarning, match=told):
        data.load(str(file))


@pytest.mark.parametrize(
    "arrays",
    [
        {"valid_inputs": 3 + 5 * TABLE, "valid_targets": LABELS},
        {"valid_inputs": TABLE * [1, 1, 255, 1], "valid_targets": LABELS},
        {"inputs": np.eye(60), "valid_inputs": np.zeros((60, 60)), "valid_targets": LABELS},
        {"inputs": HEAVY, "valid_inputs": HEAVY[::-1] ** 0.9, "valid_targets": LABELS},  # far outliers, in one of them
        {"inputs": np.ones((60, 4)), "valid_inputs": np.ones((60, 4)), "valid_targets": LABELS},
    ],
)
def test_a_split_that_differs_otherwise_is_not(arrays, file):
    save(file, **arrays)  # a warning is an error in these tests
    assert data.load(str(file)).has_own_valid


def test_a_file_that_is_not_there_is_named(file):
    assert message(file) == f"there is no file {file}"


def test_a_file_that_may_not_be_read_is_not_taken_for_broken(file, monkeypatch):
    save(file)

    def refuse(self, mode):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(pathlib.Path, "open", refuse)  # as root finds no file that it may not read
    assert "may not be read by this user; change its permissions" in message(file)


def test_it_is_said_where_a_relative_path_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message("mine.npz") == f"there is no file mine.npz in {tmp_path}, where this program was started"


def test_a_file_may_say_that_nan_is_a_missing_value(file):
    inputs = np.where(TABLE > 2, np.nan, TABLE)
    save(file, inputs=inputs, fill_missing=True)
    filled = data.make_dataset("mine", data.Examples(inputs, LABELS, num_classes=3, fill_missing=True))
    np.testing.assert_array_equal(data.load(str(file)).train.inputs, filled.train.inputs)
    save(file, inputs=inputs, fill_missing=2)
    assert "fill_missing must be True or False; got 2" in message(file)


def test_a_folder_is_no_file(file):
    file.mkdir()
    assert message(file) == f"there is no file {file}"


@pytest.mark.parametrize("content", [b"", b"text", bytes(500)])
def test_a_file_of_another_kind_is_refused(content, file):
    file.write_bytes(content)
    assert "is no .npz file, or one that is cut short; write it with np.savez" in message(file)


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_any_flipped_byte_is_noticed_or_harmless(write, file):
    write(file, inputs=TABLE[:12], targets=LABELS[:12])
    content, whole = file.read_bytes(), files._read_examples(file)
    refused = 0
    for position in range(0, len(content), 5):
        file.write_bytes(content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :])
        try:
            found = files._read_examples(file)
        except DatasetError:
            refused += 1
        else:
            for name, array in whole.items():
                np.testing.assert_array_equal(found[name], array)
    assert refused > len(content) / 10


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_file_that_is_cut_short_is_refused(share, file):
    save(file)
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    assert "cut short" in message(file)
