"""Encoded images from files or shards, read ahead by threads, and only such bytes as DALI decodes.

Bytes that DALI cannot decode invalidate its pipeline, or end the process. So of every image the crc32 of what is read
is compared with that of what was examined (by a check, or when it was packed). Other bytes of a file are examined
again; those of a pack are damage. Processes of their own examine and convert images, and take the memory and the
crashes of their libraries with them. An image that nobody can read is replaced by another one.
"""

import os
import threading
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from mopro_fast.data import decode
from mopro_fast.data.decode import CONVERTED, OK, TOLERANT, UNREADABLE, Examined
from mopro_fast.data.index import Index
from mopro_fast.data.waiting import results_of
from mopro_fast.data.workers import Apart, Died
from mopro_fast.errors import UserError

_UNKNOWN, _REFUSED = 254, 255  # verdicts beyond decode's: not examined yet; clean for Pillow, but not for DALI
_PATIENCE = 60  # seconds for an image to be examined
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


class Broken(Exception):
    """An image that cannot be read, and why."""


class Verified:
    """The images of ``index``, as bytes that were examined as they are: other bytes reach no decoder."""

    def __init__(self, index: Index, processes: int) -> None:
        """processes: that examine and convert images, at most."""
        self.index, self._processes = index, processes
        self._apart = self._started()
        self._lock = threading.Lock()
        self._cleaned: dict[int, tuple[int, bytes]] = {}  # with the crc32 of what it was made of
        self._room = _CLEANED_BYTES
        self._refusals: dict[int, str] = {}  # why a row is UNREADABLE or _REFUSED
        self._distrusted: set[int] = set()
        self._changed: dict[int, tuple[int, int]] = {}  # by row, verdict and crc32 that are not what was known
        self._is_fixed = index.shards is not None and index.shards.crc32 is not None

    def _known(self, row: int) -> tuple[int, int]:
        """-> verdict and crc32 of the bytes that were examined; the latter is -1 if there were none."""
        if row in self._changed:
            return self._changed[row]
        if self.index.checked is not None:
            return int(self.index.checked.verdict[row]), int(self.index.checked.crc32[row])
        if self._is_fixed:  # pack has written only what DALI decodes
            return OK, int(self.index.shards.crc32[row])
        return _UNKNOWN, -1

    def read(self, row: int) -> tuple[bytes, int]:
        """-> the image's bytes and their verdict: OK, CONVERTED or TOLERANT. From any thread. Raises Broken."""
        try:
            data = self.index.read(row)
        except OSError as error:
            raise Broken(error.strerror or str(error)) from None
        crc = zlib.crc32(data)
        with self._lock:
            verdict, known = self._known(row)
        if crc != known and self._is_fixed:
            raise Broken("its bytes are not those that were packed: the same `mopro-fast pack` repairs them")
        if crc != known:
            verdict = self._examine(row, data, crc)
        if verdict in (UNREADABLE, _REFUSED):
            raise Broken(self._refusals.get(row) or self.index.checked.why(row))
        return data, verdict

    def read_clean(self, row: int) -> bytes:
        """Bytes that DALI decodes. From any thread. Raises Broken."""
        data, verdict = self.read(row)
        if verdict == OK:
            return data
        kept = self._cleaned.get(row)
        crc = zlib.crc32(data)
        if kept is not None and kept[0] == crc:
            return kept[1]
        found, cleaned = self._judged(data, row not in self._distrusted)
        if cleaned is None and found.verdict == UNREADABLE:
            raise Broken(found.reason)
        self._keep(row, crc, cleaned or data)
        return cleaned or data

    def distrust(self, row: int, reason: str) -> None:
        """DALI has refused what was read for this row: clean it from now on, or if it was clean, take it as broken."""
        with self._lock:
            verdict, crc = self._known(row)
            if verdict == OK:
                self._changed[row] = CONVERTED, crc
                self._distrusted.add(row)
            else:
                self._refusals[row] = reason
                self._changed[row] = _REFUSED, crc

    def close(self) -> None:
        """End the processes; reading may go on."""
        before, self._apart = self._apart, self._started()
        before.close()

    def _started(self) -> Apart:
        return Apart(decode.judged, _PATIENCE, self._processes)  # each process is started when it is needed

    def _examine(self, row: int, data: bytes, crc: int) -> int:
        """Judge bytes that are new or have changed, and remember it. An image that was whole must not be cut now."""
        before, _ = self._known(row)
        found, cleaned = self._judged(data)
        verdict, since = found.verdict, "" if before == _UNKNOWN else "changed since it was checked; "
        if verdict == TOLERANT and before in (OK, CONVERTED, _REFUSED):
            verdict = _REFUSED
        if verdict in (UNREADABLE, _REFUSED):
            self._refusals[row] = since + found.reason
        elif cleaned is not None:
            self._keep(row, crc, cleaned)
        with self._lock:
            self._changed[row] = verdict, crc
        return verdict

    def _judged(self, data: bytes, trusted: bool = True) -> tuple[Examined, bytes | None]:
        """decode.judged(), in another process; a second time where that ends, perhaps for lack of memory."""
        apart = self._apart
        for _ in range(2):
            try:
                return apart(data, trusted)
            except Died as died:
                why = f"it ends the process that decodes it ({died})"
            if apart is not self._apart:
                raise Broken("the loader was closed")
        return Examined(UNREADABLE, why, "", 0, 0), None

    def _keep(self, row: int, crc: int, cleaned: bytes) -> None:
        with self._lock:
            self._room += len(self._cleaned.pop(row, (0, b""))[1])
            if len(cleaned) <= self._room:
                self._room -= len(cleaned)
                self._cleaned[row] = crc, cleaned


class Reader:
    """Reads rows of ``index``, ahead of so many threads that decode."""

    def __init__(self, index: Index, decoding_threads: int) -> None:
        self._images, self._threads = Verified(index, decoding_threads), _reading_threads(decoding_threads)
        self._pool: ThreadPoolExecutor | None = None
        self.distrust = self._images.distrust

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
        names = [lambda i=i: self._images.index.name([parts[i][0], *begun[i]][-1]) for i in range(len(parts))]

        def result() -> Read:
            parts = results_of(tasks, names)
            rows = np.array([row for part in parts for row in part.rows], np.int64)
            return Read(rows, [x for part in parts for x in part.data], [x for part in parts for x in part.lost])

        return result

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None
        self._images.close()

    def _read_all(self, rows: list[int], begun: list[int], substitutes: Callable[[int], Iterable[int]] | None) -> Read:
        shown, data, lost = [], [], []
        for row in rows:
            begun.append(row)
            by = row
            try:
                encoded = self._images.read_clean(row)
            except Broken as broken:
                by, encoded = self._first(substitutes(row), row, broken) if substitutes else (-1, None)
                lost.append(Lost(row, by, str(broken)))
            if encoded is not None:
                shown.append(by)
                data.append(np.frombuffer(encoded, np.uint8))
        return Read(np.array(shown, np.int64), data, lost)

    def _first(self, candidates: Iterable[int], row: int, broken: Broken) -> tuple[int, bytes]:
        tried = 0
        for other in map(int, candidates):
            tried += 1
            try:
                return other, self._images.read_clean(other)
            except Broken:
                continue
        raise UserError(
            f"cannot read {self._images.index.name(row)} ({broken}), nor any of {tried} images tried in its place: "
            "is the storage still there?"
        )


def _reading_threads(decoding_threads: int) -> int:
    """Reading waits more than it works."""
    return max(4, decoding_threads, min(16, 2 * (os.cpu_count() or 1)))
