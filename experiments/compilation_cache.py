"""JAX's cache of compiled programs, in a folder for each kind of processor."""

from __future__ import annotations

import hashlib
import os
import platform
import tempfile
from pathlib import Path

import jax
from absl import logging


def keep_compiled_programs(folder: str | None) -> None:
    """Turns on JAX's cache of compiled programs; warns and does without where the folder cannot be written to.

    Args:
      folder: as the flag `--compilation_cache` says.
    """
    if folder == "":
        jax.config.update("jax_enable_compilation_cache", False)
    if not jax.config.values["jax_enable_compilation_cache"]:
        return
    if not folder:
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        folder = jax.config.values["jax_compilation_cache_dir"] or os.path.join(home, "adalfl_jax", _processor())
    if "://" not in folder:  # a bucket is JAX's business
        folder = os.path.expanduser(folder)
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            logging.warning("compiled programs are not kept, %s; --compilation_cache=DIR names another folder", error)
            jax.config.update("jax_enable_compilation_cache", False)
            return
    jax.config.update("jax_compilation_cache_dir", folder)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # By default only what took a second is kept; most programs of a small model take less.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _processor() -> str:
    """Names the instructions a program may use: JAX's keys do not, and machines of one home may differ in them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    features = next((line for line in lines if line.startswith(("flags", "Features"))), lines[0] if lines else "")
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"
