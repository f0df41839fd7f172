"""How many of the anchors that `mopro-fast text` finds have the right label, where half of the labels are wrong.

    python bench/capro_anchors.py FOLDER [--seeds 3] [--epochs 40] [--runs FOLDER] [--results FOLDER]

FOLDER is Imagenette, with train_list.txt, test_list.txt ("path label" per line) and train_truth.txt ("path
true-label"). Captions are made by a fixed rule from the true class (mopro_fast/text/captions.py). Every step is the
command that a user types; interrupted, the same command goes on. Nothing is chosen by the truth.
"""

import argparse
import csv
import hashlib
import importlib.util
import io
import itertools
import json
import os
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

import capro_accuracy
import cifar10n
import numpy as np
import pyarrow.parquet as pq
import record
import tables

from mopro_fast.data.anchors import TABLE
from mopro_fast.files import json_object, replacing, write_json
from mopro_fast.text.captions import captions
from mopro_fast.text.match import REPORT
from mopro_fast.text.minilm import PACKAGE

CLASSES = [
    ("tench", "freshwater fish of the carp family with olive green scales that lives in slow rivers and muddy lakes"),
    ("English springer", "medium spaniel bred for flushing game birds with a white and liver coat and long ears"),
    ("cassette player", "machine that plays music from magnetic tape with buttons and a speaker and a radio"),
    ("chain saw", "portable motor tool with a toothed loop that cuts trees and firewood for loggers"),
    ("church", "building for christian worship with a steeple and a bell tower and an altar and stained windows"),
    ("French horn", "brass instrument of the orchestra with a coiled tube and valves and a flaring bell"),
    ("garbage truck", "heavy vehicle that collects household waste from bins and carries it to a dump"),
    ("gas pump", "machine at a filling station that delivers petrol through a hose into cars"),
    ("golf ball", "small hard white sphere with dimples that players hit with a club toward a hole"),
    ("parachute", "canopy of light fabric that slows the fall of a jumper or a load from an aircraft"),
]
K = (5, 20, 50)
SMOOTHED = "--anchors {k} --keep 5 --features {model} --edge"
WAYS = {
    "random": "--anchors -{k} --keep 0 --seed {seed}",
    "as they are": "--anchors {k} --keep 0",
    "smoothed, distance": f"{SMOOTHED} distance",
    "smoothed, similarity": f"{SMOOTHED} similarity",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3, help="of the captions")
    parser.add_argument("--part", type=int, help="training images (default: all)")
    parser.add_argument("--epochs", type=int, default=40, help="of the model whose features say what is similar")
    parser.add_argument("--runs", type=Path, default=Path("runs/capro_anchors"))
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    a = parser.parse_args()
    given, true = cifar10n.write_lists(a.folder, a.runs, a.part, 0, None)
    listed, truth, classes, model = (a.runs / n for n in ("train_list.txt", "truth.txt", "classes.csv", "vanilla"))
    names = [line.rsplit(None, 1)[0] for line in listed.read_text().splitlines()]
    truth.write_text("".join(f"{name} {c}\n" for name, c in zip(names, true, strict=True)))
    write_csv(classes, "label name description", ((c, *of) for c, of in enumerate(CLASSES)))
    environment = os.environ | cifar10n.MEMORY | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")

    # 1. The model without prototypes, whose features say which images are similar.
    common = f"{capro_accuracy.COMMON} {capro_accuracy.CAPRO.format(half=a.epochs)}"
    data = ["--data", str(listed), "--root", str(a.folder), "--val", str(a.runs / "test_list.txt")]
    words = [*shlex.split(common), *data, "--out", str(model), "--tensorboard", "False"]
    capro_accuracy.command(environment, "train", "small", *words)
    log = map(json.loads, (model / "log.jsonl").read_text().splitlines())
    top1 = [entry["top1"] for entry in log if entry["split"] == "val"][-1]

    # 2. Captions, their vectors, and anchors in every way.
    encoders = ["hash", "minilm"]
    if importlib.util.find_spec(PACKAGE) is None:
        print(f"{PACKAGE} is not installed: no rows of minilm", file=sys.stderr)
        encoders.remove("minilm")
    rows = []
    for seed in range(a.seeds):
        said, out, kept = (a.runs / n for n in (f"captions{seed}.csv", f"texts{seed}", f"rows{seed}.json"))
        write_csv(said, "path text", zip(names, captions(true, CLASSES, seed), strict=True))
        identity = hashlib.sha256(repr([common, listed.read_text(), said.read_text(), CLASSES]).encode()).hexdigest()
        known, embedded = json_object(kept), None
        if known.get("identity") != identity:
            words = ["--root", str(a.folder), "--texts", str(said), "--out", str(out)]
            capro_accuracy.command(environment, "text", "read", str(listed), *words)
            known = {"identity": identity, "rows": []}
        for encoder, way, k in itertools.product(encoders, WAYS, K):
            if way == "random" and encoder != encoders[0]:
                continue
            key = {"encoder": encoder, "way": way, "K": k, "seed": seed}
            row = next((row for row in known["rows"] if key.items() <= row.items()), None)
            if row is None:
                if embedded != encoder:
                    words = ["--classes", str(classes), "--encoder", encoder]
                    capro_accuracy.command(environment, "text", "embed", str(out), *words)
                    embedded = encoder
                words = shlex.split(WAYS[way].format(model=shlex.quote(str(model)), k=k, seed=seed))
                capro_accuracy.command(environment, "text", "match", str(out), "--truth", str(truth), *words)
                totals = json.loads((out / REPORT).read_text())
                row = key | {name: totals[name] for name in ("anchor_images", "anchors_right")}
                row["similar_right"] = similar_right(out / TABLE, true)
                known["rows"].append(row)
                write_json(kept, known)
            rows.append(row)
    settings = {
        "images": len(true),
        "wrong": float((given != true).mean()),
        "common": common,
        "top1": top1,
        "seeds": a.seeds,
        "absent": [] if "minilm" in encoders else ["minilm"],
    }
    path = record.write("capro_anchors", {"settings": settings, "rows": rows}, a.results)
    print(f"{tables.table('capro_anchors', a.results)}\n\n{path}")
    return 0


def similar_right(table: Path, true: np.ndarray) -> float | None:
    """The share of similar images, the image itself left out, that are of its true class; None without smoothing."""
    found = pq.read_table(table)
    if "neighbours" not in found.column_names:
        return None
    pairs = [true[i] == true[j] for i, near in enumerate(found["neighbours"].to_pylist()) for j in near if j != i]
    return float(np.mean(pairs))


def write_csv(path: Path, columns: str, rows: Iterable[tuple]) -> None:
    text = io.StringIO()
    csv.writer(text).writerows([columns.split(), *rows])
    with replacing(path) as file:
        file.write(text.getvalue().encode())


if __name__ == "__main__":
    raise SystemExit(main())
