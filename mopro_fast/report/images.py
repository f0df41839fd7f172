"""The images of the report: which labels they have, how they look small, and their scores."""

import base64
import io
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
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
from mopro_fast.labels import REMOVED, SHOWN, UNSEEN
from mopro_fast.models.build import build
from mopro_fast.models.capro import CAPro
from mopro_fast.models.method import Method
from mopro_fast.ops.reference import decide, mixed_scores

BATCH = 64
JPEG_QUALITY = 80


@dataclass
class Labels:
    """Given and corrected labels of all images."""

    given: np.ndarray
    """int64 [n]; −1: none."""
    new: np.ndarray
    """int64 [n]; −1 removed, −2 not shown."""
    source: str
    """Whose the corrections are, for the reader."""
    paths: Paths
    """[n], as given in the index or in the table."""
    scores: dict[str, Any] = field(default_factory=dict)
    """Columns [n] of the table: floats by name, and perhaps ``best``, the class of the highest score."""

    def path(self, row: int) -> str:
        return shown(self.paths[int(row)])


def read_table(path: Path) -> Labels:
    """The table that `mopro-fast clean` writes, or its folder. Needed are path, given, label and verdict."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    path = path / TABLE if os.path.isdir(path) else path
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        why = first_line(error)
        raise UserError(f"cannot read --table {path}: {why}; name the {TABLE} of `mopro-fast clean`") from None
    for name in ("path", "given", "label", "verdict"):
        if name not in table.column_names:
            raise UserError(f"--table {path} has no column {name}: it is not the {TABLE} of `mopro-fast clean`")
    try:
        given, new = (table[name].cast(pa.int64()).fill_null(-1).to_numpy().copy() for name in ("given", "label"))
        verdict = table["verdict"].cast(pa.string())
        paths = Paths(table["path"].fill_null(b"" if pa.types.is_binary(table["path"].type) else ""))
    except (pa.ArrowException, NotImplementedError) as error:
        raise UserError(f"--table {path}: its labels or verdicts are of another type: {error}") from None
    new[pc.is_in(verdict, pa.array(SHOWN[2:])).to_numpy()] = REMOVED  # in Arrow: no Python string per image
    new[~pc.is_in(verdict, pa.array(SHOWN)).to_numpy()] = UNSEEN  # the image could not be read
    floats = [f.name for f in table.schema if pa.types.is_floating(f.type)]
    scores = {name: table[name] for name in (*floats, *({"best"} & {*table.column_names}))}
    return Labels(given, new, f"the table {path}", paths, scores)


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
    if model.correct is None:
        return logits.float().softmax(1), labels
    s = model.scores(logits, q)
    t, _, _ = mixed_scores(s.logits, s.q, s.prototypes, c.mopro.alpha, c.mopro.temperature)
    now, kept = decide(t, labels, c.mopro.threshold, inclusive=isinstance(model, CAPro))[:2]
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

    names = labels.paths[rows]
    same = rows.max(initial=0) < len(index) and index.paths[rows].equals(names)
    at = rows if same else index.rows_of(names)
    unread = {labels.path(row): "not in the training data" for row in rows[at < 0]}
    rows, at = rows[at >= 0].tolist(), at[at >= 0]
    found, crops = [], []
    for row, result in zip(rows, decoded(index, at, inputs.threads(d), True, small), strict=True):
        if isinstance(result, str):
            unread[labels.path(row)] = result
            continue
        card = {"path": labels.path(row), "given": int(labels.given[row]), "new": int(labels.new[row])}
        found.append(card | {"jpeg": result[0], "scores": {}})
        if model is None:
            found[-1] |= _of_table(labels, row)
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


def _of_table(labels: Labels, row: int) -> dict[str, Any]:
    """As _score does, from the table's columns; score_given and score_best under the names used there."""
    values = {name: column[row].as_py() for name, column in labels.scores.items()}
    best = values.pop("best", None)
    renamed = {name.removeprefix("score_"): v for name, v in values.items()}
    if best is not None and best == labels.new[row]:
        renamed["new"] = renamed.get("best")
    return {"scores": _finite(renamed)} | ({} if best is None else {"best": int(best)})


def _finite(values: dict[str, float | None]) -> dict[str, float]:
    return {name: round(v, 4) for name, v in values.items() if v is not None and np.isfinite(v)}
