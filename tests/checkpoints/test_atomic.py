"""A directory is written whole or not at all, on a disk that refuses a write too."""

import os

import pytest

from jgrpo.checkpoints.atomic import atomic_directory
from jgrpo.errors import UserError


def test_appears_whole(tmp_path):
    out = tmp_path / "deep" / "out"
    with atomic_directory(out) as directory:
        (directory / "file").write_text("x")
        assert not out.exists()
    assert [p.name for p in out.iterdir()] == ["file"]
    assert os.listdir(out.parent) == ["out"]


def test_nothing_is_left_after_an_error(tmp_path):
    with pytest.raises(KeyError), atomic_directory(tmp_path / "out") as directory:
        {}[(directory / "file").write_text("x")]
    assert os.listdir(tmp_path) == []


def test_full_disk_leaves_nothing_and_says_so(tmp_path, full_disk):
    with pytest.raises(UserError, match=r"cannot write .*out: File too large"), atomic_directory(tmp_path / "out") as d:
        (d / "file").write_bytes(b"x" * 20_000)
    assert os.listdir(tmp_path) == []


def test_replacing_keeps_the_old_one_until_the_end(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("x")
    with pytest.raises(KeyError), atomic_directory(out, replace=True):
        raise KeyError
    assert os.listdir(out) == ["old"]
    with atomic_directory(out, replace=True) as directory:
        (directory / "new").write_text("y")
        assert os.listdir(out) == ["old"]
    assert os.listdir(out) == ["new"]
    assert os.listdir(tmp_path) == ["out"]


def test_taken_output_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="not empty"), atomic_directory(tmp_path):
        pass
    with pytest.raises(UserError, match="is a file"), atomic_directory(tmp_path / "file"):
        pass
    with pytest.raises(UserError, match="cannot write"), atomic_directory(tmp_path / "file" / "below"):
        pass
