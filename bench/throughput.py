"""`mopro-fast bench` with its result kept: bench/results/throughput_gpu.json or throughput_cpu.json.

    python bench/throughput.py [--results FOLDER] [the options of mopro-fast bench]

docs/performance.md shows it (python bench/tables.py). With --check it fails if the GPU's requirements are
not met or a variant failed.
"""

import argparse
import sys
from pathlib import Path

import record  # first: it sets what OpenMP reads when torch is imported

# isort: split
import tyro

from mopro_fast.benchmark import command, report

# What one H200 must reach at 224 px with ResNet-50, C=1000, Q=8192.
SPEED, OVER_OFFICIAL, OVER_OFFICIAL_SMALL, OVERHEAD = 4200, 5, 6, 0.03


def main() -> int:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--results", default=record.RESULTS)
    parser.add_argument("--check", action="store_true")
    a, rest = parser.parse_known_args()

    def keep(result: dict) -> Path:
        gpu = result["settings"]["device"] == "cuda"
        result["requirements"] = requirements(result) if gpu else []
        part = "_part" if result["settings"]["variants"] else ""  # it does not replace a full result
        return record.write(f"throughput_{'gpu' if gpu else 'cpu'}{part}", result, a.results)

    result = command.run(tyro.cli(command.Bench, args=rest, prog="bench/throughput.py"), keep)
    print(keep(result), file=sys.stderr)
    print(report.table(result))
    return int(a.check and (report.failed(result) or not all(q["passed"] for q in result["requirements"])))


def requirements(result: dict) -> list[dict]:
    """Name, value, limit, whether it is met; None where the case was not run."""
    cases = {(c["batch"], c["classes"]): c for c in result["cases"]}
    large, small = cases.get((256, 1000)), cases.get((32, 1000))
    ours = large["variants"].get(report.OURS, {}) if large else {}
    found = [
        ("images a second, N=256", ours.get("images_per_second"), SPEED, True),
        ("times the official step, N=256", large and report.over_official(large), OVER_OFFICIAL, True),
        ("times the official step, N=32", small and report.over_official(small), OVER_OFFICIAL_SMALL, True),
        ("MoPro's share beyond the two encoders, N=256", large and report.overhead(large), OVERHEAD, False),
        ("synchronisations per step", ours.get("synchronisations"), 0, False),
        ("graph launches per step", ours.get("host_launches", {}).get("graphs"), 1, False),
    ]
    return [
        {"name": name, "value": value, "limit": limit, "at_least": least, "passed": _met(value, limit, least)}
        for name, value, limit, least in found
    ]


def _met(value: float | None, limit: float, at_least: bool) -> bool | None:
    return None if value is None else value >= limit if at_least else value <= limit


if __name__ == "__main__":
    raise SystemExit(main())
