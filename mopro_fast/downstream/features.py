"""A frozen encoder's outputs for every image of an index, computed once and kept on disk."""

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mopro_fast import distributed, ops
from mopro_fast.checkpoints.formats import HEADS, digest
from mopro_fast.checkpoints.weights import load_encoder
from mopro_fast.config import DataConfig
from mopro_fast.data import inputs
from mopro_fast.data.index import Index
from mopro_fast.downstream.image_map import compute
from mopro_fast.errors import UserError
from mopro_fast.files import FEATURES, json_object, own_folder

_VERSION = "1"  # of what an output means: raise it, and everything is computed again
_OUTPUT = re.compile(r".+-[0-9a-f]{16}\.(npy|parts|lock)")
_RESULT = {"eval": {"checkpoint", "sets"}, "lowshot": {"checkpoint", "k"}, "probe": {"checkpoint", "lambdas"}}  # keys


@dataclass
class EncoderConfig:
    """How images reach the encoder."""

    image_size: int | None = None
    """Side of the central crop, in pixels (default: the checkpoint's)."""
    eval_resize: int | None = None
    """Shorter side before the crop (default: the checkpoint's, or image_size·256/224; of probe: image_size)."""
    batch_size: int = 256
    """Images per rank and step. Another one changes the last bits of the results."""
    threads: int = 0
    """Decoding threads per rank (0: this machine's cores divided by its ranks)."""
    trust_index: bool = False
    """Take the files as they were when they were checked, without looking at their sizes and times."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU of each local rank if there is one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast, faster on a GPU and less exact; scores near a threshold may fall on its other side."""


@contextlib.contextmanager
def folders(command: str, checkpoint: str, out: str, features: str | None, device: str) -> Iterator[None]:
    """--out and, if there is one, --features for this command: rank 0 keeps them for all ranks.

    features: "" stands for the folder of this name in --out. device: as for distributed.start.
    """
    distributed.start(device)
    with distributed.on_rank0(lambda: own_folder(Path(out), command, lambda folder: _made_by(folder, command))):
        before = json_object(Path(out, f"{command}.json")).get("checkpoint", checkpoint)
        if before != checkpoint:
            raise UserError(f"--out {out} holds the result of {before}: name another folder")
        if features is None:
            yield
            return
        kept, flag = Path(features or Path(out, FEATURES)), "--features "
        with distributed.on_rank0(lambda: own_folder(kept, FEATURES, _made_of_features, flag)):
            yield


def _made_by(folder: Path, command: str) -> str | None:
    """For own_folder: a result, or what an interrupted command left."""
    for name in (command, *_RESULT):
        if _RESULT[name] <= json_object(folder / f"{name}.json").keys():
            return name
    names = {path.name for path in folder.iterdir()}
    begun = re.compile(rf"\.{command}-[0-9a-f]{{16}}\.\d+\.jsonl")
    inner = "predictions" if command == "eval" else FEATURES
    only_outputs = {n for n in names if n[0] != "."} == {inner} and _made_of_features(folder / inner)
    return command if only_outputs or any(map(begun.fullmatch, names)) else None


def _made_of_features(folder: Path) -> str | None:
    return FEATURES if folder.is_dir() and any(_OUTPUT.fullmatch(path.name) for path in folder.iterdir()) else None


class Frozen:
    """The encoder of a checkpoint, in evaluation mode, and what it says of images.

    folder: where outputs are kept. filter: of resizing. margin: shorter side before the crop, by the crop's. Raises
    UserError for options that cannot be right.
    """

    def __init__(
        self,
        checkpoint: str,
        config: EncoderConfig,
        folder: Path,
        filter: Literal["linear", "cubic"] = "linear",
        margin: float | None = None,
    ) -> None:
        for name, least in (("batch_size", 1), ("image_size", 1), ("eval_resize", 1), ("threads", 0)):
            value = getattr(config, name)
            if value is not None and value < least:
                raise UserError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
        self.device = distributed.start(config.device)
        self.encoder, self.weights = load_encoder(checkpoint, self.device)
        self.bf16 = config.precision == "bf16"
        self.folder = folder
        self._trust_index = config.trust_index
        size = config.image_size or self.weights.image_size
        if size is None:
            raise UserError(f"{checkpoint} does not say at what size its images were seen: set --image-size")
        own_resize = self.weights.eval_resize if size == self.weights.image_size and margin is None else None
        self.loader_options: dict[str, Any] = {  # of EvalLoader; what the user left open is filled in
            "batch_size": config.batch_size,
            "image_size": size,
            "resize": config.eval_resize or own_resize or round(size * (margin or 256 / 224)),
            "filter": filter,
            "device": self.device,
            "threads": inputs.threads(DataConfig(threads=config.threads)),
        }

    def readable(self, index: Index, name: str) -> Index:
        """See inputs.readable. Collective: rank 0 looks."""
        threads, trust = self.loader_options["threads"], self._trust_index
        return distributed.by_rank0(lambda: inputs.readable(index, name, threads, trust=trust))

    def run(self, function: Callable[[Tensor], Any], images: Tensor) -> Any:
        """function(normalised images [N, 3, S, S]) for images uint8 [N, S, S, 3], in the precision asked for."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return function(ops.normalize(images))

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
        index = self.readable(index, name)
        o = self.loader_options
        parts = [_VERSION, meaning, index.digest(), index.left_out.tolist(), self.bf16]
        parts += [o["image_size"], o["resize"], o["filter"]]
        if index.checked is not None:
            parts.append(hashlib.sha256(np.ascontiguousarray(index.checked.size)).hexdigest())
        path = self.folder / f"{name}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}.npy"
        return compute(index, path, lambda images, _: self.run(function, images).float(), width, o)
