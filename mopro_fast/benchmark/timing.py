"""How the benchmarks measure: device time, launches, memory, host synchronisations, and the machine's own ceilings.

Eager time on a GPU: device and host are idle, the L2 cache is flushed, then two device events stand around the call,
so the host's launch overhead counts. Replay time: the same call captured in a CUDA graph; the flush is queued right
before the first event, so the host's part is hidden and only device time counts. On a CPU: time.perf_counter, no
flush, no replay. All times are microseconds, p20/p50/p80 over repetitions.
"""

import functools
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from mopro_fast.training.graph import capturing

Call = Callable[[], object]
# Bytes written, and as many read, before each repetition: over twice the L2 of an H100 (50 MB) or H200 (60 MB).
FLUSH = 2**27


def eager(call: Call, device: str, seconds: float = 0.1) -> dict[str, float]:
    """Microseconds of `call`; as many repetitions (5 to 50) as fit in `seconds`, after warming up."""
    if device == "cpu":
        return _sample(lambda: _host_time(call), seconds)
    flush = _Flush()

    def once() -> float:
        flush()
        torch.cuda.synchronize()
        return _device_time(call)

    return _sample(once, seconds)


def replay(call: Call, seconds: float = 0.1) -> dict[str, float]:
    """Microseconds of `call` replayed from a CUDA graph. Raises whatever the capture raises."""
    graph = capture(call)
    flush = _Flush()

    def once() -> float:
        flush()
        return _device_time(graph.replay)

    return _sample(once, seconds)


class _Flush:
    """Empties the L2 cache. What is written last is still dirty there, so clean lines are read over it."""

    def __init__(self) -> None:
        self.written, self.read = (torch.zeros(FLUSH // 4, dtype=torch.int32, device="cuda") for _ in range(2))

    def __call__(self) -> None:
        self.written.zero_()
        self.read.sum()


def capture(call: Call) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is compiled or allocated on first use must not be so during the capture
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with capturing(graph):
        call()
    return graph


def kernels(call: Call) -> list[tuple[str, float]]:
    """Name and microseconds of each kernel, copy and memset that one call puts on the GPU, as the profiler sees it."""
    cuda = torch.autograd.DeviceType.CUDA
    events = (e for e in _profiled(call) if e.device_type == cuda and not e.is_user_annotation)
    return [(e.name, e.time_range.elapsed_us()) for e in events]


def launches(call: Call, device: str) -> int | None:
    """How many ``kernels`` one call has; None on a CPU."""
    if device == "cpu":
        return None
    return len(kernels(call)) or None  # a profiler that saw nothing has measured nothing


def host_launches(call: Call) -> dict[str, int]:
    """How often one call launches a kernel, a copy or memset, and a graph, by the names of CUDA's functions."""
    kinds = {"LaunchKernel": "kernels", "GraphLaunch": "graphs", "Memcpy": "copies", "Memset": "copies"}
    found = dict.fromkeys(("kernels", "graphs", "copies"), 0)
    for event in _profiled(call):
        for part, kind in kinds.items():
            if event.name.startswith(("cuda", "cu")) and part in event.name:
                found[kind] += 1
    return found


def _profiled(call: Call) -> list:
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            call()
            torch.cuda.synchronize()
    return seen.events()


def extra_memory(call: Call, device: str) -> int | None:
    """Bytes allocated at the peak of one call, beyond what was allocated before it; None on a CPU."""
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def synchronisations(call: Call, device: str) -> int | None:
    """How often one call makes the host wait for the device, as PyTorch sees it; None on a CPU."""
    if device == "cpu" or not _sees_synchronisations():
        return None
    return _count_synchronisations(call)


@functools.cache
def _sees_synchronisations() -> bool:
    return _count_synchronisations(torch.ones(1, device="cuda").item) >= 1


def _count_synchronisations(call: Call) -> int:
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(w.message) for w in caught)


def ceilings(device: str) -> dict[str, float]:
    """This machine, now: bytes/s of a copy (read plus written), flop/s of a square matrix product of random numbers."""
    size, n = (2**30, 8192) if device == "cuda" else (2**24, 256)
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found = {"copy_bytes_per_s": 2 * size / _best(lambda: target.copy_(source), device)}
    before = torch.get_float32_matmul_precision()
    for name, dtype, precision in (("bf16", torch.bfloat16, before), ("tf32", torch.float32, "high")):
        torch.set_float32_matmul_precision(precision)
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        found[f"{name}_flop_per_s"] = 2 * n**3 / _best(lambda a=a, b=b: a @ b, device)
        torch.set_float32_matmul_precision(before)
    if device == "cuda":
        one = torch.zeros(1, device=device)
        found["empty_replay_us"] = replay(one.zero_)["p50"]  # what the shortest launch takes, measured the same way
    return found


def _best(call: Call, device: str) -> float:
    """Median seconds."""
    return eager(call, device)["p50"] / 1e6


def _host_time(call: Call) -> float:
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e6


def _device_time(call: Call) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) * 1000


def _sample(once: Callable[[], float], seconds: float) -> dict[str, float]:
    for _ in range(3):
        began = time.perf_counter()
        once()
    took = time.perf_counter() - began
    repeats = max(5, min(50, int(seconds / took)))
    times = [once() for _ in range(repeats)]
    return {**quantiles(times), "repeats": repeats}


def quantiles(times: list[float]) -> dict[str, float]:
    p20, _, _, p80 = statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else times * 4
    return {"p20": p20, "p50": statistics.median(times), "p80": p80}
