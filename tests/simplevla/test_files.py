"""Files and folders that are whole or absent, whatever happens on the way."""

import hashlib
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simplevla.errors import ConfigError
from simplevla.files import sha256_file, share_dir, whole_directory, write_atomic


def test_write_atomic_replaces_the_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "deep" / "file.json"
    write_atomic(path, b"old")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["file.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def no_disk(_handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_disk)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_process_killed_while_it_writes_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, b"old")
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from simplevla.files import write_atomic\n"
        "os.fsync = lambda handle: os.kill(os.getpid(), 9)\n"
        "write_atomic(Path(sys.argv[1]), b'new' * 1000)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, path], check=False)
    assert done.returncode == -9
    assert path.read_bytes() == b"old"


def test_the_mode_is_that_of_any_new_file(tmp_path):
    plain, atomic = tmp_path / "plain", tmp_path / "atomic"
    plain.write_bytes(b"")
    write_atomic(atomic, b"")
    assert atomic.stat().st_mode == plain.stat().st_mode


def test_whole_directory_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "runs" / "one"
    with whole_directory(path) as scratch:
        (scratch / "a").write_text("a")
        assert not path.exists()
    assert (path / "a").read_text() == "a"
    assert os.listdir(path.parent) == ["one"]


def test_whole_directory_vanishes_when_the_block_raises(tmp_path):
    path = tmp_path / "one"
    with pytest.raises(ZeroDivisionError), whole_directory(path) as scratch:
        (scratch / "a").write_text(str(1 / 0))
    assert os.listdir(tmp_path) == []


def test_whole_directory_overwrites_nothing(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "kept").touch()
    with pytest.raises(FileExistsError), whole_directory(tmp_path / "one"):
        pytest.fail("the block must not run")
    assert (tmp_path / "one" / "kept").exists()


@given(st.binary(max_size=4096))
def test_sha256_is_that_of_the_bytes(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("hash") / "file"
    path.write_bytes(data)
    assert sha256_file(path) == hashlib.sha256(data).hexdigest()


def test_share_dir_is_the_checkout_here():
    assert (share_dir() / "config/embodiment").is_dir()
    assert (share_dir() / "urdf").is_dir()


def test_share_dir_says_where_it_looked(monkeypatch, tmp_path):
    monkeypatch.setattr("simplevla.files.__file__", str(tmp_path / "lib" / "simplevla" / "files.py"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setenv("AMENT_PREFIX_PATH", str(tmp_path / "ament"))
    with pytest.raises(ConfigError, match="ament/share/simplevla"):
        share_dir()
    (tmp_path / "ament/share/simplevla/config/embodiment").mkdir(parents=True)
    assert share_dir() == tmp_path / "ament/share/simplevla"
