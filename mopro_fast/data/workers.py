"""Processes for work on many files: a file that ends one is known by name, and none outlives who started it.

They are fresh interpreters on a pipe, not forks (CUDA and threads do not survive those) nor multiprocessing's (which
run the caller's script again, and wait forever for a parent that was killed).
"""

import contextlib
import functools
import os
import subprocess
import sys
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from mopro_fast.errors import UserError, of_the_machine


class Crashed(NamedTuple):
    """Instead of the rest of a task's items: the process that worked on it has ended."""

    why: str


class Done(NamedTuple):
    """After a task's last item."""


def run(function: Callable[..., Iterator], tasks: deque[tuple], workers: int) -> Iterator[tuple[tuple, Any]]:
    """(task, item) for all that ``function(*task)`` yields in the processes, as it comes; then (task, Done or Crashed).

    function: importable by name. The caller may append to ``tasks`` meanwhile. A UserError is passed on; any other
    exception is a RuntimeError here.
    """
    busy: dict[Connection, tuple[_Worker, tuple]] = {}
    idle = [_Worker(function) for _ in range(min(workers, len(tasks)))]
    try:
        while tasks or busy:
            while tasks and idle:
                worker = idle.pop()
                task = tasks.popleft()
                worker.start(task)
                busy[worker.connection] = worker, task
            for connection in wait(list(busy)):
                worker, task = busy[connection]
                item = worker.receive()
                if isinstance(item, UserError | RuntimeError):
                    raise item
                if isinstance(item, Done | Crashed):
                    del busy[connection]
                    idle.append(worker if isinstance(item, Done) else _Worker(function))
                yield task, item
    finally:
        for worker in idle + [worker for worker, _ in busy.values()]:
            worker.end()


class _Worker:
    def __init__(self, function: Callable[..., Iterator]) -> None:
        self.connection, theirs = Pipe()
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; from mopro_fast.data import workers; workers.serve(sys.argv[1])"
        )
        start = functools.partial(
            subprocess.Popen,
            [sys.executable, "-c", code, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C goes to the caller alone, who ends the workers
        )
        try:
            self._process = start()
        except PermissionError:  # another user's interpreter, whose folder this process could read when it began
            self._process = start(executable="/proc/self/exe")
        theirs.close()
        self.start(function)

    def start(self, task: Any) -> None:
        with contextlib.suppress(ConnectionError):  # it has ended while it had nothing to do: receive() says so
            self.connection.send(task)

    def receive(self) -> Any:
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError):
            status = self._process.wait()
            self.connection.close()
            if status >= 0:
                raise RuntimeError(f"a worker process has ended with status {status}") from None
            return Crashed(f"signal {-status}")

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self.connection.close()


def serve(descriptor: str) -> None:
    """The processes' main function."""
    connection = Connection(int(descriptor))
    try:
        function = connection.recv()
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
