"""Data too large for the device: batches gathered on the host, by Grain's threads, while the device works."""

from __future__ import annotations

import math
import typing
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import joblib
import numpy as np
import psutil

from adalfl_jax.types import Batch

RESIDENT_SHARE = 0.25  # of the device's memory, what examples may fill; the rest is for models and their gradients
BLOCK_BYTES = 2**27  # of batches that go to the device in one piece


def stays_on_host(streaming: str, num_bytes: int) -> bool:
    """Whether examples stay on the host; by "auto", where they would fill more than a quarter of the device."""
    return streaming == "always" or (streaming == "auto" and num_bytes > RESIDENT_SHARE * _device_memory())


def stream(
    splits: tuple[Batch, Batch],
    indices: tuple[np.ndarray, np.ndarray],
    others: Any,
    place: Callable[[tuple[Any, ...]], tuple[Any, ...]] = jax.device_put,
) -> Iterator[tuple[Batch, Batch, Any]]:
    """Blocks of batches on the device; the next ones are gathered and moved while the last is worked on.

    Args:
      splits: two splits on the host, for inner and for outer batches.
      indices: into each of them, `[num_steps, ...]`.
      others: a pytree of arrays `[num_steps, ...]` that go along.
      place: puts a block of inner and of outer batches on devices.

    Yields:
      Inner batches, outer batches and `others`, of as many consecutive steps as `block_length` says.
    """
    steps = _Steps(splits, indices)
    num_steps = len(steps)
    size = block_length(num_steps, sum(leaf.nbytes for leaf in jax.tree.leaves(steps[0])))
    threads = min(16, joblib.cpu_count())
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, 2 * size))
    blocks: Any = grain.MapDataset.source(typing.cast(Any, steps)).to_iter_dataset(options).batch(size)
    blocks = grain.experimental.ThreadPrefetchIterDataset(blocks, prefetch_buffer_size=1).map(place)
    blocks = grain.experimental.ThreadPrefetchIterDataset(blocks, prefetch_buffer_size=1)
    for start, (inner, outer) in zip(range(0, num_steps, size), blocks, strict=True):
        yield Batch(*inner), Batch(*outer), jax.tree.map(lambda array, s=start: array[s : s + size], others)


def block_length(num_steps: int, step_bytes: int) -> int:
    """Steps of a block where as few as fit are as long as one another, the last one at most shorter.

    `step_bytes` is the size of the batches of one step. Each length that occurs is compiled.
    """
    num_blocks = math.ceil(num_steps / max(1, BLOCK_BYTES // step_bytes))
    return math.ceil(num_steps / num_blocks)


class _Steps:
    """The batches of each step, gathered when asked for."""

    def __init__(self, splits: tuple[Batch, Batch], indices: tuple[np.ndarray, np.ndarray]):
        self._splits, self._indices = splits, indices

    def __len__(self) -> int:
        return len(self._indices[0])

    def __getitem__(self, index: Any) -> tuple[tuple[np.ndarray, ...], ...]:
        rows = [indices[int(index)] for indices in self._indices]
        return tuple((split.inputs[row], split.targets[row]) for split, row in zip(self._splits, rows, strict=True))  # pyright: ignore[reportReturnType]


def _device_memory() -> int:
    """Bytes of the device's memory or, on a CPU, of the machine's."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    return statistics.get("bytes_limit") or psutil.virtual_memory().total
