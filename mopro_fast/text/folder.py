"""What `mopro-fast text` keeps in its folder: texts, embeddings, anchors; each step's files say what they came from."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mopro_fast import files
from mopro_fast.console import say
from mopro_fast.data.anchors import TABLE
from mopro_fast.data.index import Index, load_index, synsets
from mopro_fast.data.paths import TEXT, WHOLE, Paths, read_table
from mopro_fast.errors import UserError, first_line

OWNER = "text"  # of the folder, for files.own_folder
TEXTS, EMBEDDINGS, CLASSES, ABOUT = "texts.parquet", "embeddings.npy", "classes.npy", "text.json"
REPORT = "match.json"
HINT = "choose another folder"
_KEY = b"mopro_fast.text"
_NONE = type(None)
_SHAPE = {
    "data": str,
    "layout": str,
    "root": (str, _NONE),
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
    """data, layout, root, keep_classes: of load_index; digest: the index's; classes: their names, or None."""

    def __len__(self) -> int:
        return len(self.labels)

    @functools.cached_property
    def num_classes(self) -> int:
        """C: the greatest label and one."""
        return int(self.labels.max(initial=-1)) + 1

    def index(self, data: str | None = None) -> Index:
        """The images themselves. data: where they lie now, if they moved. Raises a UserError."""
        a = self.about
        options = {"layout": a["layout"], "root": a["root"], "keep_classes": a["keep_classes"]}
        if data is not None:
            options |= {"root": None}
        index = load_index(data or a["data"], "train", num_classes=None, **options)
        if index.digest() != a["digest"]:
            raise UserError(
                f"{index.source} is not the data that the texts were read for: give those images with their list as it "
                "was, or run `mopro-fast text read` again"
            )
        return index


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
    about = {**about, "digest": index.digest(), "classes": index.classes or synsets(about["data"])}
    table = pa.table(columns).replace_schema_metadata({_KEY: json.dumps(about).encode()})
    before = files.sha256_of(folder / TEXTS) if (folder / TEXTS).is_file() else None
    with files.replacing(folder / TEXTS) as file:
        pq.write_table(table, file)
    if before != files.sha256_of(folder / TEXTS):
        set_aside(folder)


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
