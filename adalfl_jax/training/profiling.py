"""Traces of a run's chunks, for the profiler of TensorBoard."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax


@contextlib.contextmanager
def trace_chunk(folder: Path, profile_steps: tuple[int, ...], first_step: int, last_step: int) -> Iterator[None]:
    """Traces what happens inside, if one of the steps to profile is among those of the chunk.

    Args:
      folder: of the stage; each traced chunk has a folder in it.
      profile_steps: a first and a last step, counted from 1, or nothing.
      first_step: steps taken before the chunk.
      last_step: steps taken after it.
    """
    if not profile_steps or profile_steps[0] > last_step or profile_steps[1] <= first_step:
        yield
        return
    with jax.profiler.trace(folder / f"steps_{first_step + 1}_to_{last_step}"):
        yield
