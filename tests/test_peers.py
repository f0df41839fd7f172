"""Ranks that end or hang end the others; ranks that cannot meet say so."""

import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import FORKS

from mopro_fast import cli, distributed, peers, signals
from mopro_fast.errors import UserError
from mopro_fast.models.resnet import ResNet
from mopro_fast.training.evaluate import accuracy

ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class Ranks:
    """Watches of ranks in this process, and what they would end it with."""

    def __init__(self, ranks: int, timeout: float) -> None:
        self.ended: dict[str, float] = {}
        pairs = {rank: socket.socketpair() for rank in range(1, ranks)}
        self.theirs = {rank: pair[1] for rank, pair in pairs.items()}
        self.watches = {0: peers.Watch(0, {rank: pair[0] for rank, pair in pairs.items()}, timeout)}

    def watch(self, rank: int, timeout: float) -> peers.Watch:
        self.watches[rank] = peers.Watch(rank, {0: self.theirs[rank]}, timeout)
        return self.watches[rank]

    def end(self, line: str, _status: int) -> None:
        (watch,) = [w for w in self.watches.values() if w._thread is threading.current_thread()]
        watch._closing = True
        self.ended[threading.current_thread().name] = line

    def lines(self, wanted: int, seconds: float = 3) -> list[str]:
        until = time.monotonic() + seconds
        while len(self.ended) < wanted and time.monotonic() < until:
            time.sleep(0.01)
        return [self.ended[name].partition("error: ")[2] for name in sorted(self.ended)]


@pytest.fixture
def ranks(monkeypatch):
    made = []

    def make(count: int, timeout: float = 60) -> Ranks:
        made.append(Ranks(count, timeout))
        for i, watch in made[0].watches.items():
            watch._thread.name = f"rank {i}"
        monkeypatch.setattr(signals, "end", made[0].end)
        return made[0]

    monkeypatch.setattr(peers, "LAST", 0.05)
    monkeypatch.delenv("RANK", raising=False)
    yield make
    for closing in (*made[0].watches.values(), *made[0].theirs.values()):
        closing.close()


GO_ON = ": the same command goes on where it stopped"


def test_a_rank_that_ends_ends_all(ranks):
    r = ranks(3)
    r.watch(2, 60)._thread.name = "rank 2"
    r.theirs[1].close()
    assert r.lines(2) == ["rank 1 has ended" + GO_ON] * 2


def test_rank_0_that_ends_ends_the_others(ranks):
    r = ranks(2)
    watch = r.watch(1, 60)
    r.watches[0]._away = True  # it would end, too
    r.watches[0]._links[1].shutdown(socket.SHUT_RDWR)
    assert r.lines(1) == ["rank 0 has ended" + GO_ON] and watch.lost


def test_ranks_that_are_done_may_end_until_they_are_needed(ranks):
    r = ranks(2)
    r.watch(1, 60)
    r.watches.pop(1).close()
    assert r.lines(1, 0.2) == [] and not r.watches[0].lost
    r.watches[0].be_away(True)
    r.watches[0].be_away(False)
    assert r.lines(1) == ["rank 1 has ended" + GO_ON]


def test_a_checkpoint_is_finished_first(ranks):
    r = ranks(2)
    with signals.saving():
        r.theirs[1].close()
        assert r.lines(1, 0.4) == [] and r.watches[0].lost
    assert len(r.lines(1)) == 1


def test_a_rank_without_a_sign_of_life(ranks):
    r = ranks(2, timeout=0.4)  # rank 1 says nothing
    assert r.lines(1) == ["rank 1 has given no sign of life for 0 s" + GO_ON]


def test_signs_of_life_are_enough_where_ranks_work_alone(ranks):
    r = ranks(2, timeout=1)
    r.watch(1, 1)
    assert r.lines(1, 2.5) == []


def test_ranks_that_train_and_do_not_go_on(ranks):
    r = ranks(2, timeout=1)
    other = r.watch(1, 1)
    other._thread.name = "rank 1"
    for watch in r.watches.values():
        watch.training, watch.last_moved = True, time.monotonic()
    other.waits_for = "a.jpg"
    began = time.monotonic()
    while time.monotonic() < began + 2.5:
        other.last_moved = time.monotonic()  # one goes on
        assert not r.ended
        time.sleep(0.02)
    assert r.lines(2) == ["no rank has gone on for 1 s, rank 1 waits for a.jpg" + GO_ON] * 2


def test_an_evaluation_goes_on_with_every_batch(monkeypatch):
    moved = []
    monkeypatch.setattr(peers, "moved", lambda: moved.append(1))
    encoder = ResNet("resnet18", 4, 8, width=0.125, stem="small").eval()
    batches = [(torch.zeros(1, 32, 32, 3, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), torch.arange(1))] * 3
    assert accuracy(encoder, batches, torch.device("cpu"))["images"] == len(moved) == 3


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def rank_of_two(rank: int, port: int, what: str, errors: str) -> None:
    os.dup2(os.open(f"{errors}.{rank}", os.O_WRONLY | os.O_CREAT), 2)
    sys.stderr = os.fdopen(2, "w", closefd=False)
    values = (str(rank), "2", str(rank), "127.0.0.1", str(port))
    os.environ.update(zip(ENVIRONMENT, values, strict=True))
    cli._run = lambda _: work(rank, what)
    cli.main(["train"], own=True)


def work(rank: int, what: str) -> int:
    distributed.start("cpu", timeout=10)
    dist.barrier()
    if what == "alone":  # rank 0 works, and rank 1 does not come
        distributed.by_rank0(lambda: time.sleep(60))
    if what == "saving":
        return saves_when_stopped(rank)
    if rank == 1:
        if what == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "mistaken":
            raise UserError("a mistake of rank 1")
        if what == "broken":
            threading.Thread(target=time.sleep, args=(60,)).start()  # it reads from storage that hangs
            raise ValueError("a mistake of the program")
        distributed.leave()
        return 0
    if what != "done":
        dist.all_reduce(torch.ones(1))
    distributed.leave()
    time.sleep(0.3)
    return 0


def saves_when_stopped(rank: int) -> int:
    """The write takes longer than a signal gives any rank outside of it."""
    distributed._STEP = 0.5
    with distributed.StopSignal() as stop:
        with distributed.saving():
            os.kill(os.getpid(), signal.SIGTERM)
            if rank == 0:
                time.sleep(2)
                print("written", file=sys.stderr)
        while not (received := stop.poll()):
            pass
    distributed.leave()
    return 128 + received


def test_a_write_that_hangs_is_no_sign_of_life(ranks, monkeypatch):
    monkeypatch.setattr(signals, "SAVING", 0.3)
    r = ranks(2, timeout=0.4)
    watch = r.watches[0]
    watch.training = True
    with signals.saving():
        began = time.monotonic()
        assert watch._state(began + 1)["still"] == 0
        time.sleep(0.4)
        assert watch._state(began + 1)["still"] > 0


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("what", "statuses", "lines"),
    [
        ("killed", [1, -9], ["rank 1 has ended" + GO_ON, ""]),
        ("mistaken", [1, 2], ["rank 1 has ended" + GO_ON, "[rank 1] a mistake of rank 1"]),
        ("broken", [1, 1], ["rank 1 has ended" + GO_ON, ""]),
        ("saving", [143, 143], ["", ""]),
        ("alone", [1, -9], ["rank 1 has ended" + GO_ON, ""]),
        ("done", [0, 0], ["", ""]),
    ],
    ids=["killed", "mistaken", "broken", "saving", "alone", "done"],
)
def test_two_ranks(tmp_path, what, statuses, lines):
    port, errors = free_port(), str(tmp_path / "errors")
    processes = [FORKS.Process(target=rank_of_two, args=(rank, port, what, errors)) for rank in range(2)]
    for process in processes:
        process.start()
    if what == "alone":
        time.sleep(2)
        os.kill(processes[1].pid, signal.SIGKILL)
    processes[1].join(30)
    began = time.monotonic()
    processes[0].join(60)
    assert [process.exitcode for process in processes] == statuses and time.monotonic() - began < 5
    for rank, line in enumerate(lines):
        said = Path(f"{errors}.{rank}").read_text()
        if what == "broken" and rank == 1:
            assert said.startswith("Traceback") and said.endswith("ValueError: a mistake of the program\n")
            continue
        assert said.count("mopro-fast") == (line != "") and "Traceback" not in said, said
        assert f"mopro-fast: error: {line}" * bool(line) in said
        assert said.startswith("written") == (what == "saving" and rank == 0), said


def test_rank_0_that_cannot_listen_tells_the_others(monkeypatch):
    def refused(*_, **__):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(socket, "create_server", refused)
    told = []
    said = peers.start(0, 2, "127.0.0.1", 60, lambda x: told.append(x) or x, None)
    assert "Too many open files" in said and told[0][0] in said and peers._watch is None
    monkeypatch.setattr(peers, "_connected", None)  # rank 1 does not try
    said = peers.start(1, 2, "127.0.0.1", 60, lambda _: told[0], None)
    assert "Too many open files" in said


def test_strangers_are_sent_away(monkeypatch):
    monkeypatch.setattr(peers, "_GREET", 0.1)
    with peers._listener(3) as listener:
        address = ("127.0.0.1", listener.getsockname()[1])
        with (
            socket.create_connection(address),  # it is silent
            socket.create_connection(address) as talks,
            socket.create_connection(address) as rank1,
        ):
            talks.sendall(b"GET / HTTP/1.1\r\n\r\n")
            rank1.sendall(b"1 secret\n")
            links = peers._accepted(listener, 2, "secret")
            assert [link.getpeername()[1] for link in links.values()] == [rank1.getsockname()[1]] and [*links] == [1]
            links[1].close()


@pytest.fixture
def environment(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)

    def set(*values: str) -> None:
        for name, value in zip(ENVIRONMENT, values, strict=False):
            monkeypatch.setenv(name, value)

    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    yield set
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("x", "2"), "RANK='x', no whole number"),
        (("0", "two"), "WORLD_SIZE='two', no whole number of at least 1"),
        (("0", "0"), "WORLD_SIZE='0', no whole number of at least 1"),
        (("2", "2"), "RANK=2 of WORLD_SIZE=2: ranks count from 0 to 1"),
        (("0", "2", "-1"), "LOCAL_RANK='-1'"),
        (("0", "2"), "WORLD_SIZE=2 but no MASTER_ADDR"),
        (("0", "2", "0", "localhost"), "WORLD_SIZE=2 but no MASTER_PORT"),
        (("0", "2", "0", "localhost", "70000"), "MASTER_PORT='70000', no whole number from 0 to 65535"),
        (("1", "2", "0", "nowhere.invalid", "29500"), "cannot meet at nowhere.invalid:29500 .* is rank 0 there"),
    ],
    ids=["rank", "size", "none", "range", "local", "address", "port", "number", "host"],
)
def test_an_environment_that_cannot_be_is_one_line(environment, values, message):
    environment(*values)
    with pytest.raises(UserError, match=message) as caught:
        distributed.start("cpu", timeout=1)
    assert "\n" not in str(caught.value)


def test_ranks_that_cannot_meet(environment):
    with socket.create_server(("", 0)) as listener:
        port = str(listener.getsockname()[1])
        environment("0", "2", "0", "127.0.0.1", port)
        with pytest.raises(UserError, match=rf"port {port} is in use on 127.0.0.1: choose another MASTER_PORT"):
            distributed.start("cpu", timeout=1)
    for rank, message in (("0", "start as many as WORLD_SIZE says"), ("1", "refused: is rank 0 there?")):
        environment(rank, "2", "0", "127.0.0.1", port)
        with pytest.raises(UserError, match=message):
            distributed.start("cpu", timeout=0.5)


def test_a_name_that_is_not_known_yet(monkeypatch):
    answers = [socket.gaierror(-2, "Name or service not known"), OSError(113, "No route to host")]
    connect = socket.create_connection

    def later(address, timeout):
        if answers:
            raise answers.pop()
        return connect(address, timeout)

    monkeypatch.setattr(socket, "create_connection", later)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        distributed._reach("127.0.0.1", listener.getsockname()[1], 10)
    assert not answers


def test_one_process_needs_no_others(environment):
    environment("0", "1")
    assert distributed.start("cpu") == torch.device("cpu")
