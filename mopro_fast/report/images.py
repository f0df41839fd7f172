"""The images of the report: which labels they have, how they look small, and their scores."""

import base64
import contextlib
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from mopro_fast import ops
from mopro_fast.checkpoints.state import RunState
from mopro_fast.checkpoints.weights import check_fits
from mopro_fast.config import TrainConfig
from mopro_fast.data import inputs
from mopro_fast.data.cache import central_crop, decoded
from mopro_fast.data.index import Index
from mopro_fast.data.paths import Paths, shown
from mopro_fast.downstream.clean import TABLE
from mopro_fast.errors import UserError, first_line
from mopro_fast.files import require_regular
from mopro_fast.labels import REMOVED, SHOWN, UNSEEN
from mopro_fast.models.build import build
from mopro_fast.models.method import Method
from mopro_fast.ops.reference import decide, mixed_scores

BATCH = 64
JPEG_QUALITY = 80
_ROWS = 1 << 18  # of a table at a time


@dataclass
class Labels:
    """Given and corrected labels of all images."""

    given: np.ndarray
    """int16, int32 or int64 [n]; −1: none."""
    new: np.ndarray
    """int16, int32 or int64 [n]; −1 removed, −2 not shown."""
    source: str
    """Whose the corrections are, for the reader."""
    table: "Table | None" = None
    """Has the images' paths and perhaps their scores; None: the images are those of the index."""


class Table:
    """The table that `mopro-fast clean` writes, or its folder. Its columns are read as they are asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path / TABLE if os.path.isdir(path) else path
        with self._reading():
            require_regular(self.path)
            self._file = pq.ParquetFile(self.path)
            self.schema = self._file.schema_arrow
        names = [f.name for f in self.schema if pa.types.is_floating(f.type)]
        self.scores = list(dict.fromkeys([*names, *({"best"} & {*self.schema.names})]))
        """Columns: floats, and perhaps ``best``, the class of the highest score."""

    def batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """These columns, in pieces."""
        with self._reading():
            yield from self._file.iter_batches(_ROWS, columns=columns)

    def rows(self, rows: np.ndarray) -> tuple[Paths, list[dict[str, Any]]]:
        """The paths and the scores of these rows, which are sorted."""
        sizes = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        ends = np.cumsum(sizes)
        group = np.searchsorted(ends, rows, side="right")
        columns = [name for name in self.schema.names if name in ("path", *self.scores)]
        found = [self.schema.empty_table().select(columns)]
        for i in np.unique(group):
            with self._reading():
                read = self._file.read_row_group(i, columns)
            found.append(read.take(rows[group == i] - (ends[i] - sizes[i])))
        table = pa.concat_tables(found)
        return _paths(table["path"]), table.select(self.scores).to_pylist()

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            why = first_line(error)
            raise UserError(f"cannot read --table {self.path}: {why}; name the {TABLE} of `mopro-fast clean`") from None


def read_table(path: Path) -> Labels:
    """Of a table of `mopro-fast clean`, or its folder. Needed are path, given, label and verdict."""
    table = Table(path)
    path = table.path
    for name in ("path", "given", "label", "verdict"):
        if name not in table.schema.names:
            raise UserError(f"--table {path} has no column {name}: it is not the {TABLE} of `mopro-fast clean`")
    pieces = [[np.empty(0, np.int16)], [np.empty(0, np.int16)]]
    try:
        _paths(table.schema.empty_table()["path"])
        for batch in table.batches(["given", "label", "verdict"]):
            given, new = (np.array(batch[n].cast(pa.int32()).fill_null(-1)) for n in ("given", "label"))
            verdict = batch["verdict"].cast(pa.string())
            new[np.array(pc.is_in(verdict, pa.array(SHOWN[2:])))] = REMOVED  # in Arrow: no Python string per image
            new[~np.array(pc.is_in(verdict, pa.array(SHOWN)))] = UNSEEN  # the image could not be read
            for piece, column in zip(pieces, (given, new), strict=True):
                narrow = column.astype(np.int16)
                piece.append(narrow if (narrow == column).all() else column)
    except (pa.ArrowException, NotImplementedError) as error:
        raise UserError(f"--table {path}: its labels or verdicts are of another type: {error}") from None
    given, new = map(np.concatenate, pieces)
    return Labels(given, new, f"the table {path}", table)


def decisions(labels: Labels, names: Paths, given: np.ndarray) -> np.ndarray:
    """int64 [n]: the new labels that a table has of these images with their given labels, int [n]; −2 where none."""
    new, end = np.full(len(names), UNSEEN), 0
    for batch in labels.table.batches(["path"]):
        at = names.rows_of(_paths(batch["path"]))
        rows = np.flatnonzero(at >= 0)
        at, rows, end = at[rows], rows + end, end + len(batch)
        same = labels.given[rows] == given[at]
        new[at[same]] = labels.new[rows[same]]
    return new


def _paths(column: pa.Array | pa.ChunkedArray) -> Paths:
    return Paths(column.fill_null(b"" if pa.types.is_binary(column.type) else ""))


def load_model(config: TrainConfig, state: RunState, device: str) -> Method:
    """The model, ready to evaluate. Raises UserError."""
    model = build(config)
    check_fits(model.state_dict(), state.model, "in the run's folder")
    model.load_state_dict(state.model)
    return model.to(device).eval()


@torch.no_grad()
def scores(model: Method, images: Tensor, labels: Tensor, c: TrainConfig) -> tuple[Tensor, Tensor]:
    """Step 6 of the method for images uint8 [N, S, S, 3] and labels int64 [N].

    -> t float32 [N, C], the classifier's alone without prototypes; int64 [N]: the label now, −1 if removed.
    """
    logits, q = model.encoder_q(ops.normalize(images))
    if not model.judges():
        return logits.float().softmax(1), labels
    s = model.scores(logits, q)
    t, _, _ = mixed_scores(s.logits, s.q, s.prototypes, c.mopro.alpha, c.mopro.temperature)
    now, kept = decide(t, labels, c.mopro.threshold, inclusive=model.inclusive)[:2]
    return t, torch.where(kept, now, REMOVED)


def cards(
    labels: Labels, rows: np.ndarray, index: Index, model: Method | None, config: TrainConfig, thumb: int, device: str
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """-> for each of these rows its labels, thumbnail and scores; the paths that could not be read, and why.

    model: what load_model returns, to score the images; None: the table's scores are taken, if there are any.
    """
    d = config.data
    resize = d.eval_resize or round(d.image_size * 256 / 224)

    def small(pixels: np.ndarray) -> tuple[str, np.ndarray | None]:
        return thumbnail(pixels, thumb), None if model is None else central_crop(pixels, resize, d.image_size)

    names, of_table = (index.paths[rows], [{}] * len(rows)) if labels.table is None else labels.table.rows(rows)
    same = rows.max(initial=0) < len(index) and index.paths[rows].equals(names)
    at = rows if same else index.rows_of(names)
    paths, given, new = list(map(shown, names)), labels.given[rows].tolist(), labels.new[rows].tolist()
    unread = {paths[i]: "not in the training data" for i in np.flatnonzero(at < 0)}
    there = np.flatnonzero(at >= 0).tolist()
    found, crops = [], []
    for i, result in zip(there, decoded(index, at[there], inputs.threads(d), True, small), strict=True):
        if isinstance(result, str):
            unread[paths[i]] = result
            continue
        card = {"path": paths[i], "given": given[i], "new": new[i]}
        found.append(card | {"jpeg": result[0], "scores": {}})
        if model is None:
            found[-1] |= _of_table(of_table[i], new[i])
            continue
        crops.append(result[1])
        if len(crops) == BATCH:
            _score(found[-BATCH:], crops, model, config, device)
            crops = []
    if crops:
        _score(found[-len(crops) :], crops, model, config, device)
    return found, unread


def thumbnail(pixels: np.ndarray, side: int) -> str:
    """base64 of a JPEG whose longer side is at most ``side``."""
    image = Image.fromarray(pixels)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def _score(
    found: list[dict[str, Any]], crops: list[np.ndarray], model: Method, config: TrainConfig, device: str
) -> None:
    """Put the scores of a batch into its cards: t of the given label and of the new one, the best, the verdict now."""
    given = torch.tensor([card["given"] for card in found], device=device)
    t, now = scores(model, torch.from_numpy(np.stack(crops)).to(device), given, config)
    best_score, best = t.max(1)
    columns = (t.cpu(), now.tolist(), best.tolist(), best_score.tolist())
    for card, own, label, guess, score in zip(found, *columns, strict=True):
        card |= {"best": guess, "now": label}
        values = {name: float(own[card[name]]) for name in ("given", "new") if 0 <= card[name] < len(own)}
        card["scores"] = _finite(values | {"best": score})


def _of_table(values: dict[str, Any], new: int) -> dict[str, Any]:
    """As _score does, from the table's columns; score_given and score_best under the names used there."""
    best = values.get("best")
    renamed = {name.removeprefix("score_"): v for name, v in values.items() if name != "best"}
    if best is not None and best == new:
        renamed["new"] = renamed.get("best")
    return {"scores": _finite(renamed)} | ({} if best is None else {"best": int(best)})


def _finite(values: dict[str, float | None]) -> dict[str, float]:
    return {name: round(v, 4) for name, v in values.items() if v is not None and np.isfinite(v)}
