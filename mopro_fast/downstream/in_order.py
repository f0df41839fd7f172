"""A function of many batches, with bits that do not depend on the number of cores."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def in_order(function: Callable[..., T], batches: Iterable[tuple], device: torch.device) -> Iterator[T]:
    """``function(*batch)`` of every batch, in their order.

    On a CPU a batch is one thread's affair, and as many batches run at a time as PyTorch has threads: what threads
    compute together depends, in its last bits, on how many they are.
    """
    if device.type != "cpu":
        yield from (function(*batch) for batch in batches)
        return
    threads = torch.get_num_threads()
    running: deque[Future[T]] = deque()
    with ThreadPoolExecutor(threads, "mopro_fast-batch", torch.set_num_threads, (1,)) as pool:
        try:
            for batch in batches:
                running.append(pool.submit(function, *batch))
                if len(running) > threads:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()
            torch.set_num_threads(threads)  # new threads ask for the number set last, by any thread
