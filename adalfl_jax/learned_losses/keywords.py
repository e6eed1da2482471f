"""The keyword arguments of a loss: which of them it declares, and the progress it is given by one."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.core import Tracer

from adalfl_jax.arguments import shorten, signature_of
from adalfl_jax.types import LearnedLoss

Loss = TypeVar("Loss", bound=Callable[..., Any])

ROUNDING = 1e-6  # of a share of training in float32


def require_family(loss: LearnedLoss) -> None:
    """Raises ValueError for what has no `init` and `apply`, or is a class."""
    if isinstance(loss, type) or not (hasattr(loss, "init") and hasattr(loss, "apply")):
        raise ValueError(
            f"loss must be a learned loss with init and apply, as LossNetwork() is; got {shorten(repr(loss))}"
        )


def declares(loss_fn: Callable[..., Any], name: str) -> bool:
    """Whether a loss declares an argument of this name that is keyword-only or has a default, and has not bound it.

    By `functools.wraps` a function declares what the one inside it does, if it takes it.
    """
    if _is_bound(loss_fn, name):
        return False
    for function in wrapped_functions(loss_fn):
        if (signature := signature_of(function)) is None:  # it cannot ask for it
            return False
        if (parameter := signature.parameters.get(name)) is not None:
            is_optional = parameter.default is not inspect.Parameter.empty
            return parameter.kind is inspect.Parameter.KEYWORD_ONLY or (
                is_optional and parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
            )
        if all(parameter.kind is not inspect.Parameter.VAR_KEYWORD for parameter in signature.parameters.values()):
            return False
    return False


def wrapped_functions(loss_fn: Callable[..., Any] | None) -> Iterator[Callable[..., Any]]:
    """A loss, and those inside it by `functools.partial` and `functools.wraps`."""
    while loss_fn is not None:
        yield loss_fn
        loss_fn = loss_fn.func if isinstance(loss_fn, functools.partial) else getattr(loss_fn, "__wrapped__", None)


class _AtProgress(functools.partial):
    """A loss with a progress that is not the user's: another may take its place, as that of a past step does."""


def _is_bound(loss_fn: Callable[..., Any], name: str) -> bool:
    """Whether a `functools.partial`, this loss or one inside it, has given the argument a value."""
    return any(
        isinstance(function, functools.partial)
        and name in function.keywords
        and not (isinstance(function, _AtProgress) and name == "progress")
        for function in wrapped_functions(loss_fn)
    )


def at_progress(loss_fn: Loss, progress: jax.Array | float | None) -> Loss:
    """A loss at a point of training; one that declares no `progress` as it is.

    Args:
      loss_fn: M_phi, or a fixed loss.
      progress: t / T, `[]` in [0, 1]; None where it is not known.
    """
    if progress is None or not declares(loss_fn, "progress"):
        return loss_fn
    return _AtProgress(loss_fn, progress=progress)  # pyright: ignore[reportReturnType]


def require_progress(loss_fn: Callable[..., Any], progress: jax.Array | float | None) -> None:
    """Raises ValueError where a loss reads a progress and there is none, without a default, or one not in [0, 1]."""
    if not declares(loss_fn, "progress"):
        return
    if progress is None:
        signature = signature_of(loss_fn)
        declared = signature and signature.parameters.get("progress")
        if declared and declared.default is inspect.Parameter.empty:
            raise ValueError(
                "the loss reads `progress`, the share of training that is done: give it, to a bilevel step as "
                "BilevelBatch.progress, or the loss a default for it; got None"
            )
    else:
        require_share(progress)


def require_share(progress: jax.Array | float) -> None:
    """Raises ValueError for a progress that is not one number in [0, 1], but for rounding; a traced one may be any."""
    if jnp.shape(progress) != ():
        raise ValueError(f"progress must be one number, the share of training done; got {jax.typeof(progress)}")
    if not isinstance(progress, Tracer) and not -ROUNDING <= float(progress) <= 1 + ROUNDING:
        raise ValueError(f"progress must be the share of training that is done, t / T in [0, 1]; got {progress}")
