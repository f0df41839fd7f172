"""Files that are whole or not there, and files of one process at a time."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mopro_fast.errors import UserError


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

    busy: message of the UserError where another process has it.
    """
    with open(path, "a+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(busy) from None
        except OSError:
            pass  # some network file systems have no locks
        if os.fstat(file.fileno()).st_nlink == 0:  # the other one has removed it meanwhile
            raise UserError(busy)
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
