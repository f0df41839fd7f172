"""``mopro-fast demo``: see MoPro correct labels on real images, without a download or a GPU.

The images are scikit-learn's handwritten digits (Alpaydin and Kaynak, UCI) and crops of its two sample
photographs as out-of-distribution images, written as JPEG files in WebVision's layout with half of the labels
wrong. Cross-entropy and MoPro then train on them with the same budget through the trainer that everything uses.
"""

import csv
import io
import json
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image

from mopro_fast.config import TrainConfig, recipe
from mopro_fast.console import tell
from mopro_fast.errors import UserError
from mopro_fast.files import own_folder, replacing, write_json, writing

SIDE = 32  # of the image files, px
TEST = 500  # digits that keep their true label and are never trained on
SYMMETRIC, CLASS_DEPENDENT, OUT_OF_DISTRIBUTION = 0.35, 0.15, 0.1  # shares; the first two: half the labels are wrong
LOOKS_LIKE = np.array([6, 7, 3, 8, 9, 6, 0, 1, 3, 4])  # the class-dependent mistakes: 0→6, 1→7, …


@dataclass
class Demo:
    """Train cross-entropy and MoPro on digits with 50 % wrong labels and 10 % photographs among them.

    `mopro-fast demo capro` trains CAPro as well, with a caption for every image.
    """

    out: str = "runs/demo"
    """Folder for the images, both runs, results.json and demo.png."""
    seed: int = 0
    """Decides the noise, the initial weights, the order and the augmentations."""


def main(argv: list[str]) -> int:
    if argv[:1] == ["capro"]:
        return import_module("mopro_fast.demo_capro").main(argv[1:])
    options = tyro.cli(Demo, args=argv, prog="mopro-fast demo")
    with own_folder(Path(options.out), "demo", made_by):
        return demo(Path(options.out), options.seed)


def demo(out: Path, seed: int) -> int:
    """-> 0, or 128 + the number of the signal that stopped it."""
    results = run(out, seed)
    if "stopped" in results:
        return 128 + results["stopped"]
    tell(table(results))
    draw(out, out / "demo.png")
    tell(f"\nfigure: {out / 'demo.png'}    numbers: {out / 'results.json'}    TensorBoard: tensorboard --logdir {out}")
    tell(f"what MoPro did, image by image: mopro-fast report {out / 'mopro'}")
    return 0


def made_by(folder: Path) -> str | None:
    try:
        with (folder / "images/truth.csv").open() as file:
            return "demo" if file.readline().strip() == "path,given,true" else None
    except (OSError, ValueError):
        return None


def run(out: Path, seed: int) -> dict:
    """Write the images, train both methods, measure; goes on where an interrupted call stopped."""
    from mopro_fast.training.loop import Trainer
    from mopro_fast.training.tasks import task_of

    with writing(f"--out {out}", "name another folder"):
        write_images(out / "images", seed)
    for method in ("ce", "mopro"):
        tell(f"\n== {'plain cross-entropy' if method == 'ce' else 'MoPro'} ==")
        if received := Trainer(task_of(config(method, out, seed))).run():
            return {"stopped": received}
    results = {"seed": seed} | {f"{m}_top1": curve(out / m, "val", "top1")[-1] for m in ("ce", "mopro")}
    results |= judge(*decisions(out))
    write_json(out / "results.json", results)
    return results


def config(method: str, out: Path, seed: int) -> TrainConfig:
    c = recipe("demo")
    c.method, c.data.path, c.run.out, c.run.seed = method, str(out / "images"), str(out / method), seed
    return c


def write_images(folder: Path, seed: int) -> None:
    """WebVision's layout: info/*_filelist*.txt, google/, val_images_256/; truth.csv holds what nobody trains on."""
    from sklearn.datasets import load_digits, load_sample_images

    rng = np.random.default_rng(seed)
    pixels, classes = load_digits(return_X_y=True)
    order = rng.permutation(len(classes))
    train, test = order[TEST:], order[:TEST]

    true = classes[train]
    given = true.copy()
    for c in range(10):  # the same shares of every digit
        rows = rng.permutation(np.flatnonzero(true == c))
        symmetric, class_dependent = (round(share * len(rows)) for share in (SYMMETRIC, CLASS_DEPENDENT))
        given[rows[:symmetric]] = (c + 1 + np.arange(symmetric) % 9) % 10
        given[rows[symmetric : symmetric + class_dependent]] = LOOKS_LIKE[c]
    if (folder / "truth.csv").is_file():
        found = [int(row["given"]) for row in truth(folder)]
        if found[: len(given)] != given.tolist():
            raise UserError(
                f"{folder} holds other images, of another seed or version: remove it or choose another --out"
            )
        return
    strangers = round(len(train) * OUT_OF_DISTRIBUTION / (1 - OUT_OF_DISTRIBUTION))
    photographs = load_sample_images().images
    images = [digit(pixels[i]) for i in train] + [crop(photographs, rng) for _ in range(strangers)]
    true = np.concatenate([true, np.full(strangers, -1)])
    given = np.concatenate([given, rng.permutation(strangers) % 10])

    for sub in ("info", "google", "val_images_256"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    paths = [f"google/{i:04d}.jpg" for i in rng.permutation(len(images))]
    for path, image in zip(paths, images, strict=True):
        image.save(folder / path, quality=90)
    for i, row in enumerate(test):
        digit(pixels[row]).save(folder / f"val_images_256/{i:04d}.jpg", quality=90)
    _write_list(folder / "info/train_filelist_google.txt", paths, given)
    _write_list(folder / "info/val_filelist.txt", [f"{i:04d}.jpg" for i in range(TEST)], classes[test])
    text = io.StringIO(newline="")
    csv.writer(text).writerows([("path", "given", "true"), *zip(paths, given, true, strict=True)])
    with replacing(folder / "truth.csv") as file:  # last: its presence says that all is written
        file.write(text.getvalue().encode())


def truth(folder: Path) -> list[dict[str, str]]:
    """path, given and true label of every training image, in the order of the list."""
    with (folder / "truth.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def digit(pixels: np.ndarray) -> Image.Image:
    """8×8 values of 0–16 → an RGB image."""
    small = Image.fromarray((pixels.reshape(8, 8) * (255 / 16)).astype(np.uint8))
    return small.resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB")


def crop(photographs: list[np.ndarray], rng: np.random.Generator) -> Image.Image:
    """A random square of a random photograph."""
    photograph = photographs[rng.integers(len(photographs))]
    side = int(rng.integers(48, 200))
    top, left = (int(rng.integers(0, size - side)) for size in photograph.shape[:2])
    return Image.fromarray(photograph[top : top + side, left : left + side]).resize((SIDE, SIDE))


def decisions(out: Path, method: str = "mopro") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """-> (given, true, assigned) labels in the index's order; true −1: out of distribution; assigned −1: removed."""
    rows = truth(out / "images")
    given, true = (np.array([int(r[name]) for r in rows]) for name in ("given", "true"))
    assigned = torch.load(out / method / "labels.pt", weights_only=True).numpy()
    return given, true, assigned


def judge(given: np.ndarray, true: np.ndarray, assigned: np.ndarray) -> dict[str, float | None]:
    """How good the label correction of the last epoch was, over the images shown in it (assigned ≠ −2).

    None: the share of no image.
    """

    def share(what: np.ndarray, images: np.ndarray) -> float | None:
        return float(what[images].mean()) if images.any() else None

    seen = assigned != -2
    corrected = seen & (assigned >= 0) & (assigned != given)
    wrong = seen & (true >= 0) & (given != true)
    strangers = seen & (true < 0)
    return {
        "corrections": int(corrected.sum()),
        "precision": share(assigned == true, corrected),
        "recall": share(assigned == true, wrong),
        "ood_removed": share(assigned == -1, strangers),
        "clean_removed": share(assigned == -1, seen & (true >= 0)),
    }


def curve(run_folder: Path, split: str, name: str) -> list[float]:
    return [entry[name] for entry in entries(run_folder, split)]


def entries(run_folder: Path, split: str) -> list[dict]:
    """Of the log."""
    lines = (run_folder / "log.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["split"] == split]


def table(results: dict) -> str:
    def percent(name: str) -> str:
        return "    –" if results[name] is None else f"{100 * results[name]:5.1f} %"

    return f"""
accuracy on clean test images, after the last epoch
  cross-entropy                              {results["ce_top1"]:5.1f} %
  MoPro                                      {results["mopro_top1"]:5.1f} %
MoPro's label correction in the last epoch ({results["corrections"]} labels changed)
  precision: changed labels that are right   {percent("precision")}
  recall: wrong labels that were put right   {percent("recall")}
  out-of-distribution images removed         {percent("ood_removed")}
  digits removed by mistake                  {percent("clean_removed")}"""


def draw(out: Path, path: Path) -> None:
    """One figure: accuracy and label correction over epochs; corrected and removed images."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    given, true, assigned = decisions(out)
    files = [out / "images" / r["path"] for r in truth(out / "images")]
    columns = 12
    figure = plt.figure(figsize=(12, 9), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1, 1.25])
    left, right = top.subplots(1, 2)
    for method, label in (("ce", "cross-entropy"), ("mopro", "MoPro")):
        values = curve(out / method, "val", "top1")
        left.plot(range(1, len(values) + 1), values, label=label)
    left.set(title="accuracy on clean test images", xlabel="epoch", ylabel="top-1, %")
    for name in ("kept", "relabelled"):
        values = [100 * v for v in curve(out / "mopro", "epoch", name)]
        right.plot(range(1, len(values) + 1), values, label=f"{name} by MoPro")
    right.set(title="share of the training images", xlabel="epoch", ylabel="%")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend()
    sample = np.random.default_rng(0).permutation
    changed = sample(np.flatnonzero((assigned >= 0) & (assigned != given)))
    removed = sample(np.flatnonzero(assigned == -1))
    two_rows_each = bottom.subplots(4, columns).reshape(2, -1)
    for axes, rows in zip(two_rows_each, (changed, removed), strict=True):
        for axis in axes:
            axis.axis("off")
        for axis, i in zip(axes, rows, strict=False):
            axis.imshow(Image.open(files[i]))
            text = f"{given[i]} removed" if assigned[i] == -1 else f"{given[i]} → {assigned[i]}"
            right = true[i] == assigned[i]  # −1 is both "belongs to no class" and "removed"
            axis.set_title(text, fontsize=9, color="green" if right else "red")
    bottom.suptitle("given → corrected label, and removed images (green: right, red: wrong)", fontsize=11)
    with replacing(path) as file:
        figure.savefig(file, dpi=110, format="png")
    plt.close(figure)


def _write_list(path: Path, paths: list[str], labels: np.ndarray) -> None:
    with replacing(path) as file:
        file.write("".join(f"{p} {y}\n" for p, y in zip(paths, labels, strict=True)).encode())
