"""File names as the file system has them: any bytes but zero, without a Python object per name."""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mopro_fast.console import escaped
from mopro_fast.errors import first_line

_PIECE = 1 << 20  # names joined at a time
_FEW = 8  # a share of the rows that is looked for the other way round
_EACH = pa.scalar(b"", pa.large_binary()), pa.scalar(b"\n", pa.large_binary())  # after each name


class Paths:
    """A column of names. A single one is a str as Python's own file functions take and give it (os.fsdecode)."""

    def __init__(self, names: "Iterable[str | bytes] | pa.Array | pa.ChunkedArray") -> None:
        if isinstance(names, pa.ChunkedArray):
            names = names.cast(pa.large_binary()).combine_chunks()
        if isinstance(names, pa.Array):
            self.column = names.cast(pa.large_binary())
        else:
            self.column = pa.array((os.fsencode(name) for name in names), pa.large_binary())

    def __len__(self) -> int:
        return len(self.column)

    def __getitem__(self, rows):
        """A row's name, or the Paths of a slice, a mask or an array of rows."""
        if isinstance(rows, slice):
            first, end, step = rows.indices(len(self))
            if step == 1:
                return Paths(self.column.slice(first, max(0, end - first)))  # of the same memory
            rows = np.arange(first, end, step)
        elif isinstance(rows, np.ndarray) and rows.dtype == bool:
            rows = np.flatnonzero(rows)
        if isinstance(rows, np.ndarray) and rows.ndim:
            return Paths(self.column.take(pa.array(rows)))
        return os.fsdecode(self.column[int(rows)].as_py())

    def __iter__(self) -> Iterator[str]:
        return map(os.fsdecode, (name.as_py() for name in self.column))

    def tolist(self) -> list[str]:
        return list(map(os.fsdecode, self.column.to_pylist()))

    def equals(self, other: "Paths") -> bool:
        return self.column.equals(other.column)

    def rows_of(self, names: "Paths") -> np.ndarray:
        """int64 [len(names)]: the first row of each of these names; -1: none."""
        if len(names) > len(self) // _FEW:
            return _places(names.column, self.column)
        # Looking every row up among the names takes no table of all rows.
        own = _places(self.column, names.column)
        rows = np.flatnonzero(own >= 0)[::-1]
        first = np.full(len(names), -1)
        first[own[rows]] = rows
        return first[_places(names.column, names.column)] if len(names) else first

    def for_table(self) -> pa.Array:
        """As a column of a file for others: strings, or binary where a name is not UTF-8. Paths() takes both."""
        large = self.column.nbytes >> 31  # more than their offsets can count
        try:
            return self.column.cast(pa.large_string() if large else pa.string())
        except pa.ArrowInvalid:
            return self.column if large else self.column.cast(pa.binary())

    def buffers(self) -> tuple[np.ndarray, pa.Buffer]:
        """Where each name begins and the last one ends, int64 [n + 1], and the bytes that they are in."""
        _, offsets, names = self.column.buffers()
        if not len(self):
            return np.zeros(1, np.int64), pa.py_buffer(b"")
        return np.frombuffer(offsets, np.int64)[self.column.offset :][: len(self) + 1], names or pa.py_buffer(b"")

    def joined(self) -> Iterator[memoryview]:
        """The names with a line feed between them, in pieces."""
        for first in range(0, len(self), _PIECE):
            ended = pc.binary_join_element_wise(self[first : first + _PIECE].column, *_EACH)
            offsets, names = Paths(ended).buffers()
            yield memoryview(names)[offsets[0] : offsets[-1] - (first + _PIECE >= len(self))]


def _places(values: pa.Array, of: pa.Array) -> np.ndarray:
    """int64: where each value comes first; -1: nowhere."""
    found = pc.fill_null(pc.index_in(values, value_set=of), -1)
    return found.to_numpy(zero_copy_only=False).astype(np.int64)


class Kind(NamedTuple):
    """What a column of a table can be."""

    said: str
    """For messages."""
    types: tuple[Callable[[pa.DataType], bool], ...]
    taken: Callable[[pa.ChunkedArray], Paths | np.ndarray]
    """As what it is given."""
    complete: bool = True
    """Whether every row must have a value."""


def _as_numbers(to: pa.DataType) -> Callable[[pa.ChunkedArray], np.ndarray]:
    return lambda column: column.cast(to).combine_chunks().to_numpy(zero_copy_only=False)


TEXT = Kind("text", (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary), Paths)
WHOLE = Kind("whole numbers", (pa.types.is_integer,), _as_numbers(pa.int64()))
FLAGS = Kind("whole numbers or booleans", (pa.types.is_integer, pa.types.is_boolean), _as_numbers(pa.int64()))
NUMBERS = Kind("numbers", (pa.types.is_integer, pa.types.is_floating), _as_numbers(pa.float64()), complete=False)


def read_table(
    file: Any, required: dict[str, Kind], optional: dict[str, Kind]
) -> tuple[dict[str, Any], dict[bytes, bytes]]:
    """Of a Parquet file (a path or an open one) these columns, and its metadata.

    Raises a ValueError where a required one is missing, where one is of another type or, if it must, has no value
    somewhere; an OSError.
    """
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(file, memory_map=False)
        if lacks := [name for name in required if name not in table.column_names]:
            raise ValueError(f"it has no column {lacks[0]}")
        found = {}
        for name, kind in (required | optional).items():
            if name not in table.column_names:
                continue
            column = table[name]
            if (kind.complete and column.null_count) or not any(is_type(column.type) for is_type in kind.types):
                raise ValueError(f"{name} is not {kind.said} everywhere")
            found[name] = kind.taken(column)
        return found, table.schema.metadata or {}
    except (pa.ArrowException, NotImplementedError, KeyError) as error:  # KeyError: a name that is there twice
        raise ValueError(first_line(error)) from None


def read_columns(
    file: Any, *numbers: str, optional: str = ""
) -> tuple[Paths, dict[str, np.ndarray], dict[bytes, bytes]]:
    """As :func:`read_table`: the column "path", these others as int64, and the metadata.

    optional: one more, where it is there.
    """
    columns, about = read_table(file, {"path": TEXT} | dict.fromkeys(numbers, WHOLE), {optional: WHOLE})
    return columns.pop("path"), columns, about


def shown(name: str) -> str:
    """A name for messages: what is no text, or would move a terminal's cursor, is written as an escape."""
    return escaped(os.fsencode(name).decode("utf-8", "surrogateescape"))


def plain(names: Iterable[str], root: str) -> Paths:
    """Paths from ``root`` on, without "./" and the like; those outside of it stay absolute. Links are not followed."""
    starts = [start.rstrip("/") + "/" for start in dict.fromkeys((os.path.abspath(root), os.path.realpath(root)))]

    def one(name: str) -> str:
        name = os.path.normpath(name)
        return next((name[len(start) :] for start in starts if name.startswith(start)), name)

    return Paths(map(one, names))
