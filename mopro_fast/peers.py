"""Every rank learns within seconds that another one has ended or hangs, whatever it waits in itself, and ends too.

Ranks hold a connection to rank 0, watched by a thread. The system closes those of a process that ends, however it
ends; one that hangs sends no line any more, or says that it does not go on. Rank 0 tells the others.
"""

import contextlib
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from mopro_fast import signals
from mopro_fast.errors import first_line

STATUS = 1  # of a process that ends because of another rank
LAST = 2.0  # seconds in which a rank may end by itself once another one has gone
_SAVING_UNDER_TORCHRUN = 25.0  # the same while it writes a checkpoint: torchrun kills all after 30 s
_BEAT = 5.0  # seconds between two signs of life at most
_CONNECT = 20.0  # seconds for all ranks to connect to rank 0, where they have met a moment before
_GREET = 2.0  # seconds for one that has connected to say who it is
_GO_ON = "the same command goes on where it stopped"

_watch: "Watch | None" = None


def start(
    rank: int, ranks: int, host: str, timeout: float, from_rank0: Callable[[Any], Any], gather: Callable[[Any], list]
) -> str | None:
    """Watch the other ranks, and be watched; -> why that is not possible. Collective.

    host: of rank 0. timeout: see Watch. from_rank0: gives rank 0's argument to all; gather: all ranks' arguments.
    """
    global _watch
    listener, secret, why = None, secrets.token_hex(16), ""
    links: dict[int, socket.socket] = {}
    try:
        listener = _listener(ranks) if rank == 0 else None
    except OSError as error:
        why = first_line(error)
    why, port, secret = from_rank0((why, listener and listener.getsockname()[1], secret))
    if why:
        return f"{host}: {why}"
    try:
        links = _accepted(listener, ranks, secret) if listener else {0: _connected(host, port, f"{rank} {secret}\n")}
    except OSError as error:
        why = first_line(error)
    reasons = [reason for reason in gather(why) if reason]
    if reasons:
        for link in links.values():
            link.close()
        return f"{host}:{port}: {reasons[0]}"
    _watch = Watch(rank, links, timeout)
    return None


def stop() -> None:
    """The ranks need each other no longer."""
    global _watch
    if _watch is not None:
        _watch.close()
        _watch = None


def watched() -> bool:
    """Whether the other ranks notice the end of this one."""
    return _watch is not None


def pause() -> None:
    """Until :func:`resume` this rank may end, and does without the others."""
    if _watch is not None:
        _watch.be_away(True)


def resume(timeout: float) -> None:
    if _watch is not None:
        _watch.timeout = timeout
        _watch.be_away(False)


def leave(status: int) -> None:
    """``sys.exit`` after an error. Among ranks nothing more is waited for: libraries wait for the others, who end."""
    if _watch is not None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(status)
    sys.exit(status)


def moved(training: bool | None = None) -> None:
    """This rank goes on. training: from now on (until False) it hangs with all others if none of them does."""
    if _watch is not None:
        _watch.last_moved = time.monotonic()
        if training is not None:
            _watch.training = training


def waits_for(what: str) -> None:
    """For the others' last line; "": for nothing."""
    if _watch is not None:
        _watch.waits_for = what


def explained(error: BaseException) -> str | None:
    """The line about what a collective raises when another rank has gone; None: ``error`` is something else.

    Of a stop by a signal, too: torchrun sends one to those who are left.
    """
    if _watch is None or not isinstance(error, RuntimeError | signals.Stopped):
        return None
    until = time.monotonic() + (LAST / 2 if isinstance(error, RuntimeError) else 0.2)
    while not _watch.lost and time.monotonic() < until:
        time.sleep(0.02)
    if _watch.lost:
        return _line(_watch.lost)
    collective = type(error).__name__.startswith("Dist") or "gloo" in str(error).partition("\n")[0]
    return _line(f"a rank does not answer ({first_line(error)})") if collective else None


def _line(reason: str) -> str:
    return f"mopro-fast: error: {signals.of_rank()}{reason}: {_GO_ON}"


def _forget() -> None:
    """A fork must not hold the connections: they tell of the end of this process."""
    global _watch
    if _watch is not None:
        _watch.forget()
        _watch = None


os.register_at_fork(after_in_child=_forget)


class Watch:
    """One rank's connections: rank 0's to all, the others' to rank 0; and the thread that watches them."""

    def __init__(self, rank: int, links: dict[int, socket.socket], timeout: float) -> None:
        """timeout: seconds after which a rank without a sign of life hangs, or all that train and do not go on."""
        self.timeout = timeout
        self.training, self.waits_for, self.last_moved = False, "", time.monotonic()
        self.lost = ""
        """Why this rank has to end."""
        self._rank, self._links = rank, links
        self._heard = dict.fromkeys(links, time.monotonic())
        self._states: dict[int, dict] = {}  # what ranks said last
        self._away, self._others_away = False, set()
        self._closing = False
        self._lock = threading.Lock()  # of what is sent
        self._text = dict.fromkeys(links, b"")  # of lines that are not complete
        self._selector = selectors.DefaultSelector()
        self._woken, self._wakes = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ, -1)
        for other, link in links.items():
            link.setblocking(False)
            self._selector.register(link, selectors.EVENT_READ, other)
        self._thread = threading.Thread(target=self._run, daemon=True, name="mopro_fast-peers")
        self._thread.start()

    def be_away(self, away: bool) -> None:
        gone = sorted(set(self._heard) - set(self._links))
        if gone and not away:
            self.lost = f"rank {gone[0]} has ended"
        self._away, self.training = away, False
        self._send({"away": away})
        self._wakes.send(b"\0")

    def close(self) -> None:
        self.be_away(True)
        self._closing = True
        self._wakes.send(b"\0")
        self._thread.join()
        for s in (*self._links.values(), self._woken, self._wakes):
            s.close()
        self._selector.close()

    def forget(self) -> None:
        """Close the connections of a fork."""
        for link in list(self._links.values()):
            link.close()

    def _run(self) -> None:
        looked, beat = time.monotonic(), 0.0
        while not self._closing:
            pause = min(_BEAT, self.timeout / 4)
            for key, _ in self._selector.select(pause):
                self._read(key.fileobj, key.data)
            now = time.monotonic()
            if now - looked > 2 * pause + 1:  # this process was stopped, and continued
                self._heard, self.last_moved = dict.fromkeys(self._heard, now), now
            looked = now
            if now > beat + pause:
                beat = now
                self._send(self._state(now))
            reason = self.lost or self._missed(now)
            if reason and not self._away:
                self._end(reason)

    def _state(self, now: float) -> dict:
        moves = not self.training or signals.in_saving()
        return {"still": 0 if moves else now - self.last_moved, "waits": self.waits_for}

    def _read(self, link: socket.socket, other: int) -> None:
        try:
            data = link.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if other < 0:
            return
        if not data:
            self._selector.unregister(link)
            link.close()
            del self._links[other]
            return
        self._heard[other] = time.monotonic()
        *lines, self._text[other] = (self._text[other] + data).split(b"\n")
        for line in map(json.loads, lines):
            if "away" in line:
                (self._others_away.add if line["away"] else self._others_away.discard)(other)
            elif "lost" in line:
                self.lost = line["lost"]
            else:
                self._states[other] = line

    def _missed(self, now: float) -> str:
        """What is wrong with the others."""
        for other, heard in self._heard.items():
            if other in self._others_away:
                continue
            if other not in self._links:
                return f"rank {other} has ended"
            if now - heard > self.timeout:
                return f"rank {other} has given no sign of life for {self.timeout:.0f} s"
        if self._rank != 0 or self._others_away:
            return ""
        states = {0: self._state(now), **self._states}
        if len(states) <= len(self._links) or min(state["still"] for state in states.values()) <= self.timeout:
            return ""
        waits = [f"rank {other} waits for {state['waits']}" for other, state in states.items() if state["waits"]]
        return f"no rank has gone on for {self.timeout:.0f} s" + (f", {waits[0]}" if waits else "")

    def _send(self, message: dict) -> None:
        data = json.dumps(message).encode() + b"\n"
        with self._lock:
            for link in list(self._links.values()):
                with contextlib.suppress(OSError):  # whoever has gone or hangs is noticed when read from
                    link.send(data)

    def _end(self, reason: str) -> None:
        """End this process, unless it does by itself or needs nobody any more."""
        self.lost = reason
        if self._rank == 0:
            self._send({"lost": reason})
        saving = _SAVING_UNDER_TORCHRUN if "TORCHELASTIC_RUN_ID" in os.environ else signals.SAVING
        now = began = time.monotonic()
        while now < began + (saving if self._rank == 0 and signals.in_saving() else LAST):  # the others wait for it
            time.sleep(0.02)
            if self._away or self._closing:
                return
            now = time.monotonic()
        signals.end(_line(reason), STATUS)


def _listener(ranks: int) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", 0), family=family, backlog=ranks, dualstack_ipv6=both)


def _accepted(listener: socket.socket, ranks: int, secret: str) -> dict[int, socket.socket]:
    """The others' connections to rank 0."""
    links: dict[int, socket.socket] = {}
    until = time.monotonic() + _CONNECT
    with listener:
        while len(links) < ranks - 1:
            listener.settimeout(max(0.01, until - time.monotonic()))
            link, _ = listener.accept()
            rank, _, said = _greeting(link).partition(b" ")
            if secrets.compare_digest(said, secret.encode()):
                links[int(rank)] = link
            else:
                link.close()
    return links


def _greeting(link: socket.socket) -> bytes:
    """The line that a rank begins with; of a stranger, b"" or anything."""
    link.settimeout(_GREET)
    with contextlib.suppress(OSError), link.makefile("rb") as file:
        return file.readline(80).strip()
    return b""


def _connected(host: str, port: int, greeting: str) -> socket.socket:
    link = socket.create_connection((host, port), timeout=_CONNECT / 2)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    link.sendall(greeting.encode())
    return link
