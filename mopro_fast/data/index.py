"""Which images there are, and their labels: WebVision's file lists, any file list, class folders, packed shards.

Everything that can be wrong with the input is found here, before training, and raises a UserError.
"""

import dataclasses
import errno
import functools
import hashlib
import os
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from mopro_fast.data import mapped
from mopro_fast.data.class_folders import class_numbers, is_number, read_classes, subfolders
from mopro_fast.data.decode import MAX_BYTES
from mopro_fast.data.lists import Rows, read_list, text_lines
from mopro_fast.data.paths import Paths, plain, shown
from mopro_fast.data.shards import MANIFEST, STATE, ShardSet, is_pack, open_shards, read_manifest
from mopro_fast.data.stats import Stats, stats
from mopro_fast.distributed import say
from mopro_fast.errors import UserError
from mopro_fast.files import read_regular, sha256_of
from mopro_fast.labels import NO_LABEL, row_type

Split = Literal["train", "val"]
Layout = Literal["auto", "webvision", "list", "folder", "shards"]

WEBVISION_LISTS = {
    "train": ("info/train_filelist_google.txt", "info/train_filelist_flickr.txt"),
    "val": ("info/val_filelist.txt",),
}
WEBVISION_FOLDERS = {"train": "", "val": "val_images_256"}  # where the paths of those lists start
_MOST_CLASSES = 1_000_000  # as --num-classes
_NAMED = 3  # missing images named in the message
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
_LOOK_FOR = 120.0  # seconds that missing images are looked for
FILE = ".mopro_fast_index.parquet"


@dataclass(frozen=True, eq=False)
class Checked:
    """What is known of an index's images, row by row."""

    verdict: np.ndarray
    """uint8 [n]: OK, CONVERTED, TOLERANT or UNREADABLE of decode.py."""
    size: np.ndarray
    """int64 [n], bytes; -1: no such file."""
    mtime_ns: np.ndarray
    """int64 [n]; -1: no such file."""
    crc32: np.ndarray
    """int64 [n], of the bytes; -1: none were read."""
    width: np.ndarray
    """int32 [n], of the upright image; 0 if unreadable."""
    height: np.ndarray
    """int32 [n]."""
    reason: pa.Array
    """Strings [n], "kind" or "kind: detail"; empty if OK."""
    path: str
    """The Parquet file."""
    read: int
    """How many files had to be read this time."""

    def why(self, row: int) -> str:
        """The reason of one row."""
        return self.reason[row].as_py()

    def whys(self, rows: np.ndarray) -> list[str]:
        """The reasons of some rows."""
        return self.reason.take(pa.array(rows)).to_pylist()


@dataclass(frozen=True, eq=False)
class Index:
    """The images of one split, in the order of the lists they come from."""

    root: str
    """Folder the paths start from."""
    paths: Paths
    """[n], relative to root."""
    labels: np.ndarray
    """int64 [n]; -1: none given."""
    classes: list[str] | None
    """The classes' names, where the layout has them."""
    source: str
    """What was read, for messages."""
    list_file: str | None = None
    """The list file, if the data is one."""
    shards: ShardSet | None = None
    """Where the images lie if they are packed, row by row; else each is a file."""
    made_of: dict[str, Any] | None = None
    """Of lists: what tells their rows from those of other lists."""
    stats: Stats | None = None
    """What the file system said of the files, where missing ones were looked for."""
    checked: Checked | None = None
    """What `mopro-fast check` found, row by row."""
    left_out: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    """int64, sorted: the rows that loaders do not show, since nobody can read them."""
    held_out: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    """int64: the rows that loaders do not show, since the model is not to be trained on them."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def ids(self) -> np.ndarray:
        """int64 [n]: an image's stable id is its row number here. Made at each access."""
        return np.arange(len(self))

    def digest(self) -> str:
        """sha256 over paths and labels: equal for the same data wherever it lies."""
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:
        sha = hashlib.sha256()
        for piece in self.paths.joined():
            sha.update(piece)
        sha.update(b"\0")
        sha.update(np.ascontiguousarray(self.labels, "<i8"))
        return sha.hexdigest()

    @functools.cached_property
    def num_usable(self) -> int:
        """How many rows loaders show."""
        return len(self) - len(np.union1d(self.left_out, self.held_out))

    @property
    def usable(self) -> np.ndarray:
        """int32 [num_usable] (int64 from 2³¹ rows on): the rows that loaders show. Made at each access."""
        rows = np.arange(len(self), dtype=row_type(len(self)))
        if not len(self.left_out) and not len(self.held_out):
            return rows
        shown = np.ones(len(self), bool)
        shown[self.left_out] = shown[self.held_out] = False
        return rows[shown]

    @property
    def shard_of(self) -> np.ndarray:
        """int32 [n]: the shard of each image."""
        return self.shards.shard

    def take(self, rows: np.ndarray) -> "Index":
        """The index of these rows only, not checked."""
        shards = None if self.shards is None else self.shards.take(rows)
        own = {"paths": self.paths[rows], "labels": self.labels[rows], "shards": shards}
        none = np.empty(0, np.int64)
        return dataclasses.replace(self, **own, made_of=None, stats=None, checked=None, left_out=none, held_out=none)

    def with_labels(self, labels: np.ndarray) -> "Index":
        """The index with other labels, int64 [n]; these are not what its lists say."""
        return dataclasses.replace(self, labels=labels, made_of=None)

    def rows_of(self, names: Paths) -> np.ndarray:
        """int64: the first row of each of these paths, also of absolute ones and such as ./a.jpg; -1: none."""
        found = self.paths.rows_of(names)
        odd = np.flatnonzero(found < 0)
        if len(odd):
            found[odd] = self._plain.rows_of(plain(names[odd], self.root))
        return found

    @functools.cached_property
    def _plain(self) -> Paths:
        return plain(self.paths, self.root)

    def full_path(self, i: int) -> str:
        return os.path.join(self.root, self.paths[i])

    def name(self, i: int) -> str:
        """For messages: where the image is."""
        return shown(self.full_path(i)) if self.shards is None else f"{shown(self.paths[i])} in {self.source}"

    def read(self, i: int) -> bytes:
        """The whole encoded file. Raises OSError."""
        if self.shards is not None:
            return self.shards.read(i)
        return read_regular(self.full_path(i), MAX_BYTES)[0]


def load_index(
    data: str | os.PathLike,
    split: Split,
    *,
    num_classes: int | None,
    layout: Layout = "auto",
    root: str | os.PathLike | None = None,
    keep_classes: int | None = None,
    missing: bool = False,
    classes: Sequence[str] | None = None,
) -> Index:
    """Read the index of ``data``: a WebVision folder, a list file ("path label" per line), class folders or shards.

    root: where the paths of a list file start (default: its own folder). keep_classes: take only the images with
    a label below this (of class folders, the first ones by name). num_classes: None takes any labels and any number of
    class folders. missing: files of lists may be. classes: the names of the classes in the order of their labels, of
    the data or the model that the labels are to agree with; class folders are matched by name. Raises UserError.
    """
    data = os.fspath(data)
    try:
        mode = os.stat(data).st_mode
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError | FileNotFoundError):
            raise UserError(f"no such file or folder: {shown(data)}") from None
        raise UserError(f"cannot read {shown(data)}: {error.strerror}") from None
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise UserError(f"{shown(data)} is neither a file nor a folder: save the list in a file")
    if layout == "auto":
        layout = recognise(data)
    if layout == "shards":
        return _shards(data, split, num_classes, keep_classes, classes)
    if layout == "folder":
        return _folders(data, split, num_classes, keep_classes, classes)
    if layout == "webvision":
        names = WEBVISION_LISTS[split]
        lists = [path for name in names if os.path.isfile(path := os.path.join(data, name))]
        if not lists:
            raise UserError(f"{data} has no {' and no '.join(names)}: unpack WebVision's info/ there")
        root, list_file = os.path.join(data, WEBVISION_FOLDERS[split]), None
    else:
        if not os.path.isfile(data):
            raise UserError(f"{data} is not a file: give the list file itself, or another --layout")
        root = os.path.dirname(data) if root is None else os.fspath(root)
        lists, list_file = [data], data
    index = _from_lists(lists, list_file, root, split, num_classes, keep_classes)
    return index if missing else _none_missing(index)


def recognise(data: str) -> str:
    if os.path.isfile(data):
        return "list"
    if is_pack(data) or os.path.isfile(os.path.join(data, STATE)):
        return "shards"
    lists = [name for names in WEBVISION_LISTS.values() for name in names]
    if any(os.path.isfile(os.path.join(data, name)) for name in lists):
        return "webvision"
    if subfolders(data):
        return "folder"
    raise UserError(
        f"{data} has no known layout: looked for a pack's {MANIFEST}, {', '.join(lists)} and class folders; "
        "give one of these folders or a list file"
    )


def val_layout(data: str, layout: Layout = "auto") -> Layout | None:
    """The layout of the validation split that the data of this layout brings; None if it brings none."""
    brings = {
        "shards": lambda: is_pack(data) and "val" in read_manifest(data)["splits"],
        "webvision": lambda: os.path.isfile(os.path.join(data, *WEBVISION_LISTS["val"])),
        "folder": lambda: all(os.path.isdir(os.path.join(data, name)) for name in ("train", "val")),
    }
    if layout == "auto":
        first = next((name for name, has in brings.items() if has()), None)
        return None if first != "shards" and is_pack(data) else first
    return layout if layout in brings and brings[layout]() else None


def synsets(data: str) -> list[str] | None:
    """The names of WebVision's classes in the order of their labels, where its info/synsets.txt tells them apart."""
    path = os.path.join(data, "info", "synsets.txt")
    if not os.path.isfile(path):
        return None
    try:
        return read_class_names(path)
    except UserError as error:
        say(f"{error}: the classes are taken without names")
        return None


def read_class_names(path: str) -> list[str]:
    """The first word of each line of a file; each must be there once."""
    names = [line.split()[0] for line in text_lines(path)]
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise UserError(f"{path}: the class {shown(twice)} is there twice")
    return names


def with_numbers(index: Index, classes: Sequence[str], keep_classes: int | None = None) -> Index:
    """An index of named classes with the labels that these names have in ``classes``. Raises a UserError.

    keep_classes: images of other classes are left away.
    """
    if index.classes is None or list(classes) == index.classes:
        return index
    used = [index.classes[label] for label in np.unique(index.labels[index.labels >= 0]).tolist()]
    numbers = class_numbers(used, classes, index.source)
    if keep_classes is None:
        _require_known(used, numbers, classes, index.source)
    new = np.array([numbers.get(name, NO_LABEL - 1) for name in index.classes] + [NO_LABEL])
    index = dataclasses.replace(index.with_labels(new[index.labels]), classes=list(classes))
    return index if keep_classes is None else index.take(np.flatnonzero(index.labels >= NO_LABEL))


def _require_known(folders: Sequence[str], numbers: dict[str, int], classes: Sequence[str], source: str) -> None:
    unknown = [name for name in folders if numbers.get(name, len(classes)) >= len(classes)]
    if unknown:
        absent = [name for name in classes if name not in folders]
        there = f"; {shown(absent[0])} is there and not here" if absent else ""
        raise UserError(
            f"{source}: class {shown(unknown[0])} is none of the {len(classes)} classes it must agree with{there}: "
            "name the folders alike, or give a list file with the labels"
        )


def _shards(
    data: str, split: Split, num_classes: int | None, keep_classes: int | None, classes: Sequence[str] | None
) -> Index:
    shards = open_shards(data, split)
    lowest = NO_LABEL if split == "train" else 0
    index = Index(data, shards.paths, shards.label, shards.classes, data, shards=shards)
    if classes is not None:
        index = with_numbers(index, classes, keep_classes)
    end = _MOST_CLASSES if num_classes is None or keep_classes is not None else num_classes
    for label in (int(index.labels.min(initial=lowest)), int(index.labels.max(initial=lowest))):
        if not lowest <= label < end:
            hint = (
                _beginning_at_1(index.labels, end) or f"set --num-classes to at least {label + 1}, or pack other data"
            )
            raise UserError(f"{data}: label {label} of a {split} image is outside [{lowest}, {end}): {hint}")
    if keep_classes is not None:
        index = index.take(np.flatnonzero(index.labels < keep_classes))
    if not len(index):
        raise UserError(f"{data}: no {split} image" + (f" with a label below {keep_classes}" if keep_classes else ""))
    return dataclasses.replace(index, classes=index.classes and index.classes[:keep_classes])


def table_of(root: str, list_file: str | None) -> str:
    """Where the table of a check lies: beside the list file, if the data is one, else where the paths start from."""
    return f"{list_file}.index.parquet" if list_file else os.path.join(root, FILE)


def _from_lists(
    lists: list[str], list_file: str | None, root: str, split: Split, num_classes: int | None, keep_classes: int | None
) -> Index:
    source = " + ".join(lists)
    lowest = NO_LABEL if split == "train" else 0
    end = _MOST_CLASSES if num_classes is None or keep_classes is not None else num_classes
    # 1. As a check has left the rows for all who come later; else from the lists.
    made_of = _made_of(lists, keep_classes)
    known = made_of and mapped.known(table_of(root, list_file), {"made_of": made_of})
    if known and lowest <= known["label"].min(initial=lowest) <= known["label"].max(initial=lowest) < end:
        return Index(root, Paths(known["path"]), known["label"], None, source, list_file, made_of=made_of)
    found, asked = [], []
    for name in lists:
        rows = read_list(name, lambda path: asked.append(path) or os.path.lexists(os.path.join(root, path)))
        bad = (rows.labels < lowest) | (rows.labels >= end)
        if bad.any():
            _refuse_label(name, rows, int(bad.argmax()), split, end)
        kept = slice(None) if keep_classes is None else np.flatnonzero(rows.labels < keep_classes)
        found.append((rows.paths[kept], rows.labels[kept]))
    paths = Paths(pa.chunked_array([p.column for p, _ in found]))
    if not len(paths):
        why = f"no image with a label below --keep-classes {keep_classes}" if keep_classes else "no image"
        raise UserError(f"{source}: {why}: expected lines of the form: path label")
    labels = np.concatenate([labels for _, labels in found])
    made_of = None if asked else made_of  # else which rows there are depends on more than the lists
    return Index(root, paths, labels, None, source, list_file, made_of=made_of)


def _made_of(lists: list[str], keep_classes: int | None) -> dict[str, Any] | None:
    try:
        return {"lists": [sha256_of(name) for name in lists], "keep_classes": keep_classes}
    except OSError:  # reading it says why
        return None


def _none_missing(index: Index) -> Index:
    """The index with what the file system says of the files. Raises a UserError where some are missing."""
    found, root, paths = stats(index.root, index.paths, _LOOK_FOR), index.root, index.paths
    for i in np.flatnonzero(found.error == errno.EACCES)[:1].tolist():
        folder = os.path.dirname(index.full_path(i)) or "."
        if not os.access(folder, os.X_OK):  # else it is a link into another one: the image cannot be read
            raise UserError(f"cannot read the folder {shown(folder)}: {os.strerror(errno.EACCES)}")
    absent = np.flatnonzero(np.isin(found.error, _ABSENT))
    if len(absent):
        more = ", ..." if len(absent) > _NAMED else ""
        raise UserError(
            f"{index.source}: {len(absent)} of {len(paths)} images are missing under {root or '.'}: "
            f"{', '.join(map(shown, paths[absent[:_NAMED]]))}{more}: put them there, remove their lines, or set "
            "--root"
        )
    return dataclasses.replace(index, stats=found)


def _refuse_label(name: str, rows: Rows, i: int, split: Split, end: int) -> None:
    label, where = int(rows.labels[i]), f"{name}:{rows.lines[i]}"
    if label == NO_LABEL:
        raise UserError(f"{where}: label -1 (none) cannot be evaluated: remove the image from the {split} data")
    hint = _beginning_at_1(rows.labels, end) or "correct the line"
    if end <= label < _MOST_CLASSES and hint == "correct the line":
        hint = f"set --num-classes to at least {label + 1}, or correct the line"
    raise UserError(f"{where}: label {label} is outside [0, {end}): {hint}")


def _beginning_at_1(labels: np.ndarray, end: int) -> str | None:
    if labels.max() == end and labels.min() == 1:
        return (
            f"labels here begin at 1 and no label is 0: labels count from 0, so subtract 1 from each (0 to {end - 1})"
        )
    return None


def class_root(data: str, split: Split) -> str:
    """The folder that holds the class folders."""
    if not os.path.isdir(data):
        raise UserError(f"{data} is not a folder: give a folder of class folders, or another --layout")
    has_splits = all(os.path.isdir(os.path.join(data, name)) for name in ("train", "val"))
    return os.path.join(data, split) if has_splits else data


def _folders(
    data: str, split: Split, num_classes: int | None, keep_classes: int | None, known: Sequence[str] | None
) -> Index:
    data = class_root(data, split)
    found = read_classes(data)
    if not found:
        inner = len(subfolders(data))
        what = f"no image in its {inner} class folders" if inner else "no class folders"
        raise UserError(f"{data}: {what}: expected {data}/CLASS/IMAGE.jpg")
    numbers = class_numbers(list(found), known, data)
    highest = max(numbers.values(), default=-1) + 1
    if known is not None:
        if keep_classes is None:
            _require_known(list(found), numbers, known, data)
        elif others := [name for name in found if name not in numbers]:
            say(
                f"{data}: {len(others)} class folders are none of the {len(known)} classes (such as {shown(others[0])})"
            )
        if num_classes is not None and keep_classes is None and highest > num_classes:
            raise UserError(
                f"{data}: class {shown(max(numbers, key=numbers.get))} is outside the {num_classes} classes"
            )
        classes = list(known)
    else:
        _require_count(data, numbers, num_classes, keep_classes)
        classes = list(map(str, range(max(highest, num_classes or 0))))
        for name, label in numbers.items():
            classes[label] = name
    taken = {name: label for name, label in numbers.items() if label < (keep_classes or highest)}
    if not taken:
        raise UserError(f"{data}: none of its class folders is one of the first {keep_classes} classes")
    paths = Paths(pa.chunked_array([found[name].column for name in taken]))
    labels = np.repeat(list(taken.values()), [len(found[name]) for name in taken]).astype(np.int64)
    return Index(data, paths, labels, classes[:keep_classes], data)


def _require_count(data: str, numbers: dict[str, int], num_classes: int | None, keep_classes: int | None) -> None:
    """Raise a UserError where class folders and settings contradict each other."""
    count, highest = len(numbers), max(numbers.values())
    if all(map(is_number, numbers)):
        limit = max(1000, 10 * count) if num_classes is None or keep_classes is not None else num_classes
        if highest >= limit:
            hint = "rename them (c123 for 123: such classes are numbered by name)"
            if highest == count:
                hint = "none is called 0, and labels count from 0: rename each to one less"
            raise UserError(
                f"{data}: class folders that are called by numbers are these labels, and {highest} is outside "
                f"[0, {limit}): {hint}, or give a list file"
            )
        if count < (num_classes or highest + 1):
            say(f"{data}: {count} class folders, called by numbers up to {highest}: the other classes have no image")
        return
    enough = num_classes in (None, count) if keep_classes is None else count >= keep_classes
    if not enough:
        setting = f"--num-classes {num_classes}" if keep_classes is None else f"--keep-classes {keep_classes}"
        raise UserError(
            f"{data} holds {count} class folders with images, which contradicts {setting}: set it to {count}"
        )
