"""What a run writes while it goes on, where it cannot."""

import contextlib
import resource
import time
import types

import numpy as np
import pytest

from adalfl_jax.training import writers
from adalfl_jax.training.writers import MetricWriters
from tests.training.tiny import tiny_config


@contextlib.contextmanager
def files_of_at_most(num_bytes):
    """Stands in for a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_picture_can_be_watched_before_the_run_is_over(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (100, 100, 3), np.uint8)
    with MetricWriters(tmp_path, tiny_config()) as writers:
        writers.write("adalfl", "training", 1, (0,), {"loss": np.zeros(1)})
        writers.write_picture("adalfl", "training", 1, 0, picture)
        (file,) = (tmp_path / "tensorboard" / "adalfl" / "seed_0").iterdir()
        assert file.stat().st_size > picture.size // 2


def test_scalars_can_be_watched_while_a_run_goes_on(tmp_path, monkeypatch):
    """Lines at once, and events of all methods some seconds later at most, which is dear to do for each."""
    now = [1000.0]
    monkeypatch.setattr(writers, "time", types.SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    lines, events = [], []
    with MetricWriters(tmp_path, tiny_config()) as opened:
        for step, seconds in enumerate((0, 0.5, 1.0, writers.FLUSH_SECONDS, 0.5)):
            now[0] += seconds
            for method in ("ml3", "adalfl"):
                opened.write(method, "training", step, (0, 1), {"loss": np.ones(2)})
            lines.append(len((tmp_path / "metrics.jsonl").read_text().splitlines()))
            files = sorted((tmp_path / "tensorboard").glob("*/seed_*/*"))
            events.append([file.stat().st_size for file in files])
    assert lines == [4, 8, 12, 16, 20]
    assert len(events[0]) == 4
    sizes = np.array(events)
    assert (sizes[:3] == sizes[0]).all()
    assert (sizes[3] > sizes[0]).all()


def test_events_that_cannot_be_written_raise_where_they_are(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (100, 100, 3), np.uint8)  # PNG does not make it smaller
    with MetricWriters(tmp_path, tiny_config()) as writers:
        writers.write("adalfl", "training", 1, (0,), {"loss": np.zeros(1)})
        with files_of_at_most(10_000), pytest.raises(OSError, match="too large"):
            writers.write_picture("adalfl", "training", 1, 0, picture)
