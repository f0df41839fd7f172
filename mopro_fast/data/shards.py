"""Packed images: what `mopro-fast pack` writes and how it is read.

A pack is a folder with, per split, shards (WebDataset tars ``train-000000.tar`` with a DALI index ``.idx`` beside
each; members ``<id>.jpg`` or another suffix, then ``<id>.cls``) and a table ``train.parquet`` of where each image is,
with its crc32; ``skipped.csv`` names the images that are left out; ``records/`` says of each shard what it was made of,
so that only what is missing or has changed is packed again; ``manifest.json``, written last, lists it all with
checksums.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import io
import json
import os
import tarfile
import threading
import zlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from mopro_fast.console import Progress
from mopro_fast.data import decode, mapped
from mopro_fast.data import workers as processes
from mopro_fast.data.decode import CANNOT_READ, OK, UNREADABLE, DecodeError
from mopro_fast.data.paths import Paths, read_columns, shown
from mopro_fast.errors import UserError, first_line, require_resources
from mopro_fast.files import (
    MOST_TEXT,
    misfit,
    open_descriptor,
    open_files,
    read_regular,
    replacing,
    sha256_of,
    writing,
)
from mopro_fast.labels import NO_LABEL

MANIFEST = "manifest.json"
RECORDS = "records"
STATE = ".packing.json"  # what a pack that is not complete is made of
VERSION = 1
FORMAT = "mopro_fast pack"
_AGAIN = "run the same `mopro-fast pack` again"
_FILE = {"name": Path, "sha256": str}
_OF_MANIFEST = {
    "options": dict,
    "data": {None: str},
    "classes": ([str], type(None)),
    "splits": {None: {"table": _FILE, "shards": [{**_FILE, "images": int, "bytes": int, "index": _FILE}]}},
}
_OF_RECORD = {
    **_FILE,
    "index": _FILE,
    "source": str,
    "bytes_before": int,
    "bytes": int,
    "rows": [list],
    "skipped": [list],
}
_MOST_TABLE = 1 << 34  # bytes
_COLUMNS = ("shard", "offset", "size", "label", "id", "crc32")


@dataclass(frozen=True, eq=False)
class ShardSet:
    """The images of one split of a pack, in the order in which they lie in the shards."""

    folder: str
    names: list[str]
    """The shards' files."""
    shard: np.ndarray
    """int32 [n]: which of them holds the image."""
    offset: np.ndarray
    """int64 [n]: where its bytes begin."""
    size: np.ndarray
    """int64 [n]: how many bytes it has."""
    label: np.ndarray
    """int64 [n]; -1: none given."""
    id: np.ndarray
    """int64 [n]: its row in the data that was packed."""
    paths: Paths
    """[n]: its path there."""
    classes: list[str] | None
    """The classes' names, where the data had them."""
    crc32: np.ndarray | None = None
    """int64 [n] of its bytes; None of packs made before they had it."""
    _files: "_Open" = field(default_factory=lambda: _Open())

    def __len__(self) -> int:
        return len(self.id)

    def read(self, i: int) -> bytes:
        """The encoded image. From any thread. Raises OSError."""
        shard, size = int(self.shard[i]), int(self.size[i])
        with self._files.get(self.path(shard)) as file:
            data = os.pread(file, size, int(self.offset[i]))
        if len(data) < size:
            raise OSError(f"{self.path(shard)} ends before image {self.id[i]} does")
        return data

    def take(self, rows: np.ndarray) -> "ShardSet":
        """These images alone, on the same open files."""
        columns = {name: getattr(self, name) for name in _COLUMNS}
        taken = {name: None if column is None else column[rows] for name, column in columns.items()}
        return dataclasses.replace(self, paths=self.paths[rows], **taken)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": _Open()}  # for another process

    def path(self, shard: int) -> str:
        return os.path.join(self.folder, self.names[shard])

    def close(self) -> None:
        self._files.close()


class _Open:
    """Files of one set that stay open. All sets together keep half of those that the process may have."""

    _kept = 0
    _lock = threading.RLock()  # the garbage collector may close one set while another holds it

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    @contextlib.contextmanager
    def get(self, path: str) -> Iterator[int]:
        """The number of the open file."""
        number = self._numbers.get(path)
        if number is not None:
            yield number
            return
        number = open_descriptor(path)  # without the lock: storage that hangs holds up this reader alone
        with _Open._lock:
            kept = path not in self._numbers and _Open._kept < open_files() // 2
            if kept:
                self._numbers[path] = number
                _Open._kept += 1
        try:
            yield number
        finally:
            if not kept:
                os.close(number)

    def close(self) -> None:
        with _Open._lock:
            while self._numbers:
                os.close(self._numbers.popitem()[1])
                _Open._kept -= 1

    __del__ = close


def is_pack(folder: str | os.PathLike) -> bool:
    """Whether `mopro-fast pack` made it: many folders hold a manifest.json of somebody else's.

    One that is damaged counts beside a pack's records.
    """
    path = os.path.join(folder, MANIFEST)
    if not os.path.isfile(path):
        return False
    try:
        manifest = json.loads(read_regular(path, MOST_TEXT)[0])
        if isinstance(manifest, dict) and manifest.get("format") == FORMAT:
            return True
    except (OSError, ValueError, RecursionError):
        pass
    return any(Path(folder, RECORDS).glob("*.json.gz"))


def read_manifest(folder: str | os.PathLike) -> dict[str, Any]:
    """manifest.json of a pack, if this version can read it. Raises UserError."""
    path = os.path.join(folder, MANIFEST)
    try:
        manifest = json.loads(read_regular(path, MOST_TEXT)[0])
    except FileNotFoundError:
        raise UserError(f"{folder} holds no {MANIFEST}: run `mopro-fast pack` to its end") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path} ({first_line(error)}): run `mopro-fast pack` again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{path} was not written by `mopro-fast pack`: give a folder that it made")
    if manifest.get("version") != VERSION:
        raise UserError(f"{path} has version {manifest.get('version')}, this mopro_fast reads {VERSION}: pack again")
    if wrong := misfit(manifest, _OF_MANIFEST):
        raise UserError(f"{path} is damaged: {wrong}: {_AGAIN}")
    return manifest


def open_shards(folder: str | os.PathLike, split: str = "train") -> ShardSet:
    """The images of a split. Raises UserError where a file is missing, cut or altered (of shards: by their size)."""
    folder = os.fspath(folder)
    manifest = read_manifest(folder)
    if split not in manifest["splits"]:
        raise UserError(f"{folder} holds no {split} images: it was packed from data without them")
    listed = manifest["splits"][split]
    try:
        for shard in listed["shards"]:
            path = os.path.join(folder, shard["name"])
            if (size := os.path.getsize(path)) != shard["bytes"]:
                raise UserError(f"{path} has {size} bytes, its manifest says {shard['bytes']}: {_AGAIN}")
        path = os.path.join(folder, listed["table"]["name"])
        made_of = {"split": hashlib.sha256(json.dumps([listed, manifest["classes"]]).encode()).hexdigest()}
        made_of["table"] = mapped.state_of(path)
        columns = mapped.known(path, made_of)
        if columns is None:
            columns = mapped.kept(path, _read_table(path, listed, manifest["classes"]), made_of)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): {_AGAIN}") from None
    paths = Paths(columns["path"])
    columns = {name: columns.get(name) for name in _COLUMNS}
    names = [shard["name"] for shard in listed["shards"]]
    return ShardSet(folder, names, paths=paths, classes=manifest["classes"], **columns)


def _read_table(path: str, listed: dict[str, Any], classes: list[str] | None) -> dict[str, mapped.Column]:
    """The columns of a split's table. Raises an OSError; a UserError where they cannot be what was packed."""
    content, _ = read_regular(path, _MOST_TABLE)
    if hashlib.sha256(content).hexdigest() != listed["table"]["sha256"]:
        raise UserError(f"{path} is not as it was made: {_AGAIN}")
    try:
        paths, columns, _ = read_columns(
            io.BytesIO(content), "shard", "offset", "size", "label", "id", optional="crc32"
        )
        bytes_of = np.array([shard["bytes"] for shard in listed["shards"]] or [0], np.int64)
        inside = _within(columns["shard"], len(bytes_of)) and _within(columns["offset"], 1 << 62)
        if not inside or not _within(columns["size"], bytes_of[columns["shard"]] - columns["offset"] + 1):
            raise ValueError("images outside of the shards")
        if not _within(columns["id"], 1 << 62):
            raise ValueError("numbers of images below 0")
        if not _within(columns["label"] - NO_LABEL, 1 << 62 if classes is None else len(classes) - NO_LABEL):
            raise ValueError("labels outside of the classes")
    except ValueError as error:
        raise UserError(f"{path} is damaged: {first_line(error)}: {_AGAIN}") from None
    return {"path": paths.column, **columns, "shard": columns["shard"].astype(np.int32)}


def _within(numbers: np.ndarray, ends: np.ndarray | int) -> bool:
    return bool(((numbers >= 0) & (numbers < ends)).all())


def verify_pack(folder: str, workers: int) -> list[str]:
    """Read all of a pack; -> a line for each file that is missing or differs from its checksum."""
    splits = read_manifest(folder)["splits"].values()
    listed = [entry for split in splits for shard in split["shards"] for entry in (shard, shard["index"])]
    listed += [split["table"] for split in splits]
    tasks: deque[tuple] = deque((folder, entry["name"], entry["sha256"]) for entry in listed)
    wrong, running = [], contextlib.closing(processes.run(_verify, tasks, workers))
    with running as items, Progress("verify", len(tasks), "files") as bar:
        for (_, name, _), item in items:
            if isinstance(item, processes.Done):
                bar.update()
            else:
                ended = isinstance(item, processes.Crashed)
                wrong.append(f"{os.path.join(folder, name)}: {item.why}" if ended else item)
    return sorted(wrong)


def _verify(folder: str, name: str, expected: str) -> Iterator[str]:
    path = os.path.join(folder, name)
    try:
        if sha256_of(path) != expected:
            yield f"{path}: altered"
    except OSError as error:
        yield f"{path}: {error.strerror}"


class ShardJob(NamedTuple):
    """A shard to be written."""

    root: str
    out: str
    name: str
    """Without suffix."""
    ids: np.ndarray
    """int64 [n]."""
    labels: np.ndarray
    """int64 [n]."""
    paths: Paths
    """[n], relative to root."""
    size: int
    quality: int
    crashed: dict[int, str]
    """Ids of images that must not be touched, and why."""

    def rows(self) -> Iterator[tuple[int, int, str]]:
        return zip(self.ids.tolist(), self.labels.tolist(), self.paths.tolist(), strict=True)


def write_shard(job: ShardJob) -> Iterator[tuple[int, int | None, int | None]]:
    """Write a shard, its index and its record, unless they are there and made of the same files (by their sizes).

    Yields (images, bytes before, bytes after), image by image; for a shard that is there (its images, None, None).
    Raises UserError where the folder cannot be written.
    """
    source = _source(job)
    if _is_finished(job, source):
        _add_checksums(job)
        yield len(job.ids), None, None
        return
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(job.out, MANIFEST))  # it vouches for the shard that is about to change
    own = f".{os.getpid()}"  # a worker whose caller was killed may still write while its successor does
    record: dict[str, Any] = {"name": f"{job.name}.tar", "source": source, "bytes_before": 0, "rows": [], "skipped": []}
    index = []
    with writing(job.out, "name another folder"):
        with (
            replacing(os.path.join(job.out, record["name"]), own) as file,
            tarfile.open(fileobj=(hashing := _Hashing(file)), mode="w", format=tarfile.USTAR_FORMAT) as tar,
        ):
            for number, label, path in job.rows():
                before, encoded, reason = _packed_file(job, number, path)
                record["bytes_before"] += before
                if reason:
                    record["skipped"].append([number, label, path, reason])
                else:
                    members = [(decode.suffix(encoded)[1:], encoded), ("cls", str(label).encode())]
                    at = [(kind, _add(tar, f"{number:09d}.{kind}", content), len(content)) for kind, content in members]
                    record["rows"].append([number, label, path, *at[0][1:], zlib.crc32(encoded)])
                    index.append(" ".join(f"{kind} {start} {n} {number:09d}.{kind}" for kind, start, n in at) + "\n")
                yield 1, before, len(encoded)
        text = f"v1.2 {len(index)}\n{''.join(index)}".encode()
        with replacing(os.path.join(job.out, f"{job.name}.idx"), own) as file:
            file.write(text)
        record |= {"bytes": hashing.size, "sha256": hashing.digest.hexdigest()}
        record["index"] = {"name": f"{job.name}.idx", "sha256": hashlib.sha256(text).hexdigest()}
        _write_record(job, record)


def _write_record(job: ShardJob, record: dict[str, Any]) -> None:
    with replacing(_record_path(job.out, job.name), f".{os.getpid()}") as file:
        file.write(gzip.compress(json.dumps(record).encode(), mtime=0))


class _Hashing:
    """A file for writing that counts and hashes its bytes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.size, self.digest = file, 0, hashlib.sha256()

    def tell(self) -> int:
        return self.size

    def write(self, block: bytes) -> None:
        self._file.write(block)
        self.digest.update(block)
        self.size += len(block)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> int:
    """Add a member without times and owners, as WebDataset's readers and DALI expect; -> the content's offset."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    start = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(info, io.BytesIO(content))
    return start


def read_record(out: str, name: str) -> dict[str, Any]:
    """What write_shard left: the shard's entry in the manifest, with "rows" (id, label, path, offset, size, crc32)
    and "skipped" (id, label, path, reason)."""
    return json.loads(gzip.decompress(read_regular(_record_path(out, name), MOST_TEXT)[0]))


def _record_path(out: str, name: str) -> str:
    return os.path.join(out, RECORDS, f"{name}.json.gz")


def _source(job: ShardJob) -> str:
    """sha256 over the rows and their files' sizes."""
    digest = hashlib.sha256()
    for number, label, path in job.rows():
        try:
            size = os.stat(os.path.join(job.root, path)).st_size
        except OSError as error:
            require_resources(error, shown(os.path.join(job.root, path)))
            size = -1
        digest.update(os.fsencode(f"{number} {label} {size} {path}\n"))
    return digest.hexdigest()


def _is_finished(job: ShardJob, source: str) -> bool:
    try:
        record = read_record(job.out, job.name)
        if misfit(record, _OF_RECORD) or record["source"] != source:
            return False
        if any(str(row[-1]).startswith(f"{CANNOT_READ}: {processes.NO_ANSWER}") for row in record["skipped"]):
            return False  # the storage may be there again
        if any(sha256_of(os.path.join(job.out, file["name"])) != file["sha256"] for file in (record, record["index"])):
            return False
        index, _ = read_regular(os.path.join(job.out, record["index"]["name"]), MOST_TEXT)
        lines = index.decode().splitlines()[1:]
        places = [list(map(int, line.split()[1:3])) for line in lines]
        named = record["rows"] + record["skipped"]
        if any(len(row) not in (5, 6) or misfit(row[5:], [int]) for row in record["rows"]):
            return False
        return places == [row[3:5] for row in record["rows"]] and sorted(row[:3] for row in named) == sorted(
            map(list, job.rows())
        )
    except (OSError, EOFError, ValueError, TypeError, RecursionError, zlib.error):
        return False


def _add_checksums(job: ShardJob) -> None:
    """To the record of a whole shard, if an earlier version made it."""
    record = read_record(job.out, job.name)
    if all(len(row) > 5 for row in record["rows"]):
        return
    with writing(job.out, "name another folder"):
        with open(os.path.join(job.out, record["name"]), "rb") as tar:
            for row in record["rows"]:
                tar.seek(row[3])
                row[5:] = [zlib.crc32(tar.read(row[4]))]
        Path(job.out, MANIFEST).unlink(missing_ok=True)  # it vouches for the table, which is about to change
        _write_record(job, record)


def _packed_file(job: ShardJob, number: int, path: str) -> tuple[int, bytes, str]:
    """-> size of the file, what goes into the shard, and why nothing does ("" if something does)."""
    if number in job.crashed:
        return 0, b"", job.crashed[number]
    with processes.limited():
        try:
            data, _ = read_regular(os.path.join(job.root, path), decode.MAX_BYTES)
        except OSError as error:
            return 0, b"", f"{CANNOT_READ}: {error.strerror}"
        try:
            return len(data), packed(data, job.size, job.quality), ""
        except DecodeError as error:
            return len(data), b"", str(error)


def packed(data: bytes, size: int, quality: int) -> bytes:
    """The image as it goes into a shard: the given bytes where DALI decodes them and nothing is to be changed.

    size: of the shorter side (0: as it is), reached with Pillow's antialiased bilinear filter, torchvision's Resize;
    never enlarged. Raises DecodeError.
    """
    found = decode.examine(data)
    if found.verdict == UNREADABLE:
        raise DecodeError(found.reason)
    if size == 0:
        return decode.clean(data)
    shorter, longer = sorted((found.width, found.height))
    if shorter <= size and found.verdict == OK and decode.is_stored_upright(data):
        return data
    image = Image.fromarray(decode.decode(data, size))
    if shorter > size:
        longer = size * longer // shorter
        image = image.resize((size, longer) if found.width <= found.height else (longer, size), Image.BILINEAR)
    return decode.encode(image, quality=quality)
