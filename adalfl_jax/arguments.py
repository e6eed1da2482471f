"""What an argument must be, with an error that says what was expected and what came."""

from __future__ import annotations

import inspect
import math
import reprlib
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Real
from typing import Any


def is_count(value: Any) -> bool:
    """Whether an argument is a whole number of at least 1, NumPy's included."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def require_count(name: str, value: Any) -> None:
    """Raises ValueError unless `is_count`."""
    if not is_count(value):
        raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}")


def is_number(value: Any) -> bool:
    """Whether an argument is one finite number, NumPy's included."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def require_number(name: str, value: Any, *, least: float | None = None) -> None:
    """Raises ValueError unless an argument is a finite number above 0, or of at least `least` where that is given."""
    if not is_number(value) or (value <= 0 if least is None else value < least):
        raise ValueError(
            f"{name} must be a number {'above 0' if least is None else f'of at least {least}'}; got {value!r}"
        )


def require_flag(name: str, value: Any) -> None:
    """Raises ValueError unless an argument is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False; got {value!r}")


def shorten(value: Any, longest: int = 600) -> str:
    """The text of a value for an error, without its middle where it is long."""
    text = str(value)
    return text if len(text) <= longest else f"{text[: longest // 2]} ... {text[-longest // 2 :]}"


def signature_of(function: Callable[..., Any]) -> inspect.Signature | None:
    """The signature a function declares itself, not that of one it wraps; None where it has none to inspect."""
    try:
        return inspect.signature(function, follow_wrapped=False)
    except (TypeError, ValueError):
        return None


def why_not_called(function: Callable[..., Any], arguments: Sequence[str], keywords: Iterable[str] = ()) -> str:
    """Why a function cannot be called with so many arguments and these keywords; "" if it can, or does not tell."""
    if (signature := signature_of(function)) is None:
        return ""
    try:
        signature.bind(*arguments, **dict.fromkeys(keywords))
    except TypeError as error:
        return str(error)
    return ""


def require_function(name: str, value: Any, *, method: str = "apply") -> None:
    """Raises ValueError unless an argument can be called; where it has the method, the text says to give that."""
    if not callable(value):
        remedy = f"; give its function `{method}`" if hasattr(value, method) else ""
        raise ValueError(f"{name} must be a function; got {reprlib.repr(value)}{remedy}")


def refuse_model_or_loss(name: str, value: Any, *, made_by: str) -> None:
    """Raises ValueError where a model or a learned loss was given in place of its parameters."""
    if callable(value) and hasattr(value, "params"):
        raise ValueError(f"{name} must be parameters; give those of the {type(value).__name__}, its `params`")
    if hasattr(value, "init") and hasattr(value, "apply"):
        raise ValueError(f"{name} must be parameters, as {made_by} makes; got {value!r}")


def require_optimizer(name: str, value: Any) -> None:
    """Raises ValueError unless given an optimiser; parameters in its place are shown in part."""
    if not (hasattr(value, "init") and hasattr(value, "update")):
        raise ValueError(f"{name} must be an optax transformation, as optax.sgd(0.1) makes; got {reprlib.repr(value)}")
