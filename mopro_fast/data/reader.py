"""Encoded images from files or shards, read ahead by threads, and only such bytes as DALI decodes.

A file that DALI cannot decode invalidates its pipeline. So every file's size and time are compared with those of
the check, a changed one is examined again, an odd one goes through decode.clean(), and one that nobody can read any
more is replaced by another image.
"""

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from mopro_fast.data import decode
from mopro_fast.data.decode import CONVERTED, OK, TOLERANT, UNREADABLE, DecodeError
from mopro_fast.data.index import Index
from mopro_fast.data.waiting import results_of
from mopro_fast.errors import UserError

_UNKNOWN, _REFUSED = 254, 255  # verdicts beyond decode's: not examined yet; clean for Pillow, but not for DALI
_CLEANED_BYTES = 256 << 20  # kept in memory of what clean() made; the first come stay
_MOST_AT_ONCE = 32  # files per task at most: smaller tasks cost as much as a read each


class Lost(NamedTuple):
    """An image that could not be read when its turn came."""

    row: int
    by: int
    """The row shown in its place, or -1."""
    reason: str


class Read(NamedTuple):
    """A batch's encoded images."""

    rows: np.ndarray
    """int64 [n]: the index's rows, after replacements."""
    data: list[np.ndarray]
    """n times uint8 [bytes]."""
    lost: list[Lost]


class _Broken(Exception):
    pass


class Reader:
    """Reads rows of ``index`` with this many threads."""

    def __init__(self, index: Index, threads: int) -> None:
        self._index, self._threads = index, threads
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._cleaned: dict[int, tuple[list[int], np.ndarray]] = {}  # with the state of the file
        self._room = _CLEANED_BYTES
        self._refusals: dict[int, str] = {}  # why a row is UNREADABLE or _REFUSED
        n = len(index)
        if index.checked is not None:
            self._verdict = index.checked.verdict.copy()
            self._state = np.stack([index.checked.size, index.checked.mtime_ns], axis=1)
            for i in np.flatnonzero(self._verdict == UNREADABLE).tolist():
                self._refusals[i] = index.checked.reason[i]
        elif index.shards is not None:  # pack has written only what DALI decodes
            self._verdict = np.full(n, OK, np.uint8)
            self._state = np.stack([index.shards.size[index.in_shards], np.zeros(n, np.int64)], axis=1)
        else:
            self._verdict, self._state = np.full(n, _UNKNOWN, np.uint8), np.full((n, 2), -1, np.int64)

    def start(self, rows: np.ndarray, substitutes: Callable[[int], Iterable[int]] | None) -> Callable[[], Read]:
        """Begin to read; the function returned waits for the result.

        substitutes(row) gives the rows to try in place of a broken one; without it such a row is left out. No
        readable one among them raises a UserError.
        """
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="mopro_fast-read")
        each = min(_MOST_AT_ONCE, -(-len(rows) // self._threads))
        parts = [rows[first : first + each].tolist() for first in range(0, len(rows), each)]
        begun: list[list[int]] = [[] for _ in parts]  # the rows that a task has begun to read
        tasks = [self._pool.submit(self._read_all, *part, substitutes) for part in zip(parts, begun, strict=True)]
        names = [lambda i=i: self._index.name((begun[i] or parts[i])[-1 if begun[i] else 0]) for i in range(len(parts))]

        def result() -> Read:
            parts = results_of(tasks, names)
            rows = np.array([row for part in parts for row in part.rows], np.int64)
            return Read(rows, [x for part in parts for x in part.data], [x for part in parts for x in part.lost])

        return result

    def distrust(self, row: int, reason: str) -> None:
        """DALI has refused what was read for this row: clean it from now on, or if it was clean, take it as broken."""
        if self._verdict[row] == OK:
            self._verdict[row] = CONVERTED
        else:
            self._refusals[row] = reason
            self._verdict[row] = _REFUSED

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    def _read_all(self, rows: list[int], begun: list[int], substitutes: Callable[[int], Iterable[int]] | None) -> Read:
        shown, data, lost = [], [], []
        for row in rows:
            begun.append(row)
            by = row
            try:
                encoded = self._read(row)
            except _Broken as broken:
                by, encoded = self._first(substitutes(row), row, broken) if substitutes else (-1, None)
                lost.append(Lost(row, by, str(broken)))
            if encoded is not None:
                shown.append(by)
                data.append(encoded)
        return Read(np.array(shown, np.int64), data, lost)

    def _first(self, candidates: Iterable[int], row: int, broken: _Broken) -> tuple[int, np.ndarray]:
        tried = 0
        for other in map(int, candidates):
            tried += 1
            try:
                return other, self._read(other)
            except _Broken:
                continue
        raise UserError(
            f"cannot read {self._index.name(row)} ({broken}), nor any of {tried} images tried in its place: "
            "is the storage still there?"
        )

    def _read(self, row: int) -> np.ndarray:
        """uint8 [bytes] that DALI decodes."""
        try:
            data, *state = self._index.read_with_state(row)
        except OSError as error:
            raise _Broken(error.strerror or type(error).__name__) from None
        verdict = self._verdict[row]
        if state != self._state[row].tolist():
            verdict = self._examine(row, data, state)
        if verdict in (UNREADABLE, _REFUSED):
            raise _Broken(self._refusals[row])
        if verdict == OK:
            return np.frombuffer(data, np.uint8)
        kept = self._cleaned.get(row)
        if kept is None or kept[0] != state:
            try:
                kept = state, np.frombuffer(decode.clean(data), np.uint8)
            except DecodeError as error:
                raise _Broken(str(error)) from None
            with self._lock:
                if row not in self._cleaned and kept[1].nbytes <= self._room:
                    self._room -= kept[1].nbytes
                    self._cleaned[row] = kept
        return kept[1]

    def _examine(self, row: int, data: bytes, state: list[int]) -> int:
        """Judge a file that is new or has changed, and remember it. One that was whole must not be cut now."""
        before = self._verdict[row]
        found = decode.examine(data)
        verdict = found.verdict
        if verdict == TOLERANT and before in (OK, CONVERTED, _REFUSED):
            self._refusals[row] = f"changed since it was checked; {found.reason}"
            verdict = _REFUSED
        elif verdict == UNREADABLE:
            since = "" if before == _UNKNOWN else "changed since it was checked; "
            self._refusals[row] = since + found.reason
        self._verdict[row], self._state[row] = verdict, state
        return verdict


def reading_threads(decoding_threads: int) -> int:
    """Reading waits more than it works."""
    return max(4, decoding_threads, min(16, 2 * (os.cpu_count() or 1)))
