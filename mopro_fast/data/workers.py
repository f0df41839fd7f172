"""Processes for work on many files: a file that ends one is known by name, and none outlives who started it.

They are fresh interpreters on a pipe, not forks (CUDA and threads do not survive those) nor multiprocessing's (which
run the caller's script again, and wait forever for a parent that was killed). Timers of the kernel and the signals'
default action end them, so also in the middle of a library that never returns to the interpreter.
"""

import contextlib
import fcntl
import functools
import os
import queue
import select
import signal
import subprocess
import sys
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from mopro_fast.errors import UserError, first_line, of_the_machine

WAITING, COMPUTING = 120, 60  # seconds that limited() gives: as a clock has them, and of a core's time
NO_ANSWER = "no answer"
_SILENT = 4  # more files without an answer than there are workers, one after another: the storage is gone
_STARTING = 60  # seconds: an interpreter on a slow network file system
_ENDING = 5  # seconds: storage that hangs may hold a process that was killed
_LIMITS = {signal.ITIMER_REAL: signal.SIGALRM, signal.ITIMER_PROF: signal.SIGPROF}


class Crashed(NamedTuple):
    """Instead of the rest of a task's items: the process that worked on it has ended."""

    status: int
    """As subprocess has it: below 0, by that signal."""

    @property
    def why(self) -> str:
        if self.has_waited:
            return f"{NO_ANSWER} for {WAITING} s"
        if self.has_computed:
            return f"no end after {COMPUTING} s of computing"
        return f"signal {-self.status}" if self.status < 0 else f"status {self.status}"

    @property
    def has_waited(self) -> bool:
        """Too long, for something other than the processor."""
        return -self.status == signal.SIGALRM

    @property
    def has_computed(self) -> bool:
        """Too long."""
        return -self.status == signal.SIGPROF


class Done(NamedTuple):
    """After a task's last item."""


class _Ready(NamedTuple):
    """The process has begun, and knows its function."""


class Died(Exception):
    """The process that was to run a function has ended, or has not answered in time; the message is the reason."""


def run(function: Callable[..., Iterator], tasks: deque[tuple], workers: int) -> Iterator[tuple[tuple, Any]]:
    """(task, item) for all that ``function(*task)`` yields in the processes, as it comes; then (task, Done or Crashed).

    function: importable by name. The caller may append to ``tasks`` meanwhile. A UserError is passed on; any other
    exception is a RuntimeError here. One file after another that does not answer is a UserError too.
    """
    busy: dict[Connection, tuple[_Worker, tuple]] = {}
    idle: list[_Worker] = []
    silent = 0
    try:
        while len(idle) < min(workers, len(tasks)):
            idle.append(_Worker(function))
        while tasks or busy:
            while tasks and idle:
                worker = idle.pop()
                task = tasks.popleft()
                worker.start(task)
                busy[worker.connection] = worker, task
            ready = wait(list(busy), WAITING)
            if not ready:  # a worker in the kernel, which no signal ends; or a slow disk
                _say(f"no answer for {WAITING} s from any of the files that are read: is the storage still there?")
            for connection in ready:
                worker, task = busy[connection]
                item = worker.receive()
                if isinstance(item, _Ready):
                    continue
                if isinstance(item, UserError | RuntimeError):
                    raise item
                if isinstance(item, Done | Crashed):
                    del busy[connection]
                    idle.append(worker if isinstance(item, Done) else _Worker(function))
                silent = silent + 1 if isinstance(item, Crashed) and item.has_waited else 0
                if silent > workers + _SILENT:
                    raise UserError(f"{silent} files in succession: {item.why}: is the storage still there?")
                yield task, item
    finally:
        _end(idle + [worker for worker, _ in busy.values()])


class Apart:
    """A function in processes of its own; a call, from any thread, returns or raises what the function does.

    A UserError is passed on, any other exception is a RuntimeError; Died where the process ends, or is ended since it
    exceeds the patience. The first call starts one, and so does the next after a death. function: importable by name.
    patience: seconds per call. processes: calls at once; others wait for their turn.
    """

    def __init__(self, function: Callable, patience: float = 60, processes: int = 1) -> None:
        self._function, self._patience, self._closed = function, patience, False
        self._all: set[_Worker] = set()
        self._free: queue.LifoQueue[_Worker | None] = queue.LifoQueue()  # None: none is running yet
        for _ in range(processes):
            self._free.put(None)

    def __call__(self, *args: Any) -> Any:
        if self._closed:
            raise Died("closed")
        worker = self._free.get()
        try:
            if worker is None or worker.has_ended():
                self._drop(worker)
                worker = _Worker(functools.partial(_one_value, self._function))
                self._all.add(worker)
            answer = Died("closed") if self._closed else worker.ask(args, self._patience)
            if isinstance(answer, Died):
                self._drop(worker)
                worker = None
        finally:
            self._free.put(worker)
            if self._closed:
                self.close()
        if isinstance(answer, Exception):
            raise answer
        return answer[0]

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """End the processes; calls that wait for an answer raise Died, and so do later ones."""
        self._closed = True
        for worker in list(self._all):
            worker.kill()
        free = []
        with contextlib.suppress(queue.Empty):
            while True:
                free.append(self._free.get_nowait())
        self._drop(*free)
        for _ in free:
            self._free.put(None)

    def _drop(self, *workers: "_Worker | None") -> None:
        self._all.difference_update(workers)
        _end(list(filter(None, workers)))


def _one_value(function: Callable, *args: Any) -> Iterator[tuple]:
    yield (function(*args),)


class _Worker:
    def __init__(self, function: Callable[..., Iterator]) -> None:
        self.connection, theirs = Pipe()
        life, self._life = os.pipe()
        passed = (theirs.fileno(), life)
        code = f"import sys; sys.path[:] = {sys.path!r}; from mopro_fast.data import workers; workers.serve{passed}"
        start = functools.partial(
            subprocess.Popen,
            [sys.executable, "-c", code],
            pass_fds=passed,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C goes to the caller alone, who ends the workers
        )
        try:
            try:
                self._process = start()
            except PermissionError:  # another user's interpreter, whose folder this process could read when it began
                self._process = start(executable="/proc/self/exe")
        except OSError as error:
            self._close()
            raise UserError(f"cannot start a process: {first_line(error)}: end others, or use fewer") from None
        finally:
            theirs.close()
            os.close(life)
        self._has_begun = False
        self.start(function)

    def start(self, task: Any) -> None:
        with contextlib.suppress(ConnectionError):  # it has ended while it had nothing to do: receive() says so
            self.connection.send(task)

    def receive(self) -> Any:
        try:
            item = self.connection.recv()
        except (EOFError, ConnectionResetError):
            status = self._process.wait()
            self._close()
            if status >= 0 and not self._has_begun:
                raise RuntimeError(f"a worker process has ended with status {status}") from None
            return Crashed(status)
        self._has_begun = True
        return item

    def ask(self, task: tuple, patience: float) -> tuple | Exception:
        """-> the one item of a task."""
        self.start(task)
        answer: Any = None
        while True:
            limit = patience if self._has_begun else _STARTING
            if not self.connection.poll(limit):
                return Died(f"no answer for {limit:g} s")
            item = self.receive()
            if isinstance(item, Crashed):
                return Died(item.why)
            if isinstance(item, Done | UserError | RuntimeError):
                return answer if isinstance(item, Done) else item
            answer = item

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> None:
        self.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_ENDING)
        self._close()

    def _close(self) -> None:
        self.connection.close()
        if self._life >= 0:
            os.close(self._life)
            self._life = -1


def _say(text: str) -> None:
    from mopro_fast.distributed import say  # not in the workers: it imports torch

    say(text)


def _end(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.end()


# What follows runs in the processes.

_is_worker = False


def serve(descriptor: int, life: int) -> None:
    """Their main function. life: a pipe that nobody writes to, whose other end closes when the caller ends."""
    global _is_worker
    _is_worker = True
    connection = Connection(descriptor)
    try:
        _end_with(life)
        function = connection.recv()
        connection.send(_Ready())
        warnings.simplefilter("ignore")  # Pillow's about odd files
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # and libtiff's, which would tear the progress bar
        while True:
            task = connection.recv()
            try:
                for item in function(*task):
                    connection.send(item)
                connection.send(Done())
            except UserError as error:
                connection.send(error)
            except Exception as error:
                connection.send(of_the_machine(error) or RuntimeError(traceback.format_exc()))
    except (EOFError, ConnectionError):  # the caller has ended
        os._exit(0)


def _end_with(life: int) -> None:
    ending = {signal.SIGIO, *_LIMITS.values()}
    for number in ending:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ending)
    fcntl.fcntl(life, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(life, fcntl.F_SETFL, fcntl.fcntl(life, fcntl.F_GETFL) | os.O_ASYNC)
    watched = select.poll()  # select.select() takes no numbers above 1023
    watched.register(life)
    if watched.poll(0):  # closed before it was watched
        raise EOFError


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """In a worker: the process ends if what is inside takes longer than WAITING or COMPUTING. Elsewhere nothing."""
    if not _is_worker:
        yield
        return
    signal.setitimer(signal.ITIMER_REAL, WAITING)
    signal.setitimer(signal.ITIMER_PROF, COMPUTING)
    try:
        yield
    finally:
        for timer in _LIMITS:
            signal.setitimer(timer, 0)
