"""What a run notes of its class folders, which have no list of their own: going on, the labels stay what they were."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mopro_fast.data.index import Index
from mopro_fast.data.lists import read_list
from mopro_fast.data.paths import Paths, read_columns
from mopro_fast.distributed import say
from mopro_fast.errors import OutOfResources, UserError, first_line, require_resources
from mopro_fast.files import misfit, replacing
from mopro_fast.labels import NO_LABEL

NOTED = "images.parquet"
_BEFORE = "images.txt"  # of versions before


def write_images(index: Index, folder: Path) -> None:
    """Note the images of class folders in a run's folder."""
    if index.classes is not None and index.shards is None:
        table = pa.table([index.paths.for_table(), pa.array(index.labels)], ["path", "label"])
        with replacing(folder / NOTED) as file:
            about = {"classes": json.dumps(index.classes)}
            pq.write_table(table.replace_schema_metadata(about), file, compression="zstd")


def begun(folder: Path, digest: str | None, num_classes: int) -> Index | None:
    """The index of this digest (None: of any), with which the run in ``folder`` began, if it noted one."""
    path = folder / NOTED if (folder / NOTED).is_file() else folder / _BEFORE
    if not path.is_file():
        return None
    try:
        if path.name == NOTED:
            paths, columns, about = read_columns(path, "label")
            labels, classes = columns["label"], json.loads(about.get(b"classes", b"null"))
            if wrong := misfit(classes, [str], "classes"):
                raise ValueError(wrong)
            if not (labels.min(initial=0) >= NO_LABEL and labels.max(initial=NO_LABEL) < len(classes)):
                raise ValueError("labels outside of the classes")
        else:
            paths, labels, _ = read_list(str(path), lambda _: True)
            classes = _classes_before(paths, labels, num_classes)
    except OutOfResources:
        raise
    except (OSError, ValueError, RecursionError, UserError) as error:
        require_resources(error, path)
        say(f"cannot read {path} ({first_line(error)}): the run's images are taken as they are now")
        return None
    index = Index(str(folder), paths, labels, classes, str(path))
    return index if classes is not None and digest in (None, index.digest()) else None


def _classes_before(paths: Paths, labels: np.ndarray, num_classes: int) -> list[str] | None:
    """The classes of a run that noted them in images.txt, as it trained: re-training and fine-tuning changed labels.

    All visible folders were numbered by name, those without an image as well.
    """
    folders = [name.partition("/")[0] for name in paths]
    names = sorted(set(folders))
    if len(names) == num_classes:
        return names
    label_of = dict(zip(folders, labels.tolist(), strict=True))
    numbers = [label_of[name] for name in names]
    same = all(label_of[name] == label for name, label in zip(folders, labels.tolist(), strict=True))
    if not same or not numbers or numbers[0] < 0 or sorted(set(numbers)) != numbers or numbers[-1] >= num_classes:
        return None
    classes = list(map(str, range(num_classes)))
    for name, number in zip(names, numbers, strict=True):
        classes[number] = name
    return classes


def as_begun(index: Index, begun: Index | None) -> Index:
    """``begun``, if but few of its files have gone and no label has changed; else ``index``."""
    if begun is None or index.digest() == begun.digest():
        return index
    now = index.paths.rows_of(begun.paths)
    there = now >= 0
    same_labels = np.array_equal(begun.labels[there], index.labels[now[there]])
    if not same_labels or (~there).sum() > max(10, len(begun) // 100):
        return index
    return dataclasses.replace(begun, root=index.root, source=index.source)
