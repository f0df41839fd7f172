"""Cleaned labels as CAPro's official noise_cleaning.py writes them: pseudo_label.json, …_all.json and …_all.csv.

A sample is a place in a file of records, [file, offset], which the list image_all_tfrecord.pathlist (a path, synset,
file and offset per line) translates. An image in a file of its own is [its name, -1].
"""

import csv
import io
import json
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from mopro_fast.data.lists import text_lines
from mopro_fast.data.paths import Paths, shown
from mopro_fast.errors import UserError
from mopro_fast.files import misfit, replacing, write_items

FOLDER, SAMPLES, ALL, CSV = "capro", "pseudo_label.json", "pseudo_label_all.json", "pseudo_label_all.csv"
_SCORES = ("classifier", "auxiliary", "prototype", "score")
_COLUMNS = ["path", "given", "label", "verdict", "anchor", *(f"{s}_{of}" for s in _SCORES for of in ("given", "best"))]
_KIND = "targets, pred prob, pred prob compress, prototype similarity, soft score"
_HEADER = (
    "tfrecord_name@offset",
    "is_clean?",
    f"original {_KIND}",
    f"correct {_KIND}",
    "#positive classes (original)",
    "#positive classes (corrected)",
    "#interected classes (original & corrected)",  # as they spell it
)
_ROWS = 1 << 14
_ALONE = -1  # offset of an image that is a file of its own


def entries(pathlist: str) -> Iterator[tuple[str, str, int]]:
    """Path, file and offset of every line of an image_all_tfrecord.pathlist."""
    for line in text_lines(pathlist):
        words = line.rsplit(maxsplit=3)
        if len(words) != 4 or not (words[3].isascii() and words[3].isdecimal()):
            raise UserError(f"{pathlist}: {shown(line[:80])!r} is not a path, synset, file and offset")
        yield words[0], words[2], int(words[3])


def places(pathlist: str, paths: Paths) -> dict[str, tuple[str, int]]:
    """The file and offset of each of these images that the list names; its paths may begin in a folder further up."""
    names, found = set(paths), {}
    for name, *place in entries(pathlist):
        place = tuple(place)
        while name not in names and "/" in name:
            name = name.partition("/")[2]
        if name in names and found.setdefault(name, place) != place:
            raise UserError(f"{pathlist} names {shown(name)} twice, in different places: remove one")
    return found


def write(table: Path, folder: Path, pathlist: str | None) -> None:
    """The three files, from a cleaned.parquet of a model of CAPro. Images that cannot be read are left out."""
    where = None if pathlist is None else places(pathlist, Paths(pq.read_table(table, columns=["path"])["path"]))
    folder.mkdir(exist_ok=True)
    roots: dict[str, int] = {}
    columns = {"targets": array("i"), "domains": array("b"), "roots": array("i")}
    first, comma = True, ""
    with replacing(folder / SAMPLES) as samples, replacing(folder / ALL) as every, replacing(folder / CSV) as rows:
        text = io.TextIOWrapper(rows, "utf-8", "surrogateescape", newline="", write_through=True)
        writer = csv.writer(text)
        writer.writerow(_HEADER)
        samples.write(b'{"samples": [')
        every.write(b"[")
        for row in _rows(table):
            file, offset = _place(row["path"], where, pathlist)
            root, name = os.path.split(file)
            old, new = _scored(row, row["given"], "given"), _changed(row)
            kept, anchor = row["label"] >= 0, int(row["anchor"] or 0)
            columns_of = [";".join(",".join(c) for c in classes) for classes in (old, new)]
            both = {c[0] for c in old} & {c[0] for c in new}
            writer.writerow([f"{name}@{offset}", int(kept), *columns_of, len(old), len(new), len(both)])
            every.write(f"{comma}{json.dumps([f'{file}@{offset}', old, new, anchor])}".encode())
            comma = ", "
            number = roots.setdefault(root, len(roots))
            if kept:
                samples.write(f"{'' if first else ', '}{json.dumps([name, offset])}".encode())
                first = False
                for column, value in zip(columns.values(), (row["label"], anchor, number), strict=True):
                    column.append(value)
        text.detach()
        every.write(b"]")
        for name, column in columns.items():
            samples.write(f'], "{name}": ['.encode())
            pieces = (column[first : first + _ROWS].tolist() for first in range(0, len(column), _ROWS))
            write_items(samples, ([[label] for label in piece] if name == "targets" else piece for piece in pieces))
        index = {"root2index": roots, "index2root": {str(i): root for root, i in roots.items()}}
        samples.write(f"], {json.dumps(index)[1:]}".encode())


def _rows(table: Path) -> Iterator[dict[str, Any]]:
    for batch in pq.ParquetFile(table).iter_batches(_ROWS, columns=_COLUMNS):
        for row in batch.to_pylist():
            if row["verdict"] != "unreadable":
                yield row | {"path": os.fsdecode(row["path"])}


def _place(path: str, where: dict[str, tuple[str, int]] | None, pathlist: str | None) -> tuple[str, int]:
    if where is None:
        return path, _ALONE
    if path not in where:
        raise UserError(f"{pathlist} does not name {shown(path)}: give the list of the same data")
    return where[path]


def _scored(row: dict[str, Any], label: int, of: str) -> list[list[str]]:
    """The class with its scores, as text; nothing where there is no label."""
    return [[str(label), *(f"{row[f'{score}_{of}']:.2f}" for score in _SCORES)]] if label >= 0 else []


def _changed(row: dict[str, Any]) -> list[list[str]]:
    """After cleaning; a removed image keeps its label in these files."""
    if row["label"] in (row["given"], -1):
        return _scored(row, row["given"], "given")
    return _scored(row, row["label"], "best")


def read(found: dict[str, Any], pathlist: str | None, paths: Paths) -> tuple[Paths, list[int]]:
    """Of a pseudo_label.json the kept images, by the names in ``paths`` where they are there, and their labels.

    Raises a ValueError for what it is not.
    """
    shape = {"samples": [[object]], "targets": [[int]], "roots": [int], "index2root": {None: str}}
    if wrong := misfit(found, shape):
        raise ValueError(wrong)
    samples, roots, targets = found["samples"], found["roots"], found["targets"]
    if not len(samples) == len(roots) == len(targets):
        raise ValueError(f"{len(samples)} samples, {len(roots)} roots, {len(targets)} targets")
    if any(len(labels) != 1 for labels in targets):
        raise ValueError("a sample has several labels or none: labels of NUS-WIDE are not supported yet")
    where = {(os.path.basename(f), i): name for name, (f, i) in (places(pathlist, paths) if pathlist else {}).items()}
    names = []
    for sample, root in zip(samples, roots, strict=True):
        if len(sample) != 2 or type(sample[0]) is not str or type(sample[1]) is not int:
            raise ValueError(f"the sample {str(sample)[:80]} is no [file, offset]")
        file, offset = sample
        path = os.path.join(found["index2root"].get(str(root), ""), file)
        if offset != _ALONE and not pathlist:
            raise ValueError(f"{file} is a file of records: set --pathlist to its image_all_tfrecord.pathlist")
        names.append(path if offset == _ALONE else where.get((os.path.basename(file), offset), f"{path}@{offset}"))
    return Paths(names), [labels[0] for labels in targets]
