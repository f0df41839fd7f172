"""SIGTERM, SIGHUP and Ctrl-C: saved or cleaned up, one line, and an end whatever the process waits for."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
from PIL import Image

from mopro_fast import cli, signals
from mopro_fast.checkpoints import state as checkpoint
from mopro_fast.data import waiting
from mopro_fast.training.loop import Trainer

HERE = Path(__file__).parent


def child(code: str, *words: str, number: int, **options) -> tuple[int, str, float]:
    """Send the signal to a child once it has printed a line -> exit status, stderr, seconds from then on."""
    with subprocess.Popen(
        [sys.executable, *(["-c", code] if code else []), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(HERE.parent)},
        **options,
    ) as process:
        process.stdout.readline()
        began = time.monotonic()
        process.send_signal(number)
        said = process.communicate(timeout=60)[1]
        return process.returncode, said, time.monotonic() - began


# A mutex of C's that its thread has locked already: no signal ends that wait, and no handler of Python's runs.
STUCK = """
import ctypes, threading, time
from mopro_fast import cli, signals
signals.UNHEARD = signals.LEAVING = 0.2
signals.allow(0.2)
def wait(argv):
    lock = ctypes.create_string_buffer(64)
    print("waits", flush=True)
    [ctypes.CDLL(None).pthread_mutex_lock(lock) for _ in range(2)]
def thread(argv):
    threading.Thread(target=wait, args=[argv]).start()
    time.sleep(60)
"""


@pytest.mark.parametrize("where", ["wait", "thread"])
def test_a_wait_in_a_library_ends(where):
    status, said, seconds = child(f"{STUCK}\ncli._run = {where}; cli.main(['eval'], own=True)", number=signal.SIGTERM)
    assert status == 143 and seconds < 5
    assert said == "mopro-fast: eval stopped by signal 15: the same command goes on where it stopped\n"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_the_first_signal_is_an_exception_and_later_ones_are_nothing(number, status):
    code = """
import os, time, sys
from mopro_fast import cli
def work(argv):
    try:
        print(flush=True)
        time.sleep(60)
    finally:
        for _ in range(3):
            os.kill(os.getpid(), int(sys.argv[1]))
            time.sleep(0.01)
        print("cleaned up", file=sys.stderr)
cli._run = work
cli.main(["pack"], own=True)
"""
    found, said, seconds = child(code, str(int(number)), number=number)
    lines = said.splitlines()
    assert found == status and len(lines) == 2 and seconds < 5, said
    assert lines[0] == "cleaned up" and lines[1].startswith("mopro-fast: pack ")


def test_nohup_is_heeded():
    code = "import time; from mopro_fast import cli; cli._run = lambda _: print(flush=True) or time.sleep(0.3) or 7; "
    ignored = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    assert child(code + "cli.main(['pack'], own=True)", number=signal.SIGHUP, **ignored)[:2] == (7, "")


@pytest.fixture
def flag():
    with signals.Flag() as flag:
        yield flag
        flag.ends_work = True


def send(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0)


def test_a_flag_is_noted_and_raised_where_nothing_would_be_lost(flag):
    send()
    assert flag.signal == signal.SIGTERM
    with pytest.raises(signals.Stopped), flag.at_once():
        raise AssertionError("it came before")


def test_a_signal_inside_of_at_once(flag):
    with pytest.raises(signals.Stopped), flag.at_once():
        send(signal.SIGHUP)
        raise AssertionError("it was ignored")


def test_a_signal_that_nobody_heeds_is_not_lost():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(signals.Stopped), signals.Flag():
        send()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("own", [True, False], ids=["own", "guest"])
def test_all_is_as_before_afterwards(own):
    before, threads = [signal.getsignal(s) for s in signals.HEEDED], threading.active_count()
    with signals.heeded("pack", own):
        assert signal.getsignal(signal.SIGHUP) not in before and threading.active_count() == threads + own
    assert before == [signal.getsignal(s) for s in signals.HEEDED] and threading.active_count() == threads
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["interrupt", "terminate"])
def test_a_program_that_calls_a_command_goes_on(number, monkeypatch, capsys):
    before, threads = [signal.getsignal(s) for s in signals.HEEDED], threading.active_count()
    monkeypatch.setattr(cli, "_run", lambda _: send(number) or time.sleep(5))
    with pytest.raises(SystemExit) as ended:
        cli.main(["pack"])
    assert ended.value.code == 128 + number and "mopro-fast: pack " in capsys.readouterr().err
    assert before == [signal.getsignal(s) for s in signals.HEEDED] and threading.active_count() == threads
    assert signal.set_wakeup_fd(-1) == -1


def test_a_clean_up_that_hangs_in_such_a_program():
    with pytest.raises(KeyboardInterrupt) as second, signals.heeded("pack", own=False):
        try:
            send(signal.SIGINT)
        finally:
            send(signal.SIGTERM)  # nothing
            send(signal.SIGINT)
    assert type(second.value) is KeyboardInterrupt


def test_a_handler_of_another_language_stays(monkeypatch):
    known = signal.getsignal
    monkeypatch.setattr(signal, "getsignal", lambda s: None if s == signal.SIGHUP else known(s))
    before = known(signal.SIGHUP)
    with signals.heeded("pack", own=False), signals.Flag():
        assert known(signal.SIGHUP) is before and known(signal.SIGTERM) is not before


def test_a_signal_to_a_fork_does_not_end_its_parent():
    code = """
import os, signal, time
from mopro_fast import cli, signals
signals.UNHEARD = 0.2
signals.allow(0.2)
def forked(within):
    reads, writes = os.pipe()
    with within:
        if not (fork := os.fork()):
            os.write(writes, b"-")
            time.sleep(60)
            os._exit(0)
        os.read(reads, 1)
        os.kill(fork, signal.SIGTERM)
        return os.waitpid(fork, 0)[1]
def work(argv):
    print(flush=True)
    ends = [forked(within) for within in (open(os.devnull), signals.Flag())]
    time.sleep(1)
    return 7 if ends == [signal.SIGTERM] * 2 else 8
cli._run = work
cli.main(["pack"], own=True)
"""
    assert child(code, number=signal.SIGCONT)[:2] == (7, "")


def test_a_wait_for_images_names_one_and_ends_with_a_signal(flag, monkeypatch, capsys):
    monkeypatch.setattr(waiting, "FIRST", 0.02)
    monkeypatch.setattr(waiting, "_LOOK", 0.01)
    done, never = Future(), Future()
    done.set_result(1)
    threading.Timer(0.3, send).start()
    flag.patience = 0.1
    began = time.monotonic()
    with pytest.raises(signals.Stopped):
        waiting.results_of([done, never], [lambda: "a.jpg", lambda: "b.jpg"])
    assert 0.35 < time.monotonic() - began < 5
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 2 and all("waiting for b.jpg: is the storage still there?" in line for line in lines)
    never.set_result(2)
    assert waiting.results_of([done, never], [str, str]) == [1, 2]


@pytest.mark.parametrize("step", [2, 3], ids=["training", "evaluation"])
def test_a_rank_that_is_stopped_alone_ends_without_a_save(step):
    def stopped(_):
        raise signals.Stopped(signal.SIGTERM)

    trainer = Trainer.__new__(Trainer)
    trainer.ranks, trainer.step, trainer.steps = 2, step, 3
    trainer._train_epoch = stopped if step == 2 else lambda _: 0
    trainer._end_epoch = stopped
    with pytest.raises(signals.Stopped):
        trainer._next_epoch(None)


@pytest.mark.medium
@pytest.mark.parametrize(("reads", "steps"), [(40, 8), (78, 16)], ids=["training", "evaluation"])
def test_training_saves_when_the_storage_hangs(tmp_path, reads, steps):
    for i in range(80):
        path = tmp_path / f"data/{i % 4}/{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (3 * i, 200 - i, 60 * (i % 4))).save(path)
    options = {"data": tmp_path / "data", "out": tmp_path / "run", "num-classes": 4, "batch-size": 4, "queue-size": 8}
    options |= {"image-size": 8, "eval-resize": 8, "width": 0.125, "tensorboard": False, "epochs": 1}
    options |= {"holdout": 0.2, "device": "cpu", "threads": 1}
    words = [str(x) for k, v in options.items() for x in (f"--{k}", v)]
    script = str(HERE / "hanging_command.py")
    status, said, seconds = child("", script, str(reads), "train", "demo", *words, number=signal.SIGTERM)
    assert status == 143 and seconds < 20, said
    assert said.count("stopped") == 1 and said.splitlines()[-1].startswith("stopped by signal 15 in epoch 1"), said
    state = checkpoint.load(checkpoint.all_of(tmp_path / "run/checkpoints")[-1])
    assert state.epoch == 0 and (state.step == steps if steps == 16 else 0 < state.step < 16)
