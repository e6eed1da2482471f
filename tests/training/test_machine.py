"""What a run says it was made on."""

import os

import pytest

from adalfl_jax.training.machine import num_cores


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="a process may use all cores of this system")
def test_cores_are_those_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 3, 5})
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert num_cores() == 3
