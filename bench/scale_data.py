"""Data of any number of rows that take hardly any disk: what bench/scale.py measures on.

Raw: one folder of small files, many links to it, and a list that names every file through every link, so that each row
has a path of its own. Packed: one shard under many names, and a table and a manifest that are whole.
"""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

FILES, SHARD = 4000, 10_000  # rows of a folder, and of a shard
BROKEN = 50  # of so many files one is no image
LIST, PACK = "list.txt", "pack"


def labels(rows: int, classes: int) -> np.ndarray:
    """int64 [rows]: classes of unlike sizes, as the web has them; the largest has about 30 times the smallest."""
    rng = np.random.default_rng(rows)
    sizes = np.exp(rng.normal(0, 0.5, classes))
    return np.searchsorted(np.cumsum(sizes / sizes.sum())[:-1], rng.random(rows), side="right")


def write_images(folder: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for i in range(count):
        data = io.BytesIO(b"<html>not found</html>")
        if i % BROKEN != BROKEN - 1:
            pixels = rng.integers(256, size=(*rng.integers(8, 17, size=2), 3), dtype=np.uint8)
            Image.fromarray(pixels).save(data, "JPEG", quality=90)
        (folder / f"{i:06d}.jpg").write_bytes(data.getvalue())
        os.utime(folder / f"{i:06d}.jpg", (0, 1_600_000_000))  # the same whenever they are made


def write_raw(folder: Path, rows: int, classes: int, _environment: dict, files: int = FILES) -> Path:
    """-> the list file. ``rows`` are a multiple of ``files``."""
    write_images(folder / "images", files)
    label = labels(rows, classes).reshape(-1, files)
    with open(folder / LIST, "w") as file:
        for d, of_folder in enumerate(label.tolist()):
            os.symlink("images", folder / f"d{d:05d}")
            file.write("".join(f"d{d:05d}/{i:06d}.jpg {one}\n" for i, one in enumerate(of_folder)))
    return folder / LIST


def write_known(folder: Path, rows: int, classes: int, environment: dict, files: int = FILES) -> None:
    """What `mopro-fast check` would write beside the list, from a check of the files under their first names."""
    first = folder / "first.txt"
    first.write_text("".join(f"images/{i:06d}.jpg 0\n" for i in range(files)))
    command(environment, "check", str(first))
    known = Path(f"{first}.index.parquet")
    table, label = pq.read_table(known), labels(rows, classes).reshape(-1, files)
    parts = []
    for d, of_folder in enumerate(label):
        paths = pa.array([f"d{d:05d}/{i:06d}.jpg" for i in range(files)])
        parts.append(table.set_column(0, "path", paths).set_column(1, "label", pa.array(of_folder)))
    written = pa.concat_tables(parts).combine_chunks().replace_schema_metadata(table.schema.metadata)
    pq.write_table(written, folder / f"{LIST}.index.parquet", compression="zstd")
    for left in folder.glob(f"{first.name}*"):
        left.unlink()


def write_pack(folder: Path, rows: int, classes: int, environment: dict, images: int = SHARD) -> Path:
    """-> the pack: a real one of one shard, which is then linked. ``rows`` are a multiple of ``images``."""
    write_images(folder / "packed", BROKEN - 1)
    listed = folder / "packed.txt"
    listed.write_text("".join(f"packed/{i % (BROKEN - 1):06d}.jpg 0\n" for i in range(images)))
    out = folder / PACK
    command(environment, "pack", str(listed), str(out), "--size", "0", "--shard-images", str(images))
    manifest, table = json.loads((out / "manifest.json").read_text()), pq.read_table(out / "train.parquet")
    (first,) = manifest["splits"]["train"]["shards"]
    shards, parts = [], []
    for s, label in enumerate(labels(rows, classes).reshape(-1, images)):
        name = f"train-{s:06d}"
        for suffix in (".tar", ".idx") if s else ():
            os.link(out / f"train-000000{suffix}", out / f"{name}{suffix}")
        shards.append(first | {"name": f"{name}.tar", "index": first["index"] | {"name": f"{name}.idx"}})
        own = {"id": s * images + table["id"].to_numpy(), "label": label, "shard": np.full(images, s, np.int32)}
        names = np.arange(s * images, (s + 1) * images) * 2654435761 % (1 << 32)  # distinct, and as good as random
        own["path"] = [f"s{s:05d}/{name:08x}.jpg" for name in names.tolist()]
        columns = [own.get(field.name, table[field.name]) for field in table.schema]
        parts.append(pa.table(columns, schema=table.schema))
    pq.write_table(pa.concat_tables(parts).combine_chunks(), out / "train.parquet", compression="zstd")
    with open(out / "train.parquet", "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    manifest["splits"]["train"] |= {"images": rows, "shards": shards}
    manifest["splits"]["train"]["table"]["sha256"] = digest
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    shutil.rmtree(out / "records")
    (out / "records").mkdir()
    return out


def write_scores(path: Path, rows: int, classes: int) -> None:
    """float32 [n, 8], as `mopro-fast clean` scores images: the label after cleaning (-1: removed), the best, scores."""
    given = labels(rows, classes)
    numbers = np.lib.format.open_memmap(path, "w+", np.float32, (rows, 8))
    rng = np.random.default_rng(0)
    for first in range(0, rows, 1 << 20):
        part, own = numbers[first : first + (1 << 20)], given[first : first + (1 << 20)]
        best, fate = rng.integers(classes, size=len(own)), rng.random(len(own))
        part[:, 0] = np.where(fate < 0.2, -1, np.where(fate < 0.4, best, own))
        part[:, 1] = np.where(fate < 0.01, np.nan, best)  # an image that could not be read
        part[:, 2:] = rng.random((len(own), 6), np.float32)
    numbers.flush()


def command(environment: dict, *words: str) -> None:
    subprocess.run([sys.executable, "-m", "mopro_fast", *words], check=True, env=environment, capture_output=True)
