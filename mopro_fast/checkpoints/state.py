"""What a checkpoint of this package holds: a run's state, written whole or not at all, read without executing anything.

``RunState`` names the entries of the file; beside them is ``format``. A later FORMAT is refused; those of format 1 (no
number in the file: commit ea549b1 and before) are read by ``_of_format_1``.
"""

import argparse
import dataclasses
import errno
import json
import os
import re
import warnings
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mopro_fast import __version__
from mopro_fast.checkpoints import numpy_scalars
from mopro_fast.checkpoints.fields import Damaged, check, require, said, settings
from mopro_fast.errors import UserError, require_resources
from mopro_fast.files import replacing, require_regular, writing

FORMAT = 2
NAME = re.compile(r"step_(\d{9})\.pt$")
_LATER = {"held_out", "held_out_labels", "winners", "agreement", "classes", "imported"}
"""Fields that not every checkpoint of this format has."""
_OF_EVERY_RUN = {"model", "config", "epoch", "step", "optimizer", "left_out"}
"""Fields that format 1 has wherever it has data_digest."""


@dataclass
class RunState:
    """A run between two steps; read from a file its tensors are on the CPU. With the defaults it is weights alone."""

    config: dict[str, Any]
    """The settings, as in config.json."""
    model: dict[str, Tensor]
    """The model's state dict: float32 masters, running statistics, queue, prototypes."""
    optimizer: dict[str, Any] | None = None
    """The state dict of torch.optim.SGD."""
    epoch: int = 0
    """The epoch of the next step, 0-based."""
    step: int = 0
    """The next step in that epoch, 0-based."""
    initial: str = ""
    """Retrain and finetune: the digest of the weights that the run began with."""
    data_digest: str = ""
    """Index.digest() of the training data, whose labels are those of the run."""
    left_out: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """int64: rows of the index that could not be read when the run began."""
    held_out: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """int64 [n]: rows of the index that are not trained on, of ``--holdout``."""
    held_out_labels: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """int64 [n]: the labels that these images are judged by."""
    ranks: int = 1
    """The number of ranks."""
    log_bytes: int = 0
    """Length of log.jsonl."""
    replaced: list[int] = field(default_factory=lambda: [0, 0])
    """Images that could not be read any more: in this epoch, in the run."""
    counts: list[int] = field(default_factory=lambda: [0, 0])
    """Steps that ``sums`` cover: since the last entry of the log, in this epoch."""
    sums: dict[str, Tensor] = field(default_factory=dict)
    """Of every metric the sums over those steps, float64 [ranks, 2]."""
    assigned: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32))
    """int32 [images]: the label each image was trained with in this epoch, or labels.REMOVED or UNSEEN."""
    winners: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """int64 [C, 2], TrainStep.winners of all ranks."""
    agreement: list[float] = field(default_factory=list)
    """Of each epoch from the last one before labels were corrected, the percentage of the held-out images whose label
    is the model's first guess."""
    classes: list[str] | None = None
    """The names of the classes in their order, where the training data has them."""
    imported: bool = False
    """Whether `mopro-fast import` wrote the file: it may write it anew."""
    version: str = __version__
    """The version of mopro_fast that wrote it."""


def write(file: Any, state: RunState) -> None:
    """Into a path or an open file."""
    entries = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    torch.save({"format": FORMAT, **entries, "config": json.dumps(state.config)}, file)


def save(folder: Path, step: int, state: RunState, keep: int) -> Path:
    """Write ``folder/step_<step>.pt``, then drop all but the newest ``keep`` and what crashes left."""
    path = folder / f"step_{step:09d}.pt"
    with writing(folder, "name another --out"):
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(str(path)) as file:
            write(file, state)
        for old in [*all_of(folder)[:-keep], *folder.glob(".step_*.tmp"), *folder.glob("*.partial")]:
            old.unlink()
    return path


def all_of(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(p for p in folder.glob("step_*.pt") if NAME.search(p.name))


def load(path: str | Path) -> RunState:
    """Read a checkpoint of this package, of this format or an earlier one. Raises a UserError for anything else."""
    found = read(path)
    if not is_ours(found):
        raise Damaged(f"{path} is not a checkpoint of mopro_fast (it has no model and config)")
    return checked(found, path)


def is_ours(found: Any) -> bool:
    """Whether these entries are of a checkpoint of this package, if perhaps a damaged one."""
    if not isinstance(found, dict):
        return False
    if found.keys() & {"data_digest", "log_bytes"}:
        return bool(found.keys() & {"model", "config"})
    model, config = found.get("model"), found.get("config")
    named = isinstance(model, dict) and any(str(name).startswith("encoder_q.") for name in model)
    return named and ("format" in found or isinstance(config, str))


def checked(found: dict[str, Any], path: str | Path) -> RunState:
    """The fields of such a file. Raises Damaged for the first one that is missing or is not what it must be."""
    fields = {f.name for f in dataclasses.fields(RunState)}
    number = found.get("format", 1)
    require("format" not in found or (type(number) is int and number > 1), path, "format", number, f"{FORMAT}")
    needed = fields - _LATER if number > 1 else _OF_EVERY_RUN if "data_digest" in found else ["model", "config"]
    for name in sorted(needed):
        if name not in found:
            raise Damaged(f"{path} is damaged: it has no {name}")
    if number == 1:
        found = _of_format_1(found)
    found = {k: v for k, v in found.items() if k in fields} | {"config": settings(found["config"], path)}
    check(found, path)
    return RunState(**found)


def _of_format_1(found: dict[str, Any]) -> dict[str, Any]:
    """Re-training and fine-tuning had one tensor [ranks, 2, 3] of sums: of loss, of accuracy, of steps."""
    sums = found.get("sums")
    if isinstance(sums, Tensor) and sums.dim() == 3 and len(sums) and sums.shape[1:] == (2, 3):
        found = found | {
            "sums": {"loss": sums[:, :, 0], "acc_cls": sums[:, :, 1]},
            "counts": sums[0, :, 2].int().tolist(),
        }
    return found


def read(path: str | Path) -> Any:
    """What torch.save wrote, on the CPU. Only plain data is read; nothing in the file is executed."""
    path = Path(path)
    try:
        require_regular(path)
    except (FileNotFoundError, NotADirectoryError):
        raise (Damaged if os.path.lexists(path) else UserError)(f"no checkpoint at {path}") from None
    except OSError as error:
        kind = Damaged if error.errno in (errno.EINVAL, errno.ELOOP) else UserError
        raise kind(f"cannot read the checkpoint {path}: {error.strerror}") from None
    try:
        if zipfile.is_zipfile(path):  # PyTorch reads past the checksums that it writes
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise Damaged(f"{path} is damaged: {damaged} does not match its checksum; copy it again")
        known = [argparse.Namespace, *numpy_scalars.GLOBALS]  # saved options, accuracies beside the weights
        with torch.serialization.safe_globals(known), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that are refused right after
            found = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # whatever a broken or foreign file makes the unpickler raise
        require_resources(error, path)
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code:
            raise Damaged(
                f"{path} is refused: it holds code ({code[1]}), not only tensors; none was run: save its weights alone"
            ) from None
        raise Damaged(f"cannot read the checkpoint {path}: {type(error).__name__}; is it a whole file?") from None
    number = found.get("format") if isinstance(found, dict) else None
    if type(number) is int and number > FORMAT and is_ours(found):
        newer = said(found.get("version")).strip("'")
        raise UserError(
            f"{path} was written by a newer mopro_fast, {newer} (checkpoint format {said(number)}, this is "
            f"{__version__}, which reads up to {FORMAT}): install that version or a later one"
        )
    return found
