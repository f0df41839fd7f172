"""Processes for work on files: what ends one of them, and that it ends nothing else."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mopro_fast.data import decode, workers
from mopro_fast.errors import UserError


def native(function: str, *args: int) -> None:
    """Call a function of the C library that, as a decoder may, does not let other threads of Python go on."""
    getattr(ctypes.PyDLL(None), function)(*args)


def raising(number):
    yield number
    if number == 3:
        raise UserError("three is too many")
    if number == 4:
        raise ValueError("a mistake in the program")


def test_a_worker_that_ends_while_it_waits_is_reported():
    worker = workers._Worker(raising)
    worker._process.kill()
    worker._process.wait()
    worker.start((1,))
    while isinstance(item := worker.receive(), workers._Ready):
        pass
    assert item == workers.Crashed(-9)


@pytest.mark.medium
def test_errors_of_workers_are_passed_on():
    items = [(task[0], item) for task, item in workers.run(raising, deque([(1,), (2,)]), 2)]
    assert sorted(items, key=str) == sorted([(1, 1), (1, workers.Done()), (2, 2), (2, workers.Done())], key=str)
    for number, kind, text in ((3, UserError, "three is too many"), (4, RuntimeError, "a mistake in the program")):
        with pytest.raises(kind, match=text):
            list(workers.run(raising, deque([(number,)]), 1))
    assert list(workers.run(raising, deque(), 2)) == []


def at_once(what):
    """One item, made within short limits."""
    workers.WAITING = workers.COMPUTING = 0.2
    with workers.limited():
        if what == "waits":
            native("pause")
        elif what == "computes":
            while True:
                pass
        elif what == "exits":
            os._exit(1)
    yield what


REASONS = {
    "waits": "cannot be read: no answer for 120 s",
    "exits": "cannot be read: it ends the process that tries (status 1)",
}


@pytest.mark.parametrize("what", REASONS)
def test_what_ends_a_worker_is_said(what):
    tasks = deque([(what,), ("fine",)])
    found = [(task[0], item) for task, item in workers.run(at_once, tasks, 1)]
    crash = found.pop(0)[1]
    assert decode.crash_reason(crash) == REASONS[what]
    assert found == [("fine", "fine"), ("fine", workers.Done())]


def test_a_decoder_without_end_is_no_file_that_cannot_be_read():
    (_, crash), *_ = workers.run(computing, deque([()]), 1)
    assert decode.crash_reason(crash) == "broken: no end after 60 s of computing"


def computing():
    workers.COMPUTING = 0.2
    with workers.limited():
        while True:
            pass
    yield


def test_a_limit_ends_with_the_work():
    assert [item for _, item in workers.run(slow_after_work, deque([()]), 1)] == [1, workers.Done()]
    with workers.limited():  # in this process it does nothing
        assert signal.getitimer(signal.ITIMER_PROF) == (0, 0)


def slow_after_work():
    workers.WAITING = workers.COMPUTING = 0.1
    with workers.limited():
        pass
    time.sleep(0.3)
    yield 1


def test_storage_that_answers_nothing_ends_it():
    tasks = deque([("waits",)] * 20)
    with pytest.raises(UserError, match=r"files in succession: no answer for 120 s: is the storage still there\?"):
        list(workers.run(at_once, tasks, 4))


def test_silence_is_said(monkeypatch, capsys):
    monkeypatch.setattr(workers, "WAITING", 0.01)
    assert [item for _, item in workers.run(slow_after_work, deque([()]), 1)] == [1, workers.Done()]
    assert "no answer for 0.01 s from any of the files" in capsys.readouterr().err


def test_no_process_can_be_started(monkeypatch):
    def refused(*_, **__):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(subprocess, "Popen", refused)
    with pytest.raises(UserError, match="cannot start a process: Resource temporarily unavailable"):
        list(workers.run(raising, deque([(1,)]), 1))
    assert len(os.listdir("/proc/self/fd")) == before


CALLER = """
import os, sys, threading, time
from collections import deque
from mopro_fast.data import workers
import test_workers
def work():
    if sys.argv[1] == "run":
        list(workers.run(test_workers.hanging_items, deque([(sys.argv[2],)]), 1))
    else:
        workers.Apart(test_workers.hanging)(sys.argv[2])
threading.Thread(target=work, daemon=True).start()
while not os.path.exists(sys.argv[2]):
    time.sleep(0.01)
print(flush=True)
time.sleep(60)
"""


def hanging(path):
    Path(f"{path}.new").write_text(str(os.getpid()))
    os.rename(f"{path}.new", path)
    native("pause")


def hanging_items(path):
    hanging(path)
    yield


@pytest.mark.parametrize("way", ["run", "apart"])
def test_a_worker_that_hangs_does_not_outlive_its_caller(tmp_path, way):
    path = tmp_path / "worker"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", CALLER, way, path], env=environment, stdout=subprocess.PIPE) as caller:
        caller.stdout.readline()
        caller.kill()
    worker, deadline = Path("/proc", path.read_text()), time.monotonic() + 5
    while worker.exists() and "\nState:\tZ" not in (worker / "status").read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not worker.exists() or "\nState:\tZ" in (worker / "status").read_text()


def answer(what, *more):
    if what == "pid":
        return os.getpid()
    if what == "dies":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "exits":
        os._exit(1)
    if what == "hangs":
        native("pause")
    if what == "refuses":
        raise UserError("not this one")
    if what == "fails":
        raise ValueError("a mistake in the program")
    return (what, *more)


@pytest.fixture
def apart():
    with_short_patience = workers.Apart(answer, patience=0.3)
    yield with_short_patience
    with_short_patience.close()


def test_a_process_apart_answers_until_it_dies(apart):
    assert apart("a", b"b" * 300_000, None) == ("a", b"b" * 300_000, None) and apart(None) == (None,)
    first = apart("pid")
    assert first == apart("pid") != os.getpid()
    for what, why in (("dies", "signal 11"), ("exits", "status 1"), ("hangs", "no answer for 0.3 s")):
        with pytest.raises(workers.Died, match=why):
            apart(what)
        second = apart("pid")
        assert second != first and not Path("/proc", str(first)).exists()
        first = second
    os.kill(first, signal.SIGKILL)  # while it has nothing to do: no call is to blame
    os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
    assert apart("pid") != first


@pytest.mark.parametrize("what, kind", [("refuses", UserError), ("fails", RuntimeError)])
def test_its_exceptions_are_passed_on(apart, what, kind):
    first = apart("pid")
    with pytest.raises(kind):
        apart(what)
    assert apart("pid") == first


def test_threads_share_it():
    apart = workers.Apart(answer, patience=5, processes=2)

    def call(i):
        try:
            return apart("dies" if i == 7 else i)
        except workers.Died:
            return "died"

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(call, range(20)))
    assert found == [(i,) if i != 7 else "died" for i in range(20)]
    apart.close()


def test_closed_it_answers_no_more(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    apart = workers.Apart(hanging)
    died = []

    def call():
        with pytest.raises(workers.Died) as error:
            apart(str(tmp_path / "begun"))
        died.append(str(error.value))

    thread = threading.Thread(target=call)
    thread.start()
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    apart.close()
    thread.join(5)
    assert died == ["signal 9"]
    with pytest.raises(workers.Died, match="closed"):
        apart("more")
    assert len(os.listdir("/proc/self/fd")) == before
    assert not Path("/proc", (tmp_path / "begun").read_text()).exists()


def test_a_process_apart_starts_without_torch():
    light = workers.Apart(loaded, patience=30)
    assert light("torch") is False and light("mopro_fast") is True
    light.close()


def loaded(name):
    return name in sys.modules
