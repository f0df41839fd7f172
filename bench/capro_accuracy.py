"""CAPro in its stages beside MoPro and cross-entropy of as many epochs, on images with synthetic label noise.

    python bench/capro_accuracy.py FOLDER [--seeds 3] [--part 3000] [--runs FOLDER] [--results FOLDER]

FOLDER holds train_list.txt, test_list.txt ("path label" per line) and train_truth.txt ("path true-label"). The anchors
are few-shot: of every class a few images whose label is right. CAPro: vanilla, prototypes from the anchors, cleaning,
re-training. MoPro and cross-entropy train for as many epochs as CAPro's two stages together. One process a core;
interrupted, the same command goes on. Nothing is chosen by the test images.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import chain
import cifar10n
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import record
import tables

from mopro_fast.data.check import check
from mopro_fast.data.index import load_index
from mopro_fast.files import write_json

COMMON = (
    "--stem imagenet --width 0.25 --image-size 64 --eval-resize 73 --batch-size 64 --lr 0.05 --queue-size 1024 "
    "--scale 0.2 1.0 --threshold 0.6"
)
# Half of the epochs each, as for Google-500; of the second half a twelfth until the prototypes start, a sixth until
# labels are corrected, as there.
CAPRO = "--method capro --calibrate False --epochs {half}"
STAGES = {
    "ce": "--method ce --epochs {all}",
    "mopro": "--epochs {all} --start-clean {mopro_clean}",
    "vanilla": CAPRO,
}
SECOND = {
    "capro": f"{CAPRO} --init-proto {{start}} --unfreeze-epoch {{start}} --start-clean {{clean}}",
    "capro, encoder frozen": f"{CAPRO} --init-proto {{start}} --unfreeze-epoch never --start-clean {{clean}}",
    "capro, late correction": f"{CAPRO} --init-proto {{start}} --unfreeze-epoch {{start}} --start-clean {{late}}",
}
CHAIN = ("mopro", "capro, late correction")  # what is cleaned and trained again


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--part", type=int, default=3000, help="training images")
    parser.add_argument("--epochs", type=int, default=24, help="of MoPro and cross-entropy; CAPro: half in each stage")
    parser.add_argument("--anchors", type=int, default=5, help="images per class")
    parser.add_argument("--width", default="0.25")
    parser.add_argument("--runs", type=Path, default=Path("runs/capro"))
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    a = parser.parse_args()
    half = a.epochs // 2
    numbers = {"all": a.epochs, "half": half, "mopro_clean": a.epochs * 25 // 60}  # of 60, as the recipe small
    numbers |= {"start": max(1, half // 12), "clean": max(1, half // 12) + 1 + half // 12, "late": half * 3 // 4}
    common = COMMON.replace("--width 0.25", f"--width {a.width}")
    given, true = cifar10n.write_lists(a.folder, a.runs, a.part, 0, None)
    for split, name in (("train", "train_list.txt"), ("val", "test_list.txt")):
        check(load_index(a.runs / name, split, num_classes=None, root=a.folder), workers=cifar10n.CORES, progress=False)
    data = ["--data", str(a.runs / "train_list.txt"), "--root", str(a.folder)]
    test = ["--val", str(a.runs / "test_list.txt")]
    environment = os.environ | cifar10n.MEMORY | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")

    def runs(stages: dict[str, str], more: Callable[[str, int], list[str]]) -> list[cifar10n.Run]:
        found = []
        for seed in range(a.seeds):
            for name, options in stages.items():
                own = shlex.split(options.format(**numbers)) + more(name, seed)
                folder = a.runs / name.replace(", ", "_").replace(" ", "_") / f"seed{seed}"
                ours = [*data, *test, "--out", str(folder), "--seed", str(seed), "--tensorboard", "False"]
                options_ = [*shlex.split(common), *own, *ours, "--threads", "1"]
                found.append(cifar10n.Run(name, seed, shlex.split(options.format(**numbers)), options_, folder, ""))
        return found

    def finish(run: cifar10n.Run) -> None:
        minutes = (time.time() - (run.folder / "config.json").stat().st_ctime) / 60
        cifar10n.finish(run, a.folder, given, true, environment)
        write_json(run.result, json.loads(run.result.read_text()) | {"minutes": round(minutes, 2)})

    # 1. Cross-entropy, MoPro, and CAPro without prototypes.
    first = runs(STAGES, lambda _name, _seed: [])
    stopped, failed = cifar10n.train(first, cifar10n.CORES, environment, finish)
    if stopped or failed:
        return 128 + stopped if stopped else 1
    # 2. Anchors, drawn anew for every seed, and the prototypes that start from them.
    for seed in range(a.seeds):
        write_anchors(a.runs / f"anchors{seed}.parquet", a.runs / "train_list.txt", given, true, a.anchors, seed)

    def second_options(_name: str, seed: int) -> list[str]:
        return ["--init", str(a.runs / f"vanilla/seed{seed}"), "--anchors", str(a.runs / f"anchors{seed}.parquet")]

    second = runs(SECOND, second_options)
    stopped, failed = cifar10n.train(second, cifar10n.CORES, environment, finish)
    if stopped or failed:
        return 128 + stopped if stopped else 1
    # 3. Cleaning and re-training of both methods.
    results = [json.loads(run.result.read_text()) for run in first + second]
    for run, result in zip(first + second, results, strict=True):
        if run.name in CHAIN:
            result["cleaning"], result["retrained"] = cleaned(run, data, test, true, environment)
    settings = {"images": len(true), "wrong": float((given != true).mean()), "anchors_per_class": a.anchors}
    settings |= {"test_images": len((a.runs / "test_list.txt").read_text().splitlines()), "common": common}
    settings["chosen"] = (
        "nothing was tuned: CAPro by the official shares of the epochs, late correction in the last quarter of them, "
        "MoPro as in the recipe small"
    )
    paired = cifar10n.paired(results, "ce")
    path = record.write("capro_accuracy", {"settings": settings, "runs": results, "paired": paired}, a.results)
    print(f"{tables.table('capro_accuracy', a.results)}\n\n{path}")
    return 0


def write_anchors(path: Path, listed: Path, given: np.ndarray, true: np.ndarray, each: int, seed: int) -> None:
    """Of every class ``each`` images whose label is right, at random."""
    names = [line.rsplit(None, 1)[0] for line in listed.read_text().splitlines()]
    order = np.random.default_rng((7, seed)).permutation(len(true))
    right = order[(given == true)[order]]
    chosen = np.sort(np.concatenate([right[true[right] == c][:each] for c in np.unique(true)]))
    table = {"path": [names[i] for i in chosen], "label": given[chosen], "anchor": np.ones(len(chosen), np.int8)}
    if not path.exists() or pq.read_table(path).to_pydict() != pa.table(table).to_pydict():
        pq.write_table(pa.table(table), path)


def cleaned(
    run: cifar10n.Run, data: list[str], test: list[str], true: np.ndarray, environment: dict
) -> tuple[dict, dict]:
    """-> what cleaning did to the labels, and the accuracy after re-training: with mix-up, and of CAPro without."""
    base = run.folder.parent
    table, found = base / f"clean{run.seed}", {}
    command(environment, "clean", str(run.folder), *data, "--out", str(table))
    for name, share in (("mixup", "0.8"), ("plain", "0")) if run.name != "mopro" else (("plain", "0"),):
        out = base / f"retrain{run.seed}_{name}"
        words = [*data, *test, "--cleaned", str(table), "--out", str(out), "--seed", str(run.seed), "--mixup", share]
        command(environment, "retrain", str(run.folder), *words, "--tensorboard", "False", "--batch-size", "64")
        entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        found[name] = [e["top1"] for e in entries if e["split"] == "val"][-1]
    return chain.judge(table / "cleaned.parquet", true), found


def command(environment: dict, *words: str) -> None:
    print(f"$ mopro-fast {shlex.join(words)}", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "mopro_fast", *words], check=True, env=environment, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    raise SystemExit(main())
