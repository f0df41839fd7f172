"""``mopro-fast text read DATA --out FOLDER``: the texts beside the images of a data set, cleaned.

FOLDER/texts.parquet has a row for every image, in the order of the data's lists; FOLDER/read.json says what was counted
and how. The result does not depend on the number of processes.
"""

import glob
import os
import tarfile
import zlib
from collections import Counter, deque
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tyro

from mopro_fast import files
from mopro_fast.console import Progress, say, tell
from mopro_fast.data import workers as processes
from mopro_fast.data.check import worker_count
from mopro_fast.data.index import Index, Layout, load_index
from mopro_fast.data.paths import Paths, plain, shown
from mopro_fast.errors import UserError
from mopro_fast.text import records
from mopro_fast.text.folder import OWNER, TEXTS, made_by, require_list, require_same_data, write_texts
from mopro_fast.text.words import is_parquet, read_dictionary, read_table

READ = "read.json"
OF_IMAGES = ("images", "empty", "no_record", "repeated", "duplicates")
COUNTED = {  # of records; what is told of them
    "no_image": "of no image",
    "again": "of an image that has had one: not taken",
    "no_id": "without an id: not taken",
    "not_text": "with something else than text in place of one: left out",
    "not_utf8": "with bytes that are not UTF-8: replaced",
}
_METAS = ("META", "meta", "meta_data")  # folders of records, where they are looked for
_SUFFIX, _NAME = r"\.[^./]*$", r"/?[^/]*$"  # of a path
_ODD = r"(^|/)\.{0,2}/"  # an absolute path, or one with "./" and the like
_ROWS = 1 << 14  # of a table that a process is given at a time
_WAYS = "--meta DIR (WebVision's records) or --texts FILE (CSV, Parquet or tars)"


@dataclass
class Read:
    """Read and clean the texts beside the images of a data set."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """Training data: a WebVision folder, a list file ("path label" per line), class folders, or packed shards."""
    out: str = ""
    """Folder for texts.parquet, a row per image."""
    meta: str | None = None
    """Folder of WebVision's records: DIR/google/q1360.json for the images in google/q1360 (default: META beside the
    images or their lists, if it is there)."""
    texts: str | None = None
    """A CSV or Parquet file with the columns path and text; or WebDataset tars (a file, a folder, or a pattern in
    quotes) whose .txt or .json members have the images' paths without suffix, from DATA or from a folder named as the
    tar."""
    tags: bool = False
    """Take the tags of records as well. CAPro's code leaves them out."""
    dictionary: str | None = None
    """File with a word per line: all other words are left out."""
    raw: bool = False
    """Take the texts as they are, not cleaned."""
    layout: Layout = "auto"
    """Layout of the data; auto looks."""
    root: str | None = None
    """Folder that the paths of a list file start from (default: the list's own folder)."""
    keep_classes: int | None = None
    """Take only images with a label below this."""
    workers: int = 0
    """Processes (default: one per core)."""


class Source(NamedTuple):
    """Where records are, and whose they are."""

    function: Callable
    """Of records.py, for the processes."""
    tasks: list[tuple]
    """Its arguments. The order decides which of several records of an image is taken."""
    unit: str
    """What a task is, for the progress."""
    images: Paths
    """[n]: as records name the images."""
    counts: Counter[str]
    """What is known before."""
    prefixes: list[str] | None = None
    """By task: the folder in which an image may lie that a record names."""


def main(argv: list[str]) -> int:
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff)
    o = tyro.cli(Read, args=argv, prog="mopro-fast text read", config=config)
    if not o.out:
        raise UserError("mopro-fast text read DATA needs --out")
    tell(summary(read(o), Path(o.out)))
    return 0


def summary(counts: dict[str, int], out: Path) -> str:
    c = counts
    told = "".join(f"; {c[name]} {what}" for name, what in COUNTED.items() if c[name])
    files_left = f"; {c['other_files']} files of records for other folders: not read" if c["other_files"] else ""
    return (
        f"{c['images']} images: {c['empty']} with an empty text, of which {c['no_record']} have no record; "
        f"{c['repeated']} whose text another one has too, {c['duplicates']} of them one of the same class\n"
        f"{c['records']} records{told}{files_left}\ntable: {out / TEXTS}    counts: {out / READ}"
    )


def read(o: Read) -> dict[str, int]:
    """-> what was counted; as read.json has it."""
    out = Path(o.out)
    workers = worker_count(o.workers)
    files.require_own(out, OWNER, made_by)
    if o.raw and o.dictionary:
        raise UserError(f"--dictionary {o.dictionary} has no effect with --raw: leave one of them out")
    if o.keep_classes is not None and o.keep_classes < 1:
        raise UserError(f"--keep-classes must be at least 1, got {o.keep_classes}")
    if o.dictionary:
        read_dictionary(o.dictionary)
    options = {"layout": o.layout, "root": o.root and os.path.abspath(o.root), "keep_classes": o.keep_classes}
    index = load_index(os.path.abspath(o.data), "train", num_classes=None, missing=True, **options)
    if index.labels.max() < 0:
        raise UserError(
            f"no image of {o.data} has a label: give data with web labels, a class's anchors are images of its label"
        )
    require_list(index, o.root)
    require_same_data(out, index, os.path.abspath(o.data))
    with files.own_folder(out, OWNER, made_by):
        rules = records.Rules(o.tags, o.raw, o.dictionary and os.path.abspath(o.dictionary))
        source = _source(o, index, rules)
        names, texts, counts = _read(source, workers)
        record = _matched(source, names, counts)
        text = texts.take(record).fill_null("")
        del texts  # hundreds of MB
        _count_texts(text, index.labels, counts)
        write_texts(out, index, text, {"data": os.path.abspath(o.data), **options})
        said = {name: value for name, value in asdict(o).items() if name not in ("out", "workers")}
        counts = {name: counts[name] for name in (*OF_IMAGES, "records", *COUNTED, "other_files")}
        files.write_json(out / READ, {"options": said, "counts": counts})
    return counts


def _source(o: Read, index: Index, rules: records.Rules) -> Source:
    if o.meta is not None and o.texts is not None:
        raise UserError("--meta and --texts: give one of them")
    if o.meta is not None and not os.path.isdir(o.meta):
        raise UserError(f"--meta {o.meta} is no folder: give the one that has google/ and flickr/ with .json files")
    paths = index.paths
    if pc.any(pc.match_substring_regex(paths.column, _ODD)).as_py():
        paths = plain(paths, index.root)
    if o.texts is None:
        return _of_meta(o, index, Paths(_without(paths, _SUFFIX)), rules)
    found = _files_of(o.texts)
    tars = [path for path in found if _is_tar(path)]
    if o.tags and not tars:
        raise UserError(f"--tags has no effect with the table --texts {o.texts}: leave it out")
    if tars and len(tars) < len(found):
        other = next(path for path in found if path not in tars)
        raise UserError(f"--texts {o.texts}: {tars[0]} is a tar, {other} is none: give files of one kind")
    if tars:
        prefixes = [os.path.basename(path).partition(".")[0] for path in found]
        images = Paths(_without(paths, _SUFFIX))
        return Source(records.of_tar, [(path, rules) for path in found], "tars", images, Counter(), prefixes)
    return _of_tables(found, index, rules)


def _of_meta(o: Read, index: Index, images: Paths, rules: records.Rules) -> Source:
    """images: without suffix."""
    folders = Paths(pc.unique(_without(images, _NAME))).tolist()
    folders = sorted(folder for folder in folders if folder and not os.path.isabs(folder))
    meta = o.meta if o.meta is not None else _meta_beside(o, index, folders)
    where = {folder: os.path.join(meta, f"{folder}.json") for folder in folders}
    there = [folder for folder in folders if os.path.lexists(where[folder])]  # one that cannot be read is an error
    if not there:
        such = where[folders[0]] if folders else os.path.join(meta, "FOLDER.json")
        raise UserError(f"{meta} has no records of the images of {o.data}: looked for files such as {shown(such)}")
    if absent := sorted(set(folders) - set(there)):
        say(f"{len(absent)} folders of images have no file of records, such as {shown(where[absent[0]])}")
    used = {os.path.normpath(where[folder]) for folder in there}
    held = (os.path.normpath(path) for path in glob.iglob(os.path.join(glob.escape(meta), "**/*.json"), recursive=True))
    others = sum(path not in used for path in held)
    tasks = [(where[folder], folder, rules) for folder in there]
    return Source(records.of_json, tasks, "files", images, Counter(other_files=others))


def _meta_beside(o: Read, index: Index, folders: list[str]) -> str:
    own = os.path.dirname(os.path.abspath(index.list_file or os.path.join(index.root, "list")))
    places = dict.fromkeys([own, os.path.dirname(own), os.path.abspath(index.root or ".")])
    found = [os.path.join(place, name) for place in places for name in _METAS]
    for meta in found:
        if any(os.path.isfile(os.path.join(meta, f"{folder}.json")) for folder in folders):
            say(f"records: {shown(meta)}")
            return meta
    raise UserError(f"no records beside {o.data}, such as {shown(found[0])}: give {_WAYS}")


def _of_tables(found: list[str], index: Index, rules: records.Rules) -> Source:
    """All rows, but cleaned are only those of images."""
    counts: Counter[str] = Counter()
    tasks, strangers = [], []  # of the latter one per file
    for path in found:
        columns = read_table(path, ("path", "text"))
        if columns["path"].null_count:
            raise UserError(f"{path}: {columns['path'].null_count} rows have no path: remove them")
        names, values = (columns.pop(name).combine_chunks() for name in ("path", "text"))
        rows = index.rows_of(Paths(names))
        with files.open_regular(path) as file:
            csv = not is_parquet(file)
        if csv:
            _require_no_row_inside(path, names, values, rows, index)
        counts["rows"] += len(rows)
        counts["no_image"] += int((rows < 0).sum())
        strangers += Paths(names)[np.flatnonzero(rows < 0)[:1]].tolist()
        kept = np.flatnonzero(rows >= 0)
        for first in range(0, len(kept), _ROWS):
            some = kept[first : first + _ROWS]
            tasks.append((index.paths[rows[some]].column, values.take(pa.array(some)), rules))
    if not counts["rows"]:
        raise UserError(f"{found[0]} has no rows: give a table with a row per image")
    if not tasks:
        raise _no_match(found[0], counts["rows"], strangers[0], index.paths[0])
    _tell_strangers(found[0] if len(found) == 1 else "the tables", counts, strangers)
    images = index.paths[index.paths.rows_of(index.paths)]
    return Source(records.of_column, tasks, "parts", images, counts)


def _require_no_row_inside(path: str, names: pa.Array, values: pa.Array, images: np.ndarray, index: Index) -> None:
    """Refuse a path with a line break, and a text that holds the row of an image that has none: a quote is open.

    images: int64 [rows], the image of each row; -1: none.
    """
    has_row = np.zeros(len(index), bool)
    has_row[images[images >= 0]] = True
    broken = _where(pc.match_substring(names, b"\n"))
    for i in broken[images[broken] < 0][:1].tolist():
        raise UserError(f"{path}: row {i + 1}: the path {shown(Paths(names)[i])} has a line break: close its quote")
    rows = _where(pc.match_substring(values, b"\n"))
    for some in np.split(rows, range(_ROWS, len(rows), _ROWS)):
        lines = pc.split_pattern_regex(values.take(pa.array(some)), r"[\r\n]+")
        row, lines = some[pc.list_parent_indices(lines)], pc.list_flatten(lines)
        for rest in (
            r"(?s)^\"?([^,]*?)\"?,.*$",
            r"(?s)^.*,\"?([^,]*?)\"?$",
        ):  # the path is the first column, or the last
            cells = Paths(pc.replace_substring_regex(lines, rest, r"\1"))
            image = index.paths.rows_of(cells)
            odd = _where(pc.match_substring_regex(cells.column, r"^\.{0,2}/"))
            image[odd] = index.rows_of(cells[odd])
            inside = np.flatnonzero((image >= 0) & pc.match_substring(lines, b",").to_numpy(zero_copy_only=False))
            for i in inside[~has_row[image[inside]]][:1].tolist():
                raise UserError(
                    f"{path}: row {row[i] + 1}, of {shown(Paths(names)[row[i]])}: its text holds the row of another "
                    f"image, {shown(cells[i])}, as where a quote is not closed: close it"
                )


def _where(mask: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """int64: the rows where a mask, bool [n], is true."""
    return np.flatnonzero(pc.fill_null(mask, False).to_numpy(zero_copy_only=False))


def _tell_strangers(source: str, counts: Counter[str], names: list[str]) -> None:
    """names: some of the records that are of no image."""
    if names:
        say(f"{source}: {counts['no_image']} records are of no image of the data, such as {shown(names[0])}")


def _files_of(texts: str) -> list[str]:
    if os.path.isdir(texts):
        found = sorted(glob.glob(os.path.join(glob.escape(texts), "*.tar")))
        if not found:
            raise UserError(f"--texts {texts} is a folder without tars: give a CSV or Parquet file, or tars")
        return found
    found = [texts] if os.path.exists(texts) else sorted(glob.glob(texts))
    if not found:
        raise UserError(f"no such file: --texts {texts}: give a file, a folder of tars, or a pattern in quotes")
    return found


def _is_tar(path: str) -> bool:
    try:
        with files.open_regular(path) as file:
            if is_parquet(file):
                return False
            return path.endswith((".tar", ".tar.gz", ".tgz")) or tarfile.is_tarfile(file)
    except (EOFError, zlib.error):
        return False  # compressed and cut: who reads the table says so
    except OSError as error:
        raise UserError(f"cannot read --texts {path}: {error.strerror}") from None


def _read(source: Source, workers: int) -> tuple[Paths, pa.Array, Counter[str]]:
    """-> of all records, in the order of the tasks, the images that they name, their texts, and what was counted."""
    numbers = {id(task): number for number, task in enumerate(source.tasks)}
    found: dict[int, records.Found] = {}
    running = closing(processes.run(source.function, deque(source.tasks), workers))
    with running as items, Progress("texts", len(source.tasks), source.unit) as bar:
        for task, item in items:
            if isinstance(item, processes.Crashed):
                of = shown(task[0]) if isinstance(task[0], str) else f"rows of {source.unit}"
                raise UserError(
                    f"the process that read {of} was ended ({item.why}), perhaps for lack of memory: lower --workers"
                )
            if isinstance(item, processes.Done):
                bar.update()
            else:
                found[numbers[id(task)]] = item
    ordered = [found[number] for number in range(len(source.tasks))]
    counts = sum((f.counts for f in ordered), Counter(source.counts))
    names = Paths(pa.chunked_array([f.names for f in ordered], pa.large_binary()))
    if source.prefixes is not None:
        names = _in_folders(names, source, [len(f.names) for f in ordered])
    texts = pa.chunked_array([f.texts for f in ordered], pa.large_string()).combine_chunks()
    counts["records"] = len(names) + counts["no_image"] + counts["no_id"] + counts["again"]
    return names, texts, counts


def _in_folders(names: Paths, source: Source, lengths: list[int]) -> Paths:
    """The names, with the prefix of their task where there is an image only of this name."""
    before = pa.array(map(os.fsencode, source.prefixes), pa.large_binary())
    before = before.take(pa.array(np.repeat(np.arange(len(lengths)), lengths)))
    longer = Paths(pc.binary_join_element_wise(before, names.column, pa.scalar(b"/", pa.large_binary())))
    other = (source.images.rows_of(names) < 0) & (source.images.rows_of(longer) >= 0)
    return Paths(pc.if_else(pa.array(other), longer.column, names.column))


def _matched(source: Source, names: Paths, counts: Counter[str]) -> pa.Array:
    """-> int64 [images]: the first record of each; null where there is none."""
    if not len(names):
        what = "a .txt or .json member" if source.unit == "tars" else "a record with an id"
        more = f" and {len(source.tasks) - 1} more" if len(source.tasks) > 1 else ""
        raise UserError(f"{shown(source.tasks[0][0])}{more}: no {source.unit[:-1]} has {what}: give other {_WAYS}")
    images, where = source.images, f"the {source.unit} of texts"
    record = names.rows_of(images)
    if (record < 0).all():
        raise _no_match(where, len(names), names[0], images[0])
    absent = images.rows_of(names) < 0
    counts["no_image"] += int(absent.sum())
    _tell_strangers(where, counts, names[np.flatnonzero(absent)[:1]].tolist())
    counts["again"] += int(((names.rows_of(names) != np.arange(len(names))) & ~absent).sum())
    counts["no_record"] = int((record < 0).sum())
    for i in np.flatnonzero(record < 0)[:1].tolist():
        say(f"{counts['no_record']} images have no record, such as {shown(images[i])}")
    return pa.array(record, mask=record < 0)


def _no_match(source: str, rows: int, name: str, image: str) -> UserError:
    return UserError(
        f"{source}: no record, of {rows}, names an image of the data: records have names such as {shown(name)}, the "
        f"data such as {shown(image)}"
    )


def _count_texts(text: pa.Array, labels: np.ndarray, counts: Counter[str]) -> None:
    """Into counts: images; empty; repeated: not empty, and another row has it; duplicates: one of the same class."""
    codes = text.dictionary_encode().indices.to_numpy().astype(np.int64)
    empty = pc.equal(text, "").to_numpy(zero_copy_only=False)
    within = (labels - labels.min()) * (codes.max() + 1) + codes
    _, place, times = np.unique(within, return_inverse=True, return_counts=True)
    counts["images"], counts["empty"] = len(labels), int(empty.sum())
    counts["repeated"] = int(((np.bincount(codes)[codes] > 1) & ~empty).sum())
    counts["duplicates"] = int(((times[place] > 1) & ~empty & (labels >= 0)).sum())


def _without(paths: Paths, pattern: str) -> Any:
    return pc.replace_substring_regex(paths.column, pattern, "")
