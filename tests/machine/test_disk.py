"""The atomic writer: whole or not at all, whatever goes wrong, and nothing temporary left."""

from __future__ import annotations

import os
import subprocess
import tarfile
import threading

import pytest

from diptych.data.encoded import add_member, written
from diptych.machine import disk


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_file_is_old_or_new_and_folders_are_made(tmp_path):
    file = tmp_path / "a" / "b.txt"
    disk.write_text(file, "old")
    disk.write_text(file, "néw")
    disk.write_bytes(file.with_name("c"), b"\xff")
    assert file.read_text("utf-8") == "néw" and names(file.parent) == ["b.txt", "c"]


@pytest.mark.parametrize("error", [OSError("disk full"), ValueError("x"), KeyboardInterrupt(), SystemExit(2)])
def test_an_error_leaves_the_old_file_and_nothing_temporary(error, tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(type(error)), disk.atomic(tmp_path / "a") as part:
        part.write_text("half")
        raise error
    assert (tmp_path / "a").read_text() == "old" and names(tmp_path) == ["a"]


def test_an_unwritten_file_is_an_error_and_replaces_nothing(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(FileNotFoundError), disk.atomic(tmp_path / "a"):
        pass
    assert (tmp_path / "a").read_text() == "old"


def test_threads_do_not_share_a_temporary_file(tmp_path):
    meet, texts = threading.Barrier(4), [str(n) * 100_000 for n in range(4)]

    def write(text):
        with disk.atomic(tmp_path / "a") as part:
            meet.wait()
            part.write_text(text)

    threads = [threading.Thread(target=write, args=(t,)) for t in texts]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert (tmp_path / "a").read_text() in texts and names(tmp_path) == ["a"]


def test_content_is_flushed_before_it_gets_its_name(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(os, "fsync", lambda number: done.append(os.readlink(f"/proc/self/fd/{number}")))
    real = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("rename"), real(a, b)))
    disk.write_text(tmp_path / "a", "x")
    assert [os.path.basename(d).split(".")[0] for d in done] == ["a", "rename", tmp_path.name]


def test_a_tar_is_whole_or_not_there(tmp_path):
    with pytest.raises(RuntimeError), written(tmp_path / "a.tar") as tar:
        add_member(tar, "x.txt", b"1")
        raise RuntimeError
    assert names(tmp_path) == []
    with written(tmp_path / "a.tar") as tar:
        add_member(tar, "x.txt", b"1")
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert tar.getnames() == ["x.txt"] and names(tmp_path) == ["a.tar"]


def test_a_failed_folder_leaves_the_old_one(tmp_path):
    folder = tmp_path / "release"
    disk.write_folder(folder, lambda into: (into / "a").write_text("old"))

    def fails(into):
        (into / "a").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        disk.write_folder(folder, fails)
    assert (folder / "a").read_text() == "old" and names(tmp_path) == ["release"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_keeps_the_old_content_and_gets_its_room_back(small_disk):
    disk.write_text(small_disk / "a", "old")
    with pytest.raises(OSError, match="No space left"):
        disk.write_bytes(small_disk / "a", bytes(2**21))
    with pytest.raises(OSError, match="No space left"), written(small_disk / "a.tar") as tar:
        add_member(tar, "x", bytes(2**21))
    with pytest.raises(OSError, match="No space left"):
        disk.write_folder(small_disk / "b", lambda into: (into / "x").write_bytes(bytes(2**21)))
    assert (small_disk / "a").read_text() == "old" and names(small_disk) == ["a"]
    disk.write_bytes(small_disk / "a", bytes(2**19))  # there is room again
