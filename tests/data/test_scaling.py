"""What standardises a dataset: scikit-learn's numbers, of the training split alone, and the way back."""

import numpy as np
import pytest
from sklearn.preprocessing import StandardScaler

from adalfl_jax import data
from adalfl_jax.data import DatasetError, Examples, Scaling
from adalfl_jax.data.splits import split_indices

RNG = np.random.default_rng(0)
TABLE = RNG.normal(size=(200, 4)) * [1e-3, 1.0, 50.0, 1e6] + [5.0, 0.0, -300.0, 1e5]
TARGETS = TABLE[:, :2] @ [[1e3, 2.0], [1.0, -7.0]] + [1e4, 0.5]
LABELS = np.arange(200) % 3
SHIFTED = TABLE[:30] + 1e7  # of another split: with a part in the statistics it would show
MISSING = np.where(RNG.uniform(size=TABLE.shape) < 0.2, np.nan, TABLE)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numbers_are_those_of_scikit_learn_both_ways(dtype):
    values = TABLE.astype(dtype)
    ours, theirs = Scaling.of("mine", values), StandardScaler().fit(values.astype(np.float64))
    np.testing.assert_allclose(ours.mean, theirs.mean_, rtol=1e-12)
    np.testing.assert_allclose(ours.deviation, theirs.scale_, rtol=1e-9)
    new = RNG.normal(size=(3, 5, 4))  # any leading axes
    applied, inverted = ours.apply(new), ours.invert(new)
    assert (applied.dtype, inverted.dtype) == (np.float32, np.float64)
    np.testing.assert_allclose(applied.reshape(-1, 4), theirs.transform(new.reshape(-1, 4)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(inverted.reshape(-1, 4), theirs.inverse_transform(new.reshape(-1, 4)), rtol=1e-9)


@pytest.mark.parametrize("constant", [0.1, 1 / 3, 123.456, 0.0])
def test_a_column_that_does_not_vary_is_only_centred(constant):
    values = np.full((1000, 1), constant, np.float32)
    values[-1] += 0.5
    scaling = Scaling.of("mine", values[:-1])
    assert scaling.deviation == (1.0,) == tuple(StandardScaler().fit(values[:-1]).scale_)
    standardised = scaling.apply(values)
    np.testing.assert_allclose(standardised[:-1], 0, atol=1e-5)
    assert standardised[-1] == pytest.approx(0.5, abs=1e-4)
    np.testing.assert_allclose(scaling.invert(standardised), values, rtol=1e-6)


def test_a_constant_is_only_centred_where_its_mean_is_summed_row_by_row():
    assert Scaling.of("mine", np.full((1500, 2), 0.1)).deviation == (1.0, 1.0)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_varies_in_the_last_bit_alone_is_only_centred(dtype, sign):
    value = dtype(sign * 123.456)
    values = np.where(np.arange(1000)[:, None] % 2, value, np.nextafter(value, dtype(sign * 200)))
    assert Scaling.of("mine", values).deviation == (1.0,)


def test_bytes_have_the_statistics_of_all_images_however_many():
    images = np.random.default_rng(0).integers(0, 256, (1050, 2, 2, 3), np.uint8)
    images[990:] //= 4
    scaling = Scaling.of_bytes(images)
    np.testing.assert_allclose(scaling.mean, images.mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(scaling.deviation, images.std(axis=(0, 1, 2)), rtol=1e-12)


EXAMPLES = {
    "a table with labels": Examples(TABLE, LABELS, num_classes=3),
    "a regression": Examples(TABLE, TARGETS),
    "whole numbers": Examples(TABLE.astype(np.int64), TARGETS.astype(np.float32)),
    "missing values": Examples(MISSING, TARGETS, fill_missing=True),
    "images of floats": Examples(RNG.normal([5.0, -5.0], size=(200, 3, 4, 2)), LABELS, num_classes=3),
    "splits of their own": Examples(
        TABLE, TARGETS, valid=(SHIFTED, TARGETS[:30] + 1e7), test=(SHIFTED[::-1], TARGETS[:30] - 1e7)
    ),
}


@pytest.mark.filterwarnings("ignore:.*give all splits the same units")
@pytest.mark.parametrize("kind", EXAMPLES)
@pytest.mark.parametrize("on_device", [True, False])
def test_splits_are_what_the_scaling_makes_of_the_raw_rows_and_it_is_of_the_training_split(kind, on_device):
    examples = EXAMPLES[kind]
    dataset = data.make_dataset("mine", examples, on_device=on_device)
    of_inputs, of_targets = dataset.preprocessing.inputs, dataset.preprocessing.targets
    own = examples.valid is not None
    sizes = {"valid": None, "test": None} if own else {}
    rows = split_indices("mine", LABELS, stratify=examples.num_classes is not None, **sizes)
    raw = [(examples.inputs[part], examples.targets[part]) for part in rows]
    raw[1:] = [examples.valid, examples.test] if own else raw[1:]
    for (inputs, targets), split in zip(raw, (dataset.train, dataset.valid, dataset.test), strict=True):
        np.testing.assert_array_equal(of_inputs.apply(inputs), split.inputs)
        np.testing.assert_array_equal(encoded := dataset.preprocessing.encode(inputs), split.inputs)
        assert encoded.dtype == np.float32
        if examples.num_classes is None:
            np.testing.assert_array_equal(of_targets.apply(targets), split.targets)
            rounding = 1e-6 * max(of_targets.deviation)
            inverted = of_targets.invert(split.targets)
            np.testing.assert_allclose(inverted, targets, rtol=1e-6, atol=rounding)
    for values, scaling in zip(raw[0], (of_inputs, of_targets), strict=True):
        if scaling is not None:
            axis = 0 if values.ndim == 2 else None
            np.testing.assert_allclose(scaling.mean, np.nanmean(values.astype(np.float64), axis), rtol=1e-9)
            np.testing.assert_allclose(scaling.deviation, np.nanstd(values.astype(np.float64), axis), rtol=1e-9)


def test_missing_values_become_the_mean_where_the_dataset_fills_them():
    scaling = Scaling.of("mine", MISSING, fill_missing=True)
    rows = np.array([[np.nan, 1.0, np.nan, 2e6]])
    scaled = scaling.apply(rows)
    np.testing.assert_array_equal(scaled == 0, np.isnan(rows))
    np.testing.assert_allclose(scaling.invert(scaled), [[scaling.mean[0], 1.0, scaling.mean[2], 2e6]], rtol=1e-6)
    np.testing.assert_array_equal(np.isnan(Scaling.of("mine", MISSING).apply(rows)), np.isnan(rows))


def test_outputs_get_units_back_that_float32_would_round_away():
    seconds = 1.7e9 + RNG.integers(0, 1000, 200)
    dataset = data.make_dataset("mine", Examples(TABLE, seconds.astype(np.float64)))
    train, _, _ = split_indices("mine", seconds, stratify=False)
    inverted = dataset.preprocessing.targets.invert(dataset.train.targets)
    np.testing.assert_allclose(inverted[:, 0], seconds[train], atol=1e-3)


def test_one_mean_of_all_numbers_gives_units_back_in_double_precision_too():
    inverted = Scaling(mean=1.7e9, deviation=1.0).invert(np.arange(3, dtype=np.float32))
    np.testing.assert_array_equal(inverted, 1.7e9 + np.arange(3))


def test_what_is_not_standardised_has_no_scaling():
    text = data.make_dataset("mine", Examples(RNG.integers(0, 9, (200, 4)), LABELS, 3, num_tokens=9))
    labels = data.make_dataset("mine", Examples(TABLE, LABELS, num_classes=3))
    assert text.preprocessing.inputs is None
    for dataset in (text, labels):
        assert dataset.preprocessing.targets is None
    assert len(labels.preprocessing.inputs.mean) == 4


@pytest.mark.parametrize(
    ("num_columns", "shape"), [(4, (5, 3)), (4, (5, 1)), (4, (4, 1)), (4, (5,)), (4, ()), (1, (5, 4)), (1, ())]
)
@pytest.mark.parametrize("way", ["apply", "invert"])
def test_another_number_of_columns_is_refused(way, num_columns, shape):
    scaling = Scaling.of("mine", TABLE[:, :num_columns])
    with pytest.raises(DatasetError, match=rf"there must be {num_columns} columns, .*; got shape \("):
        getattr(scaling, way)(np.zeros(shape))


def test_a_column_without_any_value_for_training_is_refused():
    inputs = TABLE.copy()
    train, _, test = split_indices("mine", LABELS, stratify=False)
    inputs[train, 2] = np.nan
    with pytest.raises(DatasetError, match=r"'mine': no training example has a value in column 2, counted from 0"):
        data.make_dataset("mine", Examples(inputs, TARGETS, fill_missing=True))
    inputs[train[0], 2] = inputs[test[0], 2]
    dataset = data.make_dataset("mine", Examples(inputs, TARGETS, fill_missing=True))
    assert dataset.preprocessing.inputs.deviation[2] == 1


def test_a_given_split_may_lack_all_values_of_a_column_and_have_huge_ones():
    lacking = np.where(np.arange(4) == 1, np.nan, TABLE[:30])
    examples = Examples(MISSING * 1e30, TARGETS, fill_missing=True, valid=(lacking * 1e30, TARGETS[:30]))
    assert not data.make_dataset("mine", examples).valid.inputs[:, 1].any()  # a warning would fail this
