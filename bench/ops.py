"""Every fused op and the head of a step: checked against float64, then timed against its peers in the same run.

    python bench/ops.py [--results FOLDER] [--only NAME ...] [--quick] [--check] [--device cpu|cuda]
                        [--seconds S] [--compile-seconds S]

Peers: the official formulation in eager PyTorch (mopro_fast/benchmark/official.py), the same under torch.compile, this
package's reference backend, and for the optimizer ops torch._foreach, torch.optim.SGD and NVIDIA's apex if installed.
What is missing is recorded with the reason. An op whose result is wrong is not timed, and the exit status is 1.
How times are taken: mopro_fast/benchmark/timing.py. What the floor counts: bench/floor.py. Inputs and shapes:
bench/cases.py.
On a GPU a full run writes bench/results/ops_gpu.json. A part of it writes ops_gpu_part.json, a CPU (small shapes only)
ops_cpu.json, into --results if that is given.
"""

import argparse
import gc
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import record  # first: it sets what OpenMP reads when torch is imported

# isort: split
import cases
import floor
import torch
import variants
from cases import Case, Shape
from variants import Factory

from mopro_fast import ops
from mopro_fast.benchmark import timing
from mopro_fast.ops import backends

STATE = 1e-6  # float32 state after one update: a few roundings
FLOAT32 = 1e-5  # losses and gradients from float32 inputs: sums of up to 10^5 terms
LEVELS = 2e-3  # 8-bit pixels: sums next to a half fall either way, and hue has steps of several levels
PEER = 1e-3  # a float32 peer beyond this computes something else
IN_PLACE = ("targets", "params", "buffers", "prototypes", "queue", "queue_master", *variants.RUNNING)


# What the ops must reach on a GPU.
COPY_SHARE = 0.85
HEAD_LAUNCHES, HEAD_US = 12, 100.0
GATHERED_RATIO = 50.0
GROWTH = [
    ("info_nce", "Q"),
    ("correct_labels", "C"),
    ("prototype_contrast", "C"),
    ("mopro_loss", "Q"),
    ("mopro_loss", "C"),
]
BYTES_PER_ENTRY = 0.5  # of N×Q or N×C: a matrix of that size takes at least one byte each


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--only", nargs="+", choices=list(cases.FIELDS), metavar="NAME", help=", ".join(cases.FIELDS))
    parser.add_argument("--quick", action="store_true", help="small shapes")
    parser.add_argument("--check", action="store_true", help="compare with float64 and time nothing")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=360, help="no case begins after so many (default 360)")
    parser.add_argument(
        "--compile-seconds",
        type=float,
        default=120,
        help="no compilation begins after so many spent on them (default 120)",
    )
    a = parser.parse_args(argv)
    if a.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU")
    quick = a.quick or a.device == "cpu"
    began = time.perf_counter()
    wanted = [c for c in (cases.quick() if quick else cases.full()) if c.op in (a.only or cases.FIELDS)]
    ceilings = {} if a.check else timing.ceilings(a.device)  # the sanitizers must not see cuBLAS
    bench = Bench(a.device, ceilings, a.compile_seconds, a.check)
    part = a.device == "cuda" and (a.only or quick or a.check)
    folder = a.results or (record.RESULTS if a.device == "cuda" and not part else None)
    name = f"ops_{'gpu' if a.device == 'cuda' else 'cpu'}{'_part' if part else ''}"
    results = []

    def so_far(memory: list[dict]) -> dict:
        """Kept after every case: a run that is cut short has not been for nothing."""
        left = [c.name for c in wanted[len(results) :]]
        found = {"device": a.device, "quick": quick, "ceilings": ceilings, "cases": results, "not_reached": left}
        found |= {"memory": memory, "seconds": round(time.perf_counter() - began, 1)}
        found["requirements"] = requirements(found)
        if folder:
            record.write(name, found, folder)
        return found

    for i, case in enumerate(wanted, 1):
        if time.perf_counter() - began > a.seconds:
            break
        results.append(bench.run(case))
        print(f"[{i}/{len(wanted)} {time.perf_counter() - began:4.0f} s] {_progress(results[-1])}", flush=True)
        so_far([])
    result = so_far([] if quick or a.check else memory_growth(a.only or cases.FIELDS))
    if folder:
        print(folder / f"{name}.json")
    print(report(result))
    return int(any(not r["check"]["passed"] for r in results))


class Bench:
    """Runs one case at a time."""

    def __init__(self, device: str, ceilings: dict[str, float], compile_seconds: float, check_only: bool) -> None:
        self.device, self.ceilings, self.check_only = device, ceilings, check_only
        self.compile_left = compile_seconds

    def run(self, case: Case) -> dict:
        """Check, then time: the record of one case, its peers under their names."""
        op, cost = variants.OPS[case.op], case.cost()
        result = {
            "op": case.op,
            "settings": case.settings,
            "dtype": case.shape.dtype,
            "backend": self.backends(case.op),
            "bytes": cost.bytes,
            "flops": cost.flops,
            "floor_us": self.floor(case),
        }
        oracle = outputs(case, op.official(cases.float64(case.state(self.device)))())
        official_errors = compare(outputs(case, op.official(case.state(self.device))()), oracle)
        result["check"] = check(case, op.ours, oracle, official_errors, self.device)
        if self.check_only or not result["check"]["passed"]:
            return result
        result["ours"] = self.time(op.ours(case.state(self.device)))
        result["peers"] = peers = {}
        for name, factory, uncapturable in self.peers(case):
            if isinstance(factory, str):
                peers[name] = {"skipped": factory}
            else:
                peers[name] = self.peer(case, name, factory, uncapturable, oracle)
        for peer in peers.values():
            for kind in ("eager_us", "replay_us"):
                if kind in peer and kind in result["ours"]:
                    peer[kind.replace("us", "ratio")] = peer[kind]["p50"] / result["ours"][kind]["p50"]
        gc.collect()
        return result

    def peers(self, case: Case) -> Iterator[tuple[str, Factory | str, str]]:
        """(name, factory or why there is none, why it is not captured)"""
        op = variants.OPS[case.op]
        yield "official", op.official, op.uncapturable
        yield "official, compiled", op.compiled, ""
        ran = set(self.backends(case.op).values())
        yield "reference", "it is what ran" if ran == {"reference"} else _reference(op.ours), ""
        for name, factory in op.others.items():
            yield name, factory, ""

    def peer(self, case: Case, name: str, factory: Factory, uncapturable: str, oracle: dict) -> dict:
        """The peer's times, or why there are none."""
        compiles = name.endswith("compiled")
        if compiles and self.compile_left <= 0:
            return {"skipped": "the run's time for compilations was spent"}
        began = time.perf_counter()
        try:
            call = factory(case.state(self.device))
            found = outputs(case, call())
            if compiles:
                self.compile_left -= time.perf_counter() - began
            error = max(e - rounding(found[n]) for n, e in compare(found, oracle).items())
            if case.shape.dtype == "float32" and error > PEER:
                return {"skipped": f"its result differs from float64's by {error:.1e}"}
            return self.time(call, uncapturable)
        except Exception as error:  # a peer may fail in any way
            return {"skipped": _one_line(error)}

    def time(self, call: variants.Call, uncapturable: str = "") -> dict:
        call()
        measured = {
            "eager_us": timing.eager(call, self.device),
            "launches": timing.launches(call, self.device),
            "synchronisations": timing.synchronisations(call, self.device),
            "extra_bytes": timing.extra_memory(call, self.device),
        }
        if self.device == "cpu":
            return measured
        if not uncapturable and measured["synchronisations"]:
            uncapturable = "it waits for the device"
        if uncapturable:
            return measured | {"not_replayed": uncapturable}
        try:
            return measured | {"replay_us": timing.replay(call)}
        except Exception as error:
            return measured | {"not_replayed": _one_line(error)}

    def floor(self, case: Case) -> float | None:
        if not self.ceilings:
            return None
        rate = "bf16_flop_per_s" if case.shape.size == 2 else "tf32_flop_per_s"
        return floor.floor_us(case.cost(), self.ceilings["copy_bytes_per_s"], self.ceilings[rate])

    def backends(self, op: str) -> dict[str, str]:
        parts = ("correct_labels", "mopro_loss", "queue_enqueue_", "prototype_update_") if op == "head" else (op,)
        described = backends.describe()
        return {part: described[part][self.device] for part in parts}


def _reference(ours: Factory) -> Factory:
    def factory(state: SimpleNamespace) -> variants.Call:
        call = ours(state)

        def referenced():
            with ops.use_backend("reference"):
                return call()

        return referenced

    return factory


def outputs(case: Case, found: dict) -> dict[str, list[torch.Tensor]]:
    """What is compared, copied, each as a list; the per-row prototype loss as its mean over the kept rows."""
    if case.op == "prototype_contrast" and found["loss"].dim():
        kept = case.state(found["loss"].device.type).kept
        found = found | {"loss": found["loss"].double()[kept].mean()}
    return {n: [x.detach().clone() for x in (v if isinstance(v, list) else [v])] for n, v in found.items()}


def compare(found: dict[str, list[torch.Tensor]], oracle: dict[str, list[torch.Tensor]]) -> dict[str, float]:
    """Per output, the largest relative RMS error of its tensors; for decisions and labels, the share that differs."""

    def error(x: torch.Tensor, want: torch.Tensor) -> float:
        if x.shape != want.shape:
            return float("inf")
        if not (x.is_floating_point() or x.dtype == torch.uint8):
            return float((x != want).double().mean())
        value = float((x.double() - want).norm() / want.double().norm().clamp(min=1e-300))
        return value if value == value else float("inf")  # NaN never passes

    return {name: max(error(x, y) for x, y in zip(found[name], oracle[name], strict=True)) for name in oracle}


def rounding(values: list[torch.Tensor]) -> float:
    """The relative error that storing an output in its type may add."""
    return 2**-8 if values[0].dtype == torch.bfloat16 else 0.0


def check(case: Case, ours: Factory, oracle: dict, official_errors: dict[str, float], device: str) -> dict:
    """Our result against float64, in memory that was filled with NaN.

    Limits: decisions and integers equal; 8-bit pixels 2e-3; float32 state 1e-6; losses and gradients 1e-5, or with
    16-bit inputs twice the official formulation's error; plus the rounding of a 16-bit output.
    """
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        found = outputs(case, ours(case.state(device))())
    except Exception as error:
        return {"passed": False, "message": _one_line(error), "errors": {}, "limits": {}}
    finally:
        torch.use_deterministic_algorithms(False)
    limits = {}
    for name, values in found.items():
        if not values[0].is_floating_point():
            limits[name] = LEVELS if values[0].dtype == torch.uint8 else 0.0
            continue
        limits[name] = (STATE if name in IN_PLACE else FLOAT32) + rounding(values)
        if case.shape.size == 2:
            limits[name] = max(limits[name], 2 * official_errors[name])
    errors = compare(found, oracle)
    wrong = [f"{n}: {errors[n]:.2e} is above {limits[n]:.2e}" for n in limits if not errors[n] <= limits[n]]
    return {"passed": not wrong, "message": "; ".join(wrong), "errors": errors, "limits": limits}


def memory_growth(wanted: list[str]) -> list[dict]:
    """Peak extra memory of ours at two Q and two C, N = 4096: what a matrix N×Q or N×C would multiply by 8 or 5."""
    found = []
    small = Shape(N=4096, C=1000, Q=8192)
    large = {"Q": 65536, "C": 5000}
    for op, dimension in GROWTH:
        if op not in wanted:
            continue
        peaks = []
        for shape in (small, replace(small, **{dimension: large[dimension]})):
            call = variants.OPS[op].ours(Case(op, shape).state("cuda"))
            call()
            peaks.append(timing.extra_memory(call, "cuda"))
        entries = small.N * (large[dimension] - getattr(small, dimension))
        excepted = 4 * entries if (op, dimension) == ("mopro_loss", "C") else 0
        found.append({"op": op, "dimension": dimension, "extra_bytes": peaks, "entries": entries, "excepted": excepted})
    return found


def requirements(result: dict) -> list[dict]:
    """What the ops must reach on a GPU: name, value, limit, passed (None: not measured)."""
    found = []

    def require(name: str, value: float | None, limit: float, at_least: bool) -> None:
        passed = None if value is None else bool(value >= limit if at_least else value <= limit)
        found.append({"name": name, "value": value, "limit": limit, "at_least": at_least, "passed": passed})

    def timed(op: str, **settings) -> list[dict]:
        rows = [r for r in result["cases"] if r["op"] == op and r["settings"].items() >= settings.items()]
        return rows if result["device"] == "cuda" else []

    copy = result["ceilings"].get("copy_bytes_per_s")
    for op in ("ema_update_", "sgd_ema_update_"):
        for shadows in (False, True):
            (row,) = timed(op, model="resnet50", shadows=shadows) or [{}]
            us = row.get("ours", {}).get("replay_us", {}).get("p50")
            share = None if us is None else row["bytes"] / us * 1e6 / copy
            name = f"{op}, {'with bf16 copies' if shadows else 'float32 alone'}: share of the copy bandwidth"
            require(name, share, COPY_SHARE, True)
    paper = cases.PAPER
    for dtype in cases.DTYPES:
        rows = timed("head", N=paper.N, C=paper.C, Q=paper.Q, M=paper.N)
        ours = next((r.get("ours", {}) for r in rows if r["dtype"] == dtype), {})
        where = f"head, N=256, C=1000, Q=8192, {dtype}"
        require(f"{where}: launches", ours.get("launches"), HEAD_LAUNCHES, False)
        require(f"{where}: µs in graph replay", ours.get("replay_us", {}).get("p50"), HEAD_US, False)
    for op in ("head", "prototype_update_"):
        for dtype in (d for d in cases.DTYPES if op in cases.ops_of(paper, d)):
            row = next((r for r in timed(op, M=cases.GATHERED) if r["dtype"] == dtype), {})
            ratio = row.get("peers", {}).get("official", {}).get("eager_ratio")
            name = f"{op}, {cases.GATHERED} gathered rows, {dtype}: times faster than official, both eager"
            require(name, ratio, GATHERED_RATIO, True)
    for op, dimension in GROWTH:
        row = next((m for m in result["memory"] if (m["op"], m["dimension"]) == (op, dimension)), None)
        grown = None if row is None else row["extra_bytes"][1] - row["extra_bytes"][0] - row["excepted"]
        name = f"{op}: bytes that memory grows by per entry of N×{dimension}"
        name += " (beyond the logits' gradient)" if (op, dimension) == ("mopro_loss", "C") else ""
        require(name, None if row is None else max(0, grown) / row["entries"], BYTES_PER_ENTRY, False)
    done = [r["ours"] for r in result["cases"] if "ours" in r] if result["device"] == "cuda" else []
    counts = [r["synchronisations"] for r in done]
    waits = sum(counts) if counts and None not in counts else None
    require("every op at every shape run: host synchronisations", waits, 0, False)
    replayed = sum("not_replayed" in r for r in done) if done else None
    require("every op at every shape run: not replayable from a CUDA graph", replayed, 0, False)
    failed = sum(not r["check"]["passed"] for r in result["cases"]) if result["cases"] else None
    require("every op at every shape run: results that differ from float64's", failed, 0, False)
    return found


def report(result: dict) -> str:
    """A line per case and a line per requirement."""
    head = (
        "op",
        "eager",
        "replay",
        "launches",
        "MB",
        "floor",
        "of floor",
        "peak MB",
        "ratios to peers: eager | replay",
    )
    rows = [head, *(_row(r) for r in result["cases"])]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head) - 1)] + [0]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    skipped = {f"{n}: {p['skipped']}" for r in result["cases"] for n, p in r.get("peers", {}).items() if "skipped" in p}
    lines += ["", *(f"skipped {s}" for s in sorted(skipped))]
    lines += [*(f"not reached: {name}" for name in result["not_reached"]), ""]
    for q in result["requirements"]:
        if q["passed"] is not None:
            bound = "at least" if q["at_least"] else "at most"
            word = "passed" if q["passed"] else "FAILED"
            lines.append(f"{word}  {q['name']}: {q['value']:.4g} ({bound} {q['limit']:g})")
    missing = sum(q["passed"] is None for q in result["requirements"])
    lines += [f"{missing} requirements not measured"] if missing else []
    lines.append(f"times in µs (p50); {result['seconds']} s in all")
    return "\n".join(lines)


def _row(r: dict) -> tuple[str, ...]:
    name = f"{r['op']} {_settings(r['settings'])} {r['dtype']}"
    least = [f"{r['bytes'] / 1e6:.2f}", _micro(r["floor_us"])]
    if "ours" not in r:
        return (name, "-", "-", "-", *least, "-", "-", r["check"]["message"] or "checked, not timed")
    ours = r["ours"]
    replay, extra = ours.get("replay_us", {}).get("p50"), ours["extra_bytes"]
    shown = {n: p for n, p in r["peers"].items() if "skipped" not in p}
    ratios = [f"{n} {_ratio(p.get('eager_ratio'))} | {_ratio(p.get('replay_ratio'))}" for n, p in shown.items()]
    return (
        name,
        f"{ours['eager_us']['p50']:.1f}",
        "-" if replay is None else f"{replay:.1f}",
        str(ours["launches"] or "-"),
        *least,
        "-" if replay is None else f"{100 * r['floor_us'] / replay:.0f} %",
        "-" if extra is None else f"{extra / 1e6:.1f}",
        "; ".join(ratios),
    )


def _progress(r: dict) -> str:
    name = f"{r['op']} {_settings(r['settings'])} {r['dtype']}"
    if not r["check"]["passed"]:
        return f"{name}: WRONG, not timed: {r['check']['message']}"
    return f"{name}: " + (f"{r['ours']['eager_us']['p50']:.1f} µs" if "ours" in r else "right")


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def _settings(settings: dict) -> str:
    return " ".join(f"{k}={v}" for k, v in settings.items())


def _micro(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}x"


if __name__ == "__main__":
    sys.exit(main())
