"""The table that a check writes (Parquet), and the parts of one that is not finished; locked, and nothing else's."""

import contextlib
import errno
import glob
import os
import re
import time
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mopro_fast.data import mapped
from mopro_fast.data.decode import VERDICTS
from mopro_fast.data.examine import FOUND, Unwritten, read_part
from mopro_fast.data.paths import Paths
from mopro_fast.distributed import say
from mopro_fast.errors import CannotWrite, UserError, require_resources
from mopro_fast.files import Busy, locked, open_regular, replacing

_MARK = b"mopro_fast.check"
_VERSION = b"2"  # of the verdicts' meaning: raise it, and everything is read again
_POLL = 0.2  # seconds between two looks for another process's check
_PART = re.compile(r"\.partial\.[0-9a-f]{8}$")
HELD = FOUND.insert(1, pa.field("label", pa.int64()))  # in the file a path is text, unless one is not UTF-8


def is_foreign(path: str, named: bool) -> str | None:
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


def read_table(path: str, tell: bool = False) -> pa.Table:
    """An earlier result; empty if there is none that can be used. tell: say where that is for its version."""
    try:
        table = pq.read_table(path, memory_map=False)
        known = pc.all(pc.is_in(table["verdict"], value_set=pa.array(VERDICTS))).as_py()
        whole = not any(column.null_count for column in table.columns)
        version = (table.schema.metadata or {}).get(_MARK)
        if version == _VERSION and whole and known is not False:
            return table.cast(HELD)
        if tell and version not in (None, _VERSION):
            say(f"{path} is of another version of mopro_fast: every image is read again")
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        require_resources(error, path)
    return HELD.empty_table()


class Parts:
    """Where a check writes. Without a place, and once one cannot be written that is not required, it keeps nothing."""

    def __init__(self, path: str, required: bool, is_kept: bool = True) -> None:
        self.path, self._required = path, required
        self.begin = f"{path}.partial" if is_kept else None
        """What the names of parts begin with."""

    def read(self) -> pa.Table:
        """What interrupted checks have found, the newest first; earlier versions had one part, the lock's file."""
        found = [read_part(part) for part in self._there()]
        return pa.concat_tables([*found, FOUND.empty_table()])

    def failed(self, why: Unwritten) -> None:
        """A part cannot be written."""
        if self._required:
            raise UserError(why.message)
        if self.begin is not None:
            say(f"{self.path} cannot be written ({why.strerror}): the result of the check is not kept")
            self.begin = None

    def finish(self, table: pa.Table) -> None:
        if self.begin is None:
            return
        named = table.set_column(0, "path", Paths(table["path"]).for_table())
        try:
            with replacing(self.path) as file:
                pq.write_table(named.replace_schema_metadata({_MARK: _VERSION}), file, compression="zstd")
        except (CannotWrite, OSError) as error:
            error = error if isinstance(error, CannotWrite) else CannotWrite(self.path, error)
            self.failed(Unwritten(str(error), error.strerror))

    def remove(self) -> None:
        """The table has all that the parts had."""
        for part in self._there() if self.begin is not None else ():
            if _PART.search(part):
                with contextlib.suppress(OSError):
                    os.unlink(part)

    def remove_left(self) -> None:
        """Parts of a check that was ended between its table and its end; not of one that is at work."""
        if self._there():
            with contextlib.suppress(OSError, Busy), locked(f"{self.path}.partial", ""):
                self.remove()

    def _there(self) -> list[str]:
        names = glob.glob(f"{glob.escape(f'{self.path}.partial')}*")
        ours = [name for name in names if name == f"{self.path}.partial" or _PART.search(name)]
        changed = {name: mapped.state_of(name) for name in ours}  # None: its check has just removed it
        return sorted(filter(changed.get, ours), key=lambda name: changed[name][1], reverse=True)


@contextlib.contextmanager
def open_parts(path: str, required: bool = True, foreign: str | None = None) -> Iterator[Parts]:
    """The parts beside the Parquet file at ``path`` or in the cache folder, locked.

    foreign: why it cannot be at ``path``.
    """
    place = _writable(path, required, foreign)
    if place is None:
        yield Parts(path, required, is_kept=False)
        return
    with contextlib.ExitStack() as stack:
        try:
            said = required
            while True:
                try:
                    stack.enter_context(locked(f"{place}.partial", f"another check writes {place}: wait for it"))
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
        yield Parts(place, required)


def _writable(path: str, required: bool, foreign: str | None) -> str | None:
    """``path``, or a place in the user's cache folder where nothing can be written beside it; None: nowhere."""
    reasons = [foreign] if foreign else []
    for place in filter(None, (None if foreign else path, mapped.in_cache(path))):
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
