"""When compiled programs are kept."""

from pathlib import Path

import jax
import pytest

from jgrpo.training.compilation import enable_compilation_cache


@pytest.fixture
def cache_dir(monkeypatch):
    """Sets and reads JAX's cache directory; restores it afterwards."""
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    yield lambda value: jax.config.update("jax_compilation_cache_dir", value)
    jax.config.update("jax_compilation_cache_dir", before[0])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])


def test_not_on_a_cpu(cache_dir):
    cache_dir(None)
    enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None


def test_on_an_accelerator_in_the_users_cache(cache_dir, monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache_dir(None)
    enable_compilation_cache()
    assert Path(jax.config.jax_compilation_cache_dir) == tmp_path / "jgrpo" / "xla"


def test_a_directory_that_is_set_stays(cache_dir, monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    cache_dir(str(tmp_path))
    enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)
