"""A frozen encoder's outputs for every image of an index, computed once: over all ranks, resumable, kept on disk."""

import contextlib
import fcntl
import hashlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mopro_fast import distributed, ops
from mopro_fast.checkpoints.formats import HEADS, digest
from mopro_fast.checkpoints.weights import load_encoder
from mopro_fast.config import DataConfig
from mopro_fast.data import inputs
from mopro_fast.data.index import Index
from mopro_fast.data.pipeline import EvalLoader
from mopro_fast.distributed import by_rank0, gather_lists, world
from mopro_fast.downstream.in_order import in_order
from mopro_fast.errors import UserError
from mopro_fast.files import replacing

_VERSION = "1"  # of what an output means: raise it, and everything is computed again
_SAVE_EVERY = 60.0  # seconds of work that a kill may cost
_PART = 1 << 28  # bytes at which a part is written before that
_NAMED = 3  # lost images named in the message


@dataclass
class EncoderConfig:
    """How images reach the encoder."""

    image_size: int | None = None
    """Side of the central crop, in pixels (default: the checkpoint's)."""
    eval_resize: int | None = None
    """Shorter side before the crop (default: the checkpoint's, or image_size·256/224; of probe: image_size)."""
    batch_size: int = 256
    """Images per rank and step."""
    threads: int = 0
    """Decoding threads per rank (0: this machine's cores divided by its ranks)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU of each local rank if there is one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Autocast type of the encoder."""


class Frozen:
    """The encoder of a checkpoint, in evaluation mode, and what it says of images.

    folder: where outputs are kept. filter: of resizing. margin: shorter side before the crop, by the crop's.
    """

    def __init__(
        self,
        checkpoint: str,
        config: EncoderConfig,
        folder: Path,
        filter: Literal["linear", "cubic"] = "linear",
        margin: float | None = None,
    ) -> None:
        for name in ("batch_size", "image_size"):
            value = getattr(config, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        self.device = distributed.start(config.device)
        self.encoder, self.weights = load_encoder(checkpoint, self.device)
        self.bf16 = config.precision == "bf16"
        self.folder = folder
        size = config.image_size or self.weights.image_size
        if size is None:
            raise UserError(f"{checkpoint} does not say at what size its images were seen: set --image-size")
        own_resize = self.weights.eval_resize if size == self.weights.image_size and margin is None else None
        self._loader_options = {
            "batch_size": config.batch_size,
            "image_size": size,
            "resize": config.eval_resize or own_resize or round(size * (margin or 256 / 224)),
            "filter": filter,
            "device": self.device,
            "threads": inputs.threads(DataConfig(threads=config.threads)),
        }

    def features(self, index: Index, name: str) -> np.ndarray:
        """The pooled features, float32 [n, F], memory-mapped; NaN where an image cannot be read.

        name: of the file, before a digest of all that it depends on.
        """
        trunk = {n: t for n, t in self.encoder.state_dict().items() if not n.startswith(HEADS)}
        return self.outputs(index, name, self.encoder.features, self.encoder.feature_dim, f"features {digest(trunk)}")

    def outputs(
        self, index: Index, name: str, function: Callable[[Tensor], Tensor], width: int, meaning: str
    ) -> np.ndarray:
        """function(normalised images [N, 3, S, S]) -> [N, width] of every image; the rest as :meth:`features`.

        meaning: tells functions apart.
        """
        index = inputs.readable(index, name, self._loader_options["threads"])
        o = self._loader_options
        parts = [_VERSION, meaning, index.digest(), index.left_out.tolist(), self.bf16]
        parts += [o["image_size"], o["resize"], o["filter"]]
        if index.checked is not None:
            parts.append(hashlib.sha256(index.checked.size.tobytes()).hexdigest())
        path = self.folder / f"{name}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}.npy"

        def step(images: Tensor) -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                return function(ops.normalize(images)).float()

        return compute(index, path, step, width, o)


def compute(index: Index, path: Path, step: Callable[[Tensor], Tensor], width: int, loader_options: dict) -> np.ndarray:
    """step(uint8 images [N, S, S, 3]) -> [N, width] for every usable image; float32 [n, width], NaN for the others.

    Ranks share the work batch by batch, and what any of them has done stays in files beside ``path`` until all is
    there: an interrupted call goes on from them. The batches are the same whoever computes them, so are the bytes.
    """
    rank, ranks = world()
    size = loader_options["batch_size"]
    batches = [index.usable[first : first + size] for first in range(0, len(index.usable), size)]
    with _locked(path) if rank == 0 else contextlib.nullcontext():
        todo = by_rank0(lambda: None if path.is_file() else _missing(path, len(index), batches))
        if todo is not None:
            mine = [batches[i] for i in todo[rank::ranks]]
            lost = gather_lists(_work(index, mine, path, step, loader_options), patient=True)
            by_rank0(lambda: _join(path, len(index), width))
            if lost and rank == 0:
                named = ", ".join(index.name(row) for row in lost[:_NAMED])
                print(
                    f"{len(lost)} images could not be read and are left out: {named}{', ...' * (len(lost) > _NAMED)}; "
                    f"to try them again, remove {path}",
                    file=sys.stderr,
                )
    return np.load(path, mmap_mode="r")


def _work(
    index: Index, batches: list[np.ndarray], path: Path, step: Callable[[Tensor], Tensor], loader_options: dict
) -> list[int]:
    """Compute these batches of rows and write them into parts; -> the rows that could not be read."""
    if not batches:
        return []
    rank = world()[0]
    loader = EvalLoader(index, rank=0, world_size=1, batches=batches, **loader_options)
    done: list[tuple[np.ndarray, np.ndarray]] = []
    saved, held = time.monotonic(), 0
    quiet = rank != 0 or not sys.stderr.isatty()

    @torch.inference_mode()
    def computing(images: Tensor, _labels: Tensor, ids: Tensor) -> tuple[np.ndarray, np.ndarray]:
        return ids.cpu().numpy(), step(images).cpu().numpy()

    try:
        with tqdm(
            total=sum(map(len, batches)), desc=path.stem.rpartition("-")[0], unit=" images", disable=quiet
        ) as bar:
            for ids, values in in_order(computing, loader, loader_options["device"]):
                done.append((ids, values))
                bar.update(len(ids))
                held += done[-1][1].nbytes
                if held > _PART or time.monotonic() - saved > _SAVE_EVERY:
                    _write_part(path, done)
                    done, saved, held = [], time.monotonic(), 0
        lost = [lost.row for lost in loader.lost]
    finally:
        loader.close()
        if done:
            _write_part(path, done)
    return lost


def _write_part(path: Path, done: list[tuple[np.ndarray, np.ndarray]]) -> None:
    ids, values = (np.concatenate(column) for column in zip(*done, strict=True))
    name = hashlib.sha256(ids.tobytes()).hexdigest()[:16]  # another batch size gives other parts
    try:
        with replacing(str(path.with_suffix(f".{name}.part"))) as file:
            np.savez(file, ids=ids, values=values)
    except OSError as error:
        raise UserError(f"cannot write into {path.parent}: {error.strerror}: make room there") from None


def _parts(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.stem}.*.part"))


def _missing(path: Path, rows: int, batches: list[np.ndarray]) -> list[int]:
    """The numbers of the batches that are not whole in the parts."""
    there = np.zeros(rows, bool)
    for part in _parts(path):
        there[np.load(part)["ids"]] = True
    return [i for i, batch in enumerate(batches) if not there[batch].all()]


def _join(path: Path, rows: int, width: int) -> None:
    """Write ``path`` from its parts and remove them."""
    partial = path.with_suffix(".partial")
    try:
        out = np.lib.format.open_memmap(partial, "w+", np.float32, (rows, width))
        out[:] = np.nan
        for part in _parts(path):
            with np.load(part) as found:
                out[found["ids"]] = found["values"]
        out.flush()
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}: make room there") from None
    for part in _parts(path):
        part.unlink()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Refuse to work on the same file twice at a time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.with_suffix(".lock").open("w")
    except OSError as error:
        raise UserError(f"cannot write into {path.parent}: {error.strerror}: name another folder") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another process computes {path}: wait for it") from None
        yield
        path.with_suffix(".lock").unlink(missing_ok=True)
