"""What a run was made on."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import platform
from collections.abc import Iterable
from typing import Any

import jax


def describe_machine(packages: Iterable[str]) -> dict[str, Any]:
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
    """The processor's name as the system has it; Linux keeps it in a file."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
