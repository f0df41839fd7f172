"""The figures in docs/: drawn from result files, whose digest each carries, so that a stale one is noticed."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np


def is_stale(path: Path, result: dict | None) -> bool:
    """Without a result there must be no figure."""
    if result is None:
        return path.exists()
    return not path.exists() or _digest(result) not in path.read_text()


def save(path: Path, result: dict, draw: Callable) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = path.stem  # the same file for the same result
    from matplotlib import pyplot

    axes = pyplot.figure(figsize=(8, 5)).gca()
    draw(result, axes)
    metadata = {"Date": None, "Description": _digest(result)}
    pyplot.savefig(path, format="svg", metadata=metadata, bbox_inches="tight")
    pyplot.close()


def ops(result: dict, axes) -> None:
    """Time in graph replay against the floor, per op; a hollow mark is the official formulation, eager."""
    timed = [r for r in result["cases"] if "replay_us" in r.get("ours", {})]
    for i, op in enumerate(dict.fromkeys(r["op"] for r in timed)):
        rows = [r for r in timed if r["op"] == op]
        floor = [r["floor_us"] for r in rows]
        axes.plot(floor, [r["ours"]["replay_us"]["p50"] for r in rows], "o", color=f"C{i}", label=op)
        official = [(r["floor_us"], r["peers"]["official"]) for r in rows]
        peers = [(x, peer["eager_us"]["p50"]) for x, peer in official if "eager_us" in peer]
        if peers:
            axes.plot(*zip(*peers, strict=True), "o", color=f"C{i}", fillstyle="none")
    axes.set(xscale="log", yscale="log", xlabel="floor, µs", ylabel="time, µs (p50)")
    low, high = axes.get_xlim()
    axes.plot([low, high], [low, high], "-", color="grey", linewidth=1, label="the floor")
    axes.set_title(
        f"{result['conditions']['gpu']}: ours in graph replay (filled), official, eager (hollow)", fontsize=10
    )
    axes.legend(fontsize=8)


def throughput(result: dict, axes) -> None:
    """Images a second by batch size, with the fewest classes that were run."""
    classes = min(case["classes"] for case in result["cases"])
    cases = sorted((c for c in result["cases"] if c["classes"] == classes), key=lambda c: c["batch"])
    for name in dict.fromkeys(name for case in cases for name in case["variants"]):
        points = [(c["batch"], c["variants"].get(name, {}).get("images_per_second")) for c in cases]
        points = [point for point in points if point[1]]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", label=name)
    axes.set(xscale="log", xlabel="N, rows per step", ylabel="images a second", ylim=(0, None))
    axes.set_xticks([c["batch"] for c in cases], [c["batch"] for c in cases])
    axes.set_title(f"{result['conditions']['gpu']}, {classes} classes", fontsize=10)
    axes.legend(fontsize=8)


NUMERICS = {"fp32": "float32", "bf16": "bfloat16", "half-keys": "bfloat16, keys in float16"}


def numerics(result: dict, axes) -> None:
    """A line per run; the band is from the lowest to the highest seed."""
    for i, precision in enumerate(NUMERICS):
        runs = [run for run in result["runs"] if run["precision"] == precision]
        curves, steps = np.array([run["losses"] for run in runs]), runs[0]["steps"]
        axes.fill_between(steps, curves.min(0), curves.max(0), color=f"C{i}", alpha=0.25, linewidth=0)
        axes.plot(steps, curves.mean(0), color=f"C{i}", label=NUMERICS[precision])
    axes.set(xlabel="step", ylabel="loss")
    axes.set_title("Mean over seeds; band: lowest to highest seed", fontsize=10)
    axes.legend()


def _digest(result: dict) -> str:
    return "drawn from " + hashlib.sha256(json.dumps(result).encode()).hexdigest()


# docs/NAME: (result file, function)
FIGURES = {
    "ops.svg": ("ops_gpu", ops),
    "throughput.svg": ("throughput_gpu", throughput),
    "numerics.svg": ("numerics", numerics),
}
