"""Datasets: splits that do not leak, statistics of the training split alone, errors."""

import contextlib
import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.datasets

from adalfl_jax import data
from adalfl_jax.data import Examples, splits
from adalfl_jax.data.splits import representative_rows, split_indices


@pytest.mark.parametrize(("name", "sizes"), [("digits", (1293, 144, 360)), ("diabetes", (317, 36, 89))])
def test_splits_have_their_sizes_and_live_on_the_device(name, sizes):
    dataset = data.load(name)
    splits = (dataset.train, dataset.valid, dataset.test)
    assert tuple(len(split.inputs) for split in splits) == sizes
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(splits))
    assert {split.inputs.dtype for split in splits} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", ["digits", "diabetes"])
def test_loading_twice_gives_the_same_splits(name):
    for first, again in zip(
        *(jax.tree.leaves(dataclasses.astuple(data.load(name))[2:5]) for _ in range(2)), strict=True
    ):
        assert jnp.array_equal(first, again)


@pytest.mark.parametrize("name", ["digits", "diabetes"])
def test_no_example_is_in_two_splits(name):
    dataset = data.load(name)
    rows = [
        {np.asarray(row).tobytes() for row in np.asarray(split.inputs)}
        for split in (dataset.train, dataset.valid, dataset.test)
    ]
    assert sum(map(len, rows)) == len(set.union(*rows))


def test_the_split_is_a_partition_of_the_rows():
    labels = np.repeat(np.arange(4), 50)
    parts = split_indices("mine", labels, stratify=True)
    assert sorted(np.concatenate(parts).tolist()) == list(range(200))
    assert [np.bincount(labels[part]).tolist() for part in parts] == [[36] * 4, [4] * 4, [10] * 4]


def test_every_split_of_digits_has_the_classes_in_proportion():
    dataset = data.load("digits")
    shares = [
        np.bincount(np.asarray(split.targets), minlength=10) / len(split.targets)
        for split in (dataset.train, dataset.valid, dataset.test)
    ]
    assert np.abs(np.array(shares) - shares[0]).max() < 0.01


def test_digits_have_one_mean_and_deviation_for_the_image():
    train = np.asarray(data.load("digits").train.inputs)
    assert train.mean() == pytest.approx(0, abs=1e-5)
    assert train.std() == pytest.approx(1, abs=1e-5)
    assert train.mean(axis=0).std() > 0.1


def test_diabetes_starts_from_the_raw_measurements_and_is_standardised_by_column():
    dataset = data.load("diabetes")
    for array in (dataset.train.inputs, dataset.train.targets):
        np.testing.assert_allclose(np.asarray(array).mean(axis=0), 0, atol=1e-5)
        np.testing.assert_allclose(np.asarray(array).std(axis=0), 1, atol=1e-5)
    assert np.abs(np.asarray(dataset.test.inputs).mean(axis=0)).max() > 0.01
    raw = sklearn.datasets.load_diabetes(scaled=False).target
    targets = np.concatenate([np.asarray(s.targets)[:, 0] for s in (dataset.train, dataset.valid, dataset.test)])
    assert np.corrcoef(np.sort(raw), np.sort(targets))[0, 1] == pytest.approx(1, abs=1e-6)


def test_a_classification_and_a_regression_say_which_they_are():
    digits, diabetes = data.load("digits"), data.load("diabetes")
    assert (digits.is_classification, digits.num_outputs, digits.input_shape) == (True, 10, (8, 8, 1))
    assert (diabetes.is_classification, diabetes.num_outputs, diabetes.input_shape) == (False, 1, (10,))


def test_an_unknown_dataset_lists_the_known():
    with pytest.raises(ValueError, match=r"unknown dataset 'digit'; did you mean 'digits'.*diabetes, digits"):
        data.load("digit")


@pytest.mark.parametrize("returned", [None, (np.zeros((50, 3)), np.arange(50) % 2)])
def test_a_registered_function_that_returns_something_else_is_told_what_to_return(returned, monkeypatch):
    monkeypatch.setattr(data.loading, "DATASETS", copy.copy(data.DATASETS))
    data.register_dataset("mine", lambda: returned)
    for load in (data.load, data.load_spec):
        with pytest.raises(
            data.DatasetError, match=rf"'mine': .* must return .*Examples\(.*{type(returned).__name__}$"
        ):
            load("mine")


INPUTS = np.random.default_rng(0).normal(size=(100, 3))
LABELS = np.arange(100) % 4


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (LABELS + 1, r"labels must be \[N\] integers from 0 to 3; got .* values from 1 to 4"),
        (
            LABELS - 1,
            r"labels must be \[N\] integers from 0 to 3; got .* values from -1 to 2; np.unique\(targets, return",
        ),
        (LABELS + 0.5, r"labels must be whole numbers; got float64 values"),
        (LABELS[:50], r"100 inputs but 50 targets"),
        (np.stack([LABELS, LABELS], axis=1), r"labels must be \[N\]"),
    ],
)
def test_labels_that_do_not_fit_are_refused(targets, message):
    with pytest.raises(ValueError, match=message):
        data.make_dataset("mine", Examples(INPUTS, targets, num_classes=4))


@pytest.mark.parametrize("offset", [1.7e9, -3e10])
def test_what_varies_little_beside_its_mean_is_standardised_before_it_is_rounded(offset):
    steps = np.random.default_rng(0).integers(-1000, 1000, (400, 1)).astype(np.float64)  # offset + steps is exact
    dataset = data.make_dataset(
        "mine", Examples(np.hstack([steps + offset, np.full_like(steps, offset)]), steps + offset)
    )
    alone = data.make_dataset("mine", Examples(steps, steps))
    for split in ("train", "test"):
        values, wanted = getattr(dataset, split), getattr(alone, split)
        np.testing.assert_allclose(values.inputs[:, 0], wanted.inputs[:, 0], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(values.targets, wanted.targets, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(values.inputs[:, 1], 0)
        assert values.inputs.dtype == values.targets.dtype == np.float32


def test_a_constant_whose_mean_is_rounded_is_centred_alone():
    dataset = data.make_dataset("mine", Examples(np.full((1500, 1), 0.1), np.arange(1500) % 4, num_classes=4))
    for split in (dataset.train, dataset.valid, dataset.test):
        np.testing.assert_allclose(split.inputs, 0, atol=1e-12)


def test_splits_of_other_kinds_of_numbers_go_together():
    test = INPUTS.astype(np.float32), LABELS
    dataset = data.make_dataset("mine", Examples(INPUTS, LABELS, num_classes=4, test=test))
    assert dataset.test.inputs.dtype == np.float32
    assert len(dataset.test.inputs) == 100


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_data_that_is_not_finite_is_refused(value):
    inputs = INPUTS.copy()
    inputs[[3, 70], 1] = value
    with pytest.raises(
        ValueError,
        match=r"dataset 'mine'.*inputs.*not finite, or not in float32, in 2 of 100 .*at index 3; .*fill_missing=True",
    ):
        data.make_dataset("mine", Examples(inputs, LABELS, num_classes=4))
    targets = INPUTS[:, 0].copy()
    targets[9] = value
    with pytest.raises(
        ValueError, match=r"dataset 'mine'.*targets.*not finite, or not in float32, in 1 of 100 examples.*at index 9"
    ):
        data.make_dataset("mine", Examples(INPUTS, targets))


def test_a_dataset_is_known_by_its_examples_and_their_splits_and_not_by_what_is_made_of_them():
    def content(inputs=INPUTS, targets=LABELS, **settings):
        return data.make_dataset("mine", Examples(inputs, targets, num_classes=4), **settings).content

    changed = INPUTS.copy()
    changed[7, 2] += 1e-3
    others = [content(changed), content(targets=LABELS[::-1]), content(INPUTS[::-1], LABELS[::-1])]
    others += [content(valid_examples=20)]
    assert len({content(), *others}) == 5
    assert content() == content(INPUTS.copy(), on_device=False, corruption=data.Corruption(0.2))
    assert len(content()) == 12


def test_a_text_is_known_by_the_size_of_its_vocabulary():
    tokens = np.arange(500).reshape(100, 5) % 7
    texts = [Examples(tokens, LABELS, num_classes=4, num_tokens=size) for size in (7, 8)]
    assert len({data.make_dataset("mine", text).content for text in texts}) == 2


@pytest.mark.parametrize("split", [0, 1, 2], ids=["train", "valid", "test"])
def test_a_dataset_is_known_by_the_rows_of_each_split(split, monkeypatch):
    examples, arrange = Examples(INPUTS, LABELS, num_classes=4), splits._arrange

    def in_another_order(*arguments):
        inputs, targets, rows = arrange(*arguments)
        return inputs, targets, tuple(np.roll(part, 1) if index == split else part for index, part in enumerate(rows))

    before = data.make_dataset("mine", examples).content
    monkeypatch.setattr(splits, "_arrange", in_another_order)
    assert data.make_dataset("mine", examples).content != before


@pytest.mark.parametrize(("num_columns", "is_told"), [(2, False), (3, True)])
def test_a_split_with_most_columns_in_other_units_is_told(num_columns, is_told):
    rng = np.random.default_rng(0)
    inputs, other = rng.normal(size=(200, 4)), rng.normal(size=(50, 4))
    other[:, :num_columns] += 1000
    examples = Examples(inputs, np.arange(200) % 2, num_classes=2, test=(other, np.arange(50) % 2))
    with pytest.warns(UserWarning, match="same units") if is_told else contextlib.nullcontext():
        data.make_dataset("mine", examples)


@pytest.mark.parametrize("order", ["in turn", "sorted", "shuffled"])
@pytest.mark.parametrize("count", [40, 73, 200])
def test_representative_rows_hold_each_class_by_its_share_however_the_examples_are_ordered(order, count):
    labels = np.arange(400) % 10
    if order != "in turn":
        labels = np.sort(labels) if order == "sorted" else np.random.default_rng(3).permutation(labels)
    rows = representative_rows(labels, count)
    assert len(np.unique(rows)) == count
    counts = np.bincount(labels[rows], minlength=10)
    assert np.abs(counts - count / 10).max() < 1
    assert len(set(labels[rows[:20]])) > 5  # nor are they sorted themselves
    assert np.array_equal(rows, representative_rows(jnp.asarray(labels), count))  # the same every time


def test_representative_rows_are_from_all_over_numbers():
    rows = representative_rows(np.linspace(0.0, 1.0, 500)[:, None], 100)
    assert len(np.unique(rows)) == 100
    assert np.ptp(np.histogram(rows, bins=5, range=(0, 500))[0]) <= 12
    assert len(set(np.diff(np.sort(rows)))) > 3  # not every fifth
    assert representative_rows(np.arange(3), 0).size == 0
    assert sorted(representative_rows(np.arange(3), 3)) == [0, 1, 2]
