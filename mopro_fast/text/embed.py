"""``mopro-fast text embed FOLDER``: a vector for every text and every class."""

import hashlib
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import torch
import tyro
from torch import Tensor

from mopro_fast import distributed, files
from mopro_fast.console import escaped, tell
from mopro_fast.distributed import say
from mopro_fast.downstream import row_map
from mopro_fast.errors import UserError
from mopro_fast.text.folder import (
    ABOUT,
    CLASSES,
    EMBEDDINGS,
    TEXTS,
    Texts,
    digests,
    own,
    read_texts,
    read_vectors,
    set_aside,
    some_of,
)
from mopro_fast.text.hashing import WIDTH, Hashing
from mopro_fast.text.words import class_texts, clean

_BATCH = 1024  # texts
_PIECE = 1 << 14  # rows written at a time
_SAMPLE = 100  # images of a class whose texts are compared with all classes'
_COMPARED = 1 << 12  # of these, at a time
_NPY = "npy:"


@dataclass
class Embed:
    """A vector for every text and every class: embeddings.npy and classes.npy beside the texts."""

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """What `mopro-fast text read` wrote."""
    classes: str | None = None
    """The classes' texts: a table with the columns label, name and description (default: the classes' names in the
    data)."""
    wordnet: str | None = None
    """For classes that are synsets: their texts from WordNet, its folder dict or nltk's corpora/wordnet."""
    encoder: str = "hash"
    """hash: words that texts share, nothing to download; minilm: all-MiniLM-L6-v2; npy:FILE: your own vectors, [n, E]
    in the order of texts.parquet, which count by their length where texts are averaged."""
    class_embeddings: str | None = None
    """With npy:FILE: the classes' vectors, a .npy file [C, E]."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU of each local rank if there is one."""


class Encoder(NamedTuple):
    of: Callable[[np.ndarray], np.ndarray | Tensor]
    """Rows of the texts that it was made for -> float32 [len(rows), width]."""
    width: int
    identity: str
    """What its vectors depend on."""


def main(argv: list[str]) -> int:
    o = tyro.cli(Embed, args=argv, prog="mopro-fast text embed")
    folder = Path(o.folder)
    device = distributed.start(o.device)
    texts = read_texts(folder)  # before the folder is made anyone's
    with own(folder):
        said = embed(o, folder, texts, device)
    if distributed.world()[0] == 0:
        tell(said)
    distributed.leave()
    return 0


def embed(o: Embed, folder: Path, texts: Texts, device: torch.device) -> str:
    """Write embeddings.npy, classes.npy and text.json; -> what to say. Raises a UserError."""
    if o.encoder not in ("hash", "minilm") and not o.encoder.startswith(_NPY):
        raise UserError(f"--encoder {o.encoder} is none of hash, minilm and npy:FILE")
    given = o.encoder.startswith(_NPY)
    if given != (o.class_embeddings is not None):
        raise UserError("--encoder npy:FILE and --class-embeddings FILE go together: give both, or another encoder")
    for name in ("classes", "wordnet"):
        if given and getattr(o, name) is not None:
            raise UserError(f"--{name} has no effect with --class-embeddings: leave one of them out")
    about: dict[str, Any] = {"texts": files.sha256_of(folder / TEXTS), "encoder": o.encoder}
    if given:
        vectors = _given(o, texts)
        distinct, (images, classes) = np.arange(len(texts)), vectors
        about |= {"identity": [files.sha256_of(v.filename) for v in vectors]}
    else:
        names, of_classes = class_texts(o.classes, o.wordnet, texts.about["classes"], texts.num_classes)
        encoded = texts.text.cast(pa.large_string()).combine_chunks().dictionary_encode()
        distinct = encoded.indices.to_numpy(zero_copy_only=False)
        _tell_equal(names, of_classes)
        # Words that cleaning takes from images' texts would only blur a class's vector of words.
        said = [clean(text) or text for text in of_classes] if o.encoder == "hash" else of_classes
        every = pa.chunked_array([encoded.dictionary, pa.array(said, pa.large_string())])
        encoder = _encoder(o.encoder, every, device)
        found = _encode(folder, encoder, every, device)
        images, classes = found[: len(encoded.dictionary)], found[len(encoded.dictionary) :]
        about |= {"identity": encoder.identity}
        about["classes"] = [{"name": n, "text": t} for n, t in zip(names, of_classes, strict=True)]
    distributed.by_rank0(lambda: _write(folder, images, distinct, classes, about))
    said = f"{folder / EMBEDDINGS}: {len(texts)} texts and {len(classes)} classes, {images.shape[1]} numbers each"
    if few := texts.named(_doubtful(texts.labels, images, distinct, classes)):
        said += (
            f"\nin {len(few):,} of {len(classes):,} classes more texts are nearest to one other class's text than to "
            f"their own: {some_of(few)}: look whether these classes' texts are right"
        )
    return said


def _encoder(name: str, texts: pa.ChunkedArray, device: torch.device) -> Encoder:
    """texts: strings, all that will be encoded."""
    if name == "hash":
        return Encoder(Hashing(texts), WIDTH, Hashing.identity)
    from mopro_fast.text.minilm import MiniLM

    model = MiniLM(device)
    return Encoder(
        lambda rows: model([text or " " for text in texts.take(pa.array(rows)).to_pylist()]),
        model.width,
        model.identity,
    )


def _encode(folder: Path, encoder: Encoder, texts: pa.ChunkedArray, device: torch.device) -> np.ndarray:
    """float16 [len(texts), width], memory-mapped."""

    @torch.inference_mode()
    def one(rows: np.ndarray) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(rows), torch.as_tensor(encoder.of(rows)).half()

    def values(batches: list[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        yield from row_map.in_order(one, ((rows,) for rows in batches), device)

    sha = hashlib.sha256(encoder.identity.encode())
    for text in texts.chunks:
        for part in text.buffers():
            sha.update(part or b"")
    batches = [np.arange(i, min(i + _BATCH, len(texts))) for i in range(0, len(texts), _BATCH)]
    path = folder / f"texts-{sha.hexdigest()[:16]}.npy"
    return row_map.compute(path, len(texts), encoder.width, batches, values, dtype=np.float16, unit="texts")


def _clear(folder: Path) -> None:
    """Remove what :func:`_encode` has written, also in calls that were interrupted, with other texts."""
    for left in folder.iterdir():
        if re.fullmatch(r"texts-[0-9a-f]{16}\.npy", left.name):
            left.unlink()
        elif re.fullmatch(r"texts-[0-9a-f]{16}\.parts", left.name):
            shutil.rmtree(left)


def _tell_equal(names: list[str], texts: list[str]) -> None:
    """Say which classes cannot be told apart."""
    first: dict[str, int] = {}
    equal = [(first[text], i) for i, text in enumerate(texts) if first.setdefault(text, i) != i]
    if equal:
        i, j = equal[0]
        such = f"{i} ({escaped(names[i])}) and {j} ({escaped(names[j])})"
        say(f"equal texts of classes, which therefore cannot be told apart: {len(equal)}, such as {such}")


def _doubtful(labels: np.ndarray, images: np.ndarray, distinct: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """int64: the classes of whose images, a sample, more have a text nearest to one other class's text than to its own.

    Such a class's text says little of its images, or stands beside the wrong class. labels: int64 [n]; -1: none.
    images, distinct: image i's vector is ``images[distinct[i]]``.
    """
    rows, end = np.flatnonzero(labels >= 0), len(classes)
    rows = rows[labels[rows].argsort(kind="stable")]
    count = np.bincount(labels[rows], minlength=end)
    place = np.arange(len(rows)) - (count.cumsum() - count)[labels[rows]]  # within its class
    rows = rows[place % (-(-count // _SAMPLE))[labels[rows]] == 0]
    units = classes / np.maximum(np.linalg.norm(classes.astype(np.float64), axis=1, keepdims=True), 1e-300)
    units = units.astype(np.float32)
    pairs = [np.empty(0, np.int64)]
    for some in np.split(rows, range(_COMPARED, len(rows), _COMPARED)):
        x, label = images[distinct[some]].astype(np.float32), labels[some]
        cosines, least = x @ units.T, 1e-6 * np.linalg.norm(x, axis=1)
        greatest = cosines.max(1)
        own = cosines[np.arange(len(some)), label] > greatest - least  # also where classes' texts are equal
        pairs.append((label * end + np.where(own, label, cosines.argmax(1)))[greatest > least])
    pairs, count = np.unique(np.concatenate(pairs), return_counts=True)
    label, nearest = np.divmod(pairs, end)
    own, other = np.zeros((2, end), np.int64)
    np.maximum.at(own, label[label == nearest], count[label == nearest])
    np.maximum.at(other, label[label != nearest], count[label != nearest])
    return np.flatnonzero(other > own)


def _write(folder: Path, images: np.ndarray, distinct: np.ndarray, classes: np.ndarray, about: dict[str, Any]) -> None:
    old = files.json_object(folder / ABOUT)
    if {name: old.get(name) for name in about} != about:
        set_aside(folder)
    (folder / ABOUT).unlink(missing_ok=True)  # what it says is not of the files below
    with files.replacing(folder / EMBEDDINGS) as file:
        shape, kind = (len(distinct), images.shape[1]), "<f2" if images.dtype == np.float16 else "<f4"
        np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": shape})
        for first in range(0, len(distinct), _PIECE):
            file.write(images[distinct[first : first + _PIECE]].astype(kind))
    with files.replacing(folder / CLASSES) as file:
        np.save(file, classes.astype("<f4"))
    files.write_json(folder / ABOUT, about | {"vectors": digests(folder)})
    _clear(folder)


def _given(o: Embed, texts: Texts) -> list[np.memmap]:
    """The vectors of --encoder npy:FILE and --class-embeddings."""
    found = []
    for name, rows, what in (
        (o.encoder.removeprefix(_NPY), len(texts), "texts"),
        (o.class_embeddings, texts.num_classes, "classes"),
    ):
        found.append(read_vectors(name, rows, what, "give a vector for each, in order"))
        empty = 0
        for first in range(0, rows, _PIECE):
            some = found[-1][first : first + _PIECE]
            with np.errstate(over="ignore"):
                kept = some.astype(np.float32)
            lost = ~np.isfinite(kept).all(1) | (some.any(1) & ~kept.any(1))
            for i in np.flatnonzero(lost)[:1].tolist():
                raise UserError(
                    f"{name}: vector {first + i} has numbers that are not finite, or that float32 cannot hold"
                )
            empty += int((~kept.any(1)).sum())
        if empty:
            say(f"{name}: vectors that are 0, as of {what} without a text: {empty:,}")
    if found[0].shape[1] != found[1].shape[1]:
        raise UserError(
            f"the images' vectors have {found[0].shape[1]} numbers and the classes' {found[1].shape[1]}: take one "
            "encoder"
        )
    return found
