"""Functions on device tensors that become one CUDA graph launch."""

import contextlib
import gc
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor


@contextlib.contextmanager
def capturing(graph: torch.cuda.CUDAGraph, **how: Any) -> Iterator[None]:
    """``torch.cuda.graph``, inside of which Python collects no garbage: CUDA memory freed there fails the capture."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        gc.collect()
        with torch.cuda.graph(graph, **how):
            yield
    finally:
        if was_on:
            gc.enable()


class Graphed:
    """``function(key, *tensors)``, which must not wait for the device, as one CUDA graph.

    The first ``warm_up`` calls with a key run as they are, which lets libraries choose and allocate; the next one is
    captured, and all later ones replay it on copies of their tensors, whose shapes must stay. Whatever else the
    function reads or writes must keep its memory. Its result is overwritten by the next call. One graph is kept:
    another key frees it. Captured calls must come on a stream that is not the default one.
    """

    def __init__(self, function: Callable[..., Any], warm_up: int) -> None:
        self._function, self._warm_up = function, warm_up
        self._key: Hashable = None
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor | None] = []
        self._result: Any = None

    def free(self) -> None:
        """Give the graph's memory back; another call begins anew."""
        self._key = self._graph = self._result = None

    def __call__(self, key: Hashable, *tensors: Tensor | None) -> Any:
        if key != self._key:
            self.free()
            self._key, self._calls = key, 0
        self._calls += 1
        if self._calls <= self._warm_up:
            return self._function(key, *tensors)
        if self._graph is None:
            self._inputs = [None if x is None else x.clone() for x in tensors]
            graph = torch.cuda.CUDAGraph()
            # thread_local: the loader's and NCCL's threads may call CUDA meanwhile.
            with capturing(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
                self._result = self._function(key, *self._inputs)
            self._graph = graph
        else:
            for own, x in zip(self._inputs, tensors, strict=True):
                if x is not None:
                    own.copy_(x, non_blocking=True)
        self._graph.replay()
        return self._result
