"""What a learned loss may ask for beside phi, targets and outputs: keyword-only arguments that it declares."""

from __future__ import annotations

import functools
import inspect

import jax

from adalfl_jax.types import LearnedLossFn


def declares(learned_loss_fn: LearnedLossFn, name: str) -> bool:
    """Whether a learned loss declares a keyword-only argument of this name."""
    try:
        parameter = inspect.signature(learned_loss_fn).parameters.get(name)
    except (TypeError, ValueError):  # a callable without an inspectable signature cannot ask for it
        return False
    return parameter is not None and parameter.kind is inspect.Parameter.KEYWORD_ONLY


def at_progress(learned_loss_fn: LearnedLossFn, progress: jax.Array | float | None) -> LearnedLossFn:
    """The learned loss at a point of training; one that declares no `progress` as it is.

    Args:
      learned_loss_fn: M_phi.
      progress: t / T, `[]` in [0, 1]; None where it is not known.
    """
    if progress is None or not declares(learned_loss_fn, "progress"):
        return learned_loss_fn
    return functools.partial(learned_loss_fn, progress=progress)  # pyright: ignore[reportCallIssue]
