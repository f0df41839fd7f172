"""Files that are whole or not there, and files of one process at a time."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mopro_fast.errors import UserError

MARKER = ".mopro_fast"  # in folders that a command of this package made


class Busy(UserError):
    """Another process has the file or the folder."""


@contextlib.contextmanager
def replacing(path: str | os.PathLike, own: str = "") -> Iterator[BinaryIO]:
    """A file for writing that appears as ``path`` when it is complete and on the disk, or not at all.

    own: told apart by this, files of several writers do not mix.
    """
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}{own}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def locked(path: str, busy: str) -> Iterator[BinaryIO]:
    """A file to read and append to, for one process at a time; removed at a normal end.

    busy: message of the Busy where another process has it.
    """
    with open(path, "a+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(busy) from None
        except OSError:
            pass  # some network file systems have no locks
        if os.fstat(file.fileno()).st_nlink == 0:  # the other one has removed it meanwhile
            raise Busy(busy)
        yield file
        with contextlib.suppress(FileNotFoundError):  # where there are no locks another one may have removed it
            os.unlink(path)


@contextlib.contextmanager
def writing(folder: Path | str, hint: str) -> Iterator[None]:
    """An OSError inside is a UserError that names the folder and ends with ``hint``, what the user can do."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}: {hint}") from None


def misfit(value: Any, shape: Any, name: str = "") -> str | None:
    """Where a JSON value is not of this shape, in words; None: it is.

    shape: a type; a tuple of shapes, any of which will do; [shape], a list of such values; {key: shape}, an object that
    has these keys, or with the key None: whose values are all so. Numbers (int) are at least 0, names of files (Path)
    without a folder.
    """
    at = name or "it"
    if isinstance(shape, tuple):
        found = [misfit(value, one, name) for one in shape]
        return found[0] if all(found) else None
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{at} is no list"
        return next(filter(None, (misfit(v, shape[0], f"{name}[{i}]") for i, v in enumerate(value))), None)
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return f"{at} is no object"
        wanted = {key: shape[None] for key in value} if None in shape else shape
        if absent := [key for key in wanted if key not in value]:
            return f"{f'{name}.' * bool(name)}{absent[0]} is missing"
        inner = (misfit(value[key], of, f"{name}.{key}".lstrip(".")) for key, of in wanted.items())
        return next(filter(None, inner), None)
    if shape is int:
        return None if type(value) is int and 0 <= value < 1 << 63 else f"{at} is no number"
    if shape is Path:
        return (
            None if isinstance(value, str) and value == os.path.basename(value) and value else f"{at} is no file name"
        )
    return None if isinstance(value, shape) else f"{at} is of another type"


def write_json(path: Path, value: Any) -> None:
    """The whole file or none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(json.dumps(value, indent=2).encode() + b"\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def home(path: str) -> str:
    """The path with the home folder in place of a ``~`` or ``~user`` that it begins with."""
    if not path.startswith("~"):
        return path
    user, _, _ = path.partition("/")
    full = os.path.expanduser(path)
    if full == path or (user == "~" and os.environ.get("HOME") == ""):
        raise UserError(f"{path!r}: no home folder is known for {user!r}: write the path without ~, or begin with ./~")
    return full
