"""What a run says it was made on."""

import os
import types

import jax
import jaxlib
import pytest

from adalfl_jax.training import machine
from adalfl_jax.training.machine import describe_machine, num_cores


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="a process may use all cores of this system")
def test_cores_are_those_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 3, 5})
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert num_cores() == 3


def on(monkeypatch, platform, device_kind):
    """JAX has one device, of this kind."""
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(platform=platform, device_kind=device_kind)])


def test_a_machine_is_its_processor_its_device_and_the_versions_of_what_is_installed(monkeypatch, tmp_path):
    on(monkeypatch, "cpu", "cpu")
    here = describe_machine(("jax", "no_such_package", "jaxlib"))
    assert list(here) == ["processor", "cores", "system", "python", "jax", "jaxlib"]
    assert (here["jax"], here["jaxlib"]) == (jax.__version__, jaxlib.__version__)
    on(monkeypatch, "gpu", "H100")
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name\t: Fast (R): 3 GHz\n\nmodel name : other\n")
    monkeypatch.setattr(machine, "pathlib", types.SimpleNamespace(Path=lambda path: tmp_path / "cpuinfo"))
    there = describe_machine(())
    assert (there["processor"], there["device"]) == ("Fast (R): 3 GHz", "H100")
