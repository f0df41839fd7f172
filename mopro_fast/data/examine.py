"""What the processes of a check do: they examine files, and write what they find into a part of their own.

Nothing here imports PyTorch, which would take each process seconds.
"""

import contextlib
import json
import secrets
import time
from collections.abc import Iterable, Iterator
from typing import IO, Any, NamedTuple

import pyarrow as pa

from mopro_fast.data.decode import examine_files
from mopro_fast.data.paths import Paths
from mopro_fast.errors import CannotWrite
from mopro_fast.files import append, open_regular

FOUND = pa.schema(
    [
        ("path", pa.large_binary()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("format", pa.string()),
        ("verdict", pa.string()),
        ("reason", pa.string()),
        ("bytes", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("crc32", pa.int64()),
    ]
)
_FILES, _SECONDS = 256, 0.5  # after which a process hands over what it has: a kill costs no more
_READ = 1 << 23  # bytes of a part that are read at a time
_part: IO[bytes] | None = None  # of this process


class Unwritten(NamedTuple):
    """A part cannot be written; the check goes on."""

    message: str
    strerror: str


def examine(root: str, names: pa.Array, parts: str | None) -> Iterator[pa.Table | Unwritten]:
    """What is found in these files, a piece at a time. parts: what the names of parts begin with; None: there are none.

    A part has a JSON list per line: what is read of it is whole whenever its process ends.
    """
    found, since = [], time.monotonic()
    for item in examine_files(root, Paths(names)):
        found.append(item)
        if len(found) == _FILES or time.monotonic() - since > _SECONDS:
            yield from _handed_over(found, parts)
            found, since = [], time.monotonic()
    if found:
        yield from _handed_over(found, parts)


def _handed_over(found: list[tuple], parts: str | None) -> Iterator[pa.Table | Unwritten]:
    global _part
    if parts is not None:
        try:
            if _part is None:
                _part = _new(parts)
            append(_part, "".join(json.dumps(item) + "\n" for item in found).encode())
        except CannotWrite as error:
            yield Unwritten(str(error), error.strerror)
    yield table(found)


def _new(parts: str) -> IO[bytes]:
    path = f"{parts}.{secrets.token_hex(4)}"
    try:
        return open(path, "xb", buffering=0)
    except OSError as error:
        raise CannotWrite(path, error) from None


def table(found: list) -> pa.Table:
    """The columns FOUND of such lists."""
    paths, *columns = zip(*found, strict=True) if found else [[]] * len(FOUND)
    arrays = [pa.array(c, f.type) for c, f in zip(columns, list(FOUND)[1:], strict=True)]
    return pa.table([Paths(paths).column, *arrays], schema=FOUND)


def read_part(path: str) -> pa.Table:
    """What an interrupted check has found, the newest first. A power failure may have left zeros in place of lines."""
    pieces = []
    with open_regular(path) as file:
        while lines := file.readlines(_READ):
            pieces.append(_of_lines(reversed(lines)))
    return pa.concat_tables([*reversed(pieces), FOUND.empty_table()])


def _of_lines(lines: Iterable[bytes]) -> pa.Table:
    found = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):  # its process was ended while it wrote
            found.append(json.loads(line))
    try:
        return table(found)
    except (ValueError, TypeError, pa.ArrowException):  # a line that no check has written
        return table(list(filter(_is_row, found)))


def _is_row(found: Any) -> bool:
    try:
        return len(table([found])) == 1
    except (ValueError, TypeError, pa.ArrowException):
        return False
