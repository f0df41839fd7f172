"""Waiting for images: storage that hangs is named, and a signal ends the wait."""

import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

from mopro_fast import peers, signals
from mopro_fast.console import say

FIRST = 60.0  # seconds after which it is said, and again after twice the time
_LOOK = 0.5  # seconds between two looks for a signal

T = TypeVar("T")


def results_of(tasks: list[Future[T]], names: list[Callable[[], str]]) -> list[T]:
    """The tasks' results. names: which image each waits for, when asked."""
    began, told = time.monotonic(), FIRST
    for task, name in zip(tasks, names, strict=True):
        while not task.done() and not wait([task], timeout=_LOOK).done:
            signals.check()
            waited = time.monotonic() - began
            if waited > FIRST / 6:
                peers.waits_for(name())
            if waited > told:
                told *= 2
                what = f"{name()}: is the storage still there?"
                say(f"{signals.of_rank()}no image for {waited:.0f} s: waiting for {what}")
    if time.monotonic() - began > FIRST / 6:
        peers.waits_for("")
    return [task.result() for task in tasks]
