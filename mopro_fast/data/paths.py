"""File names as the file system has them: any bytes but zero, without a Python object per name."""

import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mopro_fast.console import escaped
from mopro_fast.errors import first_line

_TEXT = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
_PIECE = 1 << 20  # names joined at a time


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
        if isinstance(rows, slice) or (isinstance(rows, np.ndarray) and rows.dtype == bool):
            rows = np.arange(len(self))[rows]
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
        found = pc.fill_null(pc.index_in(names.column, value_set=self.column), -1)
        return found.to_numpy(zero_copy_only=False).astype(np.int64)

    def for_table(self) -> pa.Array:
        """As a column of a file for others: strings, or binary where a name is not UTF-8. Paths() takes both."""
        large = self.column.nbytes >> 31  # more than their offsets can count
        try:
            return self.column.cast(pa.large_string() if large else pa.string())
        except pa.ArrowInvalid:
            return self.column if large else self.column.cast(pa.binary())

    def joined(self) -> Iterator[bytes]:
        """The names with a line feed between them, in pieces."""
        for first in range(0, len(self), _PIECE):
            yield b"\n" * (first > 0) + b"\n".join(self.column[first : first + _PIECE].to_pylist())


def read_columns(
    file: Any, *numbers: str, optional: str = ""
) -> tuple[Paths, dict[str, np.ndarray], dict[bytes, bytes]]:
    """Of a Parquet file (a path or an open one) the column "path", these others as int64, and its metadata.

    optional: one more, where it is there. Raises a ValueError where one is missing, of another type, or has no value
    somewhere; an OSError.
    """
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(file, memory_map=False)
        if lacks := [name for name in ("path", *numbers) if name not in table.column_names]:
            raise ValueError(f"it has no column {lacks[0]}")
        names = ("path", *numbers, optional)
        columns = {name: table[name] for name in names if name in table.column_names}
        for name, column in columns.items():
            of = _TEXT if name == "path" else (pa.types.is_integer,)
            if column.null_count or not any(is_type(column.type) for is_type in of):
                raise ValueError(f"{name} is not {'text' if name == 'path' else 'whole numbers'} everywhere")
        paths = Paths(columns.pop("path"))
        found = {name: column.cast(pa.int64()).combine_chunks().to_numpy() for name, column in columns.items()}
        return paths, found, table.schema.metadata or {}
    except (pa.ArrowException, NotImplementedError) as error:
        raise ValueError(first_line(error)) from None


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
