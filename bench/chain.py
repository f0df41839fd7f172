"""The whole chain on CIFAR-10N: train, clean, retrain, evaluate, low-shot, probe, export, import, report.

    python bench/chain.py FOLDER OUT [--part 6000] [--epochs 12] [--set NAME=VALUE ...] [--results FOLDER]

FOLDER holds train_list.txt, test_list.txt ("path label" per line) and train_truth.txt ("path true-label", -1 for an
out-of-distribution image). Every step is the command that a user types; it is printed, and all of OUT can be looked at
afterwards. Run again after an interruption, the script goes on where it stopped.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import record

from mopro_fast.checkpoints import state as checkpoint


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--part", type=int, help="images of the training list, taken at random")
    parser.add_argument("--test-part", type=int, help="images of the test list")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--retrain-epochs", type=int, default=16)
    parser.add_argument("--recipe", default="small")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="further options of the training")
    parser.add_argument("--retrain-set", nargs="*", default=[], metavar="NAME=VALUE", help="and of the re-training")
    parser.add_argument("--k", nargs="*", default=["1", "2", "4", "8", "16"], help="images per class of the SVMs")
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    a = parser.parse_args()
    if not (a.folder / "train_truth.txt").is_file():
        raise SystemExit(f"{a.folder} has no train_truth.txt: unpack CIFAR-10N there first")
    out = a.out
    out.mkdir(parents=True, exist_ok=True)
    train, truth, test = lists(a.folder, out, a.part, a.test_part)
    data = ["--data", str(train), "--root", str(a.folder)]

    # 1. Train on the noisy labels, with correction.
    run(
        "train", a.recipe, *data, "--val", str(test), "--out", str(out / "train"), "--epochs", str(a.epochs),
        *options(a.set),
    )  # fmt: skip
    trained = str(checkpoint.all_of(out / "train" / "checkpoints")[-1])

    # 2. Clean the whole training set with what was learnt.
    run("clean", trained, *data, "--out", str(out / "clean"))

    # 3. Train the classifier again, on the clean labels.
    run(
        "retrain", trained, *data, "--cleaned", str(out / "clean"), "--val", str(test), "--out", str(out / "retrain"),
        "--epochs", str(a.retrain_epochs), *options(a.retrain_set),
    )  # fmt: skip
    retrained = str(checkpoint.all_of(out / "retrain" / "checkpoints")[-1])

    # 4. Judge the classifier, before and after, and the features.
    for name, model in (("before", trained), ("after", retrained)):
        run("eval", model, "--val", f"test={test}", "--root", str(a.folder), "--out", str(out / f"eval_{name}"))
    clean_list = str(out / "true_list.txt")
    run("lowshot", trained, "--data", clean_list, "--val", str(test), "--root", str(a.folder),
        "--out", str(out / "lowshot"), "--features", str(out / "features"), "--k", *a.k)  # fmt: skip
    run("probe", trained, "--data", clean_list, "--test", str(test), "--root", str(a.folder),
        "--out", str(out / "probe"), "--features", str(out / "features"), "--steps", "100")  # fmt: skip

    # 5. Out to the official format and back, and to safetensors. A file that exists is refused.
    for name in ("model.safetensors", "official.tar", "imported.pt"):
        (out / name).unlink(missing_ok=True)
    run("export", retrained, str(out / "model.safetensors"), "--format", "safetensors")
    run("export", trained, str(out / "official.tar"), "--format", "official")
    run("import", str(out / "official.tar"), str(out / "imported.pt"))

    # 6. A page about it.
    run("report", str(out / "train"), "--table", str(out / "clean"), "--out", str(out / "report.html"))

    result = {
        "settings": {
            "recipe": a.recipe,
            "epochs": a.epochs,
            "images": len(truth),
            "outside": int((truth < 0).sum()),
            "changed": a.set,
            "retrain_changed": a.retrain_set,
        },
        "cleaning": judge(out / "clean" / "cleaned.parquet", truth),
        "top1": {name: evaluated(out / f"eval_{name}")["top1"] for name in ("before", "after")},
        "lowshot": json.loads((out / "lowshot" / "lowshot.json").read_text()),
        "probe": json.loads((out / "probe" / "probe.json").read_text()),
    }
    print(json.dumps({name: result[name] for name in ("cleaning", "top1")}, indent=2))
    print(record.write("chain", result, a.results))
    return 0


def options(given: list[str]) -> list[str]:
    return [word for pair in given for word in (f"--{pair.partition('=')[0]}", pair.partition("=")[2])]


def run(*command: str) -> None:
    print(f"\n$ mopro-fast {shlex.join(command)}", flush=True)
    subprocess.run([sys.executable, "-m", "mopro_fast", *command], check=True)


def lists(folder: Path, out: Path, part: int | None, test_part: int | None) -> tuple[Path, np.ndarray, Path]:
    """-> the training list, the true labels of its images, the test list; beside them the true labels as a list."""
    rng = np.random.default_rng(0)
    given, truth, test = (
        (folder / f"{n}.txt").read_text().splitlines() for n in ("train_list", "train_truth", "test_list")
    )
    rows = np.sort(rng.permutation(len(given))[:part])
    true = np.array([int(truth[i].rsplit(None, 1)[1]) for i in rows])
    files = {
        "train_list.txt": [given[i] for i in rows],
        "true_list.txt": [truth[i] for i in rows[true >= 0]],
        "test_list.txt": [test[i] for i in np.sort(rng.permutation(len(test))[:test_part])],
    }
    for name, lines in files.items():
        (out / name).write_text("".join(f"{line}\n" for line in lines))
    return out / "train_list.txt", true, out / "test_list.txt"


def judge(table: Path, truth: np.ndarray) -> dict[str, float]:
    """Precision: of the images whose label was changed, those that are right now. Recall: of the images with a wrong
    label, those that are right now. Removed: of the out-of-distribution images, and of the others.
    """
    found = pq.read_table(table, columns=["given", "label", "verdict"]).to_pydict()
    given, label, verdict = (np.array(found[name]) for name in ("given", "label", "verdict"))
    changed, wrong, outside = verdict == "relabelled", (given != truth) & (truth >= 0), truth < 0
    right, removed = label == truth, verdict == "removed"
    return {
        "noise_before": float((given != truth)[~outside].mean()),
        "noise_after": float((label != truth)[~outside & ~removed].mean()),
        "precision": _share(right[changed]),
        "recall": _share(right[wrong]),
        "out_of_distribution_removed": _share(removed[outside]),
        "in_distribution_removed": float(removed[~outside].mean()),
    }


def _share(true: np.ndarray) -> float | None:
    return float(true.mean()) if len(true) else None


def evaluated(folder: Path) -> dict:
    return json.loads((folder / "eval.json").read_text())["sets"]["test"]


if __name__ == "__main__":
    raise SystemExit(main())
