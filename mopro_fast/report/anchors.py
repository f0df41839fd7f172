"""The anchors of a CAPro run: per class how many, how near, what the model says of them; a sample with their texts."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mopro_fast.config import TrainConfig
from mopro_fast.data.anchors import find_anchors, table_at
from mopro_fast.data.paths import NUMBERS, Paths, shown
from mopro_fast.errors import UserError, first_line
from mopro_fast.files import require_regular
from mopro_fast.labels import UNSEEN, by_class
from mopro_fast.models.method import Method
from mopro_fast.report.figures import numbers
from mopro_fast.report.images import Labels, cards, decisions
from mopro_fast.report.run import Run
from mopro_fast.text.folder import TEXTS

CUT = 120  # characters of a text
EACH = 8  # anchors of a class, where the sample has so many
_ROWS = 1 << 14  # of texts at a time


@dataclass
class Table:
    """The run's anchors.parquet."""

    file: Path
    labels: np.ndarray
    """int64 [n]: those of the index."""
    rows: np.ndarray
    """int64 [m]: the anchors, rows of the index."""
    numbers: dict[str, np.ndarray]
    """dist, sim: float64 [n], NaN where not known; of these the columns that the table has."""


def find(run: Run, path: str | None) -> Table | None:
    """The anchors that the run trained with. path: where they are now. None: it has none, or run.missing says why."""
    c = run.config
    if c is None or c.method != "capro" or not c.capro.anchors:
        if c is not None and path is not None:
            raise UserError(f"--anchors {path} has no effect: {run.folder} was trained without anchors")
        return None
    try:
        file = table_at(path or c.capro.anchors)
    except UserError as error:
        run.missing["the anchors"] = f"{error}; if it has moved: --anchors"
        return None
    if run.index is None:
        run.missing["the anchors"] = "their images are those of the training data, which is not known"
        return None
    try:
        require_regular(file)
        found, rows = find_anchors(file, run.index)
    except UserError as error:
        run.missing["the anchors"] = str(error)
        return None
    except OSError as error:
        run.missing["the anchors"] = f"cannot read {file}: {first_line(error)}"
        return None
    same_data = run.state is not None and run.state.data_digest == run.index.digest()
    if same_data and run.state.initial not in ("", found.digest):
        run.missing["the anchors"] = f"those of {file} are not those that the run began with: name its own, --anchors"
        return None
    return Table(file, run.index.labels, np.flatnonzero(found.mask), _numbers(file, rows))


def _numbers(file: Path, rows: np.ndarray) -> dict[str, np.ndarray]:
    schema, found = pq.read_schema(file), {}
    for name in ("dist", "sim"):
        at = schema.get_field_index(name)
        if at >= 0 and any(is_type(schema.field(at).type) for is_type in NUMBERS.types):
            column = NUMBERS.taken(pq.read_table(file, columns=[name], memory_map=False)[name])
            found[name] = np.where(rows >= 0, column[rows], np.nan)
    return found


def sample(table: Table, count: int, seed: int, only: np.ndarray | None) -> np.ndarray:
    """int64: at most ``count`` anchors, class by class, near ones first.

    Of each class as many, from its nearest to its farthest at even distances in rank. Where these were fewer than
    ``EACH`` the classes are drawn. only: of these classes.
    """
    labels = table.labels[table.rows]
    classes = np.unique(labels if only is None else labels[np.isin(labels, only)])
    drawn = np.random.default_rng(seed).permutation(classes)[: max(1, count // EACH)]
    of_class = count // max(1, len(drawn))
    distance = table.numbers.get("dist", np.zeros(len(table.labels)))[table.rows]
    rows = table.rows[np.lexsort((distance, labels))]  # NaN last
    found = [rows[:0]]
    for c in np.sort(drawn):
        own = rows[table.labels[rows] == c]
        found.append(own[np.linspace(0, len(own) - 1, min(of_class, len(own))).round().astype(int)])
    return np.concatenate(found)


def collect(
    run: Run, table: Table, rows: np.ndarray, classes: int, labels: Labels | None, model: Method | None,
    config: TrainConfig, thumb: int, device: str,
) -> dict[str, Any]:  # fmt: skip
    """What the page shows of the anchors, these rows as cards. As values for JSON.

    The label that an anchor would have got is that of a table of `mopro-fast clean`, which protects none; else, of the
    anchors on the page, the one that the model decides for.
    """
    index, cleaned = run.index, labels is not None and labels.table is not None
    trained = Labels(index.labels, index.labels, "") if labels is None or cleaned else labels
    facts, judge, given = _facts(run, table, rows), None, index.labels[table.rows]
    now = np.full(len(given), UNSEEN)
    if cleaned:
        judge, now = labels.source, decisions(labels, index.paths[table.rows], given)
        for fact, decided in zip(facts, now[np.searchsorted(table.rows, rows)].tolist(), strict=True):
            fact["now"] = decided
    found, unread = cards(trained, rows, index, None if cleaned else model, config, thumb, device)
    if not cleaned and model is not None and model.judges():
        judge = "the newest checkpoint, on the central crop"
        given, now = (np.array([card[name] for card in found], np.int64) for name in ("given", "now"))
    if judge is None:
        for card in found:
            card.pop("now", None)
    named = zip(map(shown, index.paths[rows]), index.labels[rows].tolist(), strict=True)
    of_card = dict(zip(named, facts, strict=True))
    found = [card | of_card[card["path"], card["given"]] for card in found]
    judged = by_class(given, now, classes)
    return {
        "file": str(table.file),
        "judge": judge,
        "classes": {"anchors": np.bincount(index.labels[table.rows], minlength=classes).tolist()}
        | {name: judged[name].tolist() for name in ("images", "relabelled", "removed")}
        | _distances(table, classes),
        "cards": found,
        "unread": unread,
    }


def _distances(table: Table, classes: int) -> dict[str, list[float | None]]:
    """Per class: of the anchors the least and the largest, of all its images in the table the median."""
    if "dist" not in table.numbers:
        return {}
    dist, anchor = table.numbers["dist"], np.isin(np.arange(len(table.labels)), table.rows)
    known = np.isfinite(dist) & (table.labels >= 0)
    found = {}
    for name, mask, of in (("nearest", anchor, np.min), ("farthest", anchor, np.max), ("median", True, np.median)):
        rows = np.flatnonzero(known & mask)
        rows = rows[np.argsort(table.labels[rows], kind="stable")]
        there, first = np.unique(table.labels[rows], return_index=True)
        values = np.full(classes, np.nan)
        for c, part in zip(there, np.split(rows, first[1:]), strict=False):  # without any there is one empty part
            if name != "median" or not anchor[part].all():  # a table of anchors alone does not know it
                values[c] = of(dist[part])
        found[name] = numbers(values)
    return found


def _facts(run: Run, table: Table, rows: np.ndarray) -> list[dict[str, Any]]:
    """What is known of these anchors: dist, sim, text."""
    names = run.index.paths[rows]
    texts = _texts(run, table.file.parent / TEXTS, names)
    found: list[dict[str, Any]] = [{"text": texts[name]} if name in texts else {} for name in names]
    for column, values in table.numbers.items():
        for fact, value in zip(found, numbers(values[rows]), strict=True):
            if value is not None:
                fact[column] = value
    return found


def _texts(run: Run, file: Path, names: Paths) -> dict[str, str]:
    """By path, cut; of a texts.parquet, if it is there."""
    found: dict[str, str] = {}
    if not os.path.lexists(file):
        return found
    try:
        require_regular(file)
        texts = pq.ParquetFile(file)
        if lacks := [name for name in ("path", "text") if name not in texts.schema_arrow.names]:
            raise ValueError(f"it has no column {lacks[0]}")
        for batch in texts.iter_batches(_ROWS, columns=["path", "text"]):
            at = names.rows_of(Paths(batch["path"]))
            own = np.flatnonzero(at >= 0)
            whole = pc.utf8_trim_whitespace(batch["text"].take(pa.array(own)))
            for i, text in zip(at[own], pc.utf8_slice_codeunits(whole, 0, CUT + 1).to_pylist(), strict=True):
                if text is not None:
                    found[names[i]] = text if len(text) <= CUT else text[:CUT] + "…"
    except (OSError, ValueError, NotImplementedError, pa.ArrowException) as error:
        run.missing["the anchors' texts"] = f"cannot read {file}: {first_line(error)}"
    return found
