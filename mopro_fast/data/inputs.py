"""A run's data: its indexes, checked; its loaders."""

import csv
import dataclasses
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch

from mopro_fast.config import DataConfig, Settings
from mopro_fast.data.batches import EvalBatches, TrainBatches, require_rows
from mopro_fast.data.cache import DeviceEvalLoader, DeviceTrainLoader
from mopro_fast.data.check import check
from mopro_fast.data.class_folders import is_number
from mopro_fast.data.decode import UNREADABLE, VERDICTS
from mopro_fast.data.index import Checked, Index, load_index, synsets, val_layout
from mopro_fast.data.lists import read_list
from mopro_fast.data.order import place_in_class
from mopro_fast.data.paths import Paths, shown
from mopro_fast.data.pipeline import EvalLoader, TrainLoader
from mopro_fast.distributed import number, say, world
from mopro_fast.errors import UserError
from mopro_fast.files import replacing
from mopro_fast.labels import pieces, row_type

_HOLDOUT = 4  # word of the generator's seed; order.py and batches.py have 0 to 2, supervised.py 3
_KINDS = 3  # of unreadable images that are printed; left_out.csv has all


def load(c: Settings, begun: Index | None = None, resumed: bool = False) -> dict[str, Index]:
    """The indexes by name: train; val, the validation split, if there is one; the further sets.

    All have the labels of train's classes. begun: what the run began with, if it noted that; its classes keep their
    labels. resumed: files may have gone since.
    """
    d = c.data
    common = {"num_classes": d.num_classes, "keep_classes": d.keep_classes, "classes": begun and begun.classes}
    missing = {"missing": resumed or d.trust_index}
    train = load_index(d.path, "train", layout=d.layout, root=d.root, **missing, **common)
    require_rows(len(train), c.optim.batch_size, train.source)  # before the images are checked
    sets = {"train": train}
    common["classes"] = class_names(c, train)
    common["missing"] = d.trust_index
    if d.val:
        sets["val"] = _validation(d.val, common, root=d.root)
    elif layout := val_layout(d.path, d.layout):
        sets["val"] = _validation(d.path, common, layout=layout)
    for name, path in d.extra_val.items():
        sets[name] = _validation(path, common | {"keep_classes": None})
    return sets


def class_names(c: Settings, train: Index) -> list[str] | None:
    """The names of the classes of the training data in the order of their labels, where it has them."""
    names = train.classes or synsets(c.data.path)
    return names if names is None else names[: c.data.num_classes]


def _validation(path: str, common: dict[str, Any], **options: Any) -> Index:
    index = load_index(path, "val", **common, **options)
    if common["classes"] is None and index.classes is not None and not all(map(is_number, index.classes)):
        raise UserError(
            f"{index.source} has class folders, and the training data has no names of classes: give the validation "
            "images as a list file with labels, or call the folders by the labels"
        )
    return index


def readable(index: Index, name: str, workers: int, left_out: np.ndarray | None = None, trust: bool = False) -> Index:
    """The index with what a check finds, and without the images that cannot be read; what is found is printed.

    For one rank, which tells the others. Shards were checked when they were packed. left_out: what a run left out when
    it began, if it is going on: rows that broke since then stay, for the loader to replace. trust: see check.
    """
    if index.shards is not None:
        return index
    checked = check(index, workers=workers, progress=True, required=False, trust=trust)
    counts = np.bincount(checked.verdict, minlength=len(VERDICTS)).tolist()
    say(f"{name}: {len(index)} images: " + ", ".join(f"{n} {v}" for n, v in zip(counts, VERDICTS, strict=True) if n))
    if left_out is None:
        left_out = np.flatnonzero(checked.verdict == UNREADABLE)
    if len(left_out):
        say(f"{name}: {len(left_out)} of them are left out: {_by_kind(index, checked, left_out)}")
    if large := pc.sum(pc.starts_with(checked.reason, "large")).as_py():
        say(f"{name}: {large} of them are large and made smaller each time; `mopro-fast pack` does it once and for all")
    if len(left_out) == len(index):
        raise UserError(f"{index.source}: none of its {len(index)} images can be read")
    return dataclasses.replace(index, checked=checked, left_out=left_out, stats=None)


def hold_out(index: Index, data: DataConfig) -> tuple[Index, Index]:
    """-> the index without the images that ``--holdout`` names, and one of these alone, with their rows as ids.

    A share takes the same images whatever ``--seed`` is, so that runs can be compared, and leaves each class one at
    least. Raises a UserError.
    """
    rows, trusted, rest = _held_out(index, data)
    labels = index.labels
    if trusted is not None:
        labels = labels.copy()
        labels[rows] = trusted
    return dataclasses.replace(index, held_out=rows), dataclasses.replace(index.with_labels(labels), left_out=rest)


def _held_out(index: Index, data: DataConfig) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """-> int64: the rows that ``--holdout`` names, their labels if it is a list, and all rows that it does not show."""
    holdout, trusted, share = data.holdout, None, data.held_out_share()
    if share is None:
        rows, trusted = _trusted(index, holdout, data.num_classes)
    else:
        rows = _share(index.labels, share)
    judged = np.zeros(len(index), bool)
    judged[rows] = True
    judged[index.left_out] = False
    if not judged.any():
        raise UserError(f"--holdout {holdout}: no labelled image of {index.source} is held out by it: name more")
    trained = np.ones(len(index), bool)
    for others in (index.left_out, index.held_out, rows):
        trained[others] = False
    if not trained.any():
        raise UserError(f"--holdout {holdout} holds out every image of {index.source}: none is left to train on")
    return rows, trusted, np.flatnonzero(~judged)


def _share(labels: np.ndarray, share: float) -> np.ndarray:
    """int64, sorted: of each class this share, drawn at random. labels: int64 [n]."""
    order = np.arange(len(labels), dtype=row_type(len(labels)))
    np.random.default_rng(_HOLDOUT).shuffle(order)
    of_class, sizes = np.empty(len(order), np.int32), np.zeros(int(labels.max(initial=-1)) + 1, np.int64)
    for piece in pieces(len(order)):
        of_class[piece] = part = labels[order[piece]]
        sizes += np.bincount(part[part >= 0], minlength=len(sizes))
    taken = np.append(np.minimum(np.rint(share * sizes), sizes - 1), 0)  # the last is of those without a label, −1
    place = place_in_class(of_class)
    rows = [order[piece][place[piece] < taken[of_class[piece]]] for piece in pieces(len(order))]
    return np.sort(np.concatenate(rows)).astype(np.int64)


def _trusted(index: Index, path: str, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows of the images of a list file, and its labels for them; an image may stand in several rows."""
    if not os.path.isfile(path):
        raise UserError(f"--holdout {path}: neither a share of the images, such as 0.05, nor a list file")
    names, labels, lines = read_list(path, lambda name: index.rows_of(Paths([name]))[0] >= 0)
    place = index.rows_of(names)
    label_of: dict[int, int] = {}
    for name, row, label, line in zip(names, place.tolist(), labels.tolist(), lines.tolist(), strict=True):
        where = f"--holdout {path}:{line}: {shown(name)}"
        if row < 0:
            raise UserError(f"{where} is no image of {index.source}: write its path as there; --val takes others")
        if not 0 <= label < classes:
            raise UserError(f"{where} needs a label in [0, {classes})")
        if label_of.setdefault(row, label) != label:
            raise UserError(f"{where} has two labels, {label_of[row]} and {label}")
    named, trusted = index.paths[np.array(list(label_of), np.int64)], np.array(list(label_of.values()), labels.dtype)
    rows, found = [], []
    for piece in pieces(len(index)):
        own = named.rows_of(index.paths[piece])
        rows.append(piece.start + np.flatnonzero(own >= 0))
        found.append(trusted[own[own >= 0]])
    return np.concatenate(rows), np.concatenate(found)


def train_loader(
    c: Settings,
    index: Index,
    device: torch.device,
    two_views: bool,
    repeats: np.ndarray | None = None,
    whole: bool = False,
) -> TrainBatches:
    """repeats: see order.epoch_order; whole: see TrainBatches."""
    d = c.data
    options = {"seed": c.run.seed, "augment": d.augment, "two_views": two_views, "repeats": repeats, "whole": whole}
    options |= {"shuffle_shards": d.shuffle_shards, **_shared(c, device)}
    return DeviceTrainLoader(index, **options) if d.cache == "device" else TrainLoader(index, **options)


def eval_loader(c: Settings, index: Index, device: torch.device) -> EvalBatches:
    d = c.data
    options = {"resize": d.eval_resize or round(d.image_size * 256 / 224), **_shared(c, device)}
    return DeviceEvalLoader(index, **options) if d.cache == "device" else EvalLoader(index, **options)


def _shared(c: Settings, device: torch.device) -> dict[str, Any]:
    """The arguments of every loader."""
    rank, ranks = world()
    d = c.data
    options = {"batch_size": c.optim.batch_size // ranks, "rank": rank, "world_size": ranks}
    options |= {"image_size": d.image_size, "device": device, "threads": threads(d)}
    return options if d.cache == "device" else options | {"hw_decoder_load": d.hw_decoder_load}


def threads(d: DataConfig) -> int:
    """Decoding threads of a rank."""
    local_ranks = number("LOCAL_WORLD_SIZE", 1, least=1)
    return d.threads or max(1, len(os.sched_getaffinity(0)) // local_ranks)


def write_left_out(index: Index, path: Path) -> None:
    """A csv line, path and reason, for each image that the run does not show."""
    text = io.StringIO(newline="")
    csv.writer(text).writerow(("path", "reason"))
    csv.writer(text).writerows(zip(index.paths[index.left_out], index.checked.whys(index.left_out), strict=True))
    with replacing(path) as file:
        file.write(os.fsencode(text.getvalue()))


def _by_kind(index: Index, checked: Checked, rows: np.ndarray) -> str:
    """How many there are of each kind, with an example of it."""
    kinds: dict[str, list[int]] = {}
    for i, why in zip(rows.tolist(), checked.whys(rows), strict=True):
        kinds.setdefault(why.partition(":")[0], []).append(i)
    most = sorted(kinds.items(), key=lambda kind: -len(kind[1]))
    named = [f"{len(found)} {kind} (such as {shown(index.paths[found[0]])})" for kind, found in most[:_KINDS]]
    return ", ".join(named) + (", ..." if len(most) > _KINDS else "")
