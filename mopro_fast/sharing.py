"""What rank 0 has, on every rank: large arrays lie once per machine, in a file that its ranks map into memory.

Pickle (protocol 5) gives the buffers of NumPy's and Arrow's arrays apart from the rest. Rank 0 writes them into a file;
ranks that cannot open it are on another machine, where one of them writes a copy. The file loses its name once all have
mapped it: it goes with the last process.
"""

import contextlib
import mmap
import os
import pickle
import secrets
import socket
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from mopro_fast.errors import CannotWrite

LEAST = 1 << 16  # bytes of a buffer that is shared; smaller ones are sent
_ALIGNED = 64  # bytes, as Arrow wants its buffers
_PIECE = 1 << 24  # bytes sent at a time


def shared(value: Any, group: dist.ProcessGroup) -> Any:
    """Rank 0's ``value`` (something picklable) on every rank; large arrays are read-only. Raises CannotWrite."""
    rank, box = dist.get_rank(), [None]
    if rank == 0:
        buffers: list[pickle.PickleBuffer] = []
        pickled = pickle.dumps(value, 5, buffer_callback=lambda b: b.raw().nbytes < LEAST or buffers.append(b))
        sizes = [b.raw().nbytes for b in buffers]
        box = [(pickled, sizes, _write(_with_name(buffers)) if buffers else None)]
        del value, buffers
    dist.broadcast_object_list(box, 0, group=group)
    pickled, sizes, file = box[0]
    if file is None:
        return pickle.loads(pickled)
    content = _mapped(*file)
    # Machines on which it is not there get copies.
    without: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(without, _machine() if content is None else None, group=group)
    own = file[0] if rank == 0 else None
    if any(without):
        writes = content is None and without.index(_machine()) == rank
        pieces = _pieces(content if rank == 0 else None, group)
        copy = _write(pieces) if writes else None
        deque(pieces, maxlen=0)  # a rank that writes nothing takes part
        copies: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(copies, copy, group=group)
        if content is None:
            content = _mapped(*copies[without.index(_machine())])
        own = copy[0] if writes else own
    dist.barrier(group)
    if own is not None:
        os.unlink(own)
    ends = np.cumsum([_ALIGNED, *(size + -size % _ALIGNED for size in sizes)]).tolist()
    views = [memoryview(content)[first : first + size] for first, size in zip(ends, sizes, strict=False)]
    return pickle.loads(pickled, buffers=views)


def _with_name(buffers: list[pickle.PickleBuffer]) -> Iterator[bytes | memoryview]:
    """What the file holds: bytes that no other file begins with; the buffers."""
    yield secrets.token_bytes(_ALIGNED)
    for buffer in buffers:
        yield buffer.raw()
        yield bytes(-buffer.raw().nbytes % _ALIGNED)


def _write(pieces: Iterable[bytes | memoryview]) -> tuple[str, bytes]:
    """-> the path of a new file, and how it begins."""
    folder, path, name = tempfile.gettempdir(), None, b""
    try:
        number, path = tempfile.mkstemp(prefix="mopro_fast-", dir=folder)
        with open(number, "wb") as file:
            for piece in pieces:
                name = name or bytes(piece[:_ALIGNED])
                file.write(piece)
    except BaseException as error:
        if path is not None:
            os.unlink(path)
        if isinstance(error, OSError):
            raise CannotWrite(path or folder, error, "set TMPDIR to another folder") from None
        raise
    return path, name


def _mapped(path: str, name: bytes) -> mmap.mmap | None:
    with contextlib.suppress(OSError, ValueError), open(path, "rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return content if content[: len(name)] == name else None
    return None


def _machine() -> str:
    """The same for ranks that see the same files."""
    return f"{socket.gethostname()} {os.stat(tempfile.gettempdir()).st_dev}"


def _pieces(content: mmap.mmap | None, group: dist.ProcessGroup) -> Iterator[bytes]:
    """Rank 0's content on every rank."""
    box = [0 if content is None else len(content)]
    dist.broadcast_object_list(box, 0, group=group)
    for first in range(0, box[0], _PIECE):
        size = min(_PIECE, box[0] - first)
        piece = torch.empty(size, dtype=torch.uint8)
        if content is not None:
            piece = torch.frombuffer(bytearray(content[first : first + size]), dtype=torch.uint8)
        dist.broadcast(piece, 0, group=group)
        yield piece.numpy().tobytes()
