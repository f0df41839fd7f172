"""The official lowshot_svm.py as it is, and ours, on the same features: every average precision, every accuracy.

    python bench/parity_lowshot.py PATH_OF_OFFICIAL_CLONE [--results FOLDER]

The official script runs whole, on the CPU, on made-up data sets in its layouts. Its network is replaced by one that
returns the pixels, so that both see the same features, from files that it reads itself. Sizes are small: the 20 classes
of VOC07 with several labels per image and labels 0, the 205 of Places.
"""

import argparse
import contextlib
import importlib.util
import io
import os
import re
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import record
import torch
from PIL import Image

from mopro_fast.downstream import lowshot

SIDE = 10  # images of 10 × 10 pixels, 300 features
VOC_IMAGES = {"trainval": 700, "test": 400}
PLACES_PER_CLASS = {"train": 20, "val": 3}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("official", type=Path)
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    a = parser.parse_args()
    print(record.write("parity_lowshot", compare(a.official), a.results))
    return 0


def compare(official: Path) -> dict:
    """The result file without its head."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, write in (("voc", write_voc), ("places", write_places)):
            root = os.path.join(folder, name)
            write(root)
            theirs = run_official(official, name, root)
            ours = run_ours(root)
            rows.append({"set": name, **compared(theirs, ours)})
            print(rows[-1])
    return {"official": "lowshot_svm.py", "rows": rows}


def compared(theirs: dict, ours: dict) -> dict:
    means = {k: float(np.mean(list(values))) for k, values in ours["by_k"].items()}
    result = {
        "features": SIDE * SIDE * 3,
        "svms": ours["svms"],
        "official": theirs["means"],
        "ours": means,
        "largest_mean_difference": max(abs(means[k] - theirs["means"][k]) for k in theirs["means"]),
    }
    if theirs["aps"]:
        result["largest_ap_difference"] = max(abs(a - b) for a, b in zip(theirs["aps"], ours["all"], strict=True))
    return result


def run_official(clone: Path, name: str, root: str) -> dict:
    """-> per k the mean that it prints, and every average precision in its order."""
    stubs = {"torchvision": types.ModuleType("torchvision")}
    for part in ("transforms", "datasets"):
        stubs[f"torchvision.{part}"] = module = types.ModuleType(part)
        setattr(stubs["torchvision"], part, module)
    transforms = stubs["torchvision.transforms"]
    transforms.Compose = lambda _: pixels
    for step in ("Normalize", "Resize", "CenterCrop", "ToTensor"):
        setattr(transforms, step, lambda *_, **__: None)
    argv = ["lowshot_svm.py", "--supervise", "--dataset", name, f"--{name}-path", root, "--num_workers", "0"]
    before = dict(sys.modules), list(sys.path), sys.argv, torch.Tensor.cuda, torch.nn.Module.cuda
    try:
        sys.modules.update(stubs)
        sys.path.insert(0, str(clone))
        sys.argv = argv
        torch.Tensor.cuda = torch.nn.Module.cuda = lambda self: self
        spec = importlib.util.spec_from_file_location("lowshot_svm", clone / "lowshot_svm.py")
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        script.resnet50 = lambda **_: torch.nn.Flatten()
        script.np = NumPy()
        aps: list[float] = []
        judge = script.get_precision_recall

        def noting(targets, scores):
            found = judge(targets, scores)
            aps.append(100 * float(np.squeeze(found[3])))
            return (*found[:3], aps[-1] / 100)

        script.get_precision_recall = noting
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
            script.main()
    finally:
        modules, sys.path, sys.argv, torch.Tensor.cuda, torch.nn.Module.cuda = before
        for added in set(sys.modules) - set(modules):
            if added.partition(".")[0] in ("torchvision", "DataLoader", "resnet"):
                del sys.modules[added]
    last = printed.getvalue().strip().splitlines()[-1]
    means = {k: float(value) for k, value in re.findall(r"(\d+): (?:np\.float64\()?([\d.]+)", last)}
    return {"means": means, "aps": aps}


class NumPy:
    """numpy, whose mean of one column is a number: today's cannot be printed with %f as an array of one."""

    def __getattr__(self, name: str):
        return getattr(np, name)

    def mean(self, x: np.ndarray, axis: int) -> float:
        return float(np.mean(x, axis=axis)[0])


def run_ours(root: str) -> dict:
    """-> per k the runs' scores, and every score in the official order."""
    task = lowshot.load(root, None)
    train, test = (
        np.stack([pixels(Image.open(index.full_path(i))).numpy().ravel() for i in index.ids])
        for index in (task.train, task.test)
    )
    draws = lowshot.draw(task.train_labels, (1, 2, 4, 8, 16), runs=5, seed=0)
    jobs = len(os.sched_getaffinity(0))
    scores = lowshot.svm_scores(train, test, task.train_labels, task.test_labels, draws, cost=0.5, jobs=jobs)
    classes = max(c for _, _, c in scores) + 1
    values = {key: [scores[(*key, c)][0] for c in range(classes)] for key in draws}
    by_k: dict[str, list[float]] = {}
    for (k, _run), of_run in values.items():
        by_k.setdefault(str(k), []).append(float(np.mean(of_run)))
    return {"by_k": by_k, "all": [v for of_run in values.values() for v in of_run], "svms": len(scores)}


def pixels(image: Image.Image) -> torch.Tensor:
    """float32 [3, S, S] in [0, 1]."""
    return torch.from_numpy(np.asarray(image.convert("RGB"), np.float32).transpose(2, 0, 1).copy() / 255)


def picture(prototype: np.ndarray, noise: float, rng: np.random.Generator) -> Image.Image:
    noisy = prototype + rng.normal(0, noise, prototype.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def write_voc(root: str) -> None:
    rng = np.random.default_rng(0)
    prototypes = rng.integers(0, 256, (20, SIDE, SIDE, 3))
    folder = Path(root) / "VOCdevkit" / "VOC2007"
    (folder / "JPEGImages").mkdir(parents=True)
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    number = 0
    for split, images in VOC_IMAGES.items():
        labels = np.full((images, 20), -1)
        names = [f"{number + i:06d}" for i in range(images)]
        number += images
        for i, name in enumerate(names):
            present = rng.choice(20, rng.integers(1, 4), replace=False)
            labels[i, present] = 1
            labels[i, rng.integers(20)] = rng.choice([0, 1])  # 0: hard to see
            image = picture(prototypes[present].mean(0), 90, rng)
            image.save(folder / "JPEGImages" / f"{name}.jpg", format="PNG")  # lossless; the name is VOC's
        for c, name in enumerate(lowshot.VOC_CLASSES):
            lines = "".join(f"{image} {label:2d}\n" for image, label in zip(names, labels[:, c], strict=True))
            (folder / "ImageSets" / "Main" / f"{name}_{split}.txt").write_text(lines)


def write_places(root: str) -> None:
    rng = np.random.default_rng(0)
    prototypes = rng.integers(0, 256, (205, SIDE, SIDE, 3))
    images, lists = Path(root) / lowshot.PLACES_IMAGES, Path(root) / lowshot.PLACES_LISTS
    lists.mkdir(parents=True)
    for split, each in PLACES_PER_CLASS.items():
        labels = rng.permutation(np.repeat(np.arange(205), each))
        paths = [f"{c}/{split}{i:05d}.png" for i, c in enumerate(labels)]
        for path, c in zip(paths, labels, strict=True):
            (images / path).parent.mkdir(parents=True, exist_ok=True)
            picture(prototypes[c], 250, rng).save(images / path)
        lines = "".join(f"{path} {c}\n" for path, c in zip(paths, labels, strict=True))
        (lists / f"{split}_places205.csv").write_text(lines)


if __name__ == "__main__":
    raise SystemExit(main())
