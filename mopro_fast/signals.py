"""SIGTERM, SIGHUP and Ctrl-C end a command whatever it waits for: by an exception, and if need be without it.

Python runs a handler only where the main thread is in Python. Where that waits in a library (for another rank, a GPU
or a disk) a thread that the signal wakes ends the process.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

HEEDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
UNHEARD = 3.0  # seconds in which the main thread has to hear of a signal
CLEANING = 10.0  # and then to clean up
LEAVING = 2.0  # and then to end
SAVING = 300.0  # what a checkpoint that is being written may take
_LOOK = 0.1  # seconds between two looks at the time

_limit = (0.0, UNHEARD)  # since when a signal has how many seconds to end the process
_saves: float | None = None  # since when something is written that must be finished
_asked = 0  # the first signal that came
_flag: "Flag | None" = None
_said = threading.Lock()  # held by who said the last line


class Stopped(KeyboardInterrupt):
    """A signal ends the command."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def allow(seconds: float) -> None:
    """A signal, also one that has come, has this long from now on to end the process."""
    global _limit
    _limit = time.monotonic(), seconds


@contextlib.contextmanager
def saving() -> Iterator[None]:
    """What is written inside is finished first, if it takes less than SAVING."""
    global _saves
    before, _saves = _limit[1], time.monotonic()
    allow(SAVING)
    try:
        yield
    finally:
        _saves = None
        allow(before)


def in_saving() -> bool:
    """Whether something is being written that must be finished, and has not taken longer than SAVING so far."""
    return _saves is not None and time.monotonic() < _saves + SAVING


def check() -> None:
    """Raise Stopped if a signal was noted that cannot wait for a good moment any longer; for those who wait."""
    if _flag is not None and threading.current_thread() is threading.main_thread():
        _flag.check()


class Flag:
    """In this context signals are noted, in ``signal`` (0: none), for the work to stop at a good moment.

    A wait that calls :func:`check` ends ``patience`` seconds after one.
    """

    patience = 0.0

    def __init__(self) -> None:
        self.signal = 0
        self.ends_work = False
        """Whether the signal ends the work already."""
        self._came = 0.0
        self._raises = False

    def __enter__(self) -> "Flag":
        global _flag
        main = threading.current_thread() is threading.main_thread()  # others may not set handlers
        heeded = [s for s in HEEDED if s == signal.SIGINT or not _ignored(s)]
        self._before = _handled_by(self._note, heeded if main else [])
        self._outer, _flag = _flag, self
        allow(CLEANING)
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        global _flag
        _flag = self._outer
        _restore(self._before)
        allow(CLEANING if self.signal else UNHEARD)
        if self.signal and not self.ends_work and kind is None:
            raise Stopped(self.signal)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a signal raises Stopped: nothing would be lost."""
        self._raises = True
        try:
            if self.signal:
                self._stop()
            yield
        finally:
            self._raises = False

    def check(self) -> None:
        if self.signal and time.monotonic() >= self._came + self.patience:
            self._stop()

    def again(self) -> None:
        """Ctrl-C was pressed once more."""
        raise KeyboardInterrupt

    def _stop(self) -> None:
        self.ends_work = True
        raise Stopped(self.signal)

    def _note(self, number: int, _frame) -> None:
        global _asked
        first, self.signal, _asked = not self.signal, number, number
        if first:
            self._came = time.monotonic()
            if self._raises:
                self._stop()
        elif number == signal.SIGINT:
            self.again()


@contextlib.contextmanager
def heeded(command: str, own: bool) -> Iterator[None]:
    """Inside, the first signal raises Stopped in the main thread.

    own: the process is the command's, and ends in time whatever comes of that. Otherwise all is as before afterwards.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    global _asked, _said
    _asked, _said = 0, threading.Lock()
    before = _handled_by(_stop if own else _stop_guest, [s for s in HEEDED if not _ignored(s)])
    try:
        with _ended_in_time(command) if own else contextlib.nullcontext():
            yield
    finally:
        if not (own and _asked):
            _restore(before)


@contextlib.contextmanager
def _ended_in_time(command: str) -> Iterator[None]:
    """A signal that comes inside ends the process in time."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_end_in_time, args=(reader, command), daemon=True, name="mopro_fast-signals")
    watcher.start()
    try:
        yield
    except BaseException:
        claim_last_line()  # the caller says it
        raise
    finally:
        if _asked:  # at its end Python waits for all threads, also for those that hang with the storage
            claim_last_line()
            allow(LEAVING)
        else:
            signal.set_wakeup_fd(wakeup)
            os.write(writer, b"\0")
            watcher.join()
            os.close(reader)
            os.close(writer)


def interrupted(command: str, number: int) -> str:
    """The line that says so."""
    how = "interrupted" if number == signal.SIGINT else f"stopped by signal {number}"
    return f"mopro-fast: {of_rank()}{command} {how}: the same command goes on where it stopped"


def of_rank() -> str:
    """Before what other ranks than the first say."""
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"[rank {rank}] "


def claim_last_line() -> bool:
    """Whether the caller is the first who says why the process ends; others must be silent."""
    return _said.acquire(blocking=False)


def end(line: str, status: int) -> None:
    """End the process from any thread: nothing is cleaned up, nothing waited for, not even the terminal."""

    def say() -> None:
        if claim_last_line():
            with contextlib.suppress(OSError):
                os.write(2, ("\n" * os.isatty(2) + line + "\n").encode(errors="backslashreplace"))
        with contextlib.suppress(Exception):
            sys.stdout.flush()

    speaker = threading.Thread(target=say, daemon=True)
    speaker.start()
    speaker.join(1)
    os._exit(status)


def _ignored(number: int) -> bool:
    return signal.getsignal(number) is signal.SIG_IGN


def _handled_by(handler: Callable[[int, Any], None], numbers: Iterable[int]) -> dict[int, Any]:
    """-> the handlers before. Those that Python does not know (None) could not be restored, and stay."""
    return {s: signal.signal(s, handler) for s in numbers if signal.getsignal(s) is not None}


def _restore(handlers: dict[int, Any]) -> None:
    for s, handler in handlers.items():
        signal.signal(s, handler)


def _stop(number: int, _frame) -> None:
    global _asked
    if not _asked:
        _asked = number
        allow(CLEANING)
        raise Stopped(number)


def _stop_guest(number: int, frame) -> None:
    """In somebody's program nothing else ends a clean-up that hangs."""
    if _asked and number == signal.SIGINT:
        raise KeyboardInterrupt
    _stop(number, frame)


def _forget() -> None:
    """A fork is another process: what signals do to it is its own matter, and does not wake our threads."""
    global _flag
    _flag = None
    ours = (_stop, _stop_guest, Flag._note)
    for s in HEEDED:
        handler = signal.getsignal(s)
        if getattr(handler, "__func__", handler) in ours:
            signal.signal(s, signal.default_int_handler if s == signal.SIGINT else signal.SIG_DFL)
            signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget)


def _end_in_time(pipe: int, command: str) -> None:
    came = number = 0
    while True:
        if select.select([pipe], [], [], _LOOK if came else None)[0]:
            byte = os.read(pipe, 1)
            if byte in (b"", b"\0"):
                return
            if byte[0] in HEEDED and not came:
                came, number = time.monotonic(), byte[0]
        since, seconds = _limit
        if came and time.monotonic() > max(came, since) + seconds:
            end(interrupted(command, number), 128 + number)
