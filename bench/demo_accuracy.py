"""The demo's claim, measured: clean test accuracy of cross-entropy and MoPro over several seeds.

    python bench/demo_accuracy.py [--seeds 3] [--runs FOLDER] [--results FOLDER]

Every seed draws its own noise, weights and order. Interrupted, it goes on where it stopped.
"""

import argparse
import statistics
import time
from pathlib import Path

import record

from mopro_fast import demo


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs/demo_accuracy"))
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    a = parser.parse_args()
    runs = []
    for seed in range(a.seeds):
        began = time.time()
        result = demo.run(a.runs / f"seed{seed}", seed)
        if "stopped" in result:
            return 128 + result["stopped"]
        runs.append(result | {"seconds": round(time.time() - began, 1)})
        print(demo.table(result))
    gains = [r["mopro_top1"] - r["ce_top1"] for r in runs]
    path = record.write("demo_accuracy", {"recipe": "demo", "runs": runs}, a.results)
    print(f"\nMoPro is ahead of cross-entropy by {statistics.mean(gains):.1f} points (mean of {a.seeds} seeds): {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
