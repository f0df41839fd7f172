"""``mopro-fast text match FOLDER``: the images whose texts are nearest to their class's text, as anchors.parquet."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import tyro
from torch import Tensor

from mopro_fast import distributed, files
from mopro_fast.console import tell
from mopro_fast.data.anchors import TABLE
from mopro_fast.data.lists import read_list
from mopro_fast.data.paths import Paths, shown
from mopro_fast.downstream import row_map
from mopro_fast.downstream.capro_lists import nearest
from mopro_fast.downstream.features import EncoderConfig, Frozen
from mopro_fast.errors import UserError, first_line
from mopro_fast.text import graph
from mopro_fast.text.folder import ABOUT, CLASSES, EMBEDDINGS, HINT, OWNER, REPORT, TEXTS, Texts, read_texts, set_aside
from mopro_fast.text.rerank import rerank

_VERSION = "1"  # of what a distance means: raise it, and everything is computed again
_KEY = b"mopro_fast.text"


@dataclass
class Match:
    """The anchors of CAPro: of every class the images whose texts are nearest to the class's text."""

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """What `mopro-fast text read` and `embed` wrote. anchors.parquet comes beside it, for `train --anchors FOLDER`."""
    features: str | None = None
    """The images' features: a checkpoint or a run's folder, whose encoder sees every image once; or a .npy file,
    float32 [n, F] in the order of texts.parquet. Not needed with --keep 0."""
    data: str | None = None
    """Where the images lie now (default: where they lay when their texts were read)."""
    anchors: int = 50
    """K: anchors of each class; -K: K random ones, to compare with."""
    keep: int = 5
    """Each text is replaced by the mean over the texts of this many similar images; 0: the texts as they are."""
    nearest: int = 20
    """k: how many images, the most similar ones, are re-ranked to find these."""
    edge: graph.Edge = "distance"
    """A neighbour's weight: its re-ranked distance, as in CAPro's code, or 1 minus it: nearer ones count more."""
    truth: str | None = None
    """A list ("path label" per line) of images whose labels you trust: how many anchors are right."""
    seed: int = 0
    """Of random anchors."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)


def main(argv: list[str]) -> int:
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff)
    o = tyro.cli(Match, args=argv, prog="mopro-fast text match", config=config)
    folder = Path(o.folder)
    device = distributed.start(o.encoder.device)
    _require_options(o)
    texts = read_texts(folder)
    with distributed.on_rank0(lambda: files.own_folder(folder, OWNER, flag="")), files.writing(folder, HINT):
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
    if o.keep > o.nearest:
        raise UserError(f"--keep {o.keep} is more than --nearest {o.nearest}: the ones that stay are among the nearest")
    if (o.features is None) != (o.keep == 0):
        raise UserError(
            "--features names the checkpoint that says which images are similar: give one, or --keep 0 for the texts "
            "as they are, not both"
        )


def match(o: Match, folder: Path, texts: Texts, device: torch.device) -> dict[str, Any]:
    """Write anchors.parquet and match.json; -> what is in the latter. Raises a UserError. Collective."""
    about, vectors, classes = _embeddings(folder, texts)
    truth = None if o.truth is None else _truth(o.truth, texts)
    key = [_VERSION, about["texts"], about["identity"], hashlib.sha256(classes.tobytes()).hexdigest()]
    taken, neighbours, weights, smoothing = texts.labels >= 0, None, None, None
    if o.keep:
        features, made_of = _features(o, folder, texts)
        key += [digest := _digest([_VERSION, made_of, o.keep, o.nearest]), o.edge]
        neighbours, weights = graph.build(features, folder / f"graph-{digest}.npy", o.keep, o.nearest, device)
        smoothing = distributed.by_rank0(lambda: graph.Smoothing.of(neighbours, weights, o.edge))
    else:
        taken &= pc.not_equal(texts.text, "").to_numpy(zero_copy_only=False)
    found = _distances(folder / f"matches-{_digest(key)}.npy", texts, taken, vectors, classes, smoothing, device)
    chosen = _choose(o, texts, found[:, 0])
    if not chosen.any():
        raise UserError(
            f"no anchor: no image in {folder / TEXTS} has a text, or similar images with texts, and a class with a text"
        )
    columns = {"id": np.arange(len(texts)), "path": texts.paths.for_table(), "label": texts.labels}
    columns |= {"dist": found[:, 0], "sim": found[:, 1], "anchor": chosen}
    if neighbours is not None:
        columns |= {"neighbours": _lists(neighbours, neighbours >= 0), "weights": _lists(weights, neighbours >= 0)}
    made = {"encoder": about["encoder"], "anchors": o.anchors, "keep": o.keep, "nearest": o.nearest, "edge": o.edge}
    totals = made | _totals(texts, found[:, 0], chosen, truth)
    distributed.by_rank0(lambda: _write(folder, columns, made, totals))
    return totals


def _embeddings(folder: Path, texts: Texts) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """text.json, embeddings.npy memory-mapped and classes.npy."""
    again = f"run `mopro-fast text embed {folder}`"
    about = files.json_object(folder / ABOUT)
    if not about:
        raise UserError(f"no {folder / ABOUT}: {again} first")
    if about.get("texts") != files.sha256_of(folder / TEXTS):
        raise UserError(f"{folder / EMBEDDINGS} is of other texts than {folder / TEXTS}: {again} again")
    found = []
    for name, rows in ((EMBEDDINGS, len(texts)), (CLASSES, texts.num_classes)):
        try:
            files.require_regular(folder / name)
            found.append(np.load(folder / name, mmap_mode="r"))
            if found[-1].ndim != 2 or len(found[-1]) != rows:
                raise ValueError(f"it is {list(found[-1].shape)}, and there are {rows} rows")
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"cannot read {folder / name} ({first_line(error)}): {again} again") from None
    return about, found[0], np.array(found[1])


def _features(o: Match, folder: Path, texts: Texts) -> tuple[np.ndarray, str]:
    """The images' features, float32 [n, F], memory-mapped; and what tells them from others."""
    if not o.features.endswith(".npy"):
        frozen = Frozen(o.features, o.encoder, folder)
        found = frozen.features(texts.index(o.data), "features")
        return found, os.path.basename(found.filename)
    try:
        files.require_regular(o.features)
        found = np.load(o.features, mmap_mode="r")
        if found.ndim != 2 or found.dtype != np.float32 or len(found) != len(texts):
            raise ValueError(f"it holds {found.dtype} {list(found.shape)}, not float32 [{len(texts)}, F]")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"cannot read the features {o.features}: {first_line(error)}") from None
    return found, distributed.by_rank0(lambda: files.sha256_of(o.features))


def _truth(path: str, texts: Texts) -> np.ndarray:
    """int64 [n]: the true label, -1: not known."""
    names, labels, lines = read_list(path, lambda name: texts.paths.rows_of(Paths([name]))[0] >= 0)
    places = texts.paths.rows_of(names)
    for i in np.flatnonzero(places < 0)[:1].tolist():
        raise UserError(f"--truth {path}:{lines[i]}: {shown(names[i])} is no image of these texts: write it as there")
    named, at = names.rows_of(texts.paths), np.full(len(texts), -1)
    at[named >= 0] = labels[named[named >= 0]]
    return at


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
        norms = torch.linalg.vector_norm(points, dim=1, keepdim=True, dtype=torch.float64).float()
        points, there = points / norms, norms[1:, 0] > 0
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
    ends = np.append(0, there.sum(1).cumsum()).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(values[there]))


def _totals(texts: Texts, distances: np.ndarray, chosen: np.ndarray, truth: np.ndarray | None) -> dict[str, Any]:
    anchor, labels = chosen == 1, texts.labels
    totals: dict[str, Any] = {
        "images": len(texts),
        "not_compared": int((np.isnan(distances) & (labels >= 0)).sum()),
        "anchor_images": int(anchor.sum()),
        "classes": len(np.unique(labels[labels >= 0])),
        "classes_with_anchors": len(np.unique(labels[anchor])),
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


def summary(folder: Path, t: dict[str, Any]) -> str:
    lines = [
        f"{folder / TABLE}: {t['anchor_images']:,} anchors in {t['classes_with_anchors']:,} of {t['classes']:,} "
        f"classes, of {t['images']:,} images; {t['not_compared']:,} have no text to compare, or a class without one"
    ]
    if few := t["anchors_of_an_empty_text"]:
        lines.append(f"{few:,} anchors have no text of their own: the texts of similar images speak for them")
    if "anchors_right" in t:
        right = [
            f"{t[f'{what}_right']:,} of {t[f'{what}_known']:,} ({t[f'{what}_right'] / max(t[f'{what}_known'], 1):.1%})"
            for what in ("anchors", "images")
        ]
        lines.append(f"anchors right: {right[0]}; of all images whose label is known: {right[1]}")
    return "\n".join([*lines, f"train with --anchors {folder}"])


def _write(folder: Path, columns: dict[str, Any], made: dict[str, Any], totals: dict[str, Any]) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns).replace_schema_metadata({_KEY: json.dumps(made).encode()}), sink)
    new = sink.getvalue()
    if not (folder / TABLE).is_file() or files.sha256_of(folder / TABLE) != hashlib.sha256(new).hexdigest():
        set_aside(folder)
        with files.replacing(folder / TABLE) as file:
            file.write(new)
    files.write_json(folder / REPORT, totals)
