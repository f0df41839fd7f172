"""``mopro-fast check DATA``: read every image once, write down what each is worth, and say what is wrong.

The result is a Parquet file with a row per image, in the order of the data. A later call, of this command or of
training, reads only files that are new or whose size or time of change differ. While a check runs, its results go
line by line into a file beside it, from which an interrupted check goes on.
"""

import contextlib
import errno
import hashlib
import json
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import tyro

from mopro_fast.console import Progress, escaped, tell
from mopro_fast.data import workers as processes
from mopro_fast.data.decode import CANNOT_READ, CONVERTED, OK, UNREADABLE, VERDICTS, crash_reason, examine_files
from mopro_fast.data.index import Checked, Index, load_index, synsets, val_layout
from mopro_fast.data.paths import Paths, shown
from mopro_fast.data.shards import is_pack, verify_pack
from mopro_fast.distributed import say
from mopro_fast.errors import CannotWrite, UserError, require_resources
from mopro_fast.files import Busy, append, locked, open_regular, replacing

FILE = ".mopro_fast_index.parquet"
EXAMPLES = 3  # named per kind of fault
_MARK = b"mopro_fast.check"
_VERSION = b"2"  # of the verdicts' meaning: raise it, and everything is read again
_CHUNK = 64  # files a worker is given at a time
_POLL = 0.2  # seconds between two looks for another process's check
_STAT_THREADS = 16  # a network file system answers each stat in a millisecond
_SLOW = 120.0  # seconds for all of them, after which that is said
_SCHEMA = pa.schema(
    [
        ("path", pa.string()),  # binary where a name is not UTF-8; in memory always large_binary
        ("label", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("format", pa.string()),
        ("verdict", pa.string()),
        ("reason", pa.string()),
        ("bytes", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("crc32", pa.int64()),
    ],
    metadata={_MARK: _VERSION},
)
_HELD = pa.schema([_SCHEMA.field(0).with_type(pa.large_binary()), *list(_SCHEMA)[1:]])
_FOUND = _HELD.remove(1)  # what reading a file finds


def check(
    index: Index, *, workers: int, progress: bool, path: str | None = None, forget: bool = False, required: bool = True
) -> Checked:
    """Read what ``path`` (default: default_path(index)) does not know of the index's files yet; write it there.

    workers: processes. forget: leave out what ``path`` knows of files that are not in ``index``; a check of a part of
    the data should not. required: raise a UserError where another process writes ``path``, or neither ``path`` nor
    the user's cache folder can be written; else wait for the other one, and do without the file.
    """
    named = path is not None
    foreign = _is_foreign(path or default_path(index), named)
    if foreign and required:
        raise UserError(f"{foreign}: remove it, or set --index to another place")
    path, files = path or default_path(index), _stat(index)
    # 1. If all is known nothing is locked or written: trainings that begin together need not wait for each other.
    for place in () if forget else filter(None, (path, _in_cache(path))):
        old = _read(place)
        rows = _rows_of(old, index.paths)
        if len(old) and _holds(old, rows, files).all():
            found = old.take(rows)
            if np.array_equal(found["label"].to_numpy(), index.labels):
                return _checked(found, place, 0)
    with _open_partial(path, required, foreign) as partial:
        old = _read(partial.path, tell=True)
        if named and len(old) and not (_rows_of(old, index.paths) >= 0).any():
            raise UserError(f"{path} is the index of other images: remove it, or name another --index")
        known = pa.concat_tables([partial.read(), old.select(_FOUND.names)])
        # 2. Read what is not known or has changed.
        todo = np.flatnonzero(~_holds(known, _rows_of(known, index.paths), files))
        new = []
        with Progress("check", len(todo), "images", active=progress) as bar:
            for result in _examine_all(index, todo, workers):
                partial.add(result)
                new.append(result)
                bar.update()
        # 3. Write all, if anything is new.
        known = pa.concat_tables([_table(new), known])
        table = known.take(_rows_of(known, index.paths)).add_column(1, _HELD.field("label"), [index.labels])
        others = old.take(np.flatnonzero(_rows_of(table, Paths(old["path"])) < 0)) if not forget else old.slice(0, 0)
        written = pa.concat_tables([table, others]).combine_chunks()
        if not written.equals(old):
            partial.finish(written)
        return _checked(table, partial.path, len(todo))


def _is_foreign(path: str, named: bool) -> str | None:
    """Why the index would replace something else, if it would. named: a damaged file may be anything."""
    partial = f"{path}.partial"
    for file in (path, partial):
        if os.path.lexists(file) and not os.path.isfile(file):
            return f"{file} is no file"
    try:
        ours = not os.path.isfile(path) or _MARK in (pq.read_schema(path).metadata or {})
    except (OSError, pa.ArrowInvalid) as error:
        require_resources(error, path)
        ours = not named
    if not ours:
        return f"{path} is no index of `mopro-fast check`"
    with contextlib.suppress(OSError), open_regular(partial) as file:
        begun = file.read(1 << 12).lstrip(b"\0\n")  # a power failure may have left zeros
        if begun and not begun.startswith(b'["'):
            return f"{partial} is no unfinished check"
    return None


def _holds(known: pa.Table, rows: np.ndarray, files: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """bool [n]: what these rows of ``known`` say (-1: none) is of the files as they are now, with these _stat()s."""
    present, (size, mtime) = rows >= 0, files
    if not len(known):
        return present
    holds = present & (known["bytes"].to_numpy()[rows] == size) & (known["mtime_ns"].to_numpy()[rows] == mtime)
    failed = pc.starts_with(known["reason"], CANNOT_READ).to_numpy(zero_copy_only=False)
    holds[present] &= ~failed[rows[present]]  # permissions, network or memory may be better now
    return holds


def _checked(table: pa.Table, path: str, read: int) -> Checked:
    verdict = pc.index_in(table["verdict"], value_set=pa.array(VERDICTS)).to_numpy().astype(np.uint8)
    numbers = [table[name].to_numpy() for name in ("bytes", "mtime_ns", "crc32", "width", "height")]
    return Checked(verdict, *numbers, table["reason"].to_pylist(), path, read)


def default_path(index: Index) -> str:
    """Beside the list file, if the data is one, else in the folder that the paths start from."""
    return f"{index.list_file}.index.parquet" if index.list_file else os.path.join(index.root, FILE)


def _examine_all(index: Index, rows: np.ndarray, workers: int) -> Iterator[tuple]:
    """The columns of _FOUND for these rows of the index, in any order."""
    chunks = [index.paths[rows[i : i + _CHUNK]].tolist() for i in range(0, len(rows), _CHUNK)]
    tasks: deque[tuple] = deque((index.root, chunk) for chunk in chunks)
    finished: Counter[int] = Counter()  # files, by task
    with contextlib.closing(processes.run(examine_files, tasks, workers)) as items:
        for task, item in items:
            if isinstance(item, processes.Done):
                del finished[id(task)]
            elif isinstance(item, processes.Crashed):
                left = task[1][finished.pop(id(task), 0) :]
                for path in left[:1]:
                    state = _state(os.path.join(index.root, path))
                    yield path, 0, 0, "", VERDICTS[UNREADABLE], crash_reason(item), *state, -1
                if left[1:]:
                    tasks.append((index.root, left[1:]))
            else:
                finished[id(task)] += 1
                yield item


def _stat(index: Index) -> tuple[np.ndarray, np.ndarray]:
    """int64 [n]: sizes and times of change now; -1 where there is no file."""
    slow = f"still looking at {len(index)} files of {index.source}: does the storage answer?"
    timer = threading.Timer(_SLOW, say, [slow])
    timer.daemon = True
    timer.start()
    with ThreadPoolExecutor(_STAT_THREADS) as pool:
        found = pool.map(lambda i: _state(index.full_path(i)), range(len(index)))
        states = np.fromiter(found, np.dtype((np.int64, 2)), len(index))
    timer.cancel()
    return states[:, 0], states[:, 1]


def _state(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError as error:
        require_resources(error, shown(path))
        return -1, -1
    return status.st_size, status.st_mtime_ns


class _Partial:
    """Where a check writes. Without a file, and once one cannot be written that is not required, it keeps nothing."""

    def __init__(self, path: str, file: IO[bytes] | None, required: bool) -> None:
        self.path, self._file, self._required = path, file, required

    def read(self) -> pa.Table:
        """What an interrupted check found, the newest first; a line that it did not finish is cut off.

        A power failure may have left zeros in place of others.
        """
        found = []
        with self._writing():
            if self._file is not None:
                self._file.seek(0)
                text = self._file.read()
                complete = text[: text.rfind(b"\n") + 1]
                self._file.truncate(len(complete))
                for line in reversed(complete.splitlines()):
                    with contextlib.suppress(ValueError, RecursionError):
                        found.append(json.loads(line))
        try:
            return _table(found)
        except (ValueError, TypeError, pa.ArrowException):  # a line that no check has written
            return _table(list(filter(_is_row, found)))

    def add(self, result: tuple) -> None:
        with self._writing():
            if self._file is not None:
                append(self._file, json.dumps(result).encode() + b"\n")

    def finish(self, table: pa.Table) -> None:
        named = table.set_column(0, "path", Paths(table["path"]).for_table())
        with self._writing():
            if self._file is not None:
                with replacing(self.path) as file:
                    pq.write_table(named.replace_schema_metadata(_SCHEMA.metadata), file, compression="zstd")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, CannotWrite) as error:
            if self._required:
                raise (error if isinstance(error, CannotWrite) else CannotWrite(self.path, error)) from None
            say(f"{self.path} cannot be written ({error.strerror}): the result of the check is not kept")
            self._file = None


@contextlib.contextmanager
def _open_partial(path: str, required: bool = True, foreign: str | None = None) -> Iterator[_Partial]:
    """The partial file beside the Parquet file at ``path`` or in the cache folder, locked; removed at a normal end.

    foreign: why it cannot be at ``path``.
    """
    place = _writable(path, required, foreign)
    if place is None:
        yield _Partial(path, None, required)
        return
    with contextlib.ExitStack() as stack:
        try:
            said = required
            while True:
                try:
                    file = stack.enter_context(locked(f"{place}.partial", f"another check writes {place}: wait for it"))
                    break
                except Busy:
                    if required:
                        raise
                if not said:
                    say(f"another process checks the same images: waiting for {place}")
                    said = True
                time.sleep(_POLL)
        except OSError as error:
            raise CannotWrite(place, error, "set --index to another place") from None
        yield _Partial(place, file, required)


def _writable(path: str, required: bool, foreign: str | None) -> str | None:
    """``path``, or a place in the user's cache folder where nothing can be written beside it; None: nowhere."""
    reasons = [foreign] if foreign else []
    for place in filter(None, (None if foreign else path, _in_cache(path))):
        try:
            if place != path:
                os.makedirs(os.path.dirname(place), exist_ok=True)
            number = os.open(f"{place}.partial", os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK, 0o666)
            with contextlib.suppress(OSError):
                os.close(number)
        except OSError as error:
            if required and error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise CannotWrite(place, error, "set --index to another place") from None
            reasons.append(f"{place} cannot be written ({error.strerror})")
            continue
        if reasons:
            say(f"{reasons[0]}: the index is {place}")
        return place
    if required:
        raise UserError(f"{', '.join(reasons)}: set --index to another place")
    say(f"{', '.join(reasons)}: the result of the check is not kept")
    return None


def _in_cache(path: str) -> str | None:
    """Where it goes if nothing can be written at ``path``; None: the user has no home."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    if not os.path.isabs(cache):
        return None
    return os.path.join(
        cache, "mopro_fast", f"{hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest()[:16]}.parquet"
    )


def _read(path: str, tell: bool = False) -> pa.Table:
    """An earlier result; empty if there is none that can be used. tell: say where that is for its version."""
    try:
        table = pq.read_table(path, memory_map=False)
        known = pc.all(pc.is_in(table["verdict"], value_set=pa.array(VERDICTS))).as_py()
        whole = not any(column.null_count for column in table.columns)
        version = (table.schema.metadata or {}).get(_MARK)
        if version == _VERSION and whole and known is not False:
            return table.cast(_HELD)
        if tell and version not in (None, _VERSION):
            say(f"{path} is of another version of mopro_fast: every image is read again")
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        require_resources(error, path)
    return _HELD.empty_table()


def _table(found: list) -> pa.Table:
    paths, *columns = zip(*found, strict=True) if found else [[]] * len(_FOUND)
    arrays = [pa.array(c, f.type) for c, f in zip(columns, list(_FOUND)[1:], strict=True)]
    return pa.table([Paths(paths).column, *arrays], schema=_FOUND)


def _is_row(found: Any) -> bool:
    try:
        return len(_table([found])) == 1
    except (ValueError, TypeError, pa.ArrowException):
        return False


def _rows_of(table: pa.Table, paths: Paths) -> np.ndarray:
    """int64: the table's first row of each path; -1: none."""
    return Paths(table["path"]).rows_of(paths)


@dataclass
class Check:
    """Read every image of the data once; write an index (Parquet) and say which files are odd or broken, and why."""

    data: Annotated[str, tyro.conf.Positional]
    """A WebVision folder, a list file ("path label" per line), a folder of class folders, or what `pack` made."""
    layout: Literal["auto", "webvision", "list", "folder"] = "auto"
    """Layout of the data; auto looks."""
    root: str | None = None
    """Folder that the paths of a list file start from (default: the list's own folder)."""
    index: str | None = None
    """The index to write (default: .mopro_fast_index.parquet in the folder that the images' paths start from, or
    LIST.index.parquet beside a list file). The validation split's gets ".val" after its name."""
    workers: int = 0
    """Processes (0: one per core)."""


def main(argv: list[str]) -> int:
    """-> 0; 1 when nothing can be read or, of a pack, when anything has changed since."""
    options = tyro.cli(Check, args=argv, prog="mopro-fast check")
    workers = worker_count(options.workers)
    if is_pack(options.data):
        wrong = verify_pack(options.data, workers)
        again = f"{len(wrong)} files of this pack are not as they were made: run the same `mopro-fast pack` again"
        for line in (*wrong, again if wrong else f"{options.data}: every file is as it was made"):
            tell(escaped(line))
        return 1 if wrong else 0
    readable, splits = 0, load_splits(options.data, options.layout, options.root)
    paths = {split: options.index and options.index + ("" if split == "train" else f".{split}") for split in splits}
    for path in filter(None, paths.values()):
        if foreign := _is_foreign(path, named=True):  # before the first, which may take hours
            raise UserError(f"{foreign}: remove it, or name another --index")
    for split, index in splits.items():
        path = paths[split]
        checked = check(index, workers=workers, progress=True, path=path, forget=True)
        readable += (checked.verdict != UNREADABLE).sum()
        tell(f"{split}: {summary(index, checked)}")
    return 0 if readable else 1


def summary(index: Index, checked: Checked) -> str:
    """How many images of each verdict, and by kind of fault how many with up to EXAMPLES of them."""
    counts = np.bincount(checked.verdict, minlength=len(VERDICTS)).tolist()
    meaning = ("as they are", "need converting", "damaged, read as far as they go", "cannot be read")
    shares = ", ".join(f"{n} {text}" for n, text in zip(counts, meaning, strict=True) if n)
    lines = [f"{len(index)} images: {shares} ({checked.read} read now); index: {checked.path}"]
    kinds: dict[tuple[int, str], list[int]] = {}
    for i in np.flatnonzero(checked.verdict != OK):
        kind = checked.reason[i] if checked.verdict[i] == CONVERTED else checked.reason[i].partition(": ")[0]
        kinds.setdefault((-int(checked.verdict[i]), kind), []).append(i)
    for (verdict, kind), rows in sorted(kinds.items(), key=lambda item: (item[0][0], -len(item[1]), item[0][1])):
        lines.append(f"  {len(rows):7d} {VERDICTS[-verdict]}: {kind}")
        for i in rows[:EXAMPLES]:
            detail = checked.reason[i][len(kind) + 2 :]
            lines.append(f"            {shown(index.paths[i])}{f': {detail}' if detail else ''}")
    return "\n".join(lines)


def load_splits(data: str, layout: str, root: str | None, val: str | None = None) -> dict[str, Index]:
    """By name the splits that the data has ("train", "val"); val: other data for the second.

    Whatever the labels and however many classes; images of lists may be missing.
    """
    anything = {"num_classes": None, "missing": True}
    splits = {"train": load_index(data, "train", layout=layout, root=root, **anything)}
    anything["classes"] = splits["train"].classes or synsets(data)
    if val:
        splits["val"] = load_index(val, "val", root=root, **anything)
    elif own := val_layout(data, layout):
        splits["val"] = load_index(data, "val", layout=own, **anything)
    return splits


def worker_count(given: int) -> int:
    if given < 0:
        raise UserError(f"--workers must be at least 0, got {given}")
    return given or len(os.sched_getaffinity(0))
