"""Files that are none, that never end, or that nobody may read: named, not waited for, not read whole."""

import os
import socket
from pathlib import Path

import pytest

from mopro_fast.files import open_regular, read_regular

MOST = 1 << 20


def odd(kind: str, folder: Path) -> Path:
    """Something in the folder that is no file to read."""
    path = folder / f"{kind}.jpg"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(os.path.relpath(path))
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "nothing":
        path.symlink_to("nowhere")
    elif kind == "huge":
        path.touch()
        os.truncate(path, 8 << 30)
    return path


WHY = {
    "pipe": "not a regular file but a pipe",
    "socket": "not a regular file but a socket",
    "folder": "not a regular file but a folder",
    "device": "not a regular file but a device",
    "loop": "Too many levels of symbolic links",
    "nothing": "No such file or directory",
    "huge": "8589934592 bytes, at most 1048576 are read",
}


@pytest.mark.parametrize("kind", WHY)
def test_what_cannot_be_read_is_said_at_once(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path = odd(kind, tmp_path)
    with pytest.raises(OSError) as error:
        read_regular(path, MOST)
    assert (error.value.strerror, error.value.filename) == (WHY[kind], str(path))


@pytest.mark.parametrize("size", [0, 1, 4096, MOST])
def test_a_regular_file_is_read_whole(tmp_path, size):
    path = tmp_path / "a"
    path.write_bytes(os.urandom(size))
    data, status = read_regular(path, MOST)
    assert data == path.read_bytes()
    assert (status.st_size, status.st_mtime_ns) == (size, path.stat().st_mtime_ns)
    with open_regular(path) as file:
        assert file.read() == data


@pytest.mark.parametrize("most, read", [(MOST, 3000), (2999, None)], ids=["to_its_end", "not_beyond_most"])
def test_a_file_that_grows_while_it_is_read(tmp_path, monkeypatch, most, read):
    path = tmp_path / "a"
    path.write_bytes(bytes(1000))
    once = os.fstat

    def grown(number):
        status = once(number)
        path.write_bytes(bytes(3000))
        return status

    monkeypatch.setattr(os, "fstat", grown)
    if read is None:
        with pytest.raises(OSError, match="3000 bytes, at most 2999 are read"):
            read_regular(path, most)
    else:
        assert len(read_regular(path, most)[0]) == read


def test_a_file_that_says_nothing_of_its_size():
    assert read_regular("/proc/self/status", MOST)[0].startswith(b"Name:")


def test_no_handle_is_left_open(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for kind in WHY:
        with pytest.raises(OSError):
            read_regular(odd(kind, tmp_path), MOST)
    assert len(os.listdir("/proc/self/fd")) == before
