"""What `mopro-fast text` keeps in its folder: texts, embeddings, anchors; each step's files say what they came from."""

import contextlib
import functools
import hashlib
import json
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mopro_fast import distributed, files
from mopro_fast.console import escaped, say
from mopro_fast.data.anchors import TABLE
from mopro_fast.data.index import Index, load_index, synsets
from mopro_fast.data.paths import TEXT, WHOLE, Paths, read_table, shown
from mopro_fast.errors import UserError, first_line

OWNER = "text"  # of the folder, for files.own_folder
TEXTS, EMBEDDINGS, CLASSES, ABOUT = "texts.parquet", "embeddings.npy", "classes.npy", "text.json"
REPORT = "match.json"
_NAMED = 5  # classes
HINT = "make room there, or work with a copy of the folder where you can write"
_KEY = b"mopro_fast.text"
_NONE = type(None)
_SHAPE = {
    "data": str,
    "layout": str,
    "root": (str, _NONE),
    "start": str,
    "keep_classes": (int, _NONE),
    "digest": str,
    "classes": ([str], _NONE),
}


@dataclass(frozen=True, eq=False)
class Texts:
    """The texts of a data set's images, in the order of its lists."""

    paths: Paths
    """[n]."""
    labels: np.ndarray
    """int64 [n], the web labels; -1: none."""
    text: pa.ChunkedArray
    """Strings [n], cleaned."""
    about: dict[str, Any]
    """data, layout, root, keep_classes: of load_index; start: the folder that the paths start from; digest: the
    index's; classes: their names, or None."""

    def __len__(self) -> int:
        return len(self.labels)

    @functools.cached_property
    def num_classes(self) -> int:
        """C: the greatest label and one."""
        return int(self.labels.max(initial=-1)) + 1

    def index(self, data: str | None = None, root: str | None = None) -> Index:
        """The images themselves, row by row. Raises a UserError.

        data, root: of load_index, where the images are now, if they have moved or are packed.
        """
        a = self.about
        options = {"layout": a["layout"], "root": root or a["root"], "keep_classes": a["keep_classes"]}
        if data is not None:
            options |= {"layout": "auto", "root": root}
        elif not os.path.exists(a["data"]):
            raise UserError(f"{shown(a['data'])} is gone: say where the images lie now, --data PATH")
        index = load_index(data or a["data"], "train", num_classes=None, **options)
        require_list(index, root)
        if index.digest() == a["digest"]:
            return index
        rows = index.rows_of(self.paths)
        if data is None or (rows < 0).any():
            lacks = f" (it lacks {shown(self.paths[int(rows.argmin())])})" if (rows < 0).any() else ""
            raise UserError(
                f"{index.source} is not the data that the texts were read for{lacks}: give those images with their "
                "list as it was, --data PATH, or run `mopro-fast text read` again"
            )
        return index.take(rows).with_labels(self.labels)

    def named(self, labels: np.ndarray) -> list[str]:
        """Classes by number and, where the data has it, name."""
        names = self.about["classes"] or []
        return [f"{label} ({names[label]})" if label < len(names) else str(label) for label in labels.tolist()]

    def rows_of(self, names: Paths) -> np.ndarray:
        """int64: the first row of each of these paths, also of absolute ones and such as ./a.jpg; -1: none."""
        return Index(self.about["start"], self.paths, self.labels, None, TEXTS).rows_of(names)


def some_of(names: list[str]) -> str:
    """The first names, for messages."""
    return ", ".join(map(escaped, names[:_NAMED])) + (", …" if len(names) > _NAMED else "")


def require_list(index: Index, root: str | None) -> None:
    """Raise a UserError where ``root`` has no effect."""
    if root is not None and index.list_file is None:
        raise UserError(f"--root {root} has no effect: {shown(index.source)} is no list file")


def made_by(folder: Path) -> str | None:
    """The owner of a folder with our texts, also of a copy without its mark."""
    return OWNER if _about(folder) else None


def require_same_data(folder: Path, index: Index, data: str) -> None:
    """Raise a UserError where the folder has the texts of other data."""
    about = _about(folder)
    if about and about.get("data") != data and about.get("digest") != index.digest():
        raise UserError(
            f"{folder} has the texts of other data, {shown(str(about.get('data')))}: name another folder, or remove it"
        )


def _about(folder: Path) -> dict[str, Any]:
    """What texts.parquet says of itself; empty where there is none of ours."""
    try:
        with files.open_regular(folder / TEXTS) as file:
            about = json.loads((pq.read_schema(file).metadata or {}).get(_KEY, b"null"))
    except (OSError, ValueError, RecursionError, pa.ArrowException):
        about = None
    return about if isinstance(about, dict) else {}


def set_aside(folder: Path) -> None:
    """Keep the anchors under another name before others, or none, take their place: a run may have begun with them."""
    (folder / REPORT).unlink(missing_ok=True)
    table = folder / TABLE
    if table.exists():
        kept = folder / f"anchors-{files.sha256_of(table)[:8]}.parquet"
        table.replace(kept)
        say(
            f"the anchors that were in {table} are kept as {kept}: a run that began with them goes on with "
            f"--anchors {kept}"
        )


def write_texts(folder: Path, index: Index, text: pa.Array, about: dict[str, Any]) -> None:
    """texts.parquet. text: strings [n], cleaned. about: data, layout, root and keep_classes, as read."""
    columns = {
        "id": pa.array(index.ids),
        "path": index.paths.for_table(),
        "label": pa.array(index.labels, pa.int64()),
        "text": text,
        "empty": pc.equal(text, ""),
    }
    about = {**about, "start": os.path.abspath(index.root), "digest": index.digest()}
    about["classes"] = index.classes or synsets(about["data"])
    write_table(folder, TEXTS, columns, about)


def write_table(folder: Path, name: str, columns: dict[str, Any], about: dict[str, Any]) -> None:
    """Replace texts.parquet or anchors.parquet; before, set the anchors aside, unless it has these bytes already."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns).replace_schema_metadata({_KEY: json.dumps(about).encode()}), sink)
    new = sink.getvalue()
    if (folder / name).is_file() and files.sha256_of(folder / name) == hashlib.sha256(new).hexdigest():
        return
    set_aside(folder)
    with files.replacing(folder / name) as file:
        file.write(new)


@contextlib.contextmanager
def own(folder: Path) -> Iterator[None]:
    """The folder, for the ranks of this call alone, to add to. Raises a UserError."""
    with (
        distributed.on_rank0(lambda: files.own_folder(folder, OWNER, made_by, flag="", hint=HINT)),
        files.writing(folder, HINT),
    ):
        yield


def read_texts(folder: Path) -> Texts:
    """Raises a UserError."""
    file = folder / TEXTS
    if not file.is_file():
        raise UserError(f"no {file}: run `mopro-fast text read DATA … --out {folder}` first")
    try:
        files.require_regular(file)
        columns, about = read_table(file, {"path": TEXT, "label": WHOLE}, {})
        text = pq.read_table(file, columns=["text"], memory_map=False)["text"]
        about = json.loads(about.get(_KEY, b"null"))
        if wrong := files.misfit(about, _SHAPE):
            raise ValueError(wrong)
        if text.null_count or not (pa.types.is_string(text.type) or pa.types.is_large_string(text.type)):
            raise ValueError("text is not text everywhere")
    except (OSError, ValueError, RecursionError, pa.ArrowException) as error:
        raise UserError(
            f"cannot read {file} ({first_line(error)}): run `mopro-fast text read` again, into another folder"
        ) from None
    return Texts(columns["path"], columns["label"], text, about)


def digests(folder: Path) -> list[str]:
    """sha256 of embeddings.npy and of classes.npy."""
    return [files.sha256_of(folder / name) for name in (EMBEDDINGS, CLASSES)]


def read_vectors(path: str | Path, rows: int, what: str, otherwise: str, dtype: type | None = None) -> np.memmap:
    """[rows, E] of a float type, or of ``dtype``, memory-mapped, from a .npy file. Raises a UserError.

    what: what the rows are; otherwise: what to do where it is something else.
    """
    try:
        files.require_regular(path)
        found = np.load(path, mmap_mode="r")
        if not isinstance(found, np.ndarray):
            raise ValueError("it holds several arrays")
        if found.ndim != 2 or found.dtype.kind != "f" or not found.shape[1] or found.dtype != (dtype or found.dtype):
            name = "a float type" if dtype is None else np.dtype(dtype).name
            raise ValueError(f"it holds {found.dtype} {list(found.shape)}, not [{rows}, E] of {name}")
        if len(found) != rows:
            raise ValueError(f"it has {len(found)} rows for {rows} {what}")
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot take {path} ({first_line(error)}): {otherwise}") from None
    return found
