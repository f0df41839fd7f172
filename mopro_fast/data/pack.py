"""``mopro-fast pack DATA OUT``: images into shards that DALI reads at the speed of the disk (shards.py has the format).

The same data gives the same bytes whatever the number of workers: which images make up a shard depends on their
number alone, and in the training split on a fixed shuffle, since data often comes sorted by class.
"""

import csv
import hashlib
import io
import json
import os
import re
import signal
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from mopro_fast.console import Progress, tell
from mopro_fast.data import shards
from mopro_fast.data import workers as processes
from mopro_fast.data.check import load_splits, worker_count
from mopro_fast.data.decode import crash_reason
from mopro_fast.data.index import Index
from mopro_fast.data.paths import Paths
from mopro_fast.data.shards import MANIFEST, STATE, ShardJob, is_pack, read_manifest, write_shard
from mopro_fast.errors import UserError
from mopro_fast.files import json_object, misfit, own_folder, replacing, writing

SKIPPED = "skipped.csv"
_TEMPORARY = re.compile(r"\.((train|val)(-\d{6})?\.(tar|idx|json\.gz|parquet)|skipped\.csv|manifest\.json)\..*tmp")
LEAST_SIZE = 16  # px: the smallest image the recipes train on
_SHARD_IMAGES = 500, 10_000  # fewest and most, where the user leaves it to us: then there are 64 shards
_TABLE = pa.schema(
    [
        ("id", pa.int64()),
        ("label", pa.int64()),
        ("path", pa.string()),  # binary where a name is not UTF-8
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("crc32", pa.int64()),
        ("shard", pa.int32()),
    ]
)
_PATH = _TABLE.get_field_index("path")


@dataclass
class Pack:
    """Write the images of DATA into shards in the folder OUT: resized, upright, and all decodable by DALI."""

    data: Annotated[str, tyro.conf.Positional]
    """A WebVision folder, a list file ("path label" per line) or a folder of class folders."""
    out: Annotated[str, tyro.conf.Positional]
    """Folder for the shards. An interrupted pack goes on; a complete one is verified and repaired."""
    size: int = 256
    """Shorter side in pixels, with Pillow's antialiased bilinear filter; smaller images stay as they are. 0: only
    those of more than 2048 x 2048 pixels are resized, and all that DALI decodes are kept byte for byte."""
    quality: int = 90
    """JPEG quality of the images that are written anew, 1 to 95."""
    val: str | None = None
    """Validation data in any of the layouts (default: the validation split that comes with the data, if any)."""
    layout: Literal["auto", "webvision", "list", "folder"] = "auto"
    """Layout of the data; auto looks."""
    root: str | None = None
    """Folder that the paths of the list files start from (default: each list's own folder)."""
    shard_images: int = 0
    """Images per shard (0: 500 to 10,000, so that there are 64 shards)."""
    workers: int = 0
    """Processes (0: one per core)."""


def main(argv: list[str]) -> int:
    options = tyro.cli(Pack, args=argv, prog="mopro-fast pack")
    for name, low, high in (("size", LEAST_SIZE, 1 << 16), ("quality", 1, 95), ("shard_images", 1, 1 << 30)):
        value = getattr(options, name)
        if not low <= value <= high and (value != 0 or name == "quality"):
            zero = "" if name == "quality" else "0 or "
            raise UserError(f"--{name.replace('_', '-')} must be {zero}from {low} to {high}, got {value}")
    workers = worker_count(options.workers)
    for given in (options.data, options.val):
        if given and is_pack(given):
            raise UserError(f"{given} is a pack already: give the data it was made of")
    tell(pack(load_splits(options.data, options.layout, options.root, options.val), options, workers))
    return 0


def pack(splits: dict[str, Index], options: Pack, workers: int) -> str:
    """Write the pack; -> what was done, in words. Raises UserError."""
    made_of = {
        "options": {"size": options.size, "quality": options.quality, "shard_images": options.shard_images},
        "data": {split: index.digest() for split, index in splits.items()},
    }
    jobs = {split: _jobs(split, index, options) for split, index in splits.items()}
    for index in splits.values():
        _require_outside(options.out, index)
    start = time.monotonic()
    with own_folder(Path(options.out), "pack", _made_by, flag=""), _state(options.out, made_of):
        new = _write_shards([job for of_split in jobs.values() for job in of_split], workers)
        seconds = time.monotonic() - start
        listed, skipped = {}, []
        for split, of_split in jobs.items():
            listed[split], left_out = _write_table(options.out, split, [job.name for job in of_split])
            skipped += [(split, *row) for row in sorted(left_out)]
            if not listed[split]["images"]:
                raise UserError(f"none of the images of {splits[split].source} can be read: see `mopro-fast check`")
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([("split", "id", "label", "path", "reason"), *skipped])
        _write(options.out, SKIPPED, os.fsencode(text.getvalue()))
        manifest = {"format": shards.FORMAT, "version": shards.VERSION, **made_of}
        manifest |= {"classes": splits["train"].classes, "splits": listed}
        _write(options.out, MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    entries = [shard for split in listed.values() for shard in split["shards"]]
    before, after = (sum(entry[name] for entry in entries) for name in ("bytes_before", "bytes"))
    speed = f", {new / seconds:.0f} images/s" if new else "; all was there already, and is as it was made"
    images = sum(split["images"] for split in listed.values())
    done = f"{images} images in {len(entries)} shards in {options.out}: {_gb(before)} before, {_gb(after)} now{speed}"
    where = os.path.join(options.out, SKIPPED)
    return done + (f"\n{len(skipped)} images cannot be read and are left out; named in {where}" if skipped else "")


def _jobs(split: str, index: Index, options: Pack) -> list[ShardJob]:
    least, most = _SHARD_IMAGES
    images = options.shard_images or min(max(-(-len(index) // 6400) * 100, least), most)
    order = np.argsort(_mixed(index.ids), kind="stable") if split == "train" else index.ids
    parts = [order[first : first + images] for first in range(0, len(order), images)]
    return [
        ShardJob(
            index.root,
            options.out,
            f"{split}-{number:06d}",
            rows,
            index.labels[rows],
            index.paths[rows],
            options.size,
            options.quality,
            {},
        )
        for number, rows in enumerate(parts)
    ]


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """uint64 hashes (SplitMix64): a shuffle that no version of numpy changes."""
    x = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _write_shards(jobs: list[ShardJob], workers: int) -> int:
    """-> the number of images that were read for it."""
    tasks: deque[tuple] = deque((job,) for job in jobs)
    finished: Counter[str] = Counter()  # images, by shard
    before = after = new = 0
    total = sum(len(job.ids) for job in jobs)
    running = closing(processes.run(write_shard, tasks, workers))
    with running as items, Progress("pack", total, "images") as bar:
        for (job,), item in items:
            if isinstance(item, processes.Crashed):
                number = int(job.ids[finished[job.name]]) if finished[job.name] < len(job.ids) else -1
                if -item.status == signal.SIGKILL or number < 0:
                    raise UserError(
                        f"the process that packed {job.name} was ended ({item.why}), perhaps for lack of memory: lower "
                        "--workers; the same command goes on"
                    )
                tasks.append((job._replace(crashed={**job.crashed, number: crash_reason(item)}),))
                bar.update(-finished.pop(job.name, 0))
            elif not isinstance(item, processes.Done):
                images, read, written = item
                finished[job.name] += images
                if read is not None:
                    before, after, new = before + read, after + written, new + images
                bar.note(f"{_gb(before)} -> {_gb(after)}")
                bar.update(images)
    return new


def _write_table(out: str, split: str, names: list[str]) -> tuple[dict, list[list]]:
    """Write the split's table; -> its entry in the manifest, and the images left out: [id, label, path, reason]."""
    entries, tables, skipped = [], [], []
    for number, name in enumerate(names):
        record = shards.read_record(out, name)
        skipped += record.pop("skipped")
        rows = record.pop("rows")
        entries.append({**record, "images": len(rows)})
        columns = [*(zip(*rows, strict=True) if rows else [[]] * 6), [number] * len(rows)]
        arrays = [
            pa.array(columns[i], f.type) if i != _PATH else Paths(columns[i]).column for i, f in enumerate(_TABLE)
        ]
        tables.append(pa.table(arrays, _TABLE.names))
    joined = pa.concat_tables(tables).combine_chunks()
    joined = joined.set_column(_PATH, "path", Paths(joined["path"]).for_table())
    table = io.BytesIO()
    pq.write_table(joined, table, compression="zstd")
    _write(out, f"{split}.parquet", table.getvalue())
    listed = {"name": f"{split}.parquet", "sha256": hashlib.sha256(table.getvalue()).hexdigest()}
    return {"images": sum(map(len, tables)), "skipped": len(skipped), "table": listed, "shards": entries}, skipped


def _require_outside(out: str, index: Index) -> None:
    """The pack's folder must not lie among the images of a class."""
    folder = os.path.realpath(out)
    for name in index.classes or ():
        inside = os.path.realpath(os.path.join(index.root, name))
        if os.path.commonpath((inside, folder)) == inside:
            raise UserError(f"{out} lies in {os.path.join(index.root, name)}, a class of the data: name another folder")


def _made_by(folder: Path) -> str | None:
    """For own_folder, of packs that have no mark yet."""
    return "pack" if is_pack(folder) or (folder / STATE).is_file() else None


@contextmanager
def _state(out: str, made_of: dict[str, Any]) -> Iterator[None]:
    """Keep in the folder what the pack is made of until it is complete; refuse one of other data or options."""
    if is_pack(out):
        _compare(out, read_manifest(out), made_of)
    state = Path(out, STATE)
    before = json_object(state)
    if not misfit(before, {"options": dict, "data": {None: str}}):  # else it is new, or was cut short
        _compare(out, before, made_of)
    _write(out, STATE, json.dumps(made_of).encode())
    with writing(out, "name another folder"):
        os.makedirs(os.path.join(out, shards.RECORDS), exist_ok=True)
    try:
        yield
        state.unlink(missing_ok=True)
    finally:
        for left in Path(out).glob("**/.*.tmp"):  # of workers that were killed, or ended because of another's error
            if _TEMPORARY.fullmatch(left.name):
                left.unlink(missing_ok=True)


def _compare(out: str, there: dict[str, Any], here: dict[str, Any]) -> None:
    for name, value in here["options"].items():
        before = there["options"].get(name)
        if before != value:
            flag = name.replace("_", "-")
            raise UserError(f"{out} holds a pack with --{flag} {str(before)[:20]}, not {value}: name another folder")
    if there["data"] != here["data"]:
        raise UserError(f"{out} holds a pack of other data (other paths, labels or splits): name another folder")


def _write(out: str, name: str, content: bytes) -> None:
    with replacing(os.path.join(out, name)) as file:
        file.write(content)


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
