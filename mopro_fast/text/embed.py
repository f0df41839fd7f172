"""``mopro-fast text embed FOLDER``: a vector for every text and every class."""

import hashlib
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
from mopro_fast.console import tell
from mopro_fast.downstream import row_map
from mopro_fast.errors import UserError
from mopro_fast.text.folder import (
    ABOUT,
    CLASSES,
    EMBEDDINGS,
    TEXTS,
    Texts,
    own,
    read_texts,
    read_vectors,
    set_aside,
)
from mopro_fast.text.hashing import Hashing
from mopro_fast.text.words import class_texts

_BATCH = 1024  # texts
_PIECE = 1 << 14  # rows written at a time
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
    in the order of texts.parquet."""
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
        about |= {"identity": hashlib.sha256(repr([files.sha256_of(v.filename) for v in vectors]).encode()).hexdigest()}
    else:
        names, of_classes = class_texts(o.classes, o.wordnet, texts.about["classes"], texts.num_classes)
        encoded = texts.text.cast(pa.large_string()).combine_chunks().dictionary_encode()
        distinct = encoded.indices.to_numpy(zero_copy_only=False)
        every = pa.chunked_array([encoded.dictionary, pa.array(of_classes, pa.large_string())])
        encoder = _encoder(o.encoder, every, device)
        found, path = _encode(folder, encoder, every, device)
        images, classes = found[: len(encoded.dictionary)], found[len(encoded.dictionary) :]
        about |= {"identity": encoder.identity}
        about["classes"] = [{"name": n, "text": t} for n, t in zip(names, of_classes, strict=True)]
    distributed.by_rank0(lambda: _write(folder, images, distinct, classes, about))
    if not given and distributed.world()[0] == 0:
        path.unlink(missing_ok=True)
        for left in folder.glob("texts-*.parts"):  # of a call that was interrupted, with other texts
            shutil.rmtree(left)
    return f"{folder / EMBEDDINGS}: {len(texts)} texts and {len(classes)} classes, {images.shape[1]} numbers each"


def _encoder(name: str, texts: pa.ChunkedArray, device: torch.device) -> Encoder:
    """texts: strings, all that will be encoded."""
    if name == "hash":
        return Encoder(Hashing(texts), Hashing.width, Hashing.identity)
    from mopro_fast.text.minilm import MiniLM

    model = MiniLM(device)
    return Encoder(
        lambda rows: model([text or " " for text in texts.take(pa.array(rows)).to_pylist()]),
        model.width,
        model.identity,
    )


def _encode(folder: Path, encoder: Encoder, texts: pa.ChunkedArray, device: torch.device) -> tuple[np.ndarray, Path]:
    """float16 [len(texts), width], memory-mapped; and where it lies."""

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
    return row_map.compute(path, len(texts), encoder.width, batches, values, dtype=np.float16, unit="texts"), path


def _write(folder: Path, images: np.ndarray, distinct: np.ndarray, classes: np.ndarray, about: dict[str, Any]) -> None:
    if files.json_object(folder / ABOUT) != about:
        set_aside(folder)
    (folder / ABOUT).unlink(missing_ok=True)  # what it says is not of the files below
    with files.replacing(folder / EMBEDDINGS) as file:
        shape = (len(distinct), images.shape[1])
        np.lib.format.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": shape})
        for first in range(0, len(distinct), _PIECE):
            some = images[distinct[first : first + _PIECE]]
            if some.dtype != np.float16:  # own vectors, which float16 may not hold as they are
                some = _units(some)
            file.write(some.astype("<f2"))
    with files.replacing(folder / CLASSES) as file:
        np.save(file, classes.astype("<f4") if classes.dtype == np.float16 else _units(classes).astype("<f4"))
    files.write_json(folder / ABOUT, about)


def _units(vectors: np.ndarray) -> np.ndarray:
    """float64 [n, E], of length 1, or 0."""
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    return np.divide(vectors, norms, where=norms > 0, out=np.zeros(vectors.shape))


def _given(o: Embed, texts: Texts) -> list[np.memmap]:
    """The vectors of --encoder npy:FILE and --class-embeddings."""
    found = []
    for name, rows, what in (
        (o.encoder.removeprefix(_NPY), len(texts), "texts"),
        (o.class_embeddings, texts.num_classes, "classes"),
    ):
        found.append(read_vectors(name, rows, what, "give a vector for each, in order"))
        for first in range(0, rows, _PIECE):
            for i in np.flatnonzero(~np.isfinite(found[-1][first : first + _PIECE]).all(1))[:1].tolist():
                raise UserError(f"{name}: vector {first + i} has a number that is not finite")
    if found[0].shape[1] != found[1].shape[1]:
        raise UserError(
            f"the images' vectors have {found[0].shape[1]} numbers and the classes' {found[1].shape[1]}: take one "
            "encoder"
        )
    return found
