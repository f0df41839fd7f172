"""The demo's claim, measured over seeds, and how the demo's settings were chosen.

    python bench/demo_accuracy.py [--seeds 10] [--runs FOLDER] [--results FOLDER]
    python bench/demo_accuracy.py --first-seed 100 --seeds 4 --choose ce="--method ce" --choose "mopro=--alpha {0,1}"
    python bench/demo_accuracy.py --capro [--first-seed 100 --choose "fewer=match --anchors {5,10} capro --lr 0.02"]

Every seed draws its own noise, weights and order. Interrupted, the same command goes on where it stopped; the result
file is written when all is done. With --choose, settings of the recipe are compared on 150 training images that are
held out with their true labels; no test image is looked at. With --capro it is `mopro-fast demo capro`, whose steps'
names stand before the options to add.
"""

import argparse
import csv
import os
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

import cifar10n
import numpy as np
import record
import tables

from mopro_fast import demo, demo_capro
from mopro_fast.errors import UserError
from mopro_fast.report.figures import left_of_classes
from mopro_fast.training.loop import Trainer
from mopro_fast.training.tasks import task_of

TRUSTED = 150
OWN = {"--data", "--root", "--val", "--out", "--seed", "--holdout", "--init"}
STEPS = ("vanilla", "match", "capro")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="how many")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--capro", action="store_true")
    parser.add_argument("--choose", action="append", metavar="NAME=OPTIONS", help="repeatable; {a,b}: a run each")
    parser.add_argument("--runs", type=Path, default=Path("runs/demo_accuracy"))
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    a = parser.parse_args()
    if a.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {a.seeds}")
    seeds = range(a.first_seed, a.first_seed + a.seeds)
    each = {"capro": chosen_capro, "": chosen} if a.choose else {"capro": measured_capro, "": measured}
    name = f"demo{'_capro' * a.capro}_{'choice' if a.choose else 'accuracy'}"
    runs = list(each["capro" * a.capro](seeds, a))
    if "stopped" in runs[-1]:
        return 128 + runs[-1]["stopped"]
    held_out = {"held_out": TRUSTED} if a.choose else {}
    path = record.write(name, {"recipe": "demo", **held_out, "runs": runs}, a.results)
    print(f"\n{tables.table(name, a.results)}\n\n{path}")
    return 0


def measured(seeds: range, a: argparse.Namespace) -> Iterator[dict]:
    """Of each seed the demo's results, the accuracy on each class and the alarms."""
    for seed in seeds:
        began, out = time.time(), a.runs / f"seed{seed}"
        whole = not out.exists()  # otherwise a part of it ran before
        result = demo.run(out, seed)
        if "stopped" in result:
            yield result
            return
        result["seconds"] = round(time.time() - began, 1) if whole else None
        print(demo.table(result))
        for method in ("ce", "mopro"):
            found = cifar10n.evaluate(out / method, {"test": out / "images"}, os.environ)
            result[f"{method}_class_recall"] = [c["top1"] for c in found["test"]["per_class"]]
        yield result | {"alarms": len(demo.entries(out / "mopro", "alarm"))}


def measured_capro(seeds: range, a: argparse.Namespace) -> Iterator[dict]:
    """Of each seed the results of `mopro-fast demo capro` and the alarms of MoPro and CAPro."""
    for seed in seeds:
        began, out = time.time(), a.runs / f"seed{seed}"
        whole = not out.exists()
        result = demo_capro.run(out, seed)
        if "stopped" in result:
            yield result
            return
        print(demo_capro.table(result))
        alarms = {f"{m}_alarms": len(demo.entries(out / m, "alarm")) for m in ("mopro", "capro")}
        yield result | alarms | {"seconds": round(time.time() - began, 1) if whole else None}


def chosen(seeds: range, a: argparse.Namespace) -> Iterator[dict]:
    """Of each setting and seed the accuracy on held-out training images."""
    settings, folder = cifar10n.expand(a.choose, "--choose"), a.runs
    for _, options in settings:  # before any is trained
        cifar10n.checked(options, ["--data", "images"], recipe="demo", own=OWN)
    for name, options in settings:
        for seed in seeds:
            images, out = folder / f"images{seed}", folder / name.replace(" ", "_") / f"seed{seed}"
            config = cifar10n.checked(options, [*held_out(images, seed), "--seed", str(seed)], recipe="demo", own=OWN)
            config.run.out = str(out)
            if received := Trainer(task_of(config)).run():
                yield {"stopped": received}
                return
            yield {"name": name, "options": shlex.join(options), "seed": seed} | found(out)


def chosen_capro(seeds: range, a: argparse.Namespace) -> Iterator[dict]:
    """The same of CAPro's chain. Settings with the same first stage share it."""
    settings = cifar10n.expand(a.choose, "--choose")
    for name, words in settings:
        options = {step: demo_capro.OPTIONS[step] for step in STEPS}
        step = "capro"
        for word in words:
            if word in STEPS:
                step = word
            else:
                options[step] += f" {shlex.quote(word)}"
        first = a.runs / options["vanilla"].replace(" ", "_")
        for seed in seeds:
            images, out = a.runs / f"images{seed}", a.runs / name.replace(" ", "_") / f"seed{seed}"
            data = held_out(images, seed)
            demo_capro.write_captions(images, seed)
            vanilla = first / f"seed{seed}"
            for words_ in demo_capro.commands(out, images, seed, options, data, vanilla).values():
                if status := demo_capro.command(*words_):
                    yield {"stopped": status - 128}
                    return
            entry = {"name": name, "options": shlex.join(words), "seed": seed} | found(out / "capro")
            yield entry | {"vanilla_top1": demo.curve(vanilla, "holdout", "top1")[-1]}


def held_out(images: Path, seed: int) -> list[str]:
    """Write the images; -> the options of a training that holds some of them out."""
    demo.write_images(images, seed)
    data = ["--data", str(images / "info/train_filelist_google.txt"), "--root", str(images)]
    return [*data, "--holdout", str(trusted(images, seed))]


def found(run: Path) -> dict:
    left = [left_of_classes(e)["least"] for e in demo.entries(run, "classes")]
    return {
        "held_out_top1": demo.curve(run, "holdout", "top1")[-1],
        "least_left": min(left, default=None),
        "alarms": len(demo.entries(run, "alarm")),
    }


def trusted(images: Path, seed: int) -> Path:
    """A list of digits of the training images with their true labels."""
    path = images / "trusted.txt"
    if not path.is_file():
        with (images / "truth.csv").open(newline="") as file:
            digits = [f"{r['path']} {r['true']}\n" for r in csv.DictReader(file) if r["true"] != "-1"]
        path.write_text("".join(np.random.default_rng(seed).permutation(digits)[:TRUSTED]))
    return path


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except UserError as error:
        raise SystemExit(f"bench/demo_accuracy.py: {error}") from None
