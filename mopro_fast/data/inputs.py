"""A run's data: its indexes, checked; its loaders."""

import csv
import dataclasses
import io
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from mopro_fast.config import DataConfig, Settings
from mopro_fast.data.batches import EvalBatches, TrainBatches, require_rows
from mopro_fast.data.cache import DeviceEvalLoader, DeviceTrainLoader
from mopro_fast.data.check import check
from mopro_fast.data.decode import UNREADABLE, VERDICTS
from mopro_fast.data.index import Checked, Index, load_index, read_list, val_layout
from mopro_fast.data.order import place_in_class
from mopro_fast.data.pipeline import EvalLoader, TrainLoader
from mopro_fast.distributed import by_rank0, world
from mopro_fast.errors import UserError
from mopro_fast.files import replacing

_HOLDOUT = 4  # word of the generator's seed; order.py and batches.py have 0 to 2, supervised.py 3
_KINDS = 3  # of unreadable images that are printed; left_out.csv has all


def load(c: Settings, resumed: bool) -> dict[str, Index]:
    """The indexes by name: train; val, the validation split, if there is one; the further sets.

    resumed: files may have gone since the run began.
    """
    d = c.data
    common = {"num_classes": d.num_classes, "keep_classes": d.keep_classes}
    train = load_index(d.path, "train", layout=d.layout, root=d.root, missing=resumed, **common)
    require_rows(len(train), c.optim.batch_size, train.source)  # before the images are checked
    sets = {"train": train}
    if d.val:
        sets["val"] = load_index(d.val, "val", root=d.root, **common)
    elif val_layout(d.path):
        sets["val"] = load_index(d.path, "val", **common)
    for name, path in d.extra_val.items():
        sets[name] = load_index(path, "val", num_classes=d.num_classes)
    return sets


def write_list(index: Index, path: Path) -> None:
    """For as_begun(): class folders have no list of their own."""
    if index.classes is not None and index.shards is None:
        lines = [f"{name} {label}\n" for name, label in zip(index.paths, index.labels, strict=True)]
        with replacing(path) as file:
            file.writelines(line.encode() for line in lines)


def as_begun(index: Index, path: Path, digest: str) -> Index:
    """The index of this digest, with which a run began, if but few of its files have gone, and no label has
    changed; else ``index``."""
    if index.digest() == digest or not path.is_file():
        return index
    begun = load_index(path, "train", num_classes=len(index.classes), layout="list", root=index.root, missing=True)
    _, then, now = np.intersect1d(begun.paths, index.paths, return_indices=True)
    same_labels = np.array_equal(begun.labels[then], index.labels[now])
    if begun.digest() != digest or not same_labels or len(begun) - len(then) > max(10, len(begun) // 100):
        return index
    return dataclasses.replace(begun, classes=index.classes, source=index.source, list_file=None)


def readable(index: Index, name: str, workers: int, left_out: np.ndarray | None = None) -> Index:
    """The index with what a check finds, and without the images that cannot be read; what is found is printed.

    Rank 0 checks, the others wait. Shards were checked when they were packed. left_out: what a run left out when it
    began, if it is going on: rows that broke since then stay, for the loader to replace.
    """
    if index.shards is not None:
        return index
    checked = by_rank0(lambda: check(index, workers=workers, progress=sys.stderr.isatty()))
    counts = np.bincount(checked.verdict, minlength=len(VERDICTS)).tolist()
    _say(f"{name}: {len(index)} images: " + ", ".join(f"{n} {v}" for n, v in zip(counts, VERDICTS, strict=True) if n))
    if left_out is None:
        left_out = np.flatnonzero(checked.verdict == UNREADABLE)
    if len(left_out):
        _say(f"{name}: {len(left_out)} of them are left out: {_by_kind(index, checked, left_out)}")
    if len(left_out) == len(index):
        raise UserError(f"{index.source}: none of its {len(index)} images can be read")
    return dataclasses.replace(index, checked=checked, left_out=left_out)


def hold_out(index: Index, data: DataConfig) -> tuple[Index, Index]:
    """-> the index without the images that ``--holdout`` names, and one of these alone, with their rows as ids.

    A share takes the same images whatever ``--seed`` is, so that runs can be compared, and leaves each class one at
    least. Raises a UserError.
    """
    holdout, labels, share = data.holdout, index.labels, data.held_out_share()
    if share is None:
        rows, trusted = _trusted(index, holdout, data.num_classes)
        labels = labels.copy()
        labels[rows] = trusted
    else:
        order = np.random.default_rng(_HOLDOUT).permutation(len(index))
        order = order[labels[order] >= 0]
        of_class = labels[order]
        sizes = np.bincount(of_class)
        taken = np.minimum(np.rint(share * sizes), sizes - 1)
        rows = np.sort(order[place_in_class(of_class) < taken[of_class]])
    if not len(np.setdiff1d(rows, index.left_out)):
        raise UserError(f"--holdout {holdout}: no labelled image of {index.source} is held out by it: name more")
    if not len(np.setdiff1d(index.usable, rows)):
        raise UserError(f"--holdout {holdout} holds out every image of {index.source}: none is left to train on")
    rest = np.union1d(np.delete(index.ids, rows), index.left_out)
    return dataclasses.replace(index, held_out=rows), dataclasses.replace(index, labels=labels, left_out=rest)


def _trusted(index: Index, path: str, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows of the images of a list file, and its labels for them; an image may stand in several rows."""
    if not os.path.isfile(path):
        raise UserError(f"--holdout {path}: neither a share of the images, such as 0.05, nor a list file")
    names, labels, lines = read_list(path)
    of_name = dict(zip(names, labels.tolist(), strict=True))
    listed = pa.array(list(of_name), pa.string())
    place = pc.index_in(pa.array(index.paths, pa.string()), value_set=listed)  # the index may have millions
    rows = np.flatnonzero(place.is_valid().to_numpy(zero_copy_only=False))
    known = {str(name) for name in index.paths[rows]}
    for name, label, line in zip(names, labels.tolist(), lines.tolist(), strict=True):
        where = f"--holdout {path}:{line}: {name}"
        if name not in known:
            raise UserError(f"{where} is no image of {index.source}: write its path as there; --val takes others")
        if not 0 <= label < classes:
            raise UserError(f"{where} needs a label in [0, {classes})")
        if of_name[name] != label:
            raise UserError(f"{where} has two labels, {label} and {of_name[name]}")
    return rows, labels.dtype.type([of_name[str(name)] for name in index.paths[rows]])


def train_loader(
    c: Settings, index: Index, device: torch.device, two_views: bool, repeats: np.ndarray | None = None
) -> TrainBatches:
    """repeats: see order.epoch_order."""
    d = c.data
    options = {"seed": c.run.seed, "augment": d.augment, "two_views": two_views, "repeats": repeats}
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
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return d.threads or max(1, len(os.sched_getaffinity(0)) // local_ranks)


def write_left_out(index: Index, path: Path) -> None:
    """A csv line, path and reason, for each image that the run does not show."""
    text = io.StringIO(newline="")
    csv.writer(text).writerow(("path", "reason"))
    csv.writer(text).writerows((index.paths[i], index.checked.reason[i]) for i in index.left_out)
    with replacing(path) as file:
        file.write(text.getvalue().encode())


def _by_kind(index: Index, checked: Checked, rows: np.ndarray) -> str:
    """How many there are of each kind, with an example of it."""
    kinds: dict[str, list[int]] = {}
    for i in rows.tolist():
        kinds.setdefault(checked.reason[i].partition(":")[0], []).append(i)
    most = sorted(kinds.items(), key=lambda kind: -len(kind[1]))
    shown = [f"{len(found)} {kind} (such as {index.paths[found[0]]})" for kind, found in most[:_KINDS]]
    return ", ".join(shown) + (", ..." if len(most) > _KINDS else "")


def _say(text: str) -> None:
    if world()[0] == 0:
        print(text, file=sys.stderr)
