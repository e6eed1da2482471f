"""Things by name: looked up with an error that lists the names, and added to by users."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

Value = TypeVar("Value")


class Registry(dict[str, Value]):
    """Things by name: those of this package, whose names are taken, and those that users register beside them."""

    def __init__(self, kind: str, ours: Mapping[str, Value], *, taken: Iterable[str] = ()) -> None:
        """Makes one of what this package has, with other names that are `taken`."""
        super().__init__(ours)
        self._kind, self._taken = kind, frozenset((*ours, *taken))

    def require_free(self, name: str) -> None:
        """Raises ValueError for a name that is taken."""
        if name in self._taken:
            raise ValueError(f"there is a {self._kind} {name!r} in this package; register yours under another name")

    @property
    def registered(self) -> dict[str, Value]:
        """What users have registered."""
        return {name: value for name, value in self.items() if name not in self._taken}


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
        raise ValueError(f"unknown {kind} {name!r}; {nearest_of(name, names)}: {', '.join(names) or 'none'}")


def nearest_of(name: str, known: Iterable[str]) -> str:
    """What a list of the known names is introduced by: "known", behind the question whether the nearest was meant."""
    asked = suggestion(name, known)
    return f"{asked}Known" if asked else "known"


def suggestion(name: str, known: Iterable[str]) -> str:
    """`"did you mean 'x'? "` for the nearest known name, or nothing where none is near."""
    nearest = difflib.get_close_matches(str(name), list(known), n=1)
    return f"did you mean {nearest[0]!r}? " if nearest else ""
