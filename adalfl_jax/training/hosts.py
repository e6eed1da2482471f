"""Several processes of one run, on one host or many: how they meet, what they agree on, and that one alone writes.

All of them run the same program on the same arrays, each with its own devices. Files and clocks are the first one's
business; what the others need of them they are told.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from adalfl_jax.training.fields import ConfigError, differing_keys
from adalfl_jax.training.files import BusyError, WorkdirError
from adalfl_jax.training.sections import HostsConfig

Value = TypeVar("Value")

PIECE_BYTES = 2**26  # of an array that go to the others at once, through the memory of every device


def connect(config: HostsConfig) -> None:
    """Meets the other processes of a run, where the config says that there are any. Must come before any computation.

    Where one is silent for `timeout_seconds` the others end, with a message of JAX's that names it.

    Raises:
      ConfigError: too little is known of the others, they do not come, or this process has computed already.
    """
    if not config.connect or jax.distributed.is_initialized():
        return
    address = None if config.connect == "auto" else config.connect
    # JAX's own ear for SIGTERM swallows one that comes before `Preemption` listens, and nothing here asks it.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator_address=address,
            num_processes=config.num_processes or None,
            process_id=config.process_id if config.process_id >= 0 else None,
            initialization_timeout=300,
            heartbeat_timeout_seconds=config.timeout_seconds,
            shutdown_timeout_seconds=config.timeout_seconds,
        )
    except (ValueError, RuntimeError) as error:
        if address is None and "coordinator_address" in str(error):
            return  # no cluster: a process of its own
        is_unknown = address is not None and "must be defined" in str(error)
        remedy = " Set hosts.num_processes and hosts.process_id" if is_unknown else ""
        raise ConfigError(f"config.hosts: the processes cannot be connected: {error}{remedy}") from error
    sys.stderr.write(
        f"process {jax.process_index()} of {jax.process_count()}: where one is silent for {config.timeout_seconds} "
        "seconds the others end; the same commands, for all of them, go on from the last checkpoint\n"
    )


def warn(message: str) -> None:
    """Warns once for all processes of a run, in the first."""
    if is_first():
        warnings.warn(message, stacklevel=3)


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def on_first(function: Callable[[], Value]) -> Value:
    """Calls a function in the first process alone, and returns its result in every process.

    Args:
      function: returns what JSON takes.

    Raises:
      WorkdirError: in all of them, where the function does; a BusyError stays one.
    """
    if jax.process_count() == 1:
        return function()
    outcome: dict[str, Any] = {}
    if is_first():
        try:
            outcome = {"value": function()}
        except WorkdirError as error:
            outcome = {"error": str(error), "is_busy": isinstance(error, BusyError)}
    outcome = json.loads(_broadcast(json.dumps(outcome).encode()))
    if "error" in outcome:
        raise (BusyError if outcome["is_busy"] else WorkdirError)(outcome["error"])
    return outcome["value"]


def arrays_of_first(arrays: Sequence[np.ndarray], specs: Sequence[dict[str, Any]]) -> list[np.ndarray]:
    """Arrays of the first process in all of them, which know their shapes and types."""
    if jax.process_count() == 1:
        return list(arrays)
    found = []
    for index, spec in enumerate(specs):
        num_bytes = math.prod(spec["shape"]) * np.dtype(spec["dtype"]).itemsize
        content = np.ascontiguousarray(arrays[index]).tobytes() if is_first() else b""
        pieces = [_broadcast(content[start : start + PIECE_BYTES]) for start in range(0, num_bytes, PIECE_BYTES)]
        found.append(np.frombuffer(b"".join(pieces), spec["dtype"]).reshape(spec["shape"]))
    return found


def require_same(values: dict[str, Any]) -> None:
    """Compares what the processes were started with.

    Args:
      values: of this one, as JSON takes them.

    Raises:
      ConfigError: in all of them, where those of one are not those of the first.
    """
    if jax.process_count() == 1:
        return
    content = json.dumps(values).encode()
    padded = np.zeros(largest(len(content)), np.uint8)
    padded[: len(content)] = np.frombuffer(content, np.uint8)
    first, *others = (json.loads(row.tobytes().rstrip(b"\0")) for row in multihost_utils.process_allgather(padded))
    for index, other in enumerate(others, 1):
        if lines := differing_keys(first, other):
            raise ConfigError(
                f"process {index} was started with another config or on other data than process 0; start all alike "
                f"(process 0 -> process {index}):\n  " + "\n  ".join(lines)
            )


def largest(value: int) -> int:
    """The largest of the numbers that the processes call this with."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.process_allgather(np.int32(value)).max())


def agreed_signal(own: signal.Signals | None) -> signal.Signals | None:
    """The signal that came to one of the processes, or None; each calls this with what came to itself."""
    number = largest(own or 0)
    return signal.Signals(number) if number else None


def _broadcast(content: bytes) -> bytes:
    """Bytes of the first process; those of the others are not looked at."""
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    padded = np.zeros(1 << max(length - 1, 1).bit_length(), np.uint8)  # few lengths, so few programs
    if is_first():
        padded[:length] = np.frombuffer(content, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded), np.uint8).tobytes()[:length]
