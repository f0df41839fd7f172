"""``mopro-fast retrain CKPT --cleaned TABLE --data DATA --out FOLDER``: classifier re-training on cleaned labels.

Kang et al., "Decoupling representation and classifier" (ICLR 2020), as in the paper's section 3.4: the encoder stays,
the classifier is trained on with images of rare classes shown more often. CAPro shows all alike; of its other losses
none reaches the classifier of a frozen encoder.
"""

import json
import os
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mopro_fast import distributed
from mopro_fast.data.index import Index
from mopro_fast.data.paths import TEXT, WHOLE, Paths, read_columns, shown
from mopro_fast.downstream import capro_labels, supervised
from mopro_fast.downstream.supervised import (
    OneView,
    SupervisedConfig,
    SupervisedData,
    SupervisedOptim,
    SupervisedTask,
)
from mopro_fast.errors import UserError, first_line
from mopro_fast.files import misfit, open_regular, read_regular
from mopro_fast.labels import NO_LABEL

_MOST = 1 << 32  # bytes of cleaned labels in JSON
_ROWS = 1 << 18  # of a table read at a time


@dataclass
class Retrain(SupervisedConfig):
    """Train the classifier on cleaned labels with the encoder frozen. The defaults are the official settings, of MoPro
    or, for a checkpoint of CAPro, of that."""

    cleaned: str = ""
    """What `mopro-fast clean` wrote: cleaned.parquet, its folder, or a pseudo_label.json (the official one as well)."""
    pathlist: str = ""
    """CAPro's image_all_tfrecord.pathlist: which image is which, for a pseudo_label.json of its code."""
    resample: bool = True
    """Show an image more often the rarer its class is: classes in proportion to the square root of their size."""
    optim: SupervisedOptim = field(
        # The official --epochs 15 trains 16.
        default_factory=lambda: SupervisedOptim(epochs=16, lr=0.01, milestones=(5, 10), weight_decay=0.0)
    )


def main(argv: list[str]) -> int:
    return supervised.main(
        argv, "retrain", lambda weights: settings(weights is not None and weights.capro), RetrainTask
    )


def settings(capro: bool) -> Retrain:
    """The official settings, of MoPro or of CAPro (WebVision's; of Google-500 it trains 20 epochs)."""
    if not capro:
        return Retrain()
    return Retrain(
        data=SupervisedData(augment=OneView(scale=(0.8, 1.0))),
        optim=SupervisedOptim(epochs=15, lr=1e-4, schedule="warmup-cosine"),
        resample=False,
        mixup_beside=True,
        moving_statistics=True,
        train_bias=False,
    )


class RetrainTask(SupervisedTask):
    """Trains on the cleaned labels."""

    command = "retrain"
    free = frozenset({"cleaned", "pathlist"})

    def labelled(self, index: Index) -> Index:
        trained, own = self.weights.classes, index.classes
        if None not in (trained, own) and trained != own:
            label, (theirs, ours) = next(
                (i, pair) for i, pair in enumerate(zip_longest(trained, own, fillvalue="none")) if pair[0] != pair[1]
            )
            raise UserError(
                f"{self.weights.path} was trained on other classes than {index.source} has, or in another order: label "
                f"{label} is {shown(theirs)} there and {shown(ours)} here: give the data of its training"
            )
        return with_cleaned_labels(self.config, index)


def with_cleaned_labels(config: Retrain, index: Index) -> Index:
    """The index with the new labels, −1 for images that were removed."""
    if not config.cleaned:
        raise UserError("no cleaned labels given: set --cleaned to the table that `mopro-fast clean` wrote")
    path = Path(config.cleaned)
    path = path / "cleaned.parquet" if os.path.isdir(path) else path
    if not os.path.exists(path):
        raise UserError(f"no cleaned labels at {path}: name the --out of `mopro-fast clean`, or a file that it wrote")
    labels = distributed.by_rank0(lambda: _new_labels(path, config, index))
    return index.with_labels(labels)


def _new_labels(path: Path, config: Retrain, index: Index) -> np.ndarray:
    """int64 [images], −1 for those that were removed."""
    new = _row_by_row(path, index)
    if new is None:
        new = _by_name(path, config.pathlist, index)
    if new.max(initial=NO_LABEL) >= config.data.num_classes:
        raise UserError(f"{path} has the label {new.max()}: set --num-classes to at least {new.max() + 1}")
    if new.max(initial=NO_LABEL) < 0:
        raise UserError(f"{path} keeps no image of {index.source}")
    return new


def _row_by_row(path: Path, index: Index) -> np.ndarray | None:
    """int64 [images]: the labels of a table of the index's own images in their order; None of any other file.

    What is wrong with another one :func:`_by_name` says, which takes hundreds of bytes an image.
    """
    try:
        with open_regular(path) as file, pq.ParquetFile(file) as table:
            schema, kinds = table.schema_arrow, {"path": TEXT, "label": WHOLE}
            fits = [any(is_type(schema.field(name).type) for is_type in kind.types) for name, kind in kinds.items()]
            if not all(fits) or _of_anchors(schema) or table.metadata.num_rows != len(index):
                return None
            labels, first = np.empty(len(index), np.int64), 0
            for batch in table.iter_batches(_ROWS, columns=list(kinds)):
                rows = slice(first, first := first + len(batch))
                if batch["label"].null_count or not Paths(batch["path"]).equals(index.paths[rows]):
                    return None
                labels[rows] = batch["label"].cast(pa.int64()).to_numpy(zero_copy_only=False)
            return labels if labels.min(initial=0) >= NO_LABEL else None
    except (pa.ArrowException, OSError, ValueError, KeyError, NotImplementedError):
        return None


def _of_anchors(schema: pa.Schema) -> bool:
    return b"mopro_fast.clean" not in (schema.metadata or {}) and "anchor" in schema.names


def _by_name(path: Path, pathlist: str, index: Index) -> np.ndarray:
    """int64 [images]: the labels of any file of cleaned labels, −1 also where it has none."""
    paths, labels = _read(path, pathlist, index)
    if paths.equals(index.paths):  # row by row: lists may name an image twice, with different labels
        return labels
    rows = index.rows_of(paths)
    if (rows < 0).any():
        first = shown(paths[int((rows < 0).argmax())])
        raise UserError(f"{path} is of other data than {index.source}: it has {first}, which is not there")
    first = paths.rows_of(paths)
    if (labels != labels[first]).any():
        i = int((labels != labels[first]).argmax())
        raise UserError(
            f"{path} has two labels for {shown(paths[i])}, {labels[first[i]]} and {labels[i]}: give the table of all "
            "images, cleaned.parquet, or remove one"
        )
    found = paths.rows_of(index.paths)
    if path.suffix != ".json" and len(lacks := np.flatnonzero(found < 0)):
        distributed.say(
            f"{path} has no row for {len(lacks)} of {len(index)} images, such as {shown(index.paths[lacks[0]])}: they "
            "are not shown"
        )
    new = np.full(len(index), NO_LABEL)
    new[rows] = labels
    new[found >= 0] = labels[found[found >= 0]]
    return new


def _read(path: Path, pathlist: str, index: Index) -> tuple[Paths, np.ndarray]:
    """-> paths and labels int64, −1 for removed."""
    try:
        if path.suffix == ".json":
            found = json.loads(read_regular(path, _MOST)[0].decode("utf-8-sig", "surrogateescape"))
            if isinstance(found, dict) and "samples" in found:
                paths, labels = capro_labels.read(found, pathlist, index.paths)
            elif wrong := misfit(found, {"images": [str], "labels": [int]}):
                raise ValueError(wrong)
            else:
                paths, labels = Paths(found["images"]), found["labels"]
            labels = np.array(labels, np.int64)
        else:
            paths, columns, _ = read_columns(path, "label")
            labels = columns["label"]
            if _of_anchors(pq.read_schema(path)):
                raise ValueError("it is a table of anchors: give what `mopro-fast clean` wrote")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read the cleaned labels {path}: {first_line(error)}") from None
    if len(paths) != len(labels) or labels.min(initial=0) < NO_LABEL:
        raise UserError(f"{path} is damaged: {len(paths)} images, {len(labels)} labels from {labels.min(initial=0)}")
    return paths, labels
