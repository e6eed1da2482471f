"""English text that ships with Python: the topics of its built-in help, the language reference in plain words."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from adalfl_jax.data.errors import DatasetError
from adalfl_jax.data.examples import Examples

CONTEXT = 16  # characters that are seen, from which the next one is predicted
ALPHABET = "\n" + "".join(map(chr, range(32, 127)))  # all other characters are one more
NUM_CHARACTERS = len(ALPHABET) + 1
PARTS = (0.8, 0.1, 0.1)  # of the text: training, validation, test
HELD_OUT_STRIDE = 7  # characters between the windows that are measured on


def load_topics() -> Examples:
    """Windows of 16 characters of `pydoc_data.topics`, each with the character that follows, 97 classes.

    The splits are parts of the text, one after the other, and no window reaches over their ends. Topics share whole
    paragraphs ("if" is in "compound" too), and each is taken once. The text is that of the Python that runs, 373,292
    characters in 3.11.7.

    Raises:
      DatasetError: a Python without the text.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DatasetError(
            "dataset 'pydoc_topics' is the text of Python's own help, pydoc_data.topics, which this Python was"
            " installed without; install all of its standard library, or use another Python"
        ) from error
    codes = encode(text_of(topics))
    ends = np.round(np.cumsum(PARTS[:2]) * len(codes)).astype(int)
    train, valid, test = np.split(codes, ends)
    return Examples(
        *windows(train),
        num_classes=NUM_CHARACTERS,
        valid=windows(valid, HELD_OUT_STRIDE),
        test=windows(test, HELD_OUT_STRIDE),
        can_flip=False,
        num_tokens=NUM_CHARACTERS,
    )


def encode(text: str) -> np.ndarray:
    """The number of each character, uint8 `[N]`."""
    numbers = {character: number for number, character in enumerate(ALPHABET)}
    return np.array([numbers.get(character, len(ALPHABET)) for character in text], np.uint8)


def windows(codes: np.ndarray, stride: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Contexts `[N, CONTEXT]` and the character `[N]` after each, every `stride` characters."""
    views = np.lib.stride_tricks.sliding_window_view(codes, CONTEXT + 1)[::stride]
    return np.ascontiguousarray(views[:, :-1]), views[:, -1].astype(np.int32)


def text_of(topics: Mapping[str, str]) -> str:
    """All paragraphs in the order of the topics' names, each where it comes first, however it is indented."""
    found: dict[str, str] = {}
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            found.setdefault(" ".join(paragraph.split()), paragraph)
    return "\n\n".join(paragraph for words, paragraph in found.items() if words)
