"""What a run writes while it goes on, where it cannot."""

import contextlib
import resource

import numpy as np
import pytest

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


def test_events_that_cannot_be_written_raise_where_they_are(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (100, 100, 3), np.uint8)  # PNG does not make it smaller
    with MetricWriters(tmp_path, tiny_config()) as writers:
        writers.write("adalfl", "training", 1, (0,), {"loss": np.zeros(1)})
        with files_of_at_most(10_000), pytest.raises(OSError, match="too large"):
            writers.write_picture("adalfl", "training", 1, 0, picture)
