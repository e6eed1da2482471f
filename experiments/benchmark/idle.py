"""Whether a machine is idle enough to be measured on."""

from __future__ import annotations

import time

import psutil

PATIENCE = 300.0  # seconds
WINDOW = 3.0  # seconds


class BusyMachineError(Exception):
    """Other programs run on the machine."""


def busy_cores() -> float:
    """Cores at work over the next seconds, this process's own among them."""
    return psutil.cpu_percent(interval=WINDOW) / 100 * (psutil.cpu_count() or 1)


def wait_until_idle(most: float) -> float:
    """The busy cores, once they are at most so many.

    Raises:
      BusyMachineError: they are still more after `PATIENCE`.
    """
    until = time.monotonic() + PATIENCE
    while (busy := busy_cores()) > most:
        if time.monotonic() > until:
            raise BusyMachineError(
                f"{busy:.1f} cores of this machine are at work, after {PATIENCE:.0f} seconds; no more than {most} were "
                "to be; end what else runs here, or leave out --write, to see the tables and not to keep them"
            )
    return busy
