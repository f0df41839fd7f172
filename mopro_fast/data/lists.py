"""Lists of images, a "path label" per line: one reader for all commands.

Lines end in LF or CRLF, or in a file without any LF in CR. A byte-order mark, blank lines and white space around a
line are passed over. The label is last, so a path may hold spaces, and any bytes that the file system allows.
"""

import errno
import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mopro_fast.data.paths import Paths, shown
from mopro_fast.distributed import say
from mopro_fast.errors import UserError
from mopro_fast.files import open_regular, read_regular

_SPACE = rb" \t\r\v\f".decode()
_LINE = rf"^[{_SPACE}]*(?P<line>[^{_SPACE}\n](?:.*[^{_SPACE}\n])?)[{_SPACE}\n]*$"
_ROW = r"^(?P<path>(?:.*[^ \t])?)[ \t]+\+?(?P<label>-?[0-9]+)$"
_MOST_DIGITS = 18  # of an int64
_HEAD, _MOST = 1 << 16, 1 << 32  # bytes that are looked at first, and of the largest list
_SHOWN = 80  # characters of a line in messages


class Rows(NamedTuple):
    """The images that a list names."""

    paths: Paths
    labels: np.ndarray
    """int64 [n]."""
    lines: np.ndarray
    """int64 [n]: line numbers, from 1."""


def read_list(name: str, exists: Callable[[str], bool], form: str = "path label") -> Rows:
    """The rows of a list file. Raises a UserError that names the first line of another form.

    exists: whether there is an image of this path. A line that begins with "#" is a comment, which is counted, unless
    it names an image that is there. form: for messages.
    """
    lines, numbers = _lines(name)
    found = pc.extract_regex(lines, _ROW)
    digits = pc.struct_field(found, "label")
    bad = pc.fill_null(pc.greater(pc.binary_length(digits), _MOST_DIGITS), True).to_numpy(zero_copy_only=False)
    paths = pc.struct_field(found, "path")
    hashed = np.flatnonzero(pc.starts_with(lines, b"#").to_numpy(zero_copy_only=False)).tolist()
    comments = [i for i in hashed if bad[i] or not exists(os.fsdecode(paths[i].as_py()))]
    bad[comments] = False
    inner = pc.fill_null(pc.match_substring(paths, b"\r"), False).to_numpy(zero_copy_only=False)
    for i in np.flatnonzero(inner).tolist():  # a file's name, or two lines of an old Macintosh
        bad[i] = bad[i] or not exists(os.fsdecode(paths[i].as_py()))
    if bad.any():
        i = int(bad.argmax())
        raise UserError(
            f"{name}:{numbers[i]}: expected lines of the form: {form}; found: {_quoted(os.fsdecode(lines[i].as_py()))}"
        )
    if comments:
        text = f"line {numbers[comments[0]]}: {_quoted(os.fsdecode(lines[comments[0]].as_py()))}"
        say(f"{name}: comments: {len(comments)}, such as {text}")
    rows = pa.array(np.delete(np.arange(len(lines)), comments))
    labels = digits.take(rows).cast(pa.large_string()).cast(pa.int64()).to_numpy()
    return Rows(Paths(paths.take(rows)), labels, numbers[rows.to_numpy()])


def read_names(name: str, row_of: Callable[[str], int | None], source: str) -> list[tuple[int, str, int]]:
    """-> line number, path and row_of(path) of each line of a list whose labels, if any, do not count.

    A line is a path, or a path and a label. Comments as in :func:`read_list`. Raises a UserError for a path without
    a row.
    """
    lines, numbers = _lines(name)
    found, comments = [], []
    for number, line in zip(numbers.tolist(), (os.fsdecode(line) for line in lines.to_pylist()), strict=True):
        path, row = line, row_of(line)
        if row is None and len(parts := line.rsplit(maxsplit=1)) == 2:
            path, row = parts[0], row_of(parts[0])
        if row is not None:
            found.append((number, path, row))
        elif line.startswith("#"):
            comments.append(f"line {number}: {_quoted(line)}")
        else:
            raise UserError(f"{name}:{number}: no such image in {source}: {_quoted(line)}")
    if comments:
        say(f"{name}: comments: {len(comments)}, such as {comments[0]}")
    return found


def text_lines(name: str) -> list[str]:
    """The lines of a file that are not blank, such as the names of classes."""
    return list(map(os.fsdecode, _lines(name)[0].to_pylist()))


def _lines(name: str) -> tuple[pa.Array, np.ndarray]:
    """-> the lines that are not blank, large_binary, without white space around them; their numbers, int64."""
    try:
        with open_regular(name) as file:
            _require_text(name, file.read(_HEAD))  # before gigabytes of something else are read
        text, _ = read_regular(name, _MOST)
    except OSError as error:
        hint = ": name a file" if error.errno == errno.EINVAL else ""
        raise UserError(f"cannot read {name}: {error.strerror}{hint}") from None
    _require_text(name, text)
    text = text.removeprefix(b"\xef\xbb\xbf")
    if b"\n" not in text:
        text = text.replace(b"\r", b"\n")
    ends = np.flatnonzero(np.frombuffer(text, np.uint8) == ord("\n")) + 1
    bounds = np.unique(np.concatenate([[0], ends, [len(text)]])).astype(np.int64)
    buffers = [None, pa.py_buffer(bounds), pa.py_buffer(text)]
    column = pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(bounds) - 1, buffers)
    trimmed = pc.struct_field(pc.extract_regex(column, _LINE), "line")
    rows = np.flatnonzero(trimmed.is_valid().to_numpy(zero_copy_only=False))
    return trimmed.take(pa.array(rows)), rows + 1


def _require_text(name: str, text: bytes) -> None:
    if text.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{name} is UTF-16 text: save it as UTF-8")
    if (zero := text.find(b"\0")) >= 0:
        line = 1 + (text.count(b"\n", 0, zero) or text.count(b"\r", 0, zero))
        raise UserError(f"{name}:{line}: a zero byte: this is no list of paths and labels")


def _quoted(line: str) -> str:
    return f"'{shown(line[:_SHOWN])}'"
