"""33 recorded steps of the official CAPro code (yuleiqin/capro at bd1771c) and ours, never synchronised again.

    python bench/parity_capro.py

The record is shared/data/capro-record beside this repository; tests/test_capro_record.py replays it.
"""

import argparse
import sys
from pathlib import Path

import record

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import test_capro_record as replay

NAMES = {
    "logits": "logits",
    "aux": "auxiliary logits",
    "targets": "targets of collective bootstrapping",
    "queue": "queue after the step",
    "prototypes": "prototypes after the step",
    "loss": "loss",
    "gradients": "gradient norms, relative",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    a = parser.parse_args()
    if not replay.RECORD.is_file():
        raise SystemExit(f"{replay.RECORD} is not there")
    model, steps = replay.replayed()
    rows = []
    first, later = (replay.FIRST, replay.GRADIENTS), (replay.DRIFT, replay.DRIFT)
    for when, of, limits in (("first step", steps[:1], first), ("all steps", steps, later)):
        for name, what in NAMES.items():
            found = [step[name] for step in of if name in step]
            rows.append(row(f"{what}, {when}", len(found), max(found), limits[name == "gradients"]))
    own, want = model.state_dict(), replay.final()
    rows.append(row("weights and buffers after all steps", len(own), replay.furthest(own, want), replay.DRIFT))
    wrong = sum(step["decisions"] for step in steps)
    rows.append(row("labels, kept rows, queue's pointer", len(steps), wrong, 0.0, "steps that differ"))
    settings = {"threads": replay.THREADS}
    print(record.write("parity_capro", {"settings": settings, "rows": rows, "stand_ins": []}, a.results))
    return 0


def row(what: str, of: int, difference: float, limit: float, unit: str = "") -> dict:
    return {
        "what": what,
        "of": of,
        "difference": difference,
        "unit": unit,
        "limit": limit,
        "passed": difference <= limit,
    }


if __name__ == "__main__":
    raise SystemExit(main())
