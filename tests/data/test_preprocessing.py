"""New rows as the splits of a dataset hold them, by what is kept of it alone."""

import dataclasses
import json

import numpy as np
import pytest

from adalfl_jax import data
from adalfl_jax.data import DatasetError, Examples, Preprocessing

RNG = np.random.default_rng(0)
LABELS = np.arange(200) % 3
TABLE = RNG.normal([5.0, 0.0, -300.0, 1e5], [1e-3, 1.0, 50.0, 1e6], (200, 4))
MISSING = np.where(RNG.uniform(size=TABLE.shape) < 0.2, np.nan, TABLE)
REGRESSION = Examples(TABLE, TABLE[:, :2] / 3)
BYTES = Examples(RNG.integers(0, 256, (200, 4, 4, 1), np.uint8), LABELS, num_classes=3)
TOKENS = Examples(RNG.integers(0, 7, (200, 5)), LABELS, num_classes=3, num_tokens=7)
KINDS = {
    "a regression": REGRESSION,
    "missing values": Examples(MISSING, LABELS, num_classes=3, fill_missing=True),
    "images of bytes": BYTES,
    "images of floats": Examples(RNG.normal([5.0, -5.0], size=(200, 3, 4, 2)), LABELS, num_classes=3),
    "tokens": TOKENS,
}
FAR_FROM_0 = Examples(RNG.integers(30000, 30011, (200, 4, 4, 2)).astype(np.int16), LABELS, num_classes=3)


@pytest.mark.parametrize("examples", [*KINDS.values(), FAR_FROM_0], ids=[*KINDS, "images of whole numbers"])
def test_rows_of_the_training_split_are_encoded_to_the_bit(examples):
    dataset = data.make_dataset("mine", examples, on_device=False)
    encoded = {row.tobytes() for row in dataset.preprocessing.encode(examples.inputs)}
    assert all(row.tobytes() in encoded for row in dataset.train.inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_it_does_the_same_after_a_way_through_json(kind):
    examples = KINDS[kind]
    made = data.make_dataset("mine", examples).preprocessing
    found = Preprocessing.from_dict(json.loads(json.dumps(dataclasses.asdict(made), allow_nan=False)))
    assert found == made
    encoded = found.encode(examples.inputs)
    np.testing.assert_array_equal(encoded, made.encode(examples.inputs))
    normalized = found.normalize(encoded)
    assert normalized.shape[1:] == found.input_shape
    np.testing.assert_array_equal(normalized, made.normalize(encoded))
    outputs = RNG.normal(size=(9, made.num_outputs)).astype(np.float32)
    decoded = found.decode(outputs)
    np.testing.assert_array_equal(decoded, made.decode(outputs))
    assert (decoded == outputs).all() == (examples.num_classes is not None)


def test_a_dataset_holds_what_its_preprocessing_is_of():
    dataset = data.make_dataset("mine", REGRESSION)
    narrow = dataset.valid._replace(inputs=dataset.valid.inputs[:, 1:])
    with pytest.raises(DatasetError, match=r"split 'valid': inputs must be of the shape \(4,\) each; got \(16, 3\)"):
        dataclasses.replace(dataset, valid=narrow)


def test_decoded_targets_of_a_regression_are_those_that_were_given():
    dataset = data.make_dataset("mine", REGRESSION)
    inputs, targets = (
        np.concatenate([getattr(split, part) for split in (dataset.train, dataset.valid, dataset.test)])
        for part in ("inputs", "targets")
    )
    order, wanted = (np.lexsort(values.T) for values in (inputs, dataset.preprocessing.encode(TABLE)))
    np.testing.assert_allclose(dataset.preprocessing.decode(targets)[order], REGRESSION.targets[wanted], rtol=1e-5)


def test_images_of_bytes_and_tokens_stay_what_they_are():
    images, text = (data.make_dataset("mine", examples).preprocessing for examples in (BYTES, TOKENS))
    np.testing.assert_array_equal(images.encode(BYTES.inputs[..., 0]), BYTES.inputs)
    np.testing.assert_array_equal(images.encode(BYTES.inputs), BYTES.inputs)
    np.testing.assert_array_equal(text.encode(TOKENS.inputs.tolist()), TOKENS.inputs)
    assert (images.encode(BYTES.inputs).dtype, text.encode(TOKENS.inputs).dtype) == (
        np.uint8,
        np.uint8,
    )
    assert text.encode(TOKENS.inputs[:0]).shape == (0, 5)


@pytest.mark.parametrize(
    ("examples", "inputs", "message"),
    [
        (REGRESSION, TABLE[0], r"new rows: inputs must be \[N, 4\]; got \(4,\)"),
        (REGRESSION, TABLE[:, :3], r"inputs must be \[N, 4\]; got \(200, 3\)"),
        (REGRESSION, 1.0, r"inputs must be \[N, 4\]; got \(\)"),
        (REGRESSION, MISSING, "inputs are not finite"),
        (REGRESSION, np.full((2, 4), "a"), "inputs must be numbers; got <U1 values$"),
        (BYTES, BYTES.inputs / 255, r"inputs must be images of uint8, from 0 to 255; got float64"),
        (BYTES, BYTES.inputs[:, :3], r"inputs must be \[N, 4, 4, 1\]; got \(200, 3, 4, 1\)"),
        (TOKENS, TOKENS.inputs + 1, r"tokens must be \[N, T\] integers below num_tokens"),
        (TOKENS, TOKENS.inputs + 0.5, r"tokens must be \[N, T\] integers below num_tokens"),
    ],
)
def test_inputs_of_another_kind_are_refused(examples, inputs, message):
    with pytest.raises(DatasetError, match=message):
        data.make_dataset("mine", examples).preprocessing.encode(inputs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": ()}, r"shape and num_outputs must be of whole numbers above 0; got \(\) and 2"),
        ({"num_outputs": "2"}, r"shape and num_outputs must be of whole numbers above 0; got \(4,\) and '2'"),
        ({"shape": (5,)}, r"inputs must have one mean, or 5; got \("),
        ({"num_outputs": 3}, r"targets must have one mean, or 3; got \("),
        ({"targets": {"mean": [0.0, 1.0], "deviation": [1.0], "fill_missing": False}}, "of as many columns; got"),
        ({"targets": {"mean": [0.0, float("nan")], "deviation": [1.0, 1.0], "fill_missing": False}}, "must be finite"),
        ({"targets": {"mean": [0.0, 0.0], "deviation": [1.0, -1.0], "fill_missing": False}}, "and these above 0; got"),
        ({"inputs": None}, "all inputs but tokens have means; got None and num_tokens 0"),
        ({"num_tokens": 7}, "all inputs but tokens have means; got Scaling.* and num_tokens 7"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(changes, message):
    values = dataclasses.asdict(data.make_dataset("mine", REGRESSION).preprocessing)
    with pytest.raises(ValueError, match=message):
        Preprocessing.from_dict(values | changes)
