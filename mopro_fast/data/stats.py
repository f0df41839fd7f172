"""Sizes and times of change of many files, as fast as the storage answers."""

import errno
import os
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from mopro_fast.console import Progress
from mopro_fast.data.paths import Paths, shown
from mopro_fast.data.waiting import results_of
from mopro_fast.errors import require_resources

try:
    from mopro_fast import _files
except ImportError:
    _files = None

_THREADS = 16  # a network file system answers each stat in a millisecond
_CHUNK = 1 << 12  # files per task
_AHEAD = 2 * _THREADS  # tasks that wait for a thread


class Stats(NamedTuple):
    """What the file system says of files."""

    size: np.ndarray
    """int64 [n], bytes; -1: there is no such file."""
    mtime_ns: np.ndarray
    """int64 [n], time of change; -1: there is no such file."""
    error: np.ndarray
    """int32 [n]: 0, or the errno that says why there is none; of a link to nowhere ENOLINK."""
    looked: int
    """How many of the n rows, from the first on; the others are 0 for lack of time."""


def stats(root: str, paths: Paths, seconds: float | None = None, progress: bool = True) -> Stats:
    """Of these files, names from ``root`` on. seconds: begin with no more of them after that time."""
    n, began = len(paths), time.monotonic()
    size, mtime_ns, error = np.zeros(n, np.int64), np.zeros(n, np.int64), np.zeros(n, np.int32)

    def look(first: int) -> int:
        part = slice(first, first + _CHUNK)
        _look(root, paths[part], size[part], mtime_ns[part], error[part])
        return len(size[part])

    begun, looked = 0, 0
    tasks: deque[tuple[int, Future[int]]] = deque()
    with ThreadPoolExecutor(_THREADS) as pool, Progress("looking at files", n, "files", active=progress) as bar:
        while True:
            in_time = seconds is None or time.monotonic() - began < seconds
            while in_time and begun < n and len(tasks) < _AHEAD:
                tasks.append((begun, pool.submit(look, begun)))
                begun += _CHUNK
            if not tasks:
                break
            first, task = tasks.popleft()
            (done,) = results_of([task], [lambda first=first: shown(os.path.join(root, paths[first]))])
            looked += done
            bar.update(done)
    for number in np.unique(error).tolist():
        require_resources(OSError(number, os.strerror(number)), f"the files in {shown(root)}")
    return Stats(size, mtime_ns, error, looked)


def _look(root: str, paths: Paths, size: np.ndarray, mtime_ns: np.ndarray, error: np.ndarray) -> None:
    """Fill the three."""
    if _files is not None:
        offsets, names = paths.buffers()
        _files.states(os.fsencode(root), offsets, names, size, mtime_ns, error)
        return
    for i, name in enumerate(paths):
        path = os.path.join(root, name)
        try:
            found = os.stat(path)
            size[i], mtime_ns[i] = found.st_size, found.st_mtime_ns
        except OSError as why:
            lost = why.errno == errno.ENOENT and os.path.lexists(path)
            size[i] = mtime_ns[i] = -1
            error[i] = errno.ENOLINK if lost else why.errno
