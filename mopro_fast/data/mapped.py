"""Tables that are mapped into memory (Arrow's IPC format): all processes of a machine share one copy of the pages.

Such a file lies beside a Parquet table, which cannot be mapped, and holds what a start needs of it. It is made again
wherever it is missing, damaged or of another table: nothing is lost with it.
"""

import contextlib
import hashlib
import json
import mmap
import os
import zlib
from typing import Any

import numpy as np
import pyarrow as pa

from mopro_fast.errors import CannotWrite
from mopro_fast.files import Busy, open_regular, replacing

SUFFIX = ".arrow"
FEWEST = 1 << 16  # rows: fewer are read from their table as fast
_MARK = b"mopro_fast.mapped"
_VERSION = 1
_REMOTE = ("nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "ceph", "gluster", "fuse", "9p", "afs", "orangefs")
_HEAD = 1 << 16  # bytes that begin with the names of the columns and the mark

Column = np.ndarray | pa.Array


def places(table: str) -> list[str]:
    """Where the file of a Parquet table may lie: beside it, and where nothing can be written there."""
    return [place.removesuffix(".parquet") + SUFFIX for place in (table, in_cache(table)) if place]


def in_cache(path: str) -> str | None:
    """A place in the user's cache folder for what cannot be written at ``path``; None: the user has no home."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    if not os.path.isabs(cache):
        return None
    digest = hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest()[:16]
    return os.path.join(cache, "mopro_fast", f"{digest}.parquet")


def state_of(path: str) -> list[int] | None:
    """What tells a file from another one of this name: its size and time of change; None: there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def kept(table: str, columns: dict[str, Column], about: dict[str, Any]) -> dict[str, Column]:
    """The columns, mapped where there are enough to be written for a later start, and they can be."""
    for path in places(table) if len(columns["label"]) >= FEWEST else ():
        with contextlib.suppress(OSError):
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            if write(path, columns, about):
                return read(path, about) or columns
    return columns


def known(table: str, about: dict[str, Any]) -> dict[str, Column] | None:
    """The columns of a table, mapped; None where there are none of what ``about`` says."""
    return next(filter(None, (read(path, about) for path in places(table))), None)


def write(path: str, columns: dict[str, Column], about: dict[str, Any]) -> bool:
    """Write columns of equal length and what they are of (JSON); -> False where that cannot be written.

    Nothing but such a file is replaced.
    """
    if os.path.lexists(path) and not _is_ours(path):
        return False
    arrays = [pa.array(column) if isinstance(column, np.ndarray) else column for column in columns.values()]
    batch = pa.record_batch(arrays, list(columns))
    about = {**about, "version": _VERSION, "crc32": _crc32(batch)}
    schema = batch.schema.with_metadata({_MARK: json.dumps(about)})
    try:
        with replacing(path) as file, pa.ipc.new_file(file, schema) as writer:
            writer.write_batch(batch)
    except Busy:  # another process writes the same
        return True
    except CannotWrite:
        return False
    return True


def read(path: str, about: dict[str, Any]) -> dict[str, Column] | None:
    """The columns, mapped and read-only; None where the file is not whole, or not of what ``about`` says.

    From a network file system they are read, not mapped.
    """
    found = about_of(path)
    if not found or {**found, **about} != found:
        return None
    with contextlib.suppress(OSError, ValueError, pa.ArrowException):
        batch = _mapped(path, whole=True).get_batch(0)
        batch.validate(full=True)
        if _crc32(batch) == found["crc32"] and not any(column.null_count for column in batch.columns):
            return {name: _taken(column) for name, column in zip(batch.schema.names, batch.columns, strict=True)}
    return None


def about_of(path: str) -> dict[str, Any]:
    """What the columns of a file are of; empty where it is no such file."""
    with contextlib.suppress(OSError, ValueError, RecursionError, TypeError, KeyError, pa.ArrowException):
        found = json.loads((_mapped(path).schema.metadata or {})[_MARK])
        if found["version"] == _VERSION and isinstance(found["crc32"], int):
            return found
    return {}


def _mapped(path: str, whole: bool = False) -> pa.ipc.RecordBatchFileReader:
    """whole: all of it will be used."""
    with open_regular(path) as file:
        # Where another machine may replace the file, its pages are gone then, and with them who looks at them.
        here = not (whole and _is_remote(os.fstat(file.fileno()).st_dev))
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if here else file.read()
        return pa.ipc.open_file(pa.py_buffer(content))


def _is_remote(device: int, mounts: str = "/proc/self/mountinfo") -> bool:
    """Whether other machines write to this file system, too."""
    number = f"{os.major(device)}:{os.minor(device)}"
    with contextlib.suppress(OSError), open(mounts) as lines:
        kinds = [line.partition(" - ")[2] for line in lines if line.split()[2] == number]
        return any(kind.startswith(_REMOTE) for kind in kinds)
    return False


def _is_ours(path: str) -> bool:
    """Also a file of another version, and one that was cut."""
    with contextlib.suppress(OSError), open_regular(path) as file:
        head = file.read(_HEAD)
        return not head or _MARK in head
    return False


def _crc32(batch: pa.RecordBatch) -> int:
    crc = zlib.crc32(batch.schema.remove_metadata().serialize(), len(batch))
    for column in batch.columns:
        for buffer in filter(None, column.buffers()):
            crc = zlib.crc32(buffer, crc)
    return crc


def _taken(column: pa.Array) -> Column:
    return column.to_numpy() if pa.types.is_primitive(column.type) else column
