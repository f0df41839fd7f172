"""The momentum update of a ResNet-50 (28 M parameters) on a GPU: our kernel against its peers, in one run.

    python bench/ema.py [--results FOLDER]

Peers: the official code's loop (one multiply, one multiply and one addition per tensor) and torch._foreach.
The copy bandwidth measured in the same run is the yardstick. No speed-up is printed unless the results agree.
"""

import argparse
import statistics
from pathlib import Path

import record
import torch

from mopro_fast import ops
from mopro_fast.models.resnet import ResNet

M = 0.999


def official(targets, sources):
    for t, s in zip(targets, sources, strict=True):
        t.data = t.data * M + s.data * (1.0 - M)


def foreach(targets, sources):
    torch._foreach_mul_(targets, M)
    torch._foreach_add_(targets, sources, alpha=1.0 - M)


def ours(targets, sources):
    with ops.use_backend("cuda"):
        ops.ema_update_(targets, sources, M)


def replayed(function, targets, sources):
    """The same launches from a CUDA graph: what a captured step pays."""
    function(targets, sources)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function(targets, sources)
    return graph.replay


def milliseconds(call, flush: torch.Tensor, repeats: int = 50) -> dict[str, float]:
    """p20, p50, p80 of the device time of one call, the L2 cache flushed before each."""
    for _ in range(5):
        call()
    times = []
    for _ in range(repeats):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    p20, _, _, p80 = statistics.quantiles(times, n=5)
    return {"p20": p20, "p50": statistics.median(times), "p80": p80}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    a = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench/ema.py measures a GPU and there is none")
    sources = [p.detach() for p in ResNet("resnet50", 1000).cuda().parameters()]
    start = [torch.randn_like(s) for s in sources]
    expected = [M * t.double() + (1 - M) * s.double() for t, s in zip(start, sources, strict=True)]
    targets = [t.clone() for t in start]
    ours(targets, sources)
    for t, e in zip(targets, expected, strict=True):
        assert (t.double() - e).norm() <= 1e-6 * e.norm(), "the kernel is wrong: nothing is timed"

    flush = torch.empty(128 * 2**20, dtype=torch.uint8, device="cuda")
    size = 4 * sum(s.numel() for s in sources)
    big, copy = (torch.empty(2**30, dtype=torch.uint8, device="cuda") for _ in range(2))
    copy_ms = milliseconds(lambda: copy.copy_(big), flush)["p50"]
    bandwidth = 2 * big.numel() / copy_ms / 1e9  # TB/s, bytes read and written
    rows = {}
    for function in (official, foreach, ours):
        rows[function.__name__] = milliseconds(lambda f=function: f(targets, sources), flush)
    for function in (foreach, ours):
        rows[f"{function.__name__}, graph replay"] = milliseconds(replayed(function, targets, sources), flush)
    for name, row in rows.items():
        row["share_of_copy_bandwidth"] = 3 * size / row["p50"] / 1e9 / bandwidth
        print(f"{name:24s} {row['p50'] * 1000:8.1f} us  {100 * row['share_of_copy_bandwidth']:5.1f} % of a copy")
    result = {"tensors": len(sources), "bytes_moved": 3 * size, "copy_TB_per_s": bandwidth, "milliseconds": rows}
    print(record.write("ema", result, a.results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
