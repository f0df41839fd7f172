"""``mopro-fast clean CKPT --data DATA --out FOLDER``: the noise cleaning of the paper over a whole training set.

FOLDER/pseudo_label.json has the images that stay and their labels in the official format, FOLDER/cleaned.parquet a row
for every image: the same bytes whatever the number of ranks and interruptions. A model of CAPro judges by its own rule
(a score at a limit counts) and writes three columns more; its anchors are not protected.
"""

import contextlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import tyro
from torch import Tensor

from mopro_fast import distributed
from mopro_fast.checkpoints import capro
from mopro_fast.checkpoints.formats import Weights, digest
from mopro_fast.config import MoProConfig, capro_webvision
from mopro_fast.console import say, tell
from mopro_fast.data import anchors
from mopro_fast.data.index import Index, Layout, load_index
from mopro_fast.data.paths import Paths
from mopro_fast.downstream import capro_labels, image_map, row_map
from mopro_fast.downstream.features import EncoderConfig, Frozen
from mopro_fast.errors import UserError
from mopro_fast.files import (
    MOST_TEXT,
    json_object,
    own_folder,
    read_regular,
    replacing,
    require_own,
    write_items,
    write_json,
    writing,
)
from mopro_fast.labels import DECISIONS, REMOVED
from mopro_fast.models.calibration import BIAS, LOG_SCALE, calibrated
from mopro_fast.ops.reference import decide, mixed_scores

TABLE, OFFICIAL = "cleaned.parquet", "pseudo_label.json"
SCORES = ("score_given", "score_best", "classifier_given", "classifier_best", "prototype_given", "prototype_best")
OF_AUXILIARY = ("auxiliary_given", "auxiliary_best")
_SCHEMA = pa.schema(
    [
        ("id", pa.int64()),  # row of the data's lists
        ("path", pa.string()),  # binary where a name is not UTF-8
        ("given", pa.int32()),  # label; -1: none
        ("label", pa.int32()),  # after cleaning; -1: removed
        ("verdict", pa.string()),
        ("best", pa.int32()),  # the class with the highest score; -1: no image
        *((name, pa.float32()) for name in SCORES),  # null where there is no label, or no image
    ]
)
_OF_CAPRO = [*(pa.field(name, pa.float32()) for name in OF_AUXILIARY), pa.field("anchor", pa.int8())]  # null: not known
_NUMBERS = "clean-scores.npy"  # float32 [n, 8 or 10] while it works: the label after cleaning, the best class, scores
_BATCHES = 16  # per group of rows in the table
_NAMES = 1 << 16  # looked at together; less than 2 GiB of them
_HINT = "choose another --out"


@dataclass
class Clean:
    """Correct or remove every training label by the model's classifier and prototypes."""

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CKPT")]
    """A checkpoint with prototypes, of any format that this package reads, or a run's folder: its newest."""
    data: str = ""
    """Training data: a WebVision folder, a list file ("path label" per line), class folders, or packed shards."""
    out: str = ""
    """Folder for pseudo_label.json (the official format) and cleaned.parquet (a row per image)."""
    layout: Layout = "auto"
    """Layout of the data; auto looks."""
    root: str | None = None
    """Folder that the paths of a list file start from (default: the list's own folder)."""
    alpha: float | None = None
    """Weight of the classifier against the prototypes (default: as trained, else 0.5)."""
    threshold: float | None = None
    """θ: relabel when the best score exceeds it, of CAPro reaches it (default: as trained, else 0.8, of CAPro 0.6)."""
    temperature: float | None = None
    """T of the prototypes' scores (default: as trained, else 0.1)."""
    anchors: str | None = None
    """CAPro: anchors.parquet or its folder, for the column anchor (default: the training's, if it is there)."""
    format: Literal["official", "capro"] = "official"
    """capro: write the three files of CAPro's noise_cleaning.py as well, into the folder capro in --out."""
    pathlist: str | None = None
    """With --format capro: image_all_tfrecord.pathlist, which says where in its files of records an image lies."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)


def main(argv: list[str]) -> int:
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff)
    o = tyro.cli(Clean, args=argv, prog="mopro-fast clean", config=config)
    if not o.data or not o.out:
        raise UserError("mopro-fast clean CKPT needs --data and --out")
    totals = clean(o)
    if distributed.world()[0] == 0:
        tell(summary(totals, Path(o.out)))
    distributed.leave()
    return 0


def summary(totals: dict[str, int], out: Path) -> str:
    images = sum(totals.values())
    shares = ", ".join(f"{totals[v]} {v} ({100 * totals[v] / images:.1f} %)" for v in DECISIONS if totals[v])
    return f"{images} images: {shares}\ntable: {out / TABLE}    labels in the official format: {out / OFFICIAL}"


def clean(o: Clean) -> dict[str, int]:
    """-> how many images have which verdict."""
    # 1. The model, the data, and all that the result depends on.
    out = Path(o.out)
    require_own(out, "clean", _made_by)
    frozen = Frozen(o.checkpoint, o.encoder, out)
    weights, options = frozen.weights, frozen.loader_options
    _fill_in(o, weights)
    keep_classes = (weights.config or {}).get("data", {}).get("keep_classes")
    common = {"num_classes": weights.num_classes, "keep_classes": keep_classes, "classes": weights.classes}
    common |= {"layout": o.layout, "root": o.root, "missing": o.encoder.trust_index}
    index = distributed.by_rank0(lambda: load_index(o.data, "train", **common))
    marks = distributed.by_rank0(lambda: _anchors(o, weights, index))
    settings = {name: getattr(o, name) for name in ("alpha", "threshold", "temperature")}
    settings |= {"image_size": options["image_size"], "eval_resize": options["resize"]}
    settings |= {"batch_size": o.encoder.batch_size, "precision": o.encoder.precision, "device": frozen.device.type}
    settings |= {"weights": digest(weights.state), "data": index.digest(), "images": len(index)}
    if weights.capro:
        settings |= {"rule": "CAPro's, anchors not protected", "transform": "evaluation"}
        settings |= {"anchors": None if marks is None else marks.digest}
    # 2. A finished cleaning is told, also from a folder that cannot be written; another one there is refused.
    if o.format == "official" and (totals := distributed.by_rank0(lambda: _finished(out, settings))):
        return totals
    with distributed.on_rank0(lambda: own_folder(out, "clean", _made_by)):
        totals = distributed.by_rank0(lambda: _finished(out, settings))  # by a process that had the lock
        # 3. Score every image. No batch reaches over the end of a group of rows.
        if not totals:
            if weights.classes is None and index.classes is not None:
                distributed.say(f"{o.checkpoint} names no classes: those of {index.source} are taken, in this order")
            if distributed.world()[0] == 0:
                write_json(out / "clean.json", {"settings": settings})
            index = frozen.readable(index, "train")
            usable, size = index.usable, o.encoder.batch_size
            ends = np.searchsorted(usable, np.arange(_BATCHES * size, len(index), _BATCHES * size, usable.dtype))
            groups = np.split(usable, ends)
            batches = [rows[first : first + size] for rows in groups for first in range(0, len(rows), size)]
            own = [weights.state.get(name) for name in ("prototypes", LOG_SCALE, BIAS, capro.AUXILIARY)]
            own = [None if t is None else t.to(frozen.device) for t in own]

            def step(images: Tensor, labels: Tensor) -> Tensor:
                return score(frozen, own, images, labels, o)

            width = 2 + len(SCORES) + len(OF_AUXILIARY) * weights.capro
            numbers = image_map.compute(index, out / _NUMBERS, step, width, options, batches, again=out)
            # 4. Write the result.
            more = [_of_anchors(marks, len(index))] * weights.capro
            totals = distributed.by_rank0(lambda: _finish(out, index, numbers, settings, more))
        if distributed.world()[0] == 0:
            with writing(out, _HINT):
                (out / _NUMBERS).unlink(missing_ok=True)
                _remove_parts(out / "parts")
        if o.format == "capro":
            distributed.by_rank0(lambda: _write_theirs(out, o.pathlist))
    return totals


def _write_theirs(out: Path, pathlist: str | None) -> None:
    with writing(out, _HINT):
        capro_labels.write(out / TABLE, out / capro_labels.FOLDER, pathlist)


def _anchors(o: Clean, weights: Weights, index: Index) -> anchors.Anchors | None:
    """Those given; else those of the training, if they are there and of this data."""
    if not weights.capro:
        return None
    if o.anchors is not None:
        return anchors.read_anchors(o.anchors, index)
    path = (weights.config or {}).get("capro", {}).get("anchors")
    if not path or not os.path.exists(path):
        return None
    try:
        return anchors.read_anchors(path, index)
    except UserError as error:
        distributed.say(f"note: the column anchor stays empty: {error}")
        return None


def _of_anchors(marks: anchors.Anchors | None, rows: int) -> pa.Array:
    return pa.nulls(rows, pa.int8()) if marks is None else pa.array(marks.mask.astype(np.int8))


def _fill_in(o: Clean, weights: Weights) -> None:
    """What was not given, as the model was trained; then refuse what cannot be right."""
    trained = (weights.config or {}).get("mopro", {})
    official = capro_webvision().mopro if weights.capro else MoProConfig()
    for name in ("alpha", "threshold", "temperature"):
        if getattr(o, name) is None:
            setattr(o, name, trained.get(name, getattr(official, name)))
    for name in ("alpha", "threshold"):
        if not 0 <= getattr(o, name) <= 1:
            raise UserError(f"--{name} must lie in [0, 1], got {getattr(o, name)}")
    if not o.temperature > 0:
        raise UserError(f"--temperature must be above 0, got {o.temperature}")
    if "prototypes" not in weights.state or weights.num_classes is None:
        raise UserError(
            f"{o.checkpoint} has no prototypes to clean with: give a checkpoint of the training by MoPro or CAPro"
        )
    if weights.capro and not weights.state["prototypes"].any():
        raise UserError(
            f"{o.checkpoint} has no prototypes yet, all are zero: give a checkpoint of CAPro's second stage"
        )
    for name in ("anchors", "format"):
        if not weights.capro and getattr(o, name) not in (None, "official"):
            raise UserError(f"--{name} {getattr(o, name)} is for checkpoints of CAPro, and {o.checkpoint} is none")
    if o.pathlist is not None:
        if o.format != "capro":
            raise UserError(f"--pathlist {o.pathlist} has no effect without --format capro")
        if not os.path.isfile(o.pathlist):
            raise UserError(f"no file at --pathlist {o.pathlist}: name an image_all_tfrecord.pathlist")


def _made_by(folder: Path) -> str | None:
    settings = json_object(folder / "clean.json").get("settings")
    return "clean" if isinstance(settings, dict) and {"threshold", "weights", "data"} <= settings.keys() else None


def _remove_parts(folder: Path) -> None:
    """Of an earlier version that was interrupted."""
    for part in folder.glob("[0-9]*.parquet"):
        part.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


def _finished(out: Path, settings: dict[str, Any]) -> dict[str, int] | None:
    """-> the totals of a cleaning that is finished. Its settings must be ours."""
    state = out / "clean.json"
    if os.path.lexists(state):
        try:
            found = json.loads(read_regular(state, MOST_TEXT)[0])
            changed = [name for name, value in settings.items() if found["settings"].get(name) != value]
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            raise UserError(f"{state} cannot be read: remove it, or choose another --out") from None
        if changed and ((out / TABLE).exists() or row_map.begun(out / _NUMBERS)):
            raise UserError(f"{out} holds another cleaning, with other {changed[0]}: choose another --out")
        if "totals" in found and (out / TABLE).is_file():
            say(f"{out} is finished")
            return found["totals"]
    return None


def score(frozen: Frozen, own: list[Tensor | None], images: Tensor, labels: Tensor, o: Clean) -> Tensor:
    """-> float32 [n, 8]: the label after cleaning, the best class, SCORES; step 6 of the method. Of CAPro [n, 10], with
    OF_AUXILIARY, and by its rule.

    own: the model's prototypes and, if it has a calibration, its log_scale and bias; and CAPro's auxiliary classifier.
    """
    prototypes, log_scale, bias, auxiliary = own
    s = calibrated(*frozen.run(frozen.encoder, images), prototypes, o.temperature, log_scale, bias)
    mixed, *parts = mixed_scores(s.logits, s.q, s.prototypes, o.alpha, o.temperature)  # [n, C] each
    if auxiliary is not None:
        parts.append((s.q.float() @ auxiliary.T).softmax(1))
    label, kept = decide(mixed, labels, o.threshold, inclusive=auxiliary is not None)[:2]
    best, given = mixed.argmax(1), labels.clamp(min=0)
    scores = torch.cat([p.gather(1, rows[:, None]) for p in (mixed, *parts) for rows in (given, best)], 1)
    scores[:, ::2].masked_fill_(labels[:, None] < 0, float("nan"))
    return torch.cat([torch.where(kept, label, REMOVED)[:, None], best[:, None], scores], 1)


def _finish(
    out: Path, index: Index, numbers: np.ndarray, settings: dict[str, Any], more: list[pa.Array]
) -> dict[str, int]:
    """Write the table and the official file, a group of rows at a time; -> the totals. more: CAPro's last column."""
    rows = _BATCHES * settings["batch_size"]
    parts = [slice(first, first + rows) for first in range(0, len(index), rows)]
    schema = pa.schema([*_SCHEMA, *_OF_CAPRO]) if more else _SCHEMA
    schema = schema.set(1, schema.field("path").with_type(_type_of(index.paths)))
    schema = schema.with_metadata({"mopro_fast.clean": json.dumps(settings)})
    fields = [f for f in schema if f.name != "path"]
    totals = np.zeros(len(DECISIONS), np.int64)

    def decided(part: slice, column: int = 0) -> np.ndarray:
        """int32: labels after cleaning or, of column 1, the best classes; −1 where an image cannot be read."""
        return np.nan_to_num(numbers[part, column], nan=REMOVED).astype(np.int32)

    with writing(out, _HINT), replacing(out / TABLE) as table, replacing(out / OFFICIAL) as official:
        with pq.ParquetWriter(table, schema, compression="zstd") as writer:
            for part in parts:
                given, label, best = index.labels[part], decided(part), decided(part, 1)
                verdict = np.select([best < 0, label == REMOVED, label != given], [3, 2, 1], 0)  # of DECISIONS
                ids = np.arange(part.start, part.start + len(given))
                columns = [ids, given, label, np.array(DECISIONS)[verdict], best, *numbers[part, 2:].T]
                columns += [column[part] for column in more]
                arrays = [pa.array(c, f.type, from_pandas=True) for c, f in zip(columns, fields, strict=True)]
                names = index.paths[part].column.cast(schema.field("path").type)
                writer.write_table(pa.table([arrays[0], names, *arrays[1:]], schema=schema))
                totals += np.bincount(verdict, minlength=len(DECISIONS))
        official.write(b'{"images": [')
        write_items(official, (index.paths[part][decided(part) != REMOVED].tolist() for part in parts))
        official.write(b'], "labels": [')
        write_items(official, (label[label != REMOVED].tolist() for label in map(decided, parts)))
        official.write(b"]}")
    found = dict(zip(DECISIONS, totals.tolist(), strict=True))
    write_json(out / "clean.json", {"settings": settings, "totals": found})
    return found


def _type_of(names: Paths) -> pa.DataType:
    """As :meth:`Paths.for_table` has it, in pieces."""
    pieces = (names[first : first + _NAMES].for_table() for first in range(0, len(names), _NAMES))
    text = all(pa.types.is_string(piece.type) for piece in pieces)
    small, large = (pa.string(), pa.large_string()) if text else (pa.binary(), pa.large_binary())
    return large if names.column.nbytes >> 31 else small
