"""Settings of every test: shapes must match without silent broadcasting, and float64 is one fixture away."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # neither the user's programs are read nor the tests' left behind

import jax
import pytest
from absl import logging

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def float64():
    """Runs a test in double precision."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def strict_dtypes():
    """Forbids implicit promotion between types, as `jnp.float32 + jnp.float64`."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def verbosity():
    """For a program that runs in the tests' process: it is quiet, and what comes after it need not be."""
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)
