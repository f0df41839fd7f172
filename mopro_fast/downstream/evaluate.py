"""``mopro-fast eval CKPT``: what a classifier gets right, what it confuses, and how far it can be believed.

A set of class folders with fewer classes than the model has (ImageNet-R, ImageNet-A: 200) is judged among its own
classes only: the logits of all others are masked, as in the code of those data sets.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from torch import Tensor

from mopro_fast.checkpoints.formats import digest
from mopro_fast.console import tell
from mopro_fast.data.class_folders import class_numbers, is_number, read_classes
from mopro_fast.data.index import Index, class_root, load_index, read_class_names, synsets, with_numbers
from mopro_fast.data.paths import shown
from mopro_fast.distributed import by_rank0, leave, say, world
from mopro_fast.downstream.features import EncoderConfig, Frozen, folders
from mopro_fast.errors import UserError
from mopro_fast.files import write_json

TOP = 5
BIN_SIZE = 100  # images per bin of the RMS calibration error, as in hendrycks/natural-adv-examples
ECE_BINS = 15  # equal widths, as in Guo et al. (2017)
_CONFUSIONS = 100  # pairs in the file


@dataclass
class Eval:
    """Top-1 and top-5 accuracy, calibration, accuracy per class and confused pairs of a checkpoint's classifier."""

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CKPT")]
    """A checkpoint of any format that this package reads, or a run's folder: its newest."""
    out: str
    """Folder for eval.json and what the classifier said of every image, so that the same command goes on."""
    data: str | None = None
    """Data whose validation split is one of the sets, named "val"."""
    val: tuple[str, ...] = ()
    """Further sets as NAME=PATH: WebVision, a list file, class folders, shards."""
    root: str | None = None
    """Folder that the paths of list files start from (default: each list's own folder)."""
    keep_classes: int | None = None
    """Use only the images with a label below this (webvision-mini: 50) of data that has more classes."""
    classes: str | None = None
    """The names of the model's classes in order: a file with one at the start of each line (WebVision's
    info/synsets.txt), or a folder with all class folders (ImageNet's val/). Default: those of the first set that has
    all classes."""
    top: int = 10
    """Confused pairs and worst classes printed per set; the file has more."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)


def main(argv: list[str]) -> int:
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff)
    o = tyro.cli(Eval, args=argv, prog="mopro-fast eval", config=config)
    if o.top < 0:
        raise UserError(f"--top must be at least 0, got {o.top}")
    paths = _sets(o)
    with folders("eval", o.checkpoint, o.out, None, o.encoder.device):
        return evaluate(o, paths)


def evaluate(o: Eval, paths: dict[str, str]) -> int:
    """Write eval.json and print the table; -> 0."""
    options = {"num_classes": None, "root": o.root, "keep_classes": o.keep_classes}
    options["missing"] = o.encoder.trust_index
    indexes = by_rank0(lambda: {name: load_index(path, "val", **options) for name, path in paths.items()})
    frozen = Frozen(o.checkpoint, o.encoder, Path(o.out) / "predictions")
    classes = frozen.weights.num_classes
    if classes is None:
        raise UserError(f"{o.checkpoint} has no classifier: `mopro-fast probe` or `lowshot` judges its features")
    names = class_names(o.classes, frozen.weights.classes, paths, indexes, classes)
    mapped = {name: to_model(index, names, classes) for name, index in indexes.items()}
    results = {}
    for name, index in indexes.items():
        labels, present = mapped[name]
        found = predictions(frozen, index, name, present)
        class_list = [shown(n) for n in names] if names else [str(c) for c in range(classes)]
        results[name] = {"data": paths[name], "classes": int(present.sum()), **summary(found, labels, class_list)}
    rank = world()[0]
    leave()
    if rank == 0:
        write_json(Path(o.out) / "eval.json", {"checkpoint": o.checkpoint, "sets": results})
        tell(table(results, o.top))
    return 0


def _sets(o: Eval) -> dict[str, str]:
    """The data's path by the name of the set."""
    sets = {"val": o.data} if o.data else {}
    for given in o.val:
        name, equals, path = given.partition("=")
        if not (name and equals and path) or os.sep in name:
            raise UserError(f"--val {given}: expected NAME=PATH, such as imagenet-r=/data/imagenet-r")
        if name in sets:
            raise UserError(f"--val {given}: there is a set named {name} already, choose another name")
        sets[name] = path
    if not sets:
        raise UserError("nothing to evaluate on: set --data or --val NAME=PATH")
    return sets


def class_names(
    given: str | None, trained: list[str] | None, paths: dict[str, str], indexes: dict[str, Index], classes: int
) -> list[str] | None:
    """The names of the model's classes in its order; None: not known. trained: the checkpoint's."""
    if given is not None:
        names = _read_names(given)
        if len(names) != classes:
            raise UserError(f"--classes {given} has {len(names)} names, the checkpoint has {classes} classes")
        if (
            trained is not None
            and (other := next((i for i in range(classes) if names[i] != trained[i]), None)) is not None
        ):
            say(
                f"--classes {given} goes before the names in the checkpoint: label {other} is {shown(names[other])}, "
                f"not {shown(trained[other])}"
            )
        return names
    if trained is not None:
        return trained
    for name, index in indexes.items():
        if (names := synsets(paths[name])) is not None and len(names) == classes:
            return names
        if index.classes is not None and len(index.classes) == classes:
            say(f"{name}: the checkpoint names no classes: those of {index.source} are taken, in this order")
            return index.classes
    return None


def _read_names(path: str) -> list[str]:
    if os.path.isdir(path):
        path = class_root(path, "train")
        numbers = class_numbers(list(read_classes(path)), None, path)
        names = sorted(numbers, key=numbers.__getitem__)
        if [numbers[name] for name in names] != list(range(len(names))):
            raise UserError(
                f"--classes {path}: class folders that are called by numbers must be 0, 1, 2, …, all of them"
            )
        return names
    return read_class_names(path)


def to_model(index: Index, names: list[str] | None, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """-> labels int64 [n] in the model's numbers, and bool [classes]: which of them the set has.

    names: of the model's classes, in its order. A set without names, such as a list, has all of them.
    """
    own = index.classes
    numbered = own is not None and all(map(is_number, own))
    if own is not None and not numbered and names is None:
        raise UserError(
            f"{index.source} has {len(own)} of the checkpoint's {classes} classes: say which, with --classes FILE or a "
            "folder of all class folders"
        )
    if names is not None:
        index = with_numbers(index, names)
    if (highest := int(index.labels.max())) >= classes:
        raise UserError(f"{index.source}: label {highest} is outside [0, {classes}), the checkpoint's classes")
    if own is None:
        present = np.ones(classes, bool)
    elif numbered:
        present = np.bincount(index.labels, minlength=classes) > 0
    else:
        present = np.isin(names, own)
    return index.labels, present


def predictions(frozen: Frozen, index: Index, name: str, present: np.ndarray) -> np.ndarray:
    """float32 [n, 1 + top]: the greatest probability and the most probable classes among those present.

    NaN where an image cannot be read.
    """
    encoder = frozen.encoder
    absent = torch.from_numpy(~present).to(frozen.device)
    top = min(TOP, int(present.sum()))

    def classify(images: Tensor) -> Tensor:
        logits = encoder.classifier(encoder.features(images)).float().masked_fill(absent, -torch.inf)
        best = logits.softmax(1).topk(top, 1)
        return torch.cat([best.values[:, :1], best.indices], 1)

    weights = {n: t for n, t in encoder.state_dict().items() if not n.startswith(("fc1.", "fc2."))}
    meaning = f"predictions {digest(weights)} {np.flatnonzero(~present).tolist()}"
    return frozen.outputs(index, name, classify, 1 + top, meaning)


def summary(found: np.ndarray, labels: np.ndarray, names: list[str]) -> dict:
    """All measures, from what :func:`predictions` gives; rates in percent."""
    readable = ~np.isnan(found[:, 0])
    found, labels = np.asarray(found[readable]), labels[readable]
    if not len(labels):
        raise UserError("no image of the set can be read")
    confidence, best = found[:, 0].astype(np.float64), found[:, 1:].astype(np.int64)
    hits = best == labels[:, None]
    correct, first = hits[:, 0], best[:, 0]
    images = np.bincount(labels, minlength=len(names))
    right = np.bincount(labels[correct], minlength=len(names))
    of_class = 100 * right / np.maximum(images, 1)
    calibration = {
        "rms": rms_calibration(confidence, correct, last_bin=False),
        "rms_all_bins": rms_calibration(confidence, correct),
        "ece": expected_calibration(confidence, correct),
    }
    pairs, counts = np.unique(np.stack([labels, first])[:, ~correct], axis=1, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:_CONFUSIONS]
    return {
        "images": len(labels),
        "unreadable": int((~readable).sum()),
        "top1": 100 * correct.mean(),
        "top5": 100 * hits.any(1).mean(),
        "mean_per_class": of_class[images > 0].mean(),
        "calibration": {name: None if share is None else 100 * share for name, share in calibration.items()},
        "per_class": [
            {"class": names[c], "images": int(images[c]), "top1": of_class[c]} for c in np.flatnonzero(images)
        ],
        "confusions": [
            {"class": names[a], "predicted": names[b], "images": int(n), "share": 100 * n / images[a]}
            for a, b, n in zip(*pairs[:, order].tolist(), counts[order].tolist(), strict=True)
        ],
    }


def rms_calibration(confidence: np.ndarray, correct: np.ndarray, last_bin: bool = True) -> float | None:
    """Root of the mean, over images, of the squared gap between a bin's confidence and its accuracy.

    Bins of BIN_SIZE images in the order of confidence; the last takes the rest. last_bin=False leaves the most
    confident bin out, but not its images out of the mean: what the tool computes with which published figures for
    ImageNet-A and ImageNet-R were made. None: no bin is left.
    """
    n = len(confidence)
    order = np.argsort(confidence, kind="stable")
    starts = np.arange(0, max(1, n // BIN_SIZE) * BIN_SIZE, BIN_SIZE)
    sizes = np.diff([*starts, n])
    gaps = (np.add.reduceat(confidence[order], starts) - np.add.reduceat(correct[order].astype(float), starts)) / sizes
    if not last_bin:
        sizes, gaps = sizes[:-1], gaps[:-1]
    return float(np.sqrt((sizes * gaps**2).sum() / n)) if len(gaps) else None


def expected_calibration(confidence: np.ndarray, correct: np.ndarray) -> float:
    """ECE: the mean, over images, of the gap between confidence and accuracy in ECE_BINS bins (a, b] of equal width."""
    bins = np.ceil(confidence * ECE_BINS).astype(int).clip(1, ECE_BINS) - 1
    gaps = np.bincount(bins, confidence - correct, ECE_BINS)
    return float(np.abs(gaps).sum() / len(confidence))


def table(results: dict[str, dict], top: int) -> str:
    """What the terminal shows."""
    width = max(len("set"), *map(len, results))
    lines = [f"{'set':{width}s}  classes   images   top-1   top-5  per class  RMS calibration error    ECE"]
    for name, r in results.items():
        rms = r["calibration"]["rms"]
        lines.append(
            f"{name:{width}s} {r['classes']:8d} {r['images']:8d} {r['top1']:7.2f} {r['top5']:7.2f} "
            f"{r['mean_per_class']:10.2f} {'–' if rms is None else f'{rms:.2f}':>22s} {r['calibration']['ece']:6.2f}"
        )
    for name, r in results.items():
        if top and r["confusions"]:
            lines += ["", f"{name}: most often confused"]
            lines += [
                f"  {c['images']:6d} ({c['share']:5.1f} % of {c['class']}) taken for {c['predicted']}"
                for c in r["confusions"][:top]
            ]
            worst = sorted(r["per_class"], key=lambda c: c["top1"])[:top]
            lines += [f"{name}: worst classes: " + ", ".join(f"{c['class']} {c['top1']:.1f} %" for c in worst)]
        if r["unreadable"]:
            lines.append(f"{name}: {r['unreadable']} images cannot be read and are left out")
    return "\n".join(lines)
