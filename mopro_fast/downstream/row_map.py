"""A function of every row of some data, over all ranks; an interrupted call goes on from files on the disk.

The result has the same bytes whatever the number of ranks and interruptions, if a batch's values depend on it alone.
"""

import contextlib
import functools
import hashlib
import shutil
import time
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from mopro_fast import files
from mopro_fast.console import Progress
from mopro_fast.distributed import by_rank0, gather_lists, world
from mopro_fast.errors import UserError, first_line

_SAVE_EVERY = 60.0  # seconds of work that a kill may cost
_PART = 1 << 28  # bytes at which a part is written before that
_PIECE = 1 << 22  # bytes written at a time

_writing = functools.partial(files.writing, hint="make room there, or name another folder")

T = TypeVar("T")
Values = Callable[[list[np.ndarray]], Iterator[tuple[Tensor, Tensor]]]  # batches of rows -> (rows, values [N, width])


def compute(
    path: Path,
    rows: int,
    width: int,
    batches: list[np.ndarray],
    values: Values,
    *,
    dtype: type[np.generic] = np.float32,
    fill: float = np.nan,
    unit: str = "images",
) -> np.ndarray:
    """Write the values of every batch to ``path``, a .npy file; -> it memory-mapped, [rows, width] of ``dtype``.

    Finished parts lie beside it until it is whole. Raises UserError while another process computes it.

    path: NAME-KEY.npy; NAME stands before the progress bar. batches: int [n] rows of each. values: a generator over
    some of them, in their order. fill: the value of rows in no batch. unit: what a row is, for the progress bar.
    """
    rank, ranks = world()
    with locked(path):
        missing = by_rank0(lambda: [] if path.is_file() else _missing(path, rows, batches))
        if mine := [batches[i] for i in missing[rank::ranks]]:
            _work(path, mine, values, unit)
        gather_lists([], patient=True)  # until every rank has written its parts
        by_rank0(lambda: _join(path, np.full((1, width), fill, dtype), rows))
    with _reading(path):
        files.require_regular(path)
        found = np.load(path, mmap_mode="r")
        if (found.shape, found.dtype) != ((rows, width), np.dtype(dtype)):
            raise ValueError(f"it is {found.dtype} {list(found.shape)}")
        return found


def begun(path: Path) -> bool:
    """Whether there is anything of what :func:`compute` writes."""
    return path.is_file() or any(_parts(path))


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Refuse to compute ``path`` while another process does; rank 0 holds the lock of all ranks, a file beside it."""
    with contextlib.ExitStack() as stack:
        if world()[0] == 0:
            with _writing(path.parent):
                path.parent.mkdir(parents=True, exist_ok=True)
                busy, lock = f"another process computes {path}: wait for it", path.with_suffix(".lock")
                stack.enter_context(files.locked(str(lock), busy))
                stack.callback(lock.unlink, missing_ok=True)  # also where an error ends it
        yield


def in_order(function: Callable[..., T], batches: Iterable[tuple], device: torch.device) -> Iterator[T]:
    """``function(*batch)`` of every batch, in their order.

    On a CPU each batch is computed by one thread, and as many batches at a time as PyTorch has threads: the last bits
    of what several threads compute together depend on their number.
    """
    if device.type != "cpu":
        yield from (function(*batch) for batch in batches)
        return
    threads = torch.get_num_threads()
    running: deque[Future[T]] = deque()
    with ThreadPoolExecutor(threads, "mopro_fast-batch", torch.set_num_threads, (1,)) as pool:
        try:
            for batch in batches:
                running.append(pool.submit(function, *batch))
                if len(running) > threads:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()
            torch.set_num_threads(threads)  # new threads ask for the number set last, by any thread


def _work(path: Path, batches: list[np.ndarray], values: Values, unit: str) -> None:
    """Write the values of these batches into parts."""
    rank, ranks = world()
    name = path.stem.rpartition("-")[0] + (f" (1 of {ranks} ranks)" if ranks > 1 else "")
    done: list[tuple[Tensor, Tensor]] = []  # not written yet; on the device
    saved, size = time.monotonic(), 0
    with (
        contextlib.closing(values(batches)) as found,
        Progress(name, sum(map(len, batches)), unit, active=not rank) as bar,
    ):
        try:
            for rows, some in found:
                done.append((rows, some))
                size += some.nbytes
                bar.update(len(rows))
                if size > _PART or time.monotonic() - saved > _SAVE_EVERY:
                    _write_part(path, done)
                    done, saved, size = [], time.monotonic(), 0
        finally:
            if done:
                _write_part(path, done)


def _write_part(path: Path, done: list[tuple[Tensor, Tensor]]) -> None:
    ids, values = (torch.cat(column).cpu().numpy() for column in zip(*done, strict=True))
    name = hashlib.sha256(ids.tobytes()).hexdigest()[:16]  # other ids never replace these
    with _writing(path.parent):
        _folder(path).mkdir(exist_ok=True)
        with files.replacing(_folder(path) / f"{name}.npz") as file:
            np.savez(file, ids=ids, values=values)


def _missing(path: Path, rows: int, batches: list[np.ndarray]) -> list[int]:
    """The numbers of the batches that are not whole in the parts."""
    there = np.zeros(rows, bool)
    for part in _parts(path):
        there[_read_part(part, "ids")] = True
    return [i for i, batch in enumerate(batches) if not there[batch].all()]


def _join(path: Path, unread: np.ndarray, rows: int) -> None:
    """Write ``path`` from its parts, unless it is there, and remove them. unread: [1, width], a row in no part."""
    if not path.is_file():
        with _writing(path.parent), files.replacing(path) as file:
            header = {"descr": unread.dtype.str, "fortran_order": False, "shape": (rows, unread.shape[1])}
            np.lib.format.write_array_header_1_0(file, header)
            start, each = file.tell(), unread.nbytes  # bytes of a row
            piece = unread.repeat(-(-_PIECE // each), 0)
            for first in range(0, rows, len(piece)):
                file.write(piece[: rows - first])
            for part in _parts(path):
                ids, values = (_read_part(part, name) for name in ("ids", "values"))
                order = ids.argsort()
                ids, values = ids[order], values[order]
                runs = np.flatnonzero(np.diff(ids, prepend=-2) != 1)  # where ids do not follow one another
                for first, some in zip(runs, np.split(values, runs[1:]), strict=True):
                    file.seek(start + int(ids[first]) * each)
                    file.write(some)
    shutil.rmtree(_folder(path), ignore_errors=True)


def _read_part(path: Path, name: str) -> np.ndarray:
    with _reading(path), files.open_regular(path) as file, np.load(file) as found:
        return found[name]


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, EOFError, KeyError, IndexError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {path} ({first_line(error)}): remove it, to have it computed again") from None


def _parts(path: Path) -> list[Path]:
    return sorted(_folder(path).glob("*.npz"))


def _folder(path: Path) -> Path:
    return path.with_suffix(".parts")
