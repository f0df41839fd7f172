"""Which images there are, and their labels: WebVision's file lists, any file list, class folders, packed shards.

Everything that can be wrong with the input is found here, before training, and raises a UserError.
"""

import dataclasses
import functools
import hashlib
import os
from array import array
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from mopro_fast.data.shards import MANIFEST, STATE, ShardSet, is_pack, open_shards, read_manifest
from mopro_fast.errors import UserError
from mopro_fast.labels import NO_LABEL

Split = Literal["train", "val"]
Layout = Literal["auto", "webvision", "list", "folder", "shards"]

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
WEBVISION_LISTS = {
    "train": ("info/train_filelist_google.txt", "info/train_filelist_flickr.txt"),
    "val": ("info/val_filelist.txt",),
}
WEBVISION_FOLDERS = {"train": "", "val": "val_images_256"}  # where the paths of those lists start
_NAMED = 3  # missing images named in the message


@dataclass(frozen=True, eq=False)
class Checked:
    """What is known of an index's images, row by row."""

    verdict: np.ndarray
    """uint8 [n]: OK, CONVERTED, TOLERANT or UNREADABLE of decode.py."""
    size: np.ndarray
    """int64 [n], bytes; -1: no such file."""
    mtime_ns: np.ndarray
    """int64 [n]; -1: no such file."""
    width: np.ndarray
    """int32 [n], of the upright image; 0 if unreadable."""
    height: np.ndarray
    """int32 [n]."""
    reason: list[str]
    """[n], "kind" or "kind: detail"; empty if OK."""
    path: str
    """The Parquet file."""
    read: int
    """How many files had to be read this time."""


@dataclass(frozen=True, eq=False)
class Index:
    """The images of one split, in the order of the lists they come from."""

    root: str
    """Folder the paths start from."""
    paths: np.ndarray
    """StringDType [n], relative to root."""
    labels: np.ndarray
    """int64 [n]; -1: none given."""
    classes: list[str] | None
    """The classes' names, where the layout has them."""
    source: str
    """What was read, for messages."""
    list_file: str | None = None
    """The list file, if the data is one."""
    shards: ShardSet | None = None
    """Where the images lie if they are packed; else each is a file."""
    in_shards: np.ndarray | None = None
    """int64 [n]: rows of ``shards``."""
    checked: Checked | None = None
    """What `mopro-fast check` found, row by row."""
    left_out: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    """int64, sorted: the rows that loaders do not show, since nobody can read them."""
    held_out: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    """int64: the rows that loaders do not show, since the model is not to be trained on them."""

    def __len__(self) -> int:
        return len(self.labels)

    @functools.cached_property
    def ids(self) -> np.ndarray:
        """int64 [n]: an image's stable id is its row number here."""
        return np.arange(len(self))

    def digest(self) -> str:
        """sha256 over paths and labels: equal for the same data wherever it lies."""
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:
        names = "\n".join(self.paths).encode()
        return hashlib.sha256(names + b"\0" + self.labels.astype("<i8").tobytes()).hexdigest()

    @functools.cached_property
    def usable(self) -> np.ndarray:
        """int64: the rows that loaders show."""
        return np.delete(self.ids, np.union1d(self.left_out, self.held_out))

    @functools.cached_property
    def shard_of(self) -> np.ndarray:
        """int64 [n]: the shard of each image."""
        return self.shards.shard[self.in_shards]

    def take(self, rows: np.ndarray) -> "Index":
        """The index of these rows only, not checked."""
        in_shards = None if self.in_shards is None else self.in_shards[rows]
        own = {"paths": self.paths[rows], "labels": self.labels[rows], "in_shards": in_shards}
        none = np.empty(0, np.int64)
        return dataclasses.replace(self, **own, checked=None, left_out=none, held_out=none)

    def full_path(self, i: int) -> str:
        return os.path.join(self.root, self.paths[i])

    def name(self, i: int) -> str:
        """For messages: where the image is."""
        return self.full_path(i) if self.shards is None else f"{self.paths[i]} in {self.source}"

    def read(self, i: int) -> bytes:
        """The whole encoded file. Raises OSError."""
        return self.read_with_state(i)[0]

    def read_with_state(self, i: int) -> tuple[bytes, int, int]:
        """-> what :meth:`read` gives, its size, and the file's time of change in ns (0 in shards)."""
        if self.shards is not None:
            data = self.shards.read(self.in_shards[i])
            return data, len(data), 0
        with open(self.full_path(i), "rb", buffering=0) as file:
            data = file.readall()
            return data, len(data), os.fstat(file.fileno()).st_mtime_ns


def load_index(
    data: str | os.PathLike,
    split: Split,
    *,
    num_classes: int | None,
    layout: Layout = "auto",
    root: str | os.PathLike | None = None,
    keep_classes: int | None = None,
    missing: bool = False,
) -> Index:
    """Read the index of ``data``: a WebVision folder, a list file ("path label" per line), class folders or shards.

    root: where the paths of a list file start (default: its own folder). keep_classes: take only the images with
    a label below this (of class folders, the first ones by name). num_classes: None takes any labels and any number of
    class folders. missing: files of lists may be. Raises UserError.
    """
    data = os.fspath(data)
    if not os.path.exists(data):
        raise UserError(f"no such file or folder: {data}")
    if layout == "auto":
        layout = recognise(data)
    if layout == "shards":
        return _shards(data, split, num_classes, keep_classes)
    if layout == "folder":
        return _folders(data, split, num_classes, keep_classes)
    if layout == "webvision":
        names = WEBVISION_LISTS[split]
        lists = [path for name in names if os.path.isfile(path := os.path.join(data, name))]
        if not lists:
            raise UserError(f"{data} has no {' and no '.join(names)}: unpack WebVision's info/ there")
        root = os.path.join(data, WEBVISION_FOLDERS[split])
        return _from_lists(lists, root, split, num_classes, keep_classes, missing)
    if not os.path.isfile(data):
        raise UserError(f"{data} is not a file: give the list file itself, or another --layout")
    root = os.path.dirname(data) if root is None else os.fspath(root)
    index = _from_lists([data], root, split, num_classes, keep_classes, missing)
    return dataclasses.replace(index, list_file=data)


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
    if is_pack(data):
        found = "shards" if "val" in read_manifest(data)["splits"] else None
    elif os.path.isfile(os.path.join(data, *WEBVISION_LISTS["val"])):
        found = "webvision"
    else:
        found = "folder" if all(os.path.isdir(os.path.join(data, name)) for name in ("train", "val")) else None
    return found if layout in ("auto", found) else None


def _shards(data: str, split: Split, num_classes: int | None, keep_classes: int | None) -> Index:
    shards = open_shards(data, split)
    lowest = NO_LABEL if split == "train" else 0
    num_classes = 1 << 62 if num_classes is None else num_classes
    for label in (int(shards.label.min(initial=lowest)), int(shards.label.max(initial=lowest))):
        if label < lowest or (keep_classes is None and label >= num_classes):
            raise UserError(f"{data}: label {label} of a {split} image is outside [{lowest}, {num_classes})")
    rows = np.arange(len(shards)) if keep_classes is None else np.flatnonzero(shards.label < keep_classes)
    if not len(rows):
        raise UserError(f"{data}: no {split} image" + (f" with a label below {keep_classes}" if keep_classes else ""))
    classes = shards.classes and shards.classes[:keep_classes]
    return Index(data, shards.paths[rows], shards.label[rows], classes, data, shards=shards, in_shards=rows)


def _from_lists(
    lists: list[str], root: str, split: Split, num_classes: int | None, keep_classes: int | None, missing: bool
) -> Index:
    all_paths: list[str] = []
    all_labels = []
    for name in lists:
        paths, labels, lines = read_list(name)
        lowest = NO_LABEL if split == "train" else 0
        bad = labels < lowest
        if keep_classes is None and num_classes is not None:
            bad |= labels >= num_classes
        if bad.any():
            _refuse_label(name, lines[bad.argmax()], labels[bad.argmax()], split, num_classes)
        if keep_classes is not None:
            kept = np.flatnonzero(labels < keep_classes)
            paths, labels = [paths[i] for i in kept], labels[kept]
        all_paths += paths
        all_labels.append(labels)
    source = " + ".join(lists)
    if not all_paths:
        why = f"no image with a label below --keep-classes {keep_classes}" if keep_classes else "no image"
        raise UserError(f"{source}: {why}: expected lines of the form: path label")
    if not missing:
        _require_files(root, all_paths, source)
    return Index(root, _compact(all_paths, source), np.concatenate(all_labels), None, source)


def read_list(name: str) -> tuple[list[str], np.ndarray, np.ndarray]:
    """-> paths, labels int64 and line numbers of a list file; the label is last, so paths may hold spaces."""
    paths, labels, lines = [], array("q"), array("q")
    try:
        with open(name, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                line = line.strip()
                if not line or line.startswith("#"):
                    continue
                try:
                    path, label = line.rsplit(maxsplit=1)
                    labels.append(int(label))
                except (ValueError, OverflowError):
                    raise UserError(f"{name}:{number}: expected: path label; found: {line[:80]!r}") from None
                paths.append(path)
                lines.append(number)
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text ({error.reason}): save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror}") from None
    return paths, np.array(labels, np.int64), np.array(lines, np.int64)


def _refuse_label(name: str, line: int, label: int, split: Split, num_classes: int) -> None:
    if label == NO_LABEL:
        raise UserError(f"{name}:{line}: label -1 (none) cannot be evaluated: remove the image from the {split} data")
    hint = f"set --num-classes to at least {label + 1}, or correct the line" if label > 0 else "correct the line"
    raise UserError(f"{name}:{line}: label {label} is outside [0, {num_classes}): {hint}")


def _require_files(root: str, paths: list[str], source: str) -> None:
    """Raise for images that are not there. One listing per folder: millions of stat calls would take too long."""
    names: dict[str, list[str]] = {}
    for path in paths:
        folder, name = os.path.split(path)
        names.setdefault(folder, []).append(name)
    missing: list[str] = []
    for folder, wanted in names.items():
        try:
            present = set(os.listdir(os.path.join(root, folder) or "."))
        except (FileNotFoundError, NotADirectoryError):
            present = set()
        except OSError as error:
            raise UserError(f"cannot read the folder {os.path.join(root, folder)}: {error.strerror}") from None
        missing += [os.path.join(folder, name) for name in wanted if name not in present]
    if missing:
        more = ", ..." if len(missing) > _NAMED else ""
        raise UserError(
            f"{source}: {len(missing)} of {len(paths)} images are missing under {root or '.'}: "
            f"{', '.join(missing[:_NAMED])}{more}: put them there, remove their lines, or set --root"
        )


def _folders(data: str, split: Split, num_classes: int | None, keep_classes: int | None) -> Index:
    if not os.path.isdir(data):
        raise UserError(f"{data} is not a folder: give a folder of class folders, or another --layout")
    inner = subfolders(data)
    if {"train", "val"} <= set(inner):
        data = os.path.join(data, split)
        inner = subfolders(data)
    if not inner:
        raise UserError(f"{data} holds no class folders: expected {data}/CLASS/IMAGE.jpg")
    enough = num_classes in (None, len(inner)) if keep_classes is None else len(inner) >= keep_classes
    if not enough:
        setting = f"--num-classes {num_classes}" if keep_classes is None else f"--keep-classes {keep_classes}"
        raise UserError(f"{data} holds {len(inner)} class folders, which contradicts {setting}: set it to {len(inner)}")
    classes = inner[:keep_classes]
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        with os.scandir(os.path.join(data, name)) as entries:
            visible = [e for e in entries if not e.name.startswith(".")]
            images = sorted(e.name for e in visible if e.name.lower().endswith(EXTENSIONS) and e.is_file())
        if not images and subfolders(os.path.join(data, name)):
            raise UserError(f"{os.path.join(data, name)} holds folders, not images: if these are the classes, give it")
        paths += [f"{name}/{image}" for image in images]
        labels += [label] * len(images)
    if not paths:
        raise UserError(f"{data}: no image in its {len(classes)} class folders: looked for {' '.join(EXTENSIONS)}")
    return Index(data, _compact(paths, data), np.array(labels, np.int64), classes, data)


def subfolders(folder: str) -> list[str]:
    """The visible folders in ``folder``, by name."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error.strerror}") from None


def _compact(paths: list[str], source: str) -> np.ndarray:
    """As one StringDType array: UTF-8 bytes, without a Python object per path."""
    try:
        return np.array(paths, np.dtypes.StringDType())
    except UnicodeEncodeError as error:
        raise UserError(f"{source}: the file name {error.object!r} is not UTF-8: rename it") from None
