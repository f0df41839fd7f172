"""Real human label noise: CIFAR-10N with out-of-distribution images, cross-entropy against MoPro.

    python bench/cifar10n.py FOLDER [--seeds 3] [--epochs 60] [--part N] [--runs FOLDER] [--results FOLDER]

FOLDER holds train_list.txt, test_list.txt ("path label" per line) and train_truth.txt ("path true-label", -1 for an
out-of-distribution image). Both methods get recipe "small": ResNet-18 with the small stem, the same epochs.
Interrupted, it goes on where it stopped. --part trains on the first N images of a shuffled list.
"""

import argparse
import statistics
from pathlib import Path

import numpy as np
import record
import torch

from mopro_fast import demo
from mopro_fast.config import recipe
from mopro_fast.errors import UserError
from mopro_fast.training.loop import Trainer
from mopro_fast.training.tasks import task_of


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--part", type=int)
    parser.add_argument("--runs", type=Path, default=Path("runs/cifar10n"))
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    a = parser.parse_args()
    if not (a.folder / "train_truth.txt").is_file():
        raise SystemExit(f"{a.folder} has no train_truth.txt: unpack CIFAR-10N there first")
    given_lines, truth_lines = ((a.folder / f"train_{n}.txt").read_text().splitlines() for n in ("list", "truth"))
    rows = np.arange(len(given_lines))
    if a.part:
        rows = np.sort(np.random.default_rng(0).permutation(rows)[: a.part])
    a.runs.mkdir(parents=True, exist_ok=True)
    train_list = a.runs / "train_list.txt"
    train_list.write_text("".join(given_lines[i] + "\n" for i in rows))
    given, true = (np.array([int(lines[i].rsplit(None, 1)[1]) for i in rows]) for lines in (given_lines, truth_lines))

    runs = []
    for seed in range(a.seeds):
        result = {"seed": seed}
        for method in ("ce", "mopro"):
            c = recipe("small")
            c.method, c.optim.epochs, c.run.seed = method, a.epochs, seed
            c.data.path, c.data.root, c.data.val = str(train_list), str(a.folder), str(a.folder / "test_list.txt")
            c.run.out = str(a.runs / f"seed{seed}" / method)
            if received := Trainer(task_of(c)).run():
                return 128 + received
            result[f"{method}_top1"] = demo.curve(Path(c.run.out), "val", "top1")[-1]
        assigned = torch.load(Path(c.run.out) / "labels.pt", weights_only=True).numpy()
        runs.append(result | demo.judge(given, true, assigned))
        print(demo.table(runs[-1]))
    gain = statistics.mean(r["mopro_top1"] - r["ce_top1"] for r in runs)
    settings = {
        "recipe": "small",
        "epochs": a.epochs,
        "images": len(rows),
        "out_of_distribution": int((true < 0).sum()),
    }
    path = record.write("cifar10n", {"settings": settings, "runs": runs}, a.results)
    print(f"\nMoPro is ahead of cross-entropy by {gain:.1f} points (mean of {a.seeds} seeds): {path}")
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except UserError as error:
        raise SystemExit(f"bench/cifar10n.py: {error}") from None
