"""From nested mappings to frozen dataclasses: keys known, values of their type and range; and back, and compared."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

import numpy as np

ANY = "NAME"  # stands for the fields of `Options` in `field_paths`

# Half the time of building a config otherwise.
_type_hints = functools.cache(functools.partial(typing.get_type_hints, include_extras=True))


class Expected(NamedTuple):
    """What a value must be besides its type, said of a field by `Annotated` and looked at by `require_expected`."""

    text: str
    holds: Callable[[Any], bool]


PositiveFloat = Annotated[float, Expected("a number above 0", lambda value: value > 0)]
NonNegativeFloat = Annotated[float, Expected("a number of at least 0", lambda value: value >= 0)]
PositiveShare = Annotated[float, Expected("a number in (0, 1]", lambda value: 0 < value <= 1)]
ProperFraction = Annotated[float, Expected("a number in (0, 1)", lambda value: 0 < value < 1)]
PositiveInt = Annotated[int, Expected("a whole number of at least 1", lambda value: value >= 1)]
PositiveInt32 = Annotated[int, Expected("a whole number of at least 1, below 2**31", lambda value: 1 <= value < 2**31)]
NonNegativeInt = Annotated[int, Expected("a whole number of at least 0", lambda value: value >= 0)]


class Options(dict[str, Any]):
    """A section whose fields have any names, those that a file gives them; hashable, as the others are."""

    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return hash(frozenset(self.items()))


class ConfigError(ValueError):
    """A configuration that cannot run; the text names the field, what it takes and what came."""


def require(field: str, value: Any, holds: bool, expected: str) -> None:
    """Raises ConfigError for a field that is not what is expected of it."""
    if not holds:
        raise ConfigError(f"config.{field} must be {expected}; got {value!r}")


def require_expected(section: Any, name: str = "") -> None:
    """Raises ConfigError for a field of a section, of this name, that is not what its annotation says."""
    for field, hint in _type_hints(type(section)).items():
        if typing.get_origin(hint) is Annotated:
            wanted, value = typing.get_args(hint)[1], getattr(section, field)
            require(f"{name}.{field}".lstrip("."), value, wanted.holds(value), wanted.text)


def field_paths(cls: type) -> list[str]:
    """Dotted names of every field of a dataclass of dataclasses: "num_steps", "inner.learning_rate".

    `Options` have fields of any name, for which `ANY` stands: "model.options.NAME".
    """
    paths = []
    for name, hint in _type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            paths += [f"{name}.{path}" for path in field_paths(typing.cast(type, hint))]
        else:
            paths.append(f"{name}.{ANY}" if hint is Options else name)
    return paths


def require_path(cls: type, path: str) -> None:
    """Raises ValueError unless a dotted name is that of a field, and not of a whole section."""
    known = field_paths(cls)
    if fields := [each for each in known if each.startswith(f"{path}.")]:
        raise ValueError(f"{path!r} is a section of the configuration; its fields are {', '.join(fields)}")
    section, _, name = path.rpartition(".")
    is_option = name.isidentifier() and f"{section}.{ANY}" in known
    if path not in known and not is_option:
        raise ValueError(f"unknown field of the configuration {path!r}; {_meant(path, known)}")


def _meant(path: str, known: list[str]) -> str:
    """Fields that a dotted name may stand for, or else the names there are beside it."""
    section, _, name = path.rpartition(".")
    own_names = {each: each.rpartition(".")[2] for each in known}
    with_words = [each for each, own in own_names.items() if set(name.split("_")) <= set(own.split("_"))]
    beside = [each for each in known if each.rpartition(".")[0] == section]  # none where there is no such section
    near = [] if section else difflib.get_close_matches(name, set(own_names.values()), n=1, cutoff=0.8)
    meant = (
        difflib.get_close_matches(path, known, n=1, cutoff=0.9)
        or [each for each, own in own_names.items() if own == name]
        or [each for each in with_words if each in beside]
        or [each for each, own in own_names.items() if own in near]
        or with_words
    )
    if meant:
        return f"did you mean {' or '.join(map(repr, meant))}?"
    names = beside if section and beside else dict.fromkeys(each.partition(".")[0] for each in known)
    return f"known: {', '.join(names)}"


def differing_keys(left: Mapping[str, Any], right: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Lines `key: left -> right` for every leaf in which two nested dictionaries differ."""
    lines = []
    for key in sorted({*left, *right}):
        ours, theirs = left.get(key, "(absent)"), right.get(key, "(absent)")  # plain dicts, not ConfigDicts
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            lines += differing_keys(ours, theirs, f"{prefix}{key}.")
        elif ours != theirs:
            lines.append(f"{prefix}{key}: {ours!r} -> {theirs!r}")
    return lines


def build(cls: type, values: Any, where: str) -> Any:
    """A dataclass of what nested mappings hold; `where` is what errors call it.

    Raises:
      ConfigError: an unknown or missing key, a value of a wrong type or out of its range.
    """
    if not isinstance(values, Mapping) and not hasattr(values, "items"):
        raise ConfigError(f"{where} must be a section of fields; got {values!r}")
    hints = _type_hints(cls)
    given = dict(values.items())
    for key in given:
        if key not in hints:
            raise ConfigError(f"{where}.{key} is no field; {_meant(key, list(hints))}")
    given = {key: {} for key, hint in hints.items() if hint is Options} | given
    missing = [key for key in hints if key not in given]
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}")
    fields = {key: _coerce(hint, given[key], f"{where}.{key}") for key, hint in hints.items()}
    try:
        return cls(**fields)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


_EXPECTED = {int: "a whole number", float: "a finite number that float32 holds", str: "a string", bool: "True or False"}
_SEVERAL = {int: "whole numbers", float: "finite numbers that float32 holds", str: "strings"}


def _is_in_float32(value: float) -> bool:
    limits = np.finfo(np.float32)
    return value == 0 or float(limits.tiny) <= abs(value) <= float(limits.max)


def _coerce(hint: Any, value: Any, where: str, expected: str = "") -> Any:
    """Returns `value` as the type `hint`.

    The only conversions are a whole number to a float, a list to a tuple, and NumPy's scalars to Python's.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, where)
    if typing.get_origin(hint) is Annotated:
        kind, _ = typing.get_args(hint)
        return _coerce(kind, value, where)
    if hint is Options:
        return _coerce_options(value, where)
    if typing.get_origin(hint) is tuple:
        item_hint = typing.get_args(hint)[0]
        expected = f"a tuple of {_SEVERAL[item_hint]}"
        if isinstance(value, list | tuple):
            return tuple(_coerce(item_hint, item, where, expected) for item in value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool) and _is_in_float32(value):
        return float(value)
    if isinstance(hint, type) and type(value) is hint and hint is not float:
        return value
    raise ConfigError(f"{where} must be {expected or _EXPECTED[hint]}; got {value!r}")


def _coerce_options(values: Any, where: str) -> Options:
    if not hasattr(values, "items"):
        raise ConfigError(f"{where} must be a section of fields; got {values!r}")
    return Options((name, _coerce_option(value, f"{where}.{name}")) for name, value in values.items())


def _coerce_option(value: Any, where: str) -> Any:
    """A value of a kind that a file, a digest and the command line can hold."""
    if isinstance(value, list | tuple):
        return tuple(_coerce_option(item, where) for item in value)
    kind = type(value.item() if isinstance(value, np.generic) else value)
    if kind not in _EXPECTED:
        raise ConfigError(f"{where} must be a number, a string, True, False or a tuple of these; got {value!r}")
    return _coerce(kind, value, where)


def jsonable(value: Any) -> Any:
    """Nested dictionaries, with tuples as lists, and without `Options` of which none is set."""
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items() if item != {}}
    return [jsonable(item) for item in value] if isinstance(value, tuple) else value
