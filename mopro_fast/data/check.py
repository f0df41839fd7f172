"""``mopro-fast check DATA``: read every image once, write down what each is worth, and say what is wrong.

The result is a Parquet file with a row per image, in the order of the data, and a copy that is mapped into memory
(mapped.py). A later call, of this command or of training, reads only files that are new or whose size or time of change
differ. While a check runs, its processes write what they find into parts beside it, from which an interrupted check
goes on.
"""

import contextlib
import os
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tyro

from mopro_fast.console import Progress, escaped, tell
from mopro_fast.data import mapped
from mopro_fast.data import workers as processes
from mopro_fast.data.decode import CANNOT_READ, CONVERTED, OK, UNREADABLE, VERDICTS, crash_reason
from mopro_fast.data.examine import FOUND, Unwritten, examine
from mopro_fast.data.examine import table as table_of_found
from mopro_fast.data.index import Checked, Index, load_index, synsets, table_of, val_layout
from mopro_fast.data.parts import HELD, Parts, is_foreign, open_parts, read_table
from mopro_fast.data.paths import Paths, shown
from mopro_fast.data.shards import is_pack, verify_pack
from mopro_fast.data.stats import stats
from mopro_fast.distributed import say
from mopro_fast.errors import UserError

EXAMPLES = 3  # named per kind of fault
_CHUNK = 64, 1024  # files that a worker is given at a time: fewest, and most
_TRIED = 256  # of the files that could not be read, before all of them are tried again without a record
_BUDGET = 120.0  # seconds that a training compares files with an earlier check


def check(
    index: Index,
    *,
    workers: int,
    progress: bool,
    path: str | None = None,
    forget: bool = False,
    required: bool = True,
    trust: bool = False,
) -> Checked:
    """Read what ``path`` (default: default_path(index)) does not know of the index's files yet; write it there.

    workers: processes. forget: leave out what ``path`` knows of files that are not in ``index``; a check of a part of
    the data should not. required: raise a UserError where another process writes ``path``, or neither ``path`` nor
    the user's cache folder can be written; else wait for the other one, do without the file, and compare no more files
    with what is known than _BUDGET allows: a loader compares what it reads all the same. trust: compare none.
    """
    named = path is not None
    path = path or default_path(index)
    foreign = is_foreign(path, named)
    if foreign and required:
        raise UserError(f"{foreign}: remove it, or set --index to another place")
    files = None if trust else _Files(index, None if required else _BUDGET, progress)
    # 1. If all is known nothing is locked or written: trainings that begin together need not wait for each other.
    for place in filter(None, (path, mapped.in_cache(path))):
        found = _known(path, place, index, forget)
        if found is None or (files and not files.are(found["bytes"], found["mtime_ns"]).all()):
            continue
        again = np.flatnonzero(_failed(found["reason"]))
        some = again[:: max(1, len(again) // _TRIED)]
        if all(_is_unchanged(index, found, rows, workers, progress) for rows in (some, np.setdiff1d(again, some))):
            Parts(place, required=False).remove_left()
            return _checked(found, place, len(again))
    with open_parts(path, required, foreign) as parts:
        old = read_table(parts.path, tell=True)
        if named and len(old) and not (_rows_of(old, index.paths) >= 0).any():
            raise UserError(f"{path} is the index of other images: remove it, or name another --index")
        known = pa.concat_tables([parts.read(), old.select(FOUND.names)])
        # 2. Read what is not known or has changed.
        rows = _rows_of(known, index.paths)
        holds = rows >= 0
        if holds.any():
            holds &= ~_failed(known["reason"])[rows]
            if files:
                holds &= files.are(known["bytes"].to_numpy()[rows], known["mtime_ns"].to_numpy()[rows])
        todo = np.flatnonzero(~holds)
        new = _read_files(index, todo, workers, progress, parts)
        # 3. Write all, if anything is new.
        if len(new):
            known = pa.concat_tables([new, known])
            rows = _rows_of(known, index.paths)
        table = known.take(rows).add_column(1, HELD.field("label"), [index.labels])
        others = old.slice(0, 0)
        if len(old) and not forget:
            others = old.take(np.flatnonzero(_rows_of(table, Paths(old["path"])) < 0))
        written = pa.concat_tables([table, others]).combine_chunks()
        if not written.equals(old):
            parts.finish(written)
        parts.remove()
        return _kept(path, parts.path, index, table, len(others), len(todo))


def _known(path: str, place: str, index: Index, forget: bool) -> dict[str, mapped.Column] | None:
    """What the table at ``place`` knows of the index's files, if it knows all of them, and their labels."""
    about = {"digest": index.digest(), "table": mapped.state_of(place)}
    if about["table"] is None:
        return None
    if (found := mapped.known(path, about | {"others": 0} if forget else about)) is not None:
        return found
    old = HELD.empty_table() if forget else read_table(place)
    rows = _rows_of(old, index.paths)
    if not len(old) or (rows < 0).any():
        return None
    table = old.take(rows)
    if not np.array_equal(table["label"].to_numpy(), index.labels):
        return None
    return mapped.kept(path, _columns(index, table), about | {"others": len(old), "made_of": index.made_of})


def _kept(path: str, place: str, index: Index, table: pa.Table, others: int, read: int) -> Checked:
    """What a check has found, mapped from now on. place: of its table, which has so many ``others``."""
    about = {"digest": index.digest(), "table": mapped.state_of(place), "others": others, "made_of": index.made_of}
    columns = _columns(index, table)
    return _checked(columns if about["table"] is None else mapped.kept(path, columns, about), place, read)


class _Files:
    """The files of an index as they are now; looked at when that is first asked for."""

    def __init__(self, index: Index, seconds: float | None, progress: bool) -> None:
        self._index, self._seconds, self._progress, self._stats = index, seconds, progress, index.stats
        self._said = False

    def are(self, size: np.ndarray, mtime_ns: np.ndarray) -> np.ndarray:
        """bool [n]: as they were, or not looked at for lack of time."""
        s, n = self._stats or stats(self._index.root, self._index.paths, self._seconds, self._progress), len(size)
        self._stats = s
        if s.looked < n and not self._said:
            self._said = True
            say(
                f"{self._index.source}: {s.looked} of {n} files are compared with the last check, others not for lack "
                "of time: these are taken as they were (--trust-index True compares none)"
            )
        same = (size == s.size) & (mtime_ns == s.mtime_ns)
        same[s.looked :] = True
        return same


def _failed(reason: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """bool [n]: a file that could not be read; permissions, network or memory may be better now."""
    return pc.starts_with(reason, CANNOT_READ).to_numpy(zero_copy_only=False)


def _columns(index: Index, table: pa.Table) -> dict[str, mapped.Column]:
    """The columns that are mapped."""
    verdict = pc.fill_null(pc.index_in(table["verdict"], value_set=pa.array(VERDICTS)), UNREADABLE)
    numbers = {name: table[name].to_numpy() for name in ("bytes", "mtime_ns", "crc32", "width", "height")}
    reason = table["reason"].cast(pa.large_string()).combine_chunks()
    own = {"path": index.paths.column, "label": index.labels}
    return own | numbers | {"verdict": verdict.to_numpy().astype(np.uint8), "reason": reason}


def _is_unchanged(
    index: Index, known: dict[str, mapped.Column], rows: np.ndarray, workers: int, progress: bool
) -> bool:
    """Whether these rows are read with the result that is known. Nothing is written."""
    if not len(rows):
        return True
    new = _read_files(index, rows, workers, progress, Parts("", required=False, is_kept=False))
    new = new.take(_rows_of(new, index.paths[rows]))
    verdicts = pa.array(VERDICTS).take(pa.array(known["verdict"][rows]))
    same = new["reason"].equals(pa.chunked_array([known["reason"].take(pa.array(rows)).cast(pa.string())]))
    numbers = (np.array_equal(new[name].to_numpy(), known[name][rows]) for name in ("bytes", "mtime_ns", "crc32"))
    return same and new["verdict"].equals(pa.chunked_array([verdicts])) and all(numbers)


def _checked(columns: dict[str, mapped.Column], path: str, read: int) -> Checked:
    names = ("verdict", "bytes", "mtime_ns", "crc32", "width", "height", "reason")
    return Checked(*(columns[name] for name in names), path, read)


def default_path(index: Index) -> str:
    return table_of(index.root, index.list_file)


def _read_files(index: Index, rows: np.ndarray, workers: int, progress: bool, parts: Parts) -> pa.Table:
    """The columns of FOUND for these rows of the index, in any order."""
    new = [FOUND.empty_table()]
    with Progress("check", len(rows), "images", active=progress) as bar:
        for found in _examine_all(index, rows, workers, parts):
            new.append(found)
            bar.update(len(found))
    return pa.concat_tables(new)


def _examine_all(index: Index, rows: np.ndarray, workers: int, parts: Parts) -> Iterator[pa.Table]:
    fewest, most = _CHUNK
    each = min(most, max(fewest, len(rows) // (16 * workers)))
    names = [index.paths[rows[first : first + each]].column for first in range(0, len(rows), each)]
    tasks: deque[tuple] = deque((index.root, some, parts.begin) for some in names)
    finished: Counter[int] = Counter()  # files, by task
    with contextlib.closing(processes.run(examine, tasks, workers)) as items:
        for task, item in items:
            if isinstance(item, processes.Done):
                finished.pop(id(task), None)
            elif isinstance(item, Unwritten):
                parts.failed(item)
            elif not isinstance(item, processes.Crashed):
                finished[id(task)] += len(item)
                yield item
            elif len(left := task[1][finished.pop(id(task), 0) :]) == 1:
                (path,) = Paths(left)
                size, mtime, _, _ = stats(index.root, Paths(left), progress=False)
                reason = crash_reason(item)
                yield table_of_found([(path, 0, 0, "", VERDICTS[UNREADABLE], reason, int(size[0]), int(mtime[0]), -1)])
            else:  # one of these files has ended it: alone it is known by name
                tasks.extend((index.root, left.take(pa.array([i])), parts.begin) for i in range(len(left)))


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
        if foreign := is_foreign(path, named=True):  # before the first, which may take hours
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
    odd = np.flatnonzero(checked.verdict != OK)
    for i, reason in zip(odd.tolist(), checked.whys(odd), strict=True):
        kind = reason if checked.verdict[i] == CONVERTED else reason.partition(": ")[0]
        kinds.setdefault((-int(checked.verdict[i]), kind), []).append(i)
    for (verdict, kind), rows in sorted(kinds.items(), key=lambda item: (item[0][0], -len(item[1]), item[0][1])):
        lines.append(f"  {len(rows):7d} {VERDICTS[-verdict]}: {kind}")
        for i in rows[:EXAMPLES]:
            detail = checked.why(i)[len(kind) + 2 :]
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
