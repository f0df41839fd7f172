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
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from mopro_fast.errors import UserError

LEAST = 1 << 16  # bytes of a buffer that is shared; smaller ones are sent
_ALIGNED = 64  # bytes, as Arrow wants its buffers
_PIECE = 1 << 24  # bytes sent at a time


class Packed(NamedTuple):
    """Something that rank 0 has written for the others."""

    pickled: bytes
    sizes: list[int]
    """Bytes of each large buffer."""
    path: str | None
    """The file of these; None: there are none."""
    name: bytes
    """What the file begins with."""
    machine: str

    def remove(self) -> None:
        """The file's name: who has mapped it keeps it."""
        if self.path is not None:
            with contextlib.suppress(OSError):
                os.unlink(self.path)


def pack(value: Any) -> Packed:
    """On rank 0. value: something picklable. Raises a UserError where the file cannot be written."""
    buffers: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(value, 5, buffer_callback=lambda b: b.raw().nbytes < LEAST or buffers.append(b))
    name, sizes = secrets.token_bytes(_ALIGNED), [b.raw().nbytes for b in buffers]
    padded = (piece for b in buffers for piece in (b.raw(), bytes(-b.raw().nbytes % _ALIGNED)))
    return Packed(pickled, sizes, _write(chain([name], padded)) if buffers else None, name, _machine())


def unpack(packed: Packed | None, group: dist.ProcessGroup) -> Any:
    """What rank 0 has packed, on every rank: large arrays are read-only. Others have None."""
    rank, box, own = dist.get_rank(), [packed], None
    try:
        dist.broadcast_object_list(box, 0, group=group)
        packed = box[0]
        if packed.path is None:
            return pickle.loads(packed.pickled)
        content = _mapped(packed.path, packed.name) if packed.machine == _machine() else None
        # Machines on which the file is not there get copies.
        without = _of_all(_machine() if content is None else None, group)
        if any(without):
            pieces = _pieces(content if rank == 0 else None, group)
            written = None
            if content is None and without.index(_machine()) == rank:
                try:
                    written = own = _write(pieces)
                except UserError as error:
                    written = error
            deque(pieces, maxlen=0)  # a rank that writes nothing takes part
            copies = _of_all(written, group)
            for error in copies:
                if isinstance(error, UserError):
                    raise error
            if content is None:
                content = _mapped(copies[without.index(_machine())], packed.name)
        if None in _of_all(content and True, group):
            raise UserError(f"ranks cannot share {packed.path}: set TMPDIR to a folder of each machine's own")
    finally:
        if own is not None:
            with contextlib.suppress(OSError):
                os.unlink(own)
    ends = np.cumsum([_ALIGNED, *(size + -size % _ALIGNED for size in packed.sizes)]).tolist()
    views = [memoryview(content)[first : first + size] for first, size in zip(ends, packed.sizes, strict=False)]
    return pickle.loads(packed.pickled, buffers=views)


def _of_all(value: Any, group: dist.ProcessGroup) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def _write(pieces: Iterable[bytes | memoryview]) -> str:
    """-> the path of a new file. Raises a UserError."""
    folder, path = tempfile.gettempdir(), None
    try:
        number, path = tempfile.mkstemp(prefix="mopro_fast-", dir=folder)
        with open(number, "wb") as file:
            for piece in pieces:
                file.write(piece)
        return path
    except BaseException as error:
        if path is not None:
            os.unlink(path)
        if isinstance(error, OSError):
            raise UserError(
                f"cannot write {path or folder}, which ranks share: {error.strerror}: make room there, or set TMPDIR "
                "to another folder"
            ) from None
        raise


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
