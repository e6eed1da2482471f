"""Looking things up by name, with an error that lists the names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

Value = TypeVar("Value")


def lookup(kind: str, known: Mapping[str, Value], name: str) -> Value:
    """Returns `known[name]`.

    Raises:
      ValueError: no such name; the text lists the known ones and suggests the nearest.

    >>> lookup("colour", {"red": 1, "green": 2}, "gren")
    Traceback (most recent call last):
    ValueError: unknown colour 'gren'; did you mean 'green'? Known: green, red
    """
    require_known(kind, known, name)
    return known[name]


def require_known(kind: str, known: Iterable[str], name: str) -> None:
    """Raises the ValueError of `lookup` for a name that is not among the known ones."""
    if name not in (names := sorted(known)):
        raise ValueError(f"unknown {kind} {name!r}; {suggestion(name, names)}Known: {', '.join(names) or 'none'}")


def suggestion(name: str, known: Iterable[str]) -> str:
    """`"did you mean 'x'? "` for the nearest known name, or nothing where none is near."""
    nearest = difflib.get_close_matches(str(name), list(known), n=1)
    return f"did you mean {nearest[0]!r}? " if nearest else ""
