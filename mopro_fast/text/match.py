"""``mopro-fast text match FOLDER``: the images whose texts are nearest to their class's text, as anchors.parquet."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import tyro
from torch import Tensor

from mopro_fast import distributed, files
from mopro_fast.console import plural, tell
from mopro_fast.data.anchors import TABLE
from mopro_fast.data.lists import read_list
from mopro_fast.data.paths import Paths, shown
from mopro_fast.distributed import say
from mopro_fast.downstream import row_map
from mopro_fast.downstream.capro_lists import nearest
from mopro_fast.downstream.features import EncoderConfig, Frozen
from mopro_fast.errors import UserError
from mopro_fast.text import graph
from mopro_fast.text.folder import (
    ABOUT,
    CLASSES,
    EMBEDDINGS,
    REPORT,
    TEXTS,
    Texts,
    digests,
    own,
    read_texts,
    read_vectors,
    some_of,
    write_table,
)
from mopro_fast.text.rerank import rerank

_VERSION = "1"  # of what a distance means: raise it, and everything is computed again
_WHY = {  # of images that are not compared
    "no_label": "without a label",
    "no_class_text": "whose class has no text",
    "no_features": "without features (unreadable, or features that are 0 or not finite)",
    "no_text": "without a text, their own or of similar images",
}


@dataclass
class Match:
    """The anchors of CAPro: of every class the images whose texts are nearest to the class's text."""

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """What `mopro-fast text read` and `embed` wrote. anchors.parquet comes beside it, for `train --anchors FOLDER`."""
    features: str | None = None
    """The images' features: a checkpoint or a run's folder, whose encoder sees every image once; or a .npy file,
    float32 [n, F] in the order of texts.parquet. --keep 0 needs none."""
    data: str | None = None
    """Where the images are now (default: where they were when their texts were read); packed images, too."""
    root: str | None = None
    """Folder that the paths of a list file start from, if it is another one now."""
    anchors: int = 50
    """K: anchors of each class; -K: K random ones, to compare with."""
    keep: int = 5
    """How many of the most similar images, the image itself among them, speak for each text: it is replaced by the
    mean of their texts, without its own. 0: the texts as they are."""
    nearest: int = 20
    """k: how many images, the most similar ones, are re-ranked to find these."""
    edge: graph.Edge = "distance"
    """A neighbour's weight: its re-ranked distance, as in CAPro's code, or 1 minus it: nearer ones count more."""
    truth: str | None = None
    """A list ("path label" per line) of images whose labels you trust: how many anchors are right."""
    seed: int = 0
    """Of random anchors, --anchors -K."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)


def main(argv: list[str]) -> int:
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff)
    o = tyro.cli(Match, args=argv, prog="mopro-fast text match", config=config)
    folder = Path(o.folder)
    device = distributed.start(o.encoder.device)
    _require_options(o)
    texts = read_texts(folder)
    with own(folder):
        totals = match(o, folder, texts, device)
    if distributed.world()[0] == 0:
        tell(summary(folder, totals))
    distributed.leave()
    return 0


def _require_options(o: Match) -> None:
    if not o.anchors:
        raise UserError("--anchors must not be 0: give how many a class has")
    for name, least in (("keep", 0), ("nearest", 2), ("seed", 0)):
        if getattr(o, name) < least:
            raise UserError(f"--{name} must be at least {least}, got {getattr(o, name)}")
    if o.keep == 1:
        raise UserError("--keep 1 keeps of each image's nearest ones only the image itself: give at least 2, or 0")
    if o.keep > o.nearest:
        raise UserError(f"--keep {o.keep} is more than --nearest {o.nearest}: the ones that stay are among the nearest")
    if o.keep and o.features is None:
        raise UserError("give --features CKPT, whose encoder says which images are similar, or --keep 0")
    given = {f.name: getattr(x, f.name) for x in (o, o.encoder) for f in fields(x) if getattr(x, f.name) != f.default}
    of_images = {"data", "root", *(f.name for f in fields(EncoderConfig))} - {"device"}
    for applies, other, idle in (
        (o.anchors > 0, "--anchors above 0", {"seed"}),
        (not o.keep, "--keep 0", {"features", "nearest", "edge", *of_images}),
        (o.keep and _is_array(o.features), "--features FILE.npy", of_images),
    ):
        for name in [name for name in given if applies and name in idle]:
            option = f"--{name.replace('_', '-')} {given[name]}"
            raise UserError(f"{option} and {other}: the former has no effect with the latter, leave one of them out")


def match(o: Match, folder: Path, texts: Texts, device: torch.device) -> dict[str, Any]:
    """Write anchors.parquet and match.json; -> what is in the latter. Raises a UserError. Collective."""
    about, vectors, classes = _embeddings(folder, texts)
    truth = None if o.truth is None else _truth(o.truth, texts)
    key = [_VERSION, about["texts"], *about["vectors"]]
    taken, neighbours, weights, smoothing = texts.labels >= 0, None, None, None
    if o.keep:
        features, made_of = _features(o, folder, texts)
        key += [digest := _digest([_VERSION, made_of, o.keep, o.nearest]), o.edge]
        neighbours, weights = graph.build(features, folder / f"graph-{digest}.npy", o.keep, o.nearest, device)
        if (neighbours < 0).all():
            raise UserError(f"no image has features by --features {o.features}: all are not finite, or 0")
        smoothing = distributed.by_rank0(lambda: graph.Smoothing.of(neighbours, weights, o.edge))
    else:
        taken &= pc.not_equal(texts.text, "").to_numpy(zero_copy_only=False)
    found = _distances(folder / f"matches-{_digest(key)}.npy", texts, taken, vectors, classes, smoothing, device)
    chosen = _choose(o, texts, found[:, 0])
    reasons = _reasons(texts, found[:, 0], classes, neighbours)
    if not chosen.any():
        raise UserError(
            f"no anchor: no image in {folder / TEXTS} could be compared: {_told(reasons)}: look at that table, and at "
            "what `mopro-fast text embed` was given"
        )
    columns = {"id": np.arange(len(texts)), "path": texts.paths.for_table(), "label": texts.labels}
    columns |= {"dist": found[:, 0], "sim": found[:, 1], "anchor": chosen}
    if neighbours is not None:
        columns |= {"neighbours": _lists(neighbours, neighbours >= 0), "weights": _lists(weights, neighbours >= 0)}
    made = {name: getattr(o, name) for name in ("anchors", "keep", "nearest", "edge", "seed")}
    made = {"texts": about["texts"], "encoder": about["encoder"]} | made
    totals = made | {"features": o.features, "truth": o.truth} | _totals(texts, found[:, 0], chosen, truth) | reasons
    totals["without_anchors"] = texts.named(np.setdiff1d(np.arange(texts.num_classes), texts.labels[chosen == 1]))
    distributed.by_rank0(lambda: _write(folder, columns, made, totals))
    return totals


def _embeddings(folder: Path, texts: Texts) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """text.json, embeddings.npy memory-mapped and classes.npy."""
    again = f"run `mopro-fast text embed {folder}`"
    about = files.json_object(folder / ABOUT)
    if not about:
        raise UserError(f"no {folder / ABOUT}: {again} first")
    if about.get("texts") != files.sha256_of(folder / TEXTS):
        raise UserError(f"{folder / EMBEDDINGS} was made from another {TEXTS}: {again} again")
    found = []
    for name, rows, what in ((EMBEDDINGS, len(texts), "texts"), (CLASSES, texts.num_classes, "classes")):
        found.append(read_vectors(folder / name, rows, what, f"{again} again"))
    if about.get("vectors") != distributed.by_rank0(lambda: digests(folder)):
        raise UserError(f"{folder / EMBEDDINGS} or {CLASSES} is not what was written there: {again} again")
    return about, found[0], np.array(found[1])


def _features(o: Match, folder: Path, texts: Texts) -> tuple[np.ndarray, str]:
    """The images' features, float32 [n, F], memory-mapped; and what tells them from others."""
    if not _is_array(o.features):
        frozen = Frozen(o.features, o.encoder, folder)
        found = frozen.features(texts.index(o.data, o.root), "features")
        return found, os.path.basename(found.filename)
    found = read_vectors(
        o.features, len(texts), "images", "save each image's features as float32, in order", np.float32
    )
    return found, distributed.by_rank0(lambda: files.sha256_of(o.features))


def _is_array(path: str) -> bool:
    if path.endswith((".npy", ".npz")):
        return True
    try:
        with files.open_regular(path) as file:
            return file.read(len(np.lib.format.MAGIC_PREFIX)) == np.lib.format.MAGIC_PREFIX
    except OSError:
        return False  # a folder, or nothing: who reads the checkpoint says so


def _truth(path: str, texts: Texts) -> np.ndarray:
    """int64 [n]: the true label, -1: not known."""
    names, labels, lines = read_list(path, lambda name: texts.rows_of(Paths([name]))[0] >= 0)
    rows = texts.rows_of(names)
    known = rows >= 0
    if not known.any():
        raise UserError(
            f"--truth {path}: it names no image of the texts, which are such as {shown(texts.paths[0])}"
            + (f", but such as {shown(names[0])}" if len(names) else "")
        )
    if not known.all():
        such = shown(names[int(known.argmin())])
        say(f"--truth {path}: {int((~known).sum()):,} of {len(names):,} images have no text here, such as {such}")
    beyond = known & (labels >= texts.num_classes)
    for i in np.flatnonzero(beyond)[:1].tolist():
        say(
            f"--truth {path}: {plural(int(beyond.sum()), 'label')} of classes that no image has, such as {labels[i]} "
            f"in line {lines[i]}: taken as none of the data's classes; labels begin at 0"
        )
    at = np.full(len(texts), -1)
    at[rows[known]] = labels[known]
    for i in np.flatnonzero(known & (at[rows] != labels))[:1].tolist():
        raise UserError(f"--truth {path}:{lines[i]}: {shown(names[i])} has another label in another line: keep one")
    return at[texts.paths.rows_of(texts.paths)]  # also of an image's other rows


def _digest(parts: list[Any]) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _distances(
    path: Path,
    texts: Texts,
    taken: np.ndarray,
    vectors: np.ndarray,
    classes: np.ndarray,
    smoothing: graph.Smoothing | None,
    device: torch.device,
) -> np.ndarray:
    """float32 [n, 2]: the re-ranked distance of each text to its class's, and their cosine; NaN without a text."""
    rows = np.flatnonzero(taken)
    rows = rows[texts.labels[rows].argsort(kind="stable")]
    batches = np.split(rows, np.flatnonzero(np.diff(texts.labels[rows])) + 1) if len(rows) else []

    @torch.inference_mode()
    def one(rows: np.ndarray) -> tuple[Tensor, Tensor]:
        own = np.array(vectors[rows], np.float32) if smoothing is None else smoothing.mean(vectors, rows)
        points = torch.from_numpy(np.concatenate((classes[texts.labels[rows[:1]]], own))).to(device)
        norms = torch.linalg.vector_norm(points, dim=1, keepdim=True, dtype=torch.float64)
        points, there = (points / norms).float(), norms[1:, 0] > 0
        found = points.new_full((len(rows), 2), torch.nan)
        if norms[0] > 0 and there.any():
            some = torch.cat((points[:1], points[1:][there]))
            found[there] = torch.stack((rerank(some), (some[1:] * some[0]).sum(1)), 1)
        return torch.from_numpy(rows), found

    def values(batches: list[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        yield from row_map.in_order(one, ((rows,) for rows in batches), device)

    return np.array(row_map.compute(path, len(texts), 2, batches, values, unit="texts"))


def _choose(o: Match, texts: Texts, distances: np.ndarray) -> np.ndarray:
    """int8 [n]: 1 for anchors. An image that stands in several rows of one label is counted once."""
    image = texts.paths.rows_of(texts.paths)
    _, first, own = np.unique(image * (texts.num_classes + 1) + texts.labels, return_index=True, return_inverse=True)
    rows = np.sort(first[np.isfinite(distances[first])])
    order = distances[rows] if o.anchors > 0 else np.random.default_rng(o.seed).random(len(rows))
    chosen = np.zeros(len(texts), np.int8)
    chosen[rows] = nearest(texts.labels[rows], order, abs(o.anchors))
    return chosen[first][own]


def _lists(values: np.ndarray, there: np.ndarray) -> pa.Array:
    return pa.LargeListArray.from_arrays(pa.array(np.append(0, there.sum(1).cumsum())), pa.array(values[there]))


def _totals(texts: Texts, distances: np.ndarray, chosen: np.ndarray, truth: np.ndarray | None) -> dict[str, Any]:
    anchor, labels = chosen == 1, texts.labels
    compared = np.unique(labels[np.isfinite(distances)])
    totals: dict[str, Any] = {
        "images": len(texts),
        "anchor_images": int(anchor.sum()),
        "classes": texts.num_classes,
        "classes_with_anchors": len(np.unique(labels[anchor])),
        "classes_of_anchors_only": len(np.setdiff1d(compared, labels[np.isfinite(distances) & ~anchor])),
        "anchors_of_an_empty_text": int(pc.equal(texts.text, "").to_numpy(zero_copy_only=False)[anchor].sum()),
    }
    if truth is not None:
        known = truth >= 0
        totals |= {
            "anchors_known": int((anchor & known).sum()),
            "anchors_right": int((anchor & known & (truth == labels)).sum()),
            "images_known": int(known.sum()),
            "images_right": int((known & (truth == labels)).sum()),
        }
    return totals


def _reasons(texts: Texts, distances: np.ndarray, classes: np.ndarray, neighbours: np.ndarray | None) -> dict[str, int]:
    """Why images were not compared, each by its first reason."""
    left = np.isnan(distances)
    no_features = np.zeros(len(texts), bool) if neighbours is None else (neighbours < 0).all(1)
    reasons = {
        "no_label": texts.labels < 0,
        "no_class_text": (classes == 0).all(1)[texts.labels],
        "no_features": no_features,
        "no_text": left,
    }
    found = {}
    for name, here in reasons.items():
        found[name], left = int((left & here).sum()), left & ~here
    return found


def _told(reasons: dict[str, int]) -> str:
    return ", ".join(f"{reasons[name]:,} {what}" for name, what in _WHY.items() if reasons[name])


def summary(folder: Path, t: dict[str, Any]) -> str:
    kind = "anchor" if t["anchors"] > 0 else "random anchor"
    lines = [
        f"{folder / TABLE}: {plural(t['anchor_images'], kind)} in {t['classes_with_anchors']:,} of "
        f"{t['classes']:,} classes, of {plural(t['images'], 'image')}"
    ]
    if some := _told(t):
        lines.append(f"images that were not compared: {some}")
    if few := t["without_anchors"]:
        lines.append(f"no anchor in {len(few):,} of {t['classes']:,} classes: {some_of(few)}")
    if few := t["classes_of_anchors_only"]:
        lines.append(f"classes in which every image that was compared is an anchor (lower --anchors): {few:,}")
    if few := t["anchors_of_an_empty_text"]:
        lines.append(f"anchors with an empty text, chosen by the texts of similar images: {few:,}")
    if "anchors_right" in t:
        right = [
            f"{t[f'{what}_right']:,} of {known:,} ({t[f'{what}_right'] / known:.1%})" if known else "none is known"
            for what in ("anchors", "images")
            for known in (t[f"{what}_known"],)
        ]
        lines.append(f"anchors right: {right[0]}; of all images whose label is known: {right[1]}")
        if t["images_right"] == t["images_known"] > 0:
            lines.append("every label in --truth is the web label: if it is the data's own list, this says nothing")
    return "\n".join([*lines, f"train with --anchors {folder}"])


def _write(folder: Path, columns: dict[str, Any], made: dict[str, Any], totals: dict[str, Any]) -> None:
    write_table(folder, TABLE, columns, made)
    files.write_json(folder / REPORT, totals)
