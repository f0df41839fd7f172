"""The anchors of CAPro: the images whose texts match their class, from ``anchors.parquet``."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mopro_fast.console import plural
from mopro_fast.data.index import Index
from mopro_fast.data.paths import FLAGS, NUMBERS, TEXT, WHOLE, Paths, read_table, shown
from mopro_fast.distributed import say
from mopro_fast.errors import UserError, first_line

TABLE = "anchors.parquet"


@dataclass(frozen=True, eq=False)
class Anchors:
    """The anchors among an index's images, and the weights of its rows."""

    mask: np.ndarray
    """bool [n]: which rows are anchors."""
    weights: np.ndarray | None
    """float32 [n], 1 for rows that the table lacks; None: it has no column weight."""
    digest: str
    """sha256 over (row, whether it is an anchor, label, weight) of the anchors and of all rows whose weight is not 1:
    the same for the same anchors in a table of any order."""


def read_anchors(path: str, index: Index) -> Anchors:
    """The anchors in a table (docs/data.md), or in ``anchors.parquet`` of a folder. Raises a UserError.

    Its rows are found by their path, else by their id. Where the data has an image in several rows, a row of the table
    is for all of those with its label; a table without labels is for all rows of the image.
    """
    file = table_at(path)
    anchors, _ = find_anchors(file, index)
    _tell(file, index, anchors.mask)
    return anchors


def find_anchors(file: Path, index: Index) -> tuple[Anchors, np.ndarray]:
    """-> the anchors, and int64 [n]: the table's row of each of the index's, -1 where it has none.

    As :func:`read_anchors`, and says nothing.
    """
    table = _read(file)
    _require_values(file, table, index)
    same, places = _places(file, table, index)
    _require_labels(file, table, index, places)
    _require_once(file, table, index, same[places])
    found = _first(same, same[places])  # row of the table, -1: none
    mask = (found >= 0) & (table["anchor"][found] == 1)
    for i in np.flatnonzero(mask & (index.labels < 0))[:1].tolist():
        raise UserError(f"{file}: the anchor {shown(index.paths[i])} has no label in {index.source}: give it one there")
    weights = table.get("weight")
    if weights is not None:
        weights = np.where(found >= 0, weights[found], np.float32(1))
    return Anchors(mask, weights, _digest(mask, index.labels, weights)), found


def table_at(path: str) -> Path:
    """The table that ``--anchors`` names. Raises a UserError where there is none."""
    file = Path(path) / TABLE if os.path.isdir(path) else Path(path)
    if not os.path.exists(file):
        raise UserError(f"no anchors at {file}: name a table of anchors, or the folder that has it as {TABLE}")
    return file


def _read(file: Path) -> dict[str, Any]:
    """Its columns by name: anchor; path or id, the former if it has both; label and weight where it has them."""
    try:
        table, _ = read_table(file, {"anchor": FLAGS}, {"path": TEXT, "id": WHOLE, "label": WHOLE, "weight": NUMBERS})
        if "path" not in table and (lacks := [name for name in ("id", "label") if name not in table]):
            raise ValueError(f"it has no column path, and without one it needs a column {lacks[0]}")
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read the anchors {file}: {first_line(error)}: write it as in docs/data.md, anchors.parquet"
        ) from None
    if "weight" in table:
        with np.errstate(over="ignore"):
            table["weight"] = table["weight"].astype(np.float32)
    return table


def _name(table: dict[str, Any], index: Index, i: int) -> str:
    """For messages: the image of a row of the table."""
    if "path" in table:
        return shown(table["path"][i])
    row = int(table["id"][i])
    return f"id {row}" + (f" ({shown(index.paths[row])})" if 0 <= row < len(index) else "")


def _require_values(file: Path, table: dict[str, Any], index: Index) -> None:
    anchor, weight = table["anchor"], table.get("weight")
    for i in np.flatnonzero((anchor != 0) & (anchor != 1))[:1].tolist():
        name, why = _name(table, index, i), "-1 is for images with several labels: " if anchor[i] == -1 else ""
        raise UserError(f"{file}: {name} has anchor {anchor[i]}: {why}write 1 for an anchor, 0 for any other image")
    if not anchor.any():
        raise UserError(f"{file} has no anchor: write 1 into the column anchor of some images of each class")
    if weight is not None:
        for i in np.flatnonzero(~((weight >= 0) & (weight < np.inf)))[:1].tolist():
            had = "no weight" if np.isnan(weight[i]) else f"weight {weight[i]}"
            raise UserError(
                f"{file}: {_name(table, index, i)} has {had}: give each row a finite one of at least 0, or leave the "
                "column weight out"
            )


def _places(file: Path, table: dict[str, Any], index: Index) -> tuple[np.ndarray, np.ndarray]:
    """-> int64 [n], equal for those rows of the index that the table does not tell apart; and int64, for each row of
    the table one of the index, where there is one with its label."""
    if "path" not in table:
        ids, rows = table["id"], len(index)
        for i in np.flatnonzero((ids < 0) | (ids >= rows))[:1].tolist():
            raise UserError(
                f"{file} is of other data than {index.source}: it has id {ids[i]}, and ids there are 0 to {rows - 1}: "
                "give the data that it was made of"
            )
        return index.ids, ids
    names: Paths = table["path"]
    if names.equals(index.paths):
        return index.ids, index.ids
    places = index.rows_of(names)
    for i in np.flatnonzero(places < 0)[:1].tolist():
        raise UserError(
            f"{file} is of other data than {index.source}: it has {shown(names[i])}, which is not there: give the data "
            "that it was made of, or remove such rows"
        )
    image = index.paths.rows_of(index.paths)
    if "label" not in table:
        return image, image[places]
    classes = np.unique(index.labels)
    same = image * len(classes) + np.searchsorted(classes, index.labels)
    theirs = image[places] * len(classes) + np.searchsorted(classes, table["label"])
    found = np.where(np.isin(table["label"], classes), _first(theirs, same), -1)
    return same, np.where(found >= 0, found, places)


def _first(values: np.ndarray, of: np.ndarray) -> np.ndarray:
    """int64: where each value comes first in ``of``; -1: nowhere."""
    found = pc.fill_null(pc.index_in(pa.array(values), value_set=pa.array(of)), -1)
    return found.to_numpy(zero_copy_only=False).astype(np.int64)


def _require_labels(file: Path, table: dict[str, Any], index: Index, places: np.ndarray) -> None:
    ours = index.labels[places]
    theirs = table.get("label", ours)
    for i in np.flatnonzero((table["anchor"] == 1) & (theirs != ours))[:1].tolist():
        raise UserError(
            f"{file}: the anchor {_name(table, index, i)} has label {theirs[i]}, and {ours[i]} in {index.source}: an "
            "anchor keeps the label it came with, so make the table from this data, or correct either label"
        )


def _require_once(file: Path, table: dict[str, Any], index: Index, rows: np.ndarray) -> None:
    """An image may come again with another label, or with the same anchor and weight."""
    first = _first(rows, rows)
    differs = first != np.arange(len(rows))
    if "path" in table:
        columns = [table[name] for name in ("anchor", "weight") if name in table]
        differs = np.any([column != column[first] for column in columns], axis=0)
    for i in np.flatnonzero(differs)[:1].tolist():
        raise UserError(f"{file} has {_name(table, index, i)} twice: keep one of the rows")


def _tell(file: Path, index: Index, mask: np.ndarray) -> None:
    used = np.isin(np.arange(len(mask)), index.usable) & mask
    there, having = np.unique(index.labels[index.labels >= 0]), np.unique(index.labels[used])
    line = f"{file}: {plural(int(used.sum()), 'anchor')} in {len(having)} of {len(there)} classes"
    if away := mask.sum() - used.sum():
        line += f", without {away} that are held out or cannot be read"
    if len(without := np.setdiff1d(there, having)):
        example = shown(index.classes[without[0]]) if index.classes else without[0]
        line += f"; without any: {len(without)}, such as {example}"
    say(line)


def _digest(mask: np.ndarray, labels: np.ndarray, weights: np.ndarray | None) -> str:
    weights = np.ones(len(mask), np.float32) if weights is None else weights
    rows = np.flatnonzero(mask | (weights != 1))
    sha = hashlib.sha256()
    for column, kind in ((rows, "<i8"), (mask[rows], "u1"), (labels[rows], "<i8"), (weights[rows], "<f4")):
        sha.update(column.astype(kind).tobytes())
    return sha.hexdigest()
