"""Text as windows of characters: what is in them, and that the splits share none of it."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest

from adalfl_jax import data
from adalfl_jax.data import DatasetError, Examples, make_dataset
from adalfl_jax.data.text import ALPHABET, CONTEXT, NUM_CHARACTERS, encode, load_topics, text_of, windows


def decode(codes):
    return "".join((ALPHABET + "?")[code] for code in codes)


def test_characters_outside_the_alphabet_are_one_class():
    assert decode(encode("a\n§~É")) == "a\n?~?"
    assert encode("§")[0] == NUM_CHARACTERS - 1 == 96


def test_a_window_is_a_context_and_the_character_after_it():
    text = "The quick brown fox jumps over"
    inputs, targets = windows(encode(text), 3)
    for row in range(len(targets)):
        assert decode(inputs[row]) == text[3 * row : 3 * row + CONTEXT]
        assert decode(targets[row : row + 1]) == text[3 * row + CONTEXT]
    assert len(targets) == (len(text) - CONTEXT - 1) // 3 + 1


def test_a_paragraph_of_two_topics_is_taken_once_however_it_is_indented():
    topics = {"b": "shared\n  text\n\nlast", "a": "first\n\n  shared text\n\n\n\n"}
    assert text_of(topics) == "first\n\n  shared text\n\nlast"


def test_a_python_without_the_text_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DatasetError, match=r"pydoc_data\.topics, which this Python was installed without"):
        data.load("pydoc_topics")


def test_splits_are_parts_of_the_text_one_after_the_other():
    examples = load_topics()
    start, (middle, _), (end, _) = examples.inputs, examples.valid, examples.test
    assert len(start) > 50 * len(middle) > 50 * 3000
    shared = {row.tobytes() for row in np.concatenate([start[::CONTEXT]])} & {row.tobytes() for row in end}
    assert len(shared) < 0.03 * len(end)  # runs of blanks and stars


def test_tokens_stay_bytes_until_a_model_takes_them():
    dataset = data.load("pydoc_topics")
    assert (dataset.input_shape, dataset.num_outputs) == ((CONTEXT, 97), 97)
    assert dataset.train.inputs.dtype == jnp.uint8
    one_hot = dataset.normalize(dataset.test.inputs[:5])
    np.testing.assert_array_equal(one_hot.argmax(axis=-1), dataset.test.inputs[:5])
    np.testing.assert_array_equal(one_hot.sum(axis=-1), 1.0)
    spec = data.load_spec("pydoc_topics")
    noise = data.random_dataset("pydoc_topics", spec, 8)
    assert (noise.input_shape, noise.train.inputs.dtype) == (dataset.input_shape, jnp.uint8)
    assert int(noise.train.inputs.max()) < 97
    assert spec.num_bytes == CONTEXT * sum(len(part.inputs) for part in (dataset.train, dataset.valid, dataset.test))
    assert data.abstract_splits(spec, 0.1)[0].inputs.dtype == jnp.uint8


@pytest.mark.parametrize(
    "inputs", [np.full((60, 4), 5), np.full((60, 4), -1), np.zeros((60, 4)), np.zeros((60, 2, 2), int)]
)
def test_tokens_outside_the_vocabulary_are_refused(inputs):
    with pytest.raises(DatasetError, match=r"tokens must be \[N, T\] integers below num_tokens"):
        make_dataset("mine", Examples(inputs, np.arange(60) % 2, num_classes=2, num_tokens=5))
