"""Wrong labels and rare classes: how many, which ones, and in the training split alone."""

import dataclasses

import numpy as np
import pytest

from adalfl_jax import data
from adalfl_jax.data import Corruption, DatasetError, Examples
from adalfl_jax.data.corruption import long_tailed_rows, long_tailed_sizes, wrong_labels
from adalfl_jax.data.splits import SPLIT_SEED

LABELS = np.random.default_rng(0).integers(0, 5, 1003).astype(np.int32)


def noisy(labels=LABELS, num_classes=5, share=0.4, kind="symmetric", seed=SPLIT_SEED):
    return wrong_labels(labels, num_classes, share=share, kind=kind, seed=seed)


@pytest.mark.parametrize("kind", ["symmetric", "pair"])
@pytest.mark.parametrize("share", [0.0, 0.001, 1 / 3, 0.4, 0.8, 0.999])
def test_exactly_the_share_of_the_labels_is_wrong(share, kind):
    labels = noisy(share=share, kind=kind)
    assert (labels != LABELS).sum() == round(share * len(LABELS))
    assert labels.dtype == LABELS.dtype
    assert 0 <= labels.min() <= labels.max() < 5


def test_pair_noise_makes_of_a_class_the_next_and_of_the_last_the_first():
    labels = noisy(kind="pair")
    wrong = labels != LABELS
    np.testing.assert_array_equal(labels[wrong], (LABELS[wrong] + 1) % 5)


@pytest.mark.parametrize(("kind", "left"), [("symmetric", 1000), ("pair", 1000), ("removed", 600)])
def test_only_examples_that_are_left_out_make_a_split_smaller(kind, left):
    assert Corruption(0.4, kind).estimate_size(1000, 10) == left


def test_symmetric_noise_makes_of_a_class_any_other_as_often():
    many = np.zeros(40_000, int)
    counts = np.bincount(noisy(many, share=0.9), minlength=5)
    assert counts[0] == 4000
    np.testing.assert_allclose(counts[1:], 9000, rtol=0.05)


def test_two_classes_know_one_noise():
    binary = LABELS % 2
    np.testing.assert_array_equal(noisy(binary, 2), noisy(binary, 2, kind="pair"))


@pytest.mark.parametrize("kind", ["symmetric", "pair"])
def test_labels_that_are_wrong_in_a_small_share_are_the_same_in_a_large_one(kind):
    few, many = noisy(share=0.2, kind=kind), noisy(share=0.6, kind=kind)
    wrong = few != LABELS
    np.testing.assert_array_equal(few[wrong], many[wrong])


def test_draws_are_those_of_every_release_and_of_their_seed():
    labels = np.arange(12) % 3
    assert noisy(labels, 3, share=0.5).tolist() == [2, 1, 0, 0, 1, 1, 0, 2, 1, 0, 1, 0]
    assert kept_rows(labels, 3, imbalance=2).tolist() == [0, 3, 4, 5, 6, 7, 9, 10, 11]
    assert not np.array_equal(noisy(), noisy(seed=1))


def kept_rows(labels=LABELS, num_classes=5, imbalance=10.0):
    return long_tailed_rows("mine", labels, num_classes, imbalance=imbalance, seed=SPLIT_SEED)


@pytest.mark.parametrize("imbalance", [1.5, 10, 100])
def test_sizes_of_classes_fall_exponentially_by_the_imbalance(imbalance):
    sizes = long_tailed_sizes("mine", np.full(10, 5000), imbalance)
    expected = [5000 * imbalance ** (-label / 9) for label in range(10)]
    np.testing.assert_allclose(sizes, expected, atol=0.5)
    assert sizes[0] == 5000
    assert sizes[0] / sizes[-1] == pytest.approx(imbalance, rel=0.01)


@pytest.mark.parametrize("sizes", [[500, 900, 300, 800], [100, 900, 900, 900], [900, 900, 900, 90], [900, 90, 90, 90]])
def test_unequal_classes_keep_as_much_as_the_profile_allows(sizes):
    sizes = np.array(sizes)
    left = long_tailed_sizes("mine", sizes, 8)
    assert (left <= sizes).all()
    assert (left == sizes).any()
    np.testing.assert_allclose(left, left[0] / np.array([1, 2, 4, 8]), atol=1)


def test_rows_are_kept_at_random_each_once_and_in_order():
    rows = kept_rows()
    assert (np.diff(rows) > 0).all()
    counts = np.bincount(LABELS[rows])
    np.testing.assert_array_equal(counts, long_tailed_sizes("mine", np.bincount(LABELS), 10.0))
    assert np.median(rows) == pytest.approx(len(LABELS) / 2, rel=0.2)


def same(ours, theirs):
    return all(np.array_equal(left, right) for left, right in zip(ours, theirs, strict=True))


def test_noise_changes_the_labels_of_the_training_split_and_nothing_else():
    clean, noisy = data.load("digits"), data.load("digits", label_noise=0.4)
    assert same(clean.valid, noisy.valid)
    assert same(clean.test, noisy.test)
    assert np.array_equal(clean.train.inputs, noisy.train.inputs)
    assert (clean.train.targets != noisy.train.targets).sum() == round(0.4 * 1293)


def test_another_seed_draws_other_splits_and_other_wrong_labels():
    settings = {"label_noise": 0.4, "valid_examples": 100, "imbalance": 2.0}
    first, again, other = (data.load("digits", seed=seed, **settings) for seed in (0, 0, 1))
    assert all(same(getattr(first, split), getattr(again, split)) for split in ("train", "valid", "test"))
    assert same(first.train, data.load("digits", **settings).train)
    assert [len(split.targets) for split in (other.train, other.valid, other.test)] == [
        len(first.train.targets),
        100,
        360,
    ]
    assert not any(
        np.array_equal(getattr(first, split).inputs, getattr(other, split).inputs) for split in ("valid", "test")
    )
    pictures = [data.make_dataset("mine", WITH_SPLITS, corruption=Corruption(0.4), seed=seed) for seed in (0, 1)]
    assert len({dataset.content for dataset in (first, other, *pictures)}) == 3  # before labels are made wrong
    assert 0.2 < np.mean(pictures[0].train.targets != pictures[1].train.targets) < 0.8


def test_the_last_seed_draws_as_any_other():
    dataset = data.make_dataset("mine", PICTURES, corruption=Corruption(0.4), seed=4294964994)
    assert not same(dataset.train, data.make_dataset("mine", PICTURES, corruption=Corruption(0.4)).train)


@pytest.mark.parametrize("imbalance", [1.0, 5.0])
def test_examples_are_removed_whose_labels_are_wrong_with_the_other_kinds(imbalance):
    corruptions = (
        Corruption(imbalance=imbalance),
        *(Corruption(0.4, kind, imbalance) for kind in ("symmetric", "removed")),
    )
    clean, noisy, left = (data.make_dataset("mine", PICTURES, corruption=each) for each in corruptions)
    right = np.asarray(clean.train.targets == noisy.train.targets)
    assert 0 < right.sum() == len(right) - round(0.4 * len(right))
    for ours, theirs in zip(left.train, clean.train, strict=True):
        np.testing.assert_array_equal(ours, np.asarray(theirs)[right])
    assert same(left.valid, clean.valid)
    assert same(left.test, clean.test)


def test_imbalance_thins_out_the_training_split_and_noise_comes_after_it():
    clean, rare, both = (
        data.load("digits"),
        data.load("digits", imbalance=10),
        data.load("digits", imbalance=10, label_noise=0.5),
    )
    assert rare.valid.targets.tolist() == clean.valid.targets.tolist()
    assert same((rare.test.targets,), (clean.test.targets,))
    counts = np.bincount(rare.train.targets)
    np.testing.assert_array_equal(counts, long_tailed_sizes("digits", np.bincount(clean.train.targets), 10))
    assert np.array_equal(rare.train.inputs, both.train.inputs)
    assert (rare.train.targets != both.train.targets).sum() == round(0.5 * counts.sum())


def test_statistics_are_those_of_the_examples_that_are_left():
    train = np.asarray(data.load("digits", imbalance=20).train.inputs)
    assert train.mean() == pytest.approx(0, abs=1e-5)
    assert train.std() == pytest.approx(1, abs=1e-5)


def test_a_clean_set_has_the_number_of_examples_asked_for_class_by_class():
    dataset = data.load("digits", valid_examples=100, label_noise=0.4)
    assert [len(split.targets) for split in (dataset.train, dataset.valid, dataset.test)] == [1337, 100, 360]
    assert np.abs(np.bincount(dataset.valid.targets) - 10).max() <= 1
    whole = data.load("digits")
    assert np.array_equal(dataset.test.targets, whole.test.targets)


IMAGES = np.random.default_rng(0).integers(0, 256, (400, 4, 4, 1), np.uint8)
PICTURES = Examples(IMAGES, np.arange(400) % 4, num_classes=4, test=(IMAGES[:40], np.arange(40) % 4))
WITH_SPLITS = dataclasses.replace(PICTURES, valid=PICTURES.test)


def test_streamed_data_and_data_with_a_test_split_are_corrupted_alike():
    settings = {"corruption": Corruption(0.4, imbalance=5.0), "valid_examples": 60}
    resident, streamed = (data.make_dataset("mine", PICTURES, on_device=place, **settings) for place in (True, False))
    assert streamed.is_streamed
    for ours, theirs in zip(dataclasses.astuple(resident)[2:5], dataclasses.astuple(streamed)[2:5], strict=True):
        assert same(ours, theirs)
    assert len(resident.valid.targets) == 60
    assert np.array_equal(resident.test.targets, np.arange(40) % 4)
    assert np.array_equal(PICTURES.targets, np.arange(400) % 4)  # the user's own array


@pytest.mark.parametrize("settings", [{"label_noise": 0.1}, {"imbalance": 2.0}])
def test_a_regression_is_not_corrupted(settings):
    with pytest.raises(DatasetError, match=r"dataset 'diabetes' is a regression, and label_noise and imbalance"):
        data.load("diabetes", **settings)


def test_one_class_is_not_corrupted():
    with pytest.raises(DatasetError, match="is of one class"):
        data.make_dataset("mine", Examples(IMAGES, np.zeros(400, int), num_classes=1), corruption=Corruption(0.1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_noise": 1.0}, r"label_noise must be a share of the labels in \[0, 1\); got 1.0"),
        ({"label_noise": -0.1}, "label_noise must be"),
        ({"label_noise": float("nan")}, "label_noise must be"),
        ({"label_noise": "0.2"}, r"label_noise must be .*; got '0\.2'"),
        ({"imbalance": 0.5}, "imbalance must be a finite number of at least 1; got 0.5"),
        ({"imbalance": float("inf")}, "imbalance must be"),
        ({"imbalance": True}, "imbalance must be a finite number of at least 1; got True"),
        ({"label_noise": 0.9999, "noise_kind": "removed"}, "a label_noise of 0.9999 leaves no example"),
        ({"noise_kind": "pairs"}, "unknown noise_kind 'pairs'; did you mean 'pair'"),
        ({"valid_examples": -1}, "valid_examples must be a number of examples, or 0 .*; got -1"),
        ({"valid_examples": 2.5}, "valid_examples must be a number of examples, or 0 .*; got 2.5"),
        ({"seed": -1}, "seed must be a whole number from 0 to 4294964994; got -1"),
        ({"seed": 4294964995}, "seed must be a whole number"),
        ({"seed": 1.0}, "seed must be a whole number"),
        ({"valid_fraction": "a"}, "valid_fraction must be a number between 0 and 1; got 'a'"),
        ({"valid_fraction": 0.001}, "no validation split of 2 can be cut off 1437 examples"),
        ({"valid_examples": 5}, "no validation split of 5 can be cut off 1437 examples"),
        ({"valid_examples": 1437}, "no validation split of 1437 can be cut off 1437 examples"),
        (
            {"imbalance": 1000.0},
            r"imbalance = 1000 leaves class 8 without an example.*from 1[0-9][0-9] to",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        data.load("digits", **settings)


def test_imbalance_wants_an_example_of_every_class():
    with pytest.raises(DatasetError, match=r"imbalance = 2 leaves class 4 without an.* from 0 to 72.*every class"):
        data.make_dataset(
            "mine", Examples(IMAGES, np.arange(400) % 4, num_classes=5), corruption=Corruption(imbalance=2.0)
        )
