"""``mopro-fast lowshot CKPT``: linear SVMs on frozen features from k images per class (MoPro, table 3).

The protocol is lowshot_svm.py's of the official code, which has it from Goyal et al. (2019): features of unit length,
LinearSVC with its settings, the mean of several draws. VOC07: one SVM per class on images with several labels, average
precision; everything else: one SVM for all classes, accuracy.
"""

import os
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import tyro

from mopro_fast.console import Progress, tell
from mopro_fast.data.index import Index, load_index, val_layout
from mopro_fast.data.lists import read_list
from mopro_fast.data.paths import Paths
from mopro_fast.distributed import by_rank0, leave, world
from mopro_fast.downstream.done import Done
from mopro_fast.downstream.features import EncoderConfig, Frozen, folders
from mopro_fast.downstream.svm import MAX_ITER, train_and_score, unit
from mopro_fast.errors import UserError
from mopro_fast.files import write_json

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
PLACES_LISTS = "trainvalsplit_places205"
PLACES_IMAGES = "data/vision/torralba/deeplearning/images256"


@dataclass
class Lowshot:
    """Classify with linear SVMs on a frozen encoder's features, trained on k images per class."""

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CKPT")]
    """A checkpoint of any format that this package reads, or a run's folder: its newest."""
    data: str
    """A folder with VOCdevkit/VOC2007, one with Places205's trainvalsplit_places205/, or training images in any other
    layout of `mopro-fast train`."""
    out: str
    """Folder for lowshot.json and, while it works, what is done so far."""
    val: str | None = None
    """Images to test on (default: those that come with the data)."""
    root: str | None = None
    """Folder that the paths of list files start from (default: each list's own folder)."""
    k: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Images per class. The draws follow one another: with another list, or order, they are others."""
    runs: int = 5
    """Draws per k."""
    cost: float = 0.5
    """C of the SVM."""
    seed: int = 0
    """Of the draws."""
    jobs: int = 0
    """SVMs trained at a time (0: one per core)."""
    features: str | None = None
    """Folder where features are kept for the next time (default: features/ in --out)."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)


class Task(NamedTuple):
    """Images to draw from and images to test on."""

    train: Index
    test: Index
    train_labels: np.ndarray
    """int64 [n], -1: none; or int8 [n, classes] of 1 (there), -1 (not there), 0 (hard to see, official: not there)."""
    test_labels: np.ndarray
    classes: list[str]


def main(argv: list[str]) -> int:
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff)
    o = tyro.cli(Lowshot, args=argv, prog="mopro-fast lowshot", config=config)
    _validate(o)
    with folders("lowshot", o.checkpoint, o.out, o.features or "", o.encoder.device):
        return lowshot(o)


def lowshot(o: Lowshot) -> int:
    """Write lowshot.json and print the table; -> 0."""
    task = by_rank0(lambda: load(o.data, o.val, o.root, o.encoder.trust_index))
    _require_enough(task, o.k)
    draws = draw(task.train_labels, o.k, o.runs, o.seed)
    drawn = np.unique(np.concatenate(list(draws.values())))  # no other training image is looked at
    out = Path(o.out)
    frozen = Frozen(o.checkpoint, o.encoder, Path(o.features) if o.features else out / "features")
    train = frozen.features(task.train.take(drawn), "drawn")
    test = frozen.features(task.test, "test")
    rank = world()[0]
    leave()
    if rank:
        return 0

    readable, tested = (~np.isnan(x[:, 0]) for x in (train, test))
    rows = {key: np.searchsorted(drawn, images) for key, images in draws.items()}
    rows = {key: r[readable[r]] for key, r in rows.items()}
    files = [os.path.basename(x.filename) for x in (train, test)]
    settings = {"features": files, "k": o.k, "runs": o.runs, "cost": o.cost, "seed": o.seed}
    done = Done(out, "lowshot", settings)
    jobs = o.jobs or len(os.sched_getaffinity(0))
    labels = task.train_labels[drawn], task.test_labels[tested]
    result = report(o, task, svm_scores(np.asarray(train), test[tested], *labels, rows, o.cost, jobs, done))
    write_json(out / "lowshot.json", result)
    done.remove()
    tell(table(result))
    return 0


def load(data: str, val: str | None, root: str | None = None, missing: bool = False) -> Task:
    """The images and labels of ``data`` in any of its layouts. missing: files of lists may be."""
    for folder in (os.path.join(data, "VOCdevkit", "VOC2007"), os.path.join(data, "VOC2007"), data):
        if os.path.isdir(os.path.join(folder, "ImageSets", "Main")):
            _require_own(data, val)
            return Task(*_voc(folder), list(VOC_CLASSES))
    if os.path.isdir(os.path.join(data, PLACES_LISTS)):
        _require_own(data, val)
        root = os.path.join(data, PLACES_IMAGES)
        lists = [os.path.join(data, PLACES_LISTS, f"{split}_places205.csv") for split in ("train", "val")]
        train = load_index(lists[0], "train", num_classes=205, layout="list", root=root, missing=True)
        test = load_index(lists[1], "val", num_classes=205, layout="list", root=root, missing=missing)
        return Task(train, test, train.labels, test.labels, [str(c) for c in range(205)])
    if val is None and not val_layout(data):
        raise UserError(f"{data} comes without images to test on: name them with --val")
    train = load_index(data, "train", num_classes=None, root=root, missing=missing)
    test = load_index(val or data, "val", num_classes=None, root=root, classes=train.classes, missing=missing)
    classes = train.classes or [str(c) for c in range(int(max(train.labels.max(), test.labels.max())) + 1)]
    return Task(train, test, train.labels, test.labels, classes)


def _require_own(data: str, val: str | None) -> None:
    if val is not None:
        raise UserError(f"{data} has its own images to test on: leave out --val {val}")


def _voc(folder: str) -> tuple[Index, Index, np.ndarray, np.ndarray]:
    """The official script's order: that of the first class's list."""
    found = {}
    for split in ("trainval", "test"):
        columns = [_voc_list(folder, name, split) for name in VOC_CLASSES]
        names = list(columns[0])
        for name, column in zip(VOC_CLASSES, columns, strict=True):
            if column.keys() != columns[0].keys():
                lists = f"{VOC_CLASSES[0]}_{split}.txt and {name}_{split}.txt"
                raise UserError(f"{folder}/ImageSets/Main: {lists} name different images")
        labels = np.array([[column[name] for column in columns] for name in names], np.int8).reshape(-1, len(columns))
        root = os.path.join(folder, "JPEGImages")
        paths = Paths(f"{name}.jpg" for name in names)
        absent = [path for path in paths if not os.path.isfile(os.path.join(root, path))]
        if absent:
            raise UserError(f"{root}: {len(absent)} images of {split} are missing, such as {absent[0]}")
        found[split] = Index(root, paths, np.zeros(len(paths), np.int64), None, f"{folder} {split}"), labels
    (train, train_labels), (test, test_labels) = found["trainval"], found["test"]
    return train, test, train_labels, test_labels


def _voc_list(folder: str, name: str, split: str) -> dict[str, int]:
    path = os.path.join(folder, "ImageSets", "Main", f"{name}_{split}.txt")
    if not os.path.isfile(path):
        raise UserError(f"cannot read {path}: no such file: unpack VOC2007's trainval and test there")
    images, numbers, _ = read_list(path, lambda _: True, form="image label")
    labels = dict(zip(images, numbers.tolist(), strict=True))
    if not labels or not set(labels.values()) <= {-1, 0, 1}:
        raise UserError(f"{path}: expected labels 1, 0 and -1")
    return labels


def draw(labels: np.ndarray, ks: tuple[int, ...], runs: int, seed: int) -> dict[tuple[int, int], np.ndarray]:
    """By (k, run) the int64 rows of k images per class, class by class: the official script's, for the same seed.

    An image of several classes may be drawn more than once.
    """
    columns = labels.T > 0 if labels.ndim == 2 else [labels == c for c in range(labels.max() + 1)]
    members = [np.flatnonzero(column).tolist() for column in columns]
    rng = random.Random(seed)
    draws = {}
    for k in ks:
        for run in range(runs):
            rows: list[int] = []
            for images in members:
                shuffled = images.copy()
                rng.shuffle(shuffled)
                rows += shuffled[:k]
            draws[k, run] = np.array(rows, np.int64)
    return draws


def svm_scores(
    train: np.ndarray,
    test: np.ndarray,
    train_labels: np.ndarray,
    test_labels: np.ndarray,
    draws: dict[tuple[int, int], np.ndarray],
    cost: float,
    jobs: int = 1,
    done: Done | None = None,
) -> dict[tuple[int, int, int], tuple[float, bool]]:
    """By (k, run, class) the score in percent and whether the SVM converged; without several labels class is 0.

    train, test: float32 [n, F] as the encoder gives them. labels: int64 [n], or int8 [n, classes] of several labels.
    draws: by (k, run), rows of ``train``.
    """
    from joblib import Parallel, delayed

    train, test = unit(train), unit(test)
    several = train_labels.ndim == 2
    labels, truth = (np.atleast_2d(x.T) for x in (train_labels, test_labels))  # a row per SVM of a draw
    found = {} if done is None else {tuple(map(int, key.split())): tuple(r) for key, r in done.results.items()}
    calls = [
        delayed(train_and_score)((*key, c), train, rows, labels[c, rows], test, truth[c], several, cost)
        for key, rows in draws.items()
        for c in range(len(labels))
        if (*key, c) not in found
    ]
    with Progress("SVMs", len(calls), "fitted") as bar:
        for key, score, converged in Parallel(jobs, return_as="generator_unordered")(calls):
            found[key] = (score, converged)
            if done is not None:
                done.add(" ".join(map(str, key)), found[key])
            bar.update()
    return found


def _validate(o: Lowshot) -> None:
    for name, values in (("k", o.k), ("runs", (o.runs,))):
        if not values or min(values) < 1:
            raise UserError(f"--{name} must be at least 1, got {min(values, default='nothing')}")
    if len(set(o.k)) < len(o.k):
        raise UserError(f"--k {' '.join(map(str, o.k))} names a number twice")
    if o.cost <= 0:
        raise UserError(f"--cost must be above 0, got {o.cost}")


def _require_enough(task: Task, ks: tuple[int, ...]) -> None:
    """As many images of each class as are drawn; for average precision also one to test on."""
    several = task.train_labels.ndim == 2
    drawn, tested = (
        (labels > 0).sum(0) if several else np.bincount(labels[labels >= 0], minlength=len(task.classes))
        for labels in (task.train_labels, task.test_labels)
    )
    for counts, least, index in ((drawn, max(ks), task.train), (tested, int(several), task.test)):
        short = np.flatnonzero((counts < least) & (several | (drawn + tested > 0)))  # a number without images is none
        if len(short):
            n = counts[short[0]]
            hint = f"lower --k to {n}" if n and index is task.train else "add some, or leave the class out"
            name = task.classes[short[0]]
            raise UserError(f"class {name} has {n} images in {index.source}, fewer than the {least} needed: {hint}")


def report(o: Lowshot, task: Task, scores: dict[tuple[int, int, int], tuple[float, bool]]) -> dict:
    """The result file."""
    several = task.train_labels.ndim == 2
    columns = range(len(task.classes)) if several else [0]
    table = np.array([[[scores[k, run, c][0] for c in columns] for run in range(o.runs)] for k in o.k])
    runs = table.mean(2)  # [k, run]
    by_k = {
        str(k): {"mean": float(values.mean()), "std": float(values.std()), "runs": values.tolist()}
        for k, values in zip(o.k, runs, strict=True)
    }
    result = {
        "checkpoint": o.checkpoint,
        "data": o.data,
        "metric": "mAP" if several else "accuracy",
        "settings": {"runs": o.runs, "cost": o.cost, "seed": o.seed},
        "not_converged": sum(not converged for _, converged in scores.values()),
        "k": by_k,
    }
    if several:
        by_class = table.mean(1).T  # [class, k]
        result["classes"] = {
            name: dict(zip(map(str, o.k), values.tolist(), strict=True))
            for name, values in zip(task.classes, by_class, strict=True)
        }
    return result


def table(result: dict) -> str:
    metric = f"{result['metric']}, %"
    lines = [f"  k  {metric:>15s}  runs"]
    for k, r in result["k"].items():
        each = " ".join(f"{value:.2f}" for value in r["runs"])
        lines.append(f"{k:>3s}  {r['mean']:7.2f} ± {r['std']:5.2f}  {each}")
    if result["not_converged"]:
        lines.append(f"{result['not_converged']} SVMs did not converge in {MAX_ITER} iterations, the official limit")
    return "\n".join(lines)
