"""``mopro-fast import LIST OUT --pathlist FILE``: CAPro's official lists of images, in; and out, for ``export``.

A line is ``FILE@OFFSET`` and a label (validation) or JSON with label and meta_dist, its text's distance to the class's
(training). FILE@OFFSET is a place in a file of records; image_all_tfrecord.pathlist (a path, synset, file and offset
per line) says which image lies there.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from mopro_fast.console import plural, tell
from mopro_fast.data.anchors import TABLE
from mopro_fast.data.lists import text_lines
from mopro_fast.data.order import place_in_class
from mopro_fast.data.paths import FLAGS, NUMBERS, TEXT, WHOLE, Paths, read_table, shown
from mopro_fast.downstream.capro_labels import entries, places
from mopro_fast.errors import UserError, first_line
from mopro_fast.files import misfit, own_folder, replacing, writing

LIST = "list.txt"
_SHAPE = {"label": int, "meta_dist": (int, float)}


@dataclass
class ImportList:
    """A list of CAPro's code as list.txt ("path label" per line) and, of a training list, anchors.parquet."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="LIST")]
    """The list: FILE@OFFSET and a label, or JSON, per line."""
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder for list.txt and anchors.parquet."""
    pathlist: str
    """CAPro's image_all_tfrecord.pathlist: which image lies where."""
    anchors: int = 50
    """How many images of each class are anchors, those with the smallest distances (the code's --topk)."""


def main(argv: list[str]) -> int:
    o = tyro.cli(ImportList, args=argv, prog="mopro-fast import")
    if o.anchors < 1:
        raise UserError(f"--anchors must be at least 1, got {o.anchors}")
    columns = read(o.source, o.pathlist)
    out, text = Path(o.out), f"{o.out}: {len(columns['path'])} images"
    with own_folder(out, "import"), writing(out, "choose another OUT"):
        rows = zip(columns["path"], columns["label"].tolist(), strict=True)
        with replacing(out / LIST) as file:
            file.writelines(os.fsencode(f"{path} {label}\n") for path, label in rows)
        if "dist" in columns:
            anchor = nearest(columns["label"], columns["dist"], o.anchors)
            table = {"path": Paths(columns["path"]).for_table(), "label": columns["label"], "anchor": anchor}
            table |= {name: columns[name] for name in ("dist", "weight") if name in columns}
            with replacing(out / TABLE) as file:
                pq.write_table(pa.table(table), file)
            text += f", {plural(int(anchor.sum()), 'anchor')}"
    tell(f"{text}: train with --data {out / LIST}" + (f" --anchors {out}" if "dist" in columns else ""))
    return 0


def read(source: str, pathlist: str) -> dict[str, Any]:
    """-> path: names; label int64; of a training list dist float64, and weight where every line has a sample_weight."""
    where = {(os.path.basename(file), offset): name for name, file, offset in entries(pathlist)}
    rows: dict[str, list] = {"path": [], "label": [], "dist": [], "weight": []}
    for number, line in enumerate(text_lines(source), 1):
        place, _, rest = line.partition(" ")
        file, _, offset = place.rpartition("@")
        name = where.get((os.path.basename(file), int(offset) if offset.isascii() and offset.isdecimal() else None))
        if name is None:
            raise UserError(f"{source}: entry {number}: {pathlist} has no image at {shown(place[:80])}")
        rows["path"].append(name)
        _add(rows, rest, f"{source}: entry {number}")
    if not rows["path"]:
        raise UserError(f"{source} names no image")
    found = {"path": rows["path"], "label": np.array(rows["label"], np.int64)}
    for column in ("dist", "weight"):
        if len(rows[column]) == len(rows["path"]):
            found[column] = np.array(rows[column], np.float64)
    return found


def _add(rows: dict[str, list], text: str, where: str) -> None:
    """The label of a line, or its JSON's label, distance and weight."""
    if text.isascii() and text.isdecimal() and not rows["dist"]:
        rows["label"].append(int(text))
        return
    try:
        info = json.loads(text)
        if wrong := misfit(info, _SHAPE):
            raise ValueError(wrong)
    except (ValueError, RecursionError) as error:
        several = "," in text.partition("{")[0] or '"label": [' in text
        why = "several labels (NUS-WIDE's) are not supported yet" if several else first_line(error)
        raise UserError(f"{where} is no label and no JSON of CAPro's: {why}") from None
    rows["label"].append(info["label"])
    rows["dist"].append(float(info["meta_dist"]))
    if isinstance(info.get("sample_weight"), int | float):
        rows["weight"].append(float(info["sample_weight"]))


def nearest(labels: np.ndarray, distances: np.ndarray, each: int) -> np.ndarray:
    """int8 [n]: 1 for the ``each`` images of a class with the smallest distances; ties in the list's order."""
    order = np.argsort(distances, kind="stable")
    found = np.zeros(len(labels), np.int8)
    found[order[place_in_class(labels[order]) < each]] = 1
    return found


def write(table: str, file: Any, pathlist: str) -> int:
    """A table of anchors as a training list of CAPro's code; -> how many lines.

    Its --topk takes the smallest meta_dist of each class. A table without the column dist has 0 for anchors, else 1.
    """
    try:
        optional = {"dist": NUMBERS, "sim": NUMBERS, "weight": NUMBERS}
        rows, _ = read_table(table, {"path": TEXT, "label": WHOLE, "anchor": FLAGS}, optional)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the anchors {table}: {first_line(error)}") from None
    where, ones = places(pathlist, rows["path"]), np.ones(len(rows["label"]))
    distances = rows.get("dist", 1.0 - (rows["anchor"] > 0))
    columns = (rows["label"], distances, rows.get("sim", ones), rows.get("weight", ones))
    for name, label, distance, sim, weight in zip(rows["path"], *(c.tolist() for c in columns), strict=True):
        if name not in where:
            raise UserError(f"{pathlist} does not name {shown(name)}: give the list of the same data")
        info = {"label": label, "conf_score": 1.0, "sample_weight": weight, "meta_label": [label], "meta_sim": [sim]}
        line = f"{where[name][0]}@{where[name][1]} {json.dumps(info | {'meta_dist': round(distance, 4)})}\n"
        file.write(os.fsencode(line))
    return len(rows["label"])
