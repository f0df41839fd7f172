"""Files that are whole or not there; files and folders of one process at a time; nothing of the user's is written over.

What is read is a regular file: a pipe would be waited for, a device has no end.

A lock is ``flock`` on a file: it goes with the process, however that ends. Some network file systems have none; there
all goes on without.
"""

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import re
import resource
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mopro_fast.errors import CannotWrite, UserError, require_resources

MARKER = ".mopro_fast"  # in a folder: whose it is, {"command": "train"}; its lock
FEATURES = "features"  # an owner that is no command: several commands share such a folder
_LEFT = re.compile(r"\.lock$|\..+\.tmp$")  # hidden files that earlier versions left where they were killed
_OTHER = "name another folder"
_PIECE = 1 << 22  # bytes read at a time
_KINDS = {"a folder": stat.S_ISDIR, "a pipe": stat.S_ISFIFO, "a socket": stat.S_ISSOCK}
MOST_TEXT = 1 << 28  # bytes of a file of ours or of settings: whatever is larger is something else
_HANDLES = 1 << 16  # open files that a process of ours may ask for
_TRIES = 9  # of opening a lock's file that another process removes meanwhile


class Busy(UserError):
    """Another process has the file or the folder."""


def read_regular(path: str | os.PathLike, most: int) -> tuple[bytes, os.stat_result]:
    """-> the whole of a regular file, and its state as it was when it was opened.

    Raises an OSError whose strerror says why not: also for another kind of file, which is not waited for, and for one
    of more than ``most`` bytes, which are not read. A process without handles or memory is OutOfResources.
    """
    number = open_descriptor(path)
    try:
        status = os.fstat(number)
        _require_size(path, status.st_size, most)
        data = os.read(number, status.st_size + 1)
        if len(data) != status.st_size:  # it grows or shrinks, or came in pieces
            parts, size = [data], len(data)
            while size <= most and parts[-1]:
                parts.append(os.read(number, min(_PIECE, most + 1 - size)))
                size += len(parts[-1])
            _require_size(path, size, most)
            data = b"".join(parts)
        return data, status
    except (MemoryError, OSError) as error:
        require_resources(error, os.fspath(path))
        raise
    finally:
        os.close(number)


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """A regular file to read. Raises an OSError as :func:`read_regular` does for another kind."""
    return open(path, "rb", opener=open_descriptor)


def sha256_of(path: str | os.PathLike) -> str:
    """Of a regular file's bytes. Raises an OSError as :func:`read_regular` does."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def require_regular(path: str | os.PathLike) -> None:
    """Raise an OSError where :func:`open_regular` would; for libraries that open files by themselves."""
    open_regular(path).close()


def open_descriptor(path: str | os.PathLike, flags: int = os.O_RDONLY) -> int:
    """As :func:`open_regular`, for the caller to close."""
    try:
        number = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        require_resources(error, os.fspath(path))
        if error.errno == errno.ENXIO:  # a socket, or a device that is not there
            _require_regular(path, os.stat(path).st_mode)
        raise
    try:
        _require_regular(path, os.fstat(number).st_mode)
        os.set_blocking(number, True)  # an archive's storage answers others at once, with an error
    except BaseException:
        os.close(number)
        raise
    return number


def _require_regular(path: str | os.PathLike, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for name, is_one in _KINDS.items() if is_one(mode)), "a device")
        raise OSError(errno.EINVAL, f"not a regular file but {kind}", os.fspath(path))


def _require_size(path: str | os.PathLike, size: int, most: int) -> None:
    if size > most:
        raise OSError(errno.EFBIG, f"{size} bytes, at most {most} are read", os.fspath(path))


@contextlib.contextmanager
def replacing(path: str | os.PathLike, own: str = "", new: bool = False) -> Iterator[BinaryIO]:
    """A file for writing that appears as ``path`` when it is complete and on the disk, or not at all.

    Raises CannotWrite, also where what writes into it hides the reason, as PyTorch does. own: told apart by this, files
    of several writers do not mix; of two with the same one is refused. new: refuse to replace a file that has come
    meanwhile.
    """
    temporary = _beside(path, f"{own}{MARKER}.tmp")
    raw, others = None, False  # others: the caller's code runs, whose OSErrors may be of other files
    try:
        with _held(temporary, f"another process writes {path}: wait for it") as raw:
            file = io.BufferedRandom(raw)
            try:
                file.truncate(0)
                others = True
                yield file
                others = False
                file.flush()
                if raw.failed:
                    raise raw.failed
                os.fsync(raw.fileno())
                if new:
                    require_new(path)
                os.replace(temporary, path)
            except BaseException:
                raw.abandoned = True
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
                raise
            finally:
                with contextlib.suppress(OSError):
                    file.close()
    except UserError:
        raise
    except Exception as error:
        failed = raw.failed if raw else None
        if failed is None and (others or not isinstance(error, OSError)):
            raise
        raise CannotWrite(path, failed or error) from None


def append(file: io.FileIO, line: bytes) -> None:
    """Write all of it at the end of an unbuffered file, or nothing. Raises CannotWrite."""
    try:
        end = file.seek(0, os.SEEK_END)
        try:
            left = memoryview(line)
            while left:
                left = left[file.write(left) :]
        except BaseException:
            with contextlib.suppress(OSError):
                file.truncate(end)
            raise
    except OSError as error:
        raise CannotWrite(file.name, error) from None


@contextlib.contextmanager
def locked(path: str, busy: str) -> Iterator[io.FileIO]:
    """A file to read and :func:`append` to, for one process at a time; removed at a normal end, or if it is empty.

    busy: message of the Busy where another process has it.
    """
    with _held(path, busy, append=True) as file:
        try:
            yield file
        except BaseException:
            if os.fstat(file.fileno()).st_size:
                raise
            with contextlib.suppress(OSError):
                os.unlink(path)
            raise
        with contextlib.suppress(FileNotFoundError):  # where there are no locks another one may have removed it
            os.unlink(path)


@contextlib.contextmanager
def output(path: str | os.PathLike, mine: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """Keep ``path``, a file that the user named, for this process while the command works; -> where to write it.

    It is refused where it exists, so it can be no input, unless ``mine`` knows it as what the command wrote before.
    """
    require_new(path, mine)
    path = Path(os.path.realpath(path))
    lock = _beside(path, f"{MARKER}.lock")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_held(lock, f"another process writes {path}: wait for it, or name another file"))
        except OSError as error:
            raise CannotWrite(path, error, "name another file") from None
        try:
            require_new(path, mine)  # by a process that had the lock
            yield path
        finally:
            with contextlib.suppress(OSError):
                os.unlink(lock)


def require_new(path: str | os.PathLike, mine: Callable[[Path], bool] | None = None) -> None:
    """Raise a UserError where ``path`` cannot be a new file, unless ``mine`` knows what is there."""
    path = Path(path)
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder: name a file")
    if not os.path.isdir(path.parent):
        raise UserError(f"cannot write {path}: there is no folder {path.parent}")
    run = Path(os.path.realpath(path)).parent
    if run.name == "checkpoints" and os.path.isfile(run.parent / "config.json"):
        raise UserError(f"{path} would lie among the checkpoints of a run: name a file elsewhere")
    if os.path.lexists(path) and not (os.path.isfile(path) and mine is not None and mine(path)):
        raise UserError(f"{path} exists already: remove it, or name another file")


@contextlib.contextmanager
def own_folder(
    path: Path,
    command: str,
    old: Callable[[Path], str | None] = lambda _: None,
    flag: str = "--out ",
    hint: str = _OTHER,
) -> Iterator[None]:
    """The folder ``path``, made if need be, for this process of this command alone; a UserError where it is not its.

    One that was made and stays empty goes again. FEATURES as the command: several processes share the folder. old: ->
    the command that made a folder which has no mark yet, or None; it must be sure. flag: before the path in messages.
    hint: what to do where nobody can write.
    """
    shown = f"{flag}{path}"
    with contextlib.ExitStack() as lock:
        with writing(shown, hint):
            require_own(path, command, old, flag)
            made = not path.exists()
            busy = f"another process writes into {shown}: wait for it, or name another folder"
            marker = None
            try:
                marker = lock.enter_context(_held(path / MARKER, busy, wait=command == FEATURES, folder=True))
                require_own(path, command, old, flag)  # by a process that had the lock
                if not marker.read().strip(b"\0"):
                    marker.truncate(0)
                    append(marker, json.dumps({"command": command}).encode() + b"\n")
                    try:
                        os.fsync(marker.fileno())
                    except OSError:
                        marker.truncate(0)
                        raise
            except BaseException:
                with contextlib.suppress(OSError):
                    if marker and _mark(path)[1]:
                        os.unlink(path / MARKER)
                    if made:
                        path.rmdir()
                raise
        if command == FEATURES:
            lock.close()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if set(os.listdir(path)) <= {MARKER}:
                    (path / MARKER).unlink(missing_ok=True)
                    if made:
                        path.rmdir()


def require_own(path: Path, command: str, old: Callable[[Path], str | None], flag: str = "--out ") -> None:
    """Raise a UserError where :func:`own_folder` would, the lock aside. Nothing is written."""
    shown = f"{flag}{path}"
    if os.path.lexists(path) and not path.is_dir() and (path.exists() or path.is_symlink()):
        kind = "a file" if path.is_file() else "no folder" if path.exists() else "a link to nothing"
        raise UserError(f"{shown} is {kind}: name a folder")
    with writing(shown, _OTHER):
        try:
            names = os.listdir(path)  # before the mark is read, which is written before all else
        except (FileNotFoundError, NotADirectoryError):
            return
        owner, begun = _mark(path)
        owner = owner or old(path)
        others = [name for name in names if not (_LEFT.fullmatch(name) or (begun and name == MARKER))]
    others = sorted(others, key=lambda name: (name.startswith("."), name)) if owner is None else []
    if others:
        raise UserError(f"{shown} holds other files, such as {others[0]}: name a new or an empty folder")
    if owner not in (None, command):
        whose = "is where features are kept" if owner == FEATURES else f"belongs to `mopro-fast {owner}`"
        raise UserError(f"{shown} {whose}: name another folder")


def json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none that can be read."""
    try:
        found = json.loads(read_regular(path, MOST_TEXT)[0])
    except (OSError, ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {}


@contextlib.contextmanager
def writing(folder: Path | str, hint: str) -> Iterator[None]:
    """An OSError inside is a CannotWrite that names the folder. hint: what the user can do, unless the error says."""
    try:
        yield
    except OSError as error:
        name = os.fsdecode(error.filename or "")
        own = name in str(folder) or os.path.basename(name) == MARKER  # the folder itself, or one above it
        name = "" if own else f"{os.path.basename(name)} "
        raise CannotWrite(f"{name}into {folder}", error, hint) from None


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
    """The whole file or none. Raises CannotWrite."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotWrite(path, error) from None
    with replacing(path) as file:
        file.write(json.dumps(value, indent=2).encode() + b"\n")


def write_items(file: BinaryIO, pieces: Iterable[list]) -> None:
    """The items of all pieces, as json.dump writes those of one list."""
    comma = ""
    for piece in filter(None, pieces):
        file.write((comma + json.dumps(piece)[1:-1]).encode())
        comma = ", "


def open_files() -> int:
    """How many files this process may have open."""
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _HANDLES if most == resource.RLIM_INFINITY else most


def ask_for_open_files() -> None:
    """Raise that as far as the system allows and we may need."""
    most, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and most < _HANDLES:
        wanted = _HANDLES if hard == resource.RLIM_INFINITY else min(hard, _HANDLES)
        with contextlib.suppress(OSError, ValueError):  # macOS has a lower bound of its own
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def home(path: str) -> str:
    """The path with the home folder in place of a ``~`` or ``~user`` that it begins with."""
    if not path.startswith("~"):
        return path
    user, _, _ = path.partition("/")
    full = os.path.expanduser(path)
    if full == path or (user == "~" and os.environ.get("HOME") == ""):
        raise UserError(f"{path!r}: no home folder is known for {user!r}: write the path without ~, or begin with ./~")
    return full


def _mark(folder: Path) -> tuple[str | None, bool]:
    """Whose the folder is, and whether the mark is but begun: its process was killed, or is about to write it."""
    marker = folder / MARKER
    text = read_regular(marker, MOST_TEXT)[0].strip(b"\0") if os.path.isfile(marker) else b""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None, not text
    owner = found.get("command") if isinstance(found, dict) else None
    return (owner if isinstance(owner, str) else None), False


def _beside(path: str | os.PathLike, ending: str) -> str:
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name}{ending}")


class _File(io.FileIO):
    """Remembers why it could not be written. Once abandoned, what a buffer still holds goes nowhere."""

    failed: OSError | None = None
    abandoned = False

    def write(self, data: Any) -> int:
        if self.abandoned:
            return memoryview(data).nbytes
        try:
            return super().write(data)
        except OSError as error:
            self.failed = error
            raise


@contextlib.contextmanager
def _held(
    path: str | os.PathLike, busy: str, wait: bool = False, append: bool = False, folder: bool = False
) -> Iterator[_File]:
    """A file of ours to read and write, unbuffered and locked; made if need be, never reached through a link.

    busy: message of the Busy where another process has it. wait: for that one's end. folder: make its folder.
    """

    def opened(path: str, flags: int) -> int:
        if folder:
            os.makedirs(os.path.dirname(path), exist_ok=True)
        number = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        if not stat.S_ISREG(os.fstat(number).st_mode):
            os.close(number)
            raise OSError(errno.EEXIST, "there is something else than a file", path)
        return number

    for _ in range(_TRIES):
        file = _File(path, "a+" if append else "r+", opener=opened)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise Busy(busy) from None
            except OSError:
                pass  # some network file systems have no locks
            if _is_still(path, file):
                yield file
                return
        finally:
            with contextlib.suppress(OSError):  # what matters in it was flushed before
                file.close()
    raise Busy(busy)


def _is_still(path: str | os.PathLike, file: BinaryIO) -> bool:
    """Whether the open file is the one of this name: another process may have removed or renamed it meanwhile."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), os.lstat(path))
    return False
