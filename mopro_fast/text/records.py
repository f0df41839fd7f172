"""Records about images from a file of them, as the processes of `mopro-fast text read` read and clean them."""

import contextlib
import json
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import pyarrow as pa

from mopro_fast.console import escaped
from mopro_fast.errors import UserError, first_line
from mopro_fast.files import open_regular, read_regular
from mopro_fast.text.words import image_text, read_dictionary

PARTS = ("title", "description", "text", "caption")  # of a record, in this order; WebVision's have the first two
TAGS = "tags"
_MOST = 1 << 30  # bytes of one file of records
_MOST_MEMBER = 1 << 24  # bytes of one in a tar
_BAD = "\ufffd"  # what stands for bytes that are no UTF-8


class Rules(NamedTuple):
    """How a record becomes a text."""

    tags: bool
    raw: bool
    dictionary: str | None


class Found(NamedTuple):
    """What a file has, in its order."""

    names: pa.Array
    """large_binary [n]: the images they are of."""
    texts: pa.Array
    """large_string [n]."""
    counts: Counter[str]
    """Of records: no_id, again, not_text, not_utf8; read.COUNTED says what they are."""


def of_json(path: str, folder: str, rules: Rules) -> Iterator[Found]:
    """WebVision's: a list of {id, title, description, tags} of the images in one folder; all but id may lack."""
    try:
        data, _ = read_regular(path, _MOST)
        records, whole = _parsed(data)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"cannot read {path} ({escaped(first_line(error))}): fetch it again, or remove it and leave its images "
            "without texts"
        ) from None
    if not isinstance(records, list):
        raise UserError(f"{path} is no list of records such as {{'id': …, 'title': …}}")
    counts: Counter[str] = Counter()
    names, texts = [], []
    for record in records:
        name = record.get("id") if isinstance(record, dict) else None
        if type(name) is int:
            name = str(name)
        if not isinstance(name, str) or not name:
            counts["no_id"] += 1
            continue
        names.append(os.fsencode(folder) + b"/" + name.encode("utf-8", "replace"))
        texts.append(_text(_parts(record, rules, counts), rules, counts, whole))
    yield _found(pa.array(names, pa.large_binary()), texts, counts)


def of_tar(path: str, rules: Rules) -> Iterator[Found]:
    """A WebDataset's: a .txt or, where there is none, a .json member of each sample. names: members without suffix."""
    counts: Counter[str] = Counter()
    plain: dict[str, str] = {}
    objects: dict[str, str] = {}
    member = None
    try:
        with open_regular(path) as file, tarfile.open(fileobj=file, errors="surrogateescape") as tar:
            for member in tar:
                key, kind = os.path.splitext(os.path.normpath(member.name))
                of_kind = {".txt": plain, ".json": objects}.get(kind.lower())
                if of_kind is None or not member.isfile():
                    continue
                if member.size > _MOST_MEMBER:
                    raise ValueError(f"{member.size} bytes, at most {_MOST_MEMBER} are read")
                data = tar.extractfile(member).read()
                if of_kind is plain:
                    parts, whole = [data.decode("utf-8-sig", "replace")], _is_utf8(data)
                else:
                    record, whole = _parsed(data)
                    if not isinstance(record, dict):
                        raise ValueError("it is no object")
                    parts = _parts(record, rules, counts)
                if key in of_kind:
                    counts["again"] += 1
                of_kind.setdefault(key, _text(parts, rules, counts, whole))
            member = None
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise ValueError(f"its end is missing: no end-of-archive block at byte {tar.offset}, as if it was cut")
            _require_one(tar)
    except (OSError, ValueError, RecursionError, EOFError, tarfile.TarError, zlib.error) as error:
        at = f"{escaped(member.name)} in " if member is not None else ""
        raise UserError(f"cannot read {at}{path} ({escaped(first_line(error))}): make the tar again") from None
    texts = objects | plain
    yield _found(pa.array(map(os.fsencode, texts), pa.large_binary()), texts.values(), counts)


def _require_one(tar: tarfile.TarFile) -> None:
    """Raise a ValueError where another archive follows, as after `cat a.tar b.tar`. Other bytes may."""
    while block := tar.fileobj.read(tarfile.BLOCKSIZE):
        if block.strip(tarfile.NUL):
            with contextlib.suppress(tarfile.HeaderError):
                tarfile.TarInfo.frombuf(block, tar.encoding, tar.errors)
                raise ValueError(f"another one follows its end at byte {tar.offset}: keep the two apart")
            return


def of_column(names: pa.Array, values: pa.Array, rules: Rules) -> Iterator[Found]:
    """A table's rows. values: large_binary [n]; null: no text."""
    counts: Counter[str] = Counter()
    texts = []
    for data in values.to_pylist():
        counts["not_text"] += data is None
        texts.append(_text([(data or b"").decode("utf-8", "replace")], rules, counts, _is_utf8(data or b"")))
    yield _found(names, texts, counts)


def _parsed(data: bytes) -> tuple[Any, bool]:
    """-> the value, and whether all bytes were text. Raises a ValueError, a RecursionError."""
    encoding = json.detect_encoding(data)
    try:
        return json.loads(data.decode(encoding)), True
    except UnicodeDecodeError:
        return json.loads(data.decode(encoding, "replace")), False


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _parts(record: dict[str, Any], rules: Rules, counts: Counter[str]) -> list[str]:
    values = [record.get(part) for part in PARTS]
    if rules.tags:
        tags = record.get(TAGS)
        values += tags if isinstance(tags, list) else [tags]
    parts = [value for value in values if isinstance(value, str)]
    counts["not_text"] += len(parts) < sum(value is not None for value in values)
    return parts


def _text(parts: Iterable[str], rules: Rules, counts: Counter[str], whole: bool) -> str:
    counts["not_utf8"] += not whole and any(_BAD in part for part in parts)
    if rules.raw:
        return " ".join(filter(None, map(str.strip, parts)))
    return image_text(parts, read_dictionary(rules.dictionary) if rules.dictionary else None)


def _found(names: pa.Array, texts: Iterable[str], counts: Counter[str]) -> Found:
    column = (text.encode("utf-8", "replace") for text in texts)  # half a pair of surrogates is no text
    return Found(names, pa.array(column, pa.large_binary()).cast(pa.large_string()), counts)
