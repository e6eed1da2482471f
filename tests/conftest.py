"""Settings of every test: shapes must match without silent broadcasting, and float64 is one fixture away."""

import gc
import importlib.metadata
import os
import shutil
import signal
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["TTY_COMPATIBLE"] = "0"  # what programs print goes to pipes here, whatever FORCE_COLOR says
# Compiling takes most of the time, and a third of it without most optimisations and XLA's newer way of writing fused
# loops (jaxlib 0.10 still has the older one); a fifth less of that with each program compiled in one piece. Results
# differ in rounding alone.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_cpu_parallel_codegen_split_count=1"
    + " --xla_cpu_use_fusion_emitters=false" * importlib.metadata.version("jaxlib").startswith("0.10."),
)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell's `&` has it; tests send it, and to children
    signal.signal(signal.SIGINT, signal.default_int_handler)
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit the folder
    # Tests compile many programs twice. They share those of one session, read none of the user's and leave none behind.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="adalfl_jax_tests_")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax
import pytest
from absl import logging

gc.set_threshold(50_000, 20, 50)  # tracing makes many objects and little garbage
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

NO_FIGURES = ("adalfl_jax.training.outputs.write_figures", lambda folder, record: {})


def pytest_unconfigure():
    """Removes the compiled programs once the last worker is done."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


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
def without_figures(monkeypatch):
    """Runs leave no pictures, which take a quarter of their time."""
    monkeypatch.setattr(*NO_FIGURES)


@pytest.fixture(scope="module")
def module_without_figures():
    """The same for the runs of a fixture that tests share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*NO_FIGURES)
        yield


@pytest.fixture
def verbosity():
    """For a program that runs in the tests' process: it is quiet, and what comes after it need not be."""
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)
