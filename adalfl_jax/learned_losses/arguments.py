"""What a learned loss is called with: phi, targets, outputs, and keyword arguments that it declares."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from adalfl_jax.types import LearnedLoss

Loss = TypeVar("Loss", bound=Callable[..., Any])


def require_family(loss: LearnedLoss) -> None:
    """Raises ValueError for what has no `init` and `apply`, or is a class."""
    if isinstance(loss, type) or not (hasattr(loss, "init") and hasattr(loss, "apply")):
        raise ValueError(f"loss must be a learned loss with init and apply, as LossNetwork() is; got {loss!r}")


def declares(loss_fn: Callable[..., Any], name: str) -> bool:
    """Whether a loss declares an argument of this name that is keyword-only or has a default, and has not bound it."""
    if _is_bound(loss_fn, name):
        return False
    try:
        parameter = inspect.signature(loss_fn).parameters.get(name)
    except (TypeError, ValueError):  # a callable without an inspectable signature cannot ask for it
        return False
    if parameter is None or parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
        return False
    return parameter.kind is inspect.Parameter.KEYWORD_ONLY or parameter.default is not inspect.Parameter.empty


class _AtProgress(functools.partial):
    """A loss with a progress that is not the user's: another may take its place, as that of a past step does."""


def _is_bound(loss_fn: Callable[..., Any] | None, name: str) -> bool:
    """Whether a `functools.partial`, this loss or one inside it, has given the argument a value."""
    while loss_fn is not None:
        if isinstance(loss_fn, functools.partial):
            if name in loss_fn.keywords and not (isinstance(loss_fn, _AtProgress) and name == "progress"):
                return True
            loss_fn = loss_fn.func
        else:
            loss_fn = getattr(loss_fn, "__wrapped__", None)
    return False


def at_progress(loss_fn: Loss, progress: jax.Array | float | None) -> Loss:
    """A loss at a point of training; one that declares no `progress` as it is.

    Args:
      loss_fn: M_phi, or a fixed loss.
      progress: t / T, `[]` in [0, 1]; None where it is not known.

    Raises:
      ValueError: no progress for a loss that declares it without a default.
    """
    if not declares(loss_fn, "progress"):
        return loss_fn
    if progress is None:
        if inspect.signature(loss_fn).parameters["progress"].default is inspect.Parameter.empty:
            raise ValueError(
                "the loss reads `progress`, the share of training that is done: give it, to a bilevel step as "
                "BilevelBatch.progress, or the loss a default for it; got None"
            )
        return loss_fn
    return _AtProgress(loss_fn, progress=progress)  # pyright: ignore[reportReturnType]
