"""Where compiled programs are kept, and that a folder that cannot be written to stops nothing."""

from pathlib import Path

import jax
import pytest

from experiments.compilation_cache import _processor, keep_compiled_programs

CACHE_SETTINGS = (
    "jax_enable_compilation_cache",
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture
def cache_settings(monkeypatch, tmp_path):
    """JAX's settings, as a user has them who never set one, and back; nothing is compiled meanwhile."""
    before = {name: getattr(jax.config, name) for name in CACHE_SETTINGS}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    for name, value in zip(CACHE_SETTINGS, (True, None, 1.0), strict=True):
        jax.config.update(name, value)
    yield lambda: [getattr(jax.config, name) for name in CACHE_SETTINGS]
    for name, value in before.items():
        jax.config.update(name, value)


def test_compiled_programs_are_kept_in_the_users_cache_by_kind_of_processor(cache_settings, tmp_path):
    keep_compiled_programs(None)
    enabled, folder, seconds = cache_settings()
    assert enabled
    assert seconds == 0.1
    (below,) = (tmp_path / "caches" / "adalfl_jax").iterdir()
    assert folder == str(below)
    assert not list(below.iterdir())


def test_a_folder_of_compiled_programs_that_is_set_already_stays(cache_settings, tmp_path, monkeypatch):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))  # as JAX_COMPILATION_CACHE_DIR does
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1.0")
    keep_compiled_programs(None)
    assert cache_settings() == [True, str(tmp_path / "mine"), 1.0]
    keep_compiled_programs(str(tmp_path / "other"))  # the flag goes before
    assert cache_settings()[1] == str(tmp_path / "other")
    assert not (tmp_path / "caches").exists()


def test_an_empty_folder_name_keeps_no_compiled_programs(cache_settings, tmp_path):
    keep_compiled_programs("")
    assert cache_settings()[0] is False
    assert not list(tmp_path.iterdir())


def test_a_folder_of_compiled_programs_that_cannot_be_written_stops_nothing(cache_settings, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    keep_compiled_programs(str(tmp_path / "file" / "programs"))
    assert cache_settings()[0] is False
    assert "compiled programs are not kept" in caplog.text
    assert "--compilation_cache=DIR" in caplog.text


def test_where_the_cache_is_off_no_folder_is_made(cache_settings, tmp_path):
    jax.config.update("jax_enable_compilation_cache", False)
    keep_compiled_programs(str(tmp_path / "programs"))
    assert cache_settings()[:2] == [False, None]
    assert not list(tmp_path.iterdir())


def test_processors_of_other_instructions_have_other_caches(monkeypatch):
    names = []
    for features in ("fpu avx2", "fpu avx2 avx512f"):
        monkeypatch.setattr(Path, "read_text", lambda path, text=f"flags\t: {features}\n": text)
        names.append(_processor())
    assert len(set(names)) == 2
