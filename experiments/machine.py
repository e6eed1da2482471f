"""What figures were measured on."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import platform
import time
from typing import Any

import jax

PATIENCE = 300.0  # seconds; an average over a minute forgets all but a hundredth of what ran before


class BusyMachineError(Exception):
    """Other programs run on the machine."""


def describe_machine(packages: tuple[str, ...]) -> dict[str, Any]:
    """The processor, the device JAX computes on, threads and versions; what is not installed has no version."""
    device = jax.devices()[0]
    facts: dict[str, Any] = {"processor": processor_name(), "cores": num_cores(), "system": platform.system()}
    if device.platform != "cpu":
        facts["device"] = device.device_kind
    facts["python"] = platform.python_version()
    for package in packages:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return facts


def num_cores() -> int:
    """Cores this process may use; XLA takes a thread for each."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor_name() -> str:
    """As the system calls it; Linux keeps the name in a file."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def system_load() -> float:
    """Processes that want a core, over the last minute; 0 where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def wait_until_idle(most: float) -> float:
    """The load, once it is at most so much. What ran before counts in it for minutes, so a busy machine is waited for.

    Raises:
      BusyMachineError: it is still above after `PATIENCE`.
    """
    until = time.monotonic() + PATIENCE
    while (load := system_load()) > most:
        if time.monotonic() > until:
            raise BusyMachineError(
                f"the load of this machine, the processes that want a core, is {load:.1f} and was to fall to {most} "
                f"within {PATIENCE:.0f} seconds; end what else runs here, or leave out --write, to see the tables and "
                "not to keep them"
            )
        time.sleep(5)
    return load
