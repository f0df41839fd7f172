"""Sizes and times of many files: what os.stat says of each, with and without the C++ module."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from mopro_fast.data import stats as module
from mopro_fast.data.paths import Paths
from mopro_fast.data.stats import stats

NAMES = [
    "a.jpg",
    "in a/b.jpg",
    b"\xff.jpg",
    "none.jpg",
    "a.jpg/x",
    "dangling",
    "loop",
    "in a",
    "x" * 300,
    "in a/../a.jpg",
]
ERRORS = {"none.jpg": errno.ENOENT, "a.jpg/x": errno.ENOTDIR, "dangling": errno.ENOLINK, "loop": errno.ELOOP}
ERRORS |= {"x" * 300: errno.ENAMETOOLONG}


@pytest.fixture(params=["C++", "Python"])
def root(request, tmp_path, monkeypatch):
    if request.param == "Python":
        monkeypatch.setattr(module, "_files", None)
    elif module._files is None:
        pytest.skip("built without a C++ compiler")
    (tmp_path / "in a").mkdir()
    for i, name in enumerate(NAMES[:3]):
        path = Path(tmp_path, os.fsdecode(name))
        path.write_bytes(bytes(i + 5))
        os.utime(path, ns=(1, 1_700_000_000_123_456_789 + i))
    os.symlink("none", tmp_path / "dangling")
    os.symlink("loop", tmp_path / "loop")
    return tmp_path


@pytest.mark.parametrize("chunk", [1, 3, 4096])
def test_as_the_file_system_says(root, chunk, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    names = [*NAMES, str(root / "a.jpg"), "/none"]
    found = stats(str(root), Paths(names)[0 : len(names)], progress=False)
    assert found.looked == len(names)
    for i, name in enumerate(map(os.fsdecode, names)):
        path = Path(root, name)
        if found.error[i]:
            assert found.error[i] == ERRORS.get(name, errno.ENOENT) and found.size[i] == found.mtime_ns[i] == -1
        else:
            assert (found.size[i], found.mtime_ns[i]) == (path.stat().st_size, path.stat().st_mtime_ns)
    assert np.count_nonzero(found.error) == len(ERRORS) + 1


def test_from_the_folder_where_the_process_is(root, monkeypatch):
    monkeypatch.chdir(root)
    found = stats("", Paths(["a.jpg", "none"])[1:], progress=False)
    assert found.error.tolist() == [errno.ENOENT] and stats("", Paths(["a.jpg"]), progress=False).size.tolist() == [5]
    assert stats("", Paths([]), progress=False).looked == 0


def test_no_time(root):
    found = stats(str(root), Paths(NAMES), seconds=0, progress=False)
    assert found.looked == 0 and not found.error.any()


@pytest.mark.skipif(module._files is None, reason="built without a C++ compiler")
@pytest.mark.parametrize("offsets", [[0, 9], [-1, 2], [2, 1], []])
def test_names_outside_of_the_buffer_are_refused(offsets):
    n = max(0, len(offsets) - 1)
    out = np.zeros(n, np.int64), np.zeros(n, np.int64), np.zeros(n, np.int32)
    with pytest.raises(ValueError, match=r"offsets"):
        module._files.states(b"", np.array(offsets, np.int64), b"a.jpg", *out)
