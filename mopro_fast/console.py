"""What commands show. A reader that has gone, a full disk or an encoding that lacks a character ends none of them."""

import codecs
import contextlib
import errno
import io
import os
import re
import select
import stat
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

_QUIET, _SILENCE = 10.0, 60.0  # seconds between the lines of Progress: least and, while there is progress, most
_COLOUR = re.compile(r"\x1b\[[\d;]*m")
_CONTROL = re.compile(r"\x1b(?!\[[\d;]*m|\[A)|[\0-\x08\v\f\x0e-\x1a\x1c-\x1f\x7f-\x9f]")  # tqdm goes up by ESC [A
_ASCII = {"…": "...", "–": "-", "−": "-", "·": "-", "→": "->", "←": "<-", "×": "x", "≤": "<=", "λ": "lambda"}


def escaped(text: str) -> str:
    """For the middle of a line: what would end it or move a terminal's cursor is written as Python writes it."""
    return text if text.isprintable() else "".join(c if c.isprintable() else _escape(c) for c in text)


def _escape(c: str) -> str:
    byte = ord(c) - 0xDC00  # of a file name that is not UTF-8, as os.fsdecode gives it
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else c.encode("unicode_escape").decode()


def say(text: str) -> None:
    """A line on stderr, above the progress bar if there is one."""
    from tqdm import tqdm

    if sys.stderr is not None:
        tqdm.write(escaped(text), file=sys.stderr)


def plural(n: int, what: str) -> str:
    """1 anchor, 2 anchors."""
    return f"{n:,} {what}{'s' * (n != 1)}"


def tell(text: str) -> None:
    """Lines on stdout: what was asked for."""
    print("\n".join(map(escaped, text.split("\n"))))


def duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}h{m:02d}m" if hours else f"{m}m{s:02d}s"


class Progress:
    """How far some work is: a bar on a terminal; elsewhere a line per tenth or minute of work that takes long."""

    def __init__(
        self, name: str, total: int, unit: str, *, done: int = 0, active: bool = True, lines: bool = True
    ) -> None:
        """done: before this. active: whether anything is shown. lines: False where the caller says how far it is."""
        from tqdm import tqdm

        self.is_bar = active and total > 0 and _has_room(sys.stderr)
        self._name, self._total, self._unit = escaped(name), total, unit
        self._lines = active and lines and not self.is_bar
        self._first = self._done = self._at = done
        self._note = ""
        self._began = self._said = time.monotonic()
        options = {"total": total, "initial": done, "desc": self._name, "unit": f" {unit}", "leave": False}
        self._bar = tqdm(**options, disable=not self.is_bar, file=sys.stderr)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._bar.close()

    def update(self, n: int = 1) -> None:
        self._done += n
        self._bar.update(n)
        if self._lines:
            silent = time.monotonic() - self._said
            if silent > _SILENCE or (silent > _QUIET and 10 * (self._done - self._at) >= self._total):
                self._line()

    def note(self, text: str) -> None:
        """Something to show after the numbers."""
        self._note = text
        self._bar.set_postfix_str(text, refresh=False)

    def _line(self) -> None:
        self._said, self._at = time.monotonic(), self._done
        speed = (self._done - self._first) / (self._said - self._began)
        left = f", {duration((self._total - self._done) / speed)} left" if speed > 0 else ""
        note = f", {self._note}" if self._note else ""
        say(f"{self._name}: {self._done} of {self._total} {self._unit}, {speed:.3g} per second{left}{note}")


def _has_room(stream: Any) -> bool:
    """Whether it is a terminal on which a bar can be seen: `script` and containers have some without rows."""
    try:
        return stream is not None and stream.isatty() and all(os.get_terminal_size(stream.fileno()))
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def guarded() -> Iterator[Callable[[], bool]]:
    """Let no stdout or stderr end the program: Python's own are replaced meanwhile, those of others stay.

    Yields a function: whether all of stdout was written, with a line on stderr if not. A reader that has gone had all
    he wanted.
    """
    _fill_standard_descriptors()
    before = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    pythons = [name for name, stream in before.items() if stream is getattr(sys, f"__{name}__")]
    ours = {name: _stream(name, before[name]) for name in pythons}

    def whole() -> bool:
        if "stdout" not in ours:
            return True
        ours["stdout"].flush()
        if lost := ours["stdout"].descriptor.lost:
            say(f"mopro-fast: error: the output is not whole: stdout cannot be written ({lost.strerror})")
        return lost is None

    try:
        for name, stream in ours.items():
            setattr(sys, name, stream)
        yield whole
    finally:
        for name, stream in ours.items():
            stream.flush()
            setattr(sys, name, before[name])


def _fill_standard_descriptors() -> None:
    """Where 0, 1 or 2 is closed, the next file opened would get that number, and messages meant for a terminal."""
    with contextlib.suppress(OSError):  # no handle is left: then these three are in use
        while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
            os.set_inheritable(descriptor, True)
        os.close(descriptor)


class _Descriptor(io.FileIO):
    """Writing never fails: what cannot be written is dropped."""

    def __init__(self, number: int) -> None:
        super().__init__(number, "wb", closefd=False)
        self.is_terminal = self.isatty()
        self.lost: OSError | None = None
        """Why something is missing that somebody may look for."""

    def write(self, data: Any) -> int:
        try:
            while (written := super().write(data)) is None:  # it does not block: some other program made it so
                select.select([], [self], [])
            return written
        except OSError as error:
            closed_terminal = error.errno == errno.EIO and stat.S_ISCHR(os.fstat(self.fileno()).st_mode)
            if closed_terminal or isinstance(error, ConnectionError):  # for good: also for child processes
                with open(os.devnull, "wb") as nowhere:
                    os.dup2(nowhere.fileno(), self.fileno())
            else:
                self.lost = error
            return memoryview(data).nbytes


class _Stream(io.TextIOWrapper):
    def __init__(self, descriptor: _Descriptor, **options: Any) -> None:
        super().__init__(io.BufferedWriter(descriptor), **options)
        self.descriptor = descriptor

    def write(self, text: str) -> int:
        if not self.descriptor.is_terminal:
            text = _COLOUR.sub("", text)  # tyro's, which looks at stdout only
        return super().write(_CONTROL.sub(lambda found: _escape(found[0]), text))


def _stream(name: str, old: io.TextIOWrapper | None) -> _Stream:
    """Like ``old``, Python's own of this name, which is None where it was closed."""
    if old is None:
        return _Stream(_Descriptor({"stdout": 1, "stderr": 2}[name]), encoding="utf-8", errors=_READABLE)
    with contextlib.suppress(OSError):
        old.flush()
    errors = _READABLE if old.errors in ("strict", "surrogateescape", "backslashreplace") else old.errors
    at_once = old.line_buffering or old.write_through
    return _Stream(_Descriptor(old.fileno()), encoding=old.encoding, errors=errors, line_buffering=at_once)


def _readable(error: UnicodeError) -> tuple[str, int]:
    """For the codecs: characters that the encoding lacks."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(_ASCII.get(c) or _escape(c) for c in lacking), error.end


_READABLE = "mopro_fast.readable"
codecs.register_error(_READABLE, _readable)
