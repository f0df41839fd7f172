"""Checkpoints: written atomically, the newest few kept, read without executing anything in them."""

import argparse
import os
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from mopro_fast.errors import UserError

NAME = re.compile(r"step_(\d{9})\.pt$")


def save(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write ``folder/step_<step>.pt`` so that a crash leaves the whole file or none; then drop all but ``keep``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:09d}.pt"
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"cannot write the checkpoint {path}: {error.strerror}; earlier ones are untouched") from None
    for old in [*all_of(folder)[:-keep], *folder.glob("*.partial")]:  # partial: left by a crash while writing
        old.unlink()
    return path


def all_of(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(p for p in folder.glob("step_*.pt") if NAME.search(p.name))


def read(path: str | Path) -> Any:
    """What torch.save wrote, on the CPU. Only plain data is read; nothing in the file is executed."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        if zipfile.is_zipfile(path):  # PyTorch reads past the checksums that it writes
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise UserError(f"{path} is damaged: {damaged} does not match its checksum; copy it again")
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():  # saved options
            warnings.simplefilter("ignore")  # of pickles that are refused right after
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # whatever a broken or foreign file makes the unpickler raise
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code:
            raise UserError(f"{path} is refused: it holds code ({code[1]}), not only tensors; none was run") from None
        raise UserError(f"cannot read the checkpoint {path}: {type(error).__name__}; is it a whole file?") from None


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of this package onto the CPU."""
    state = read(path)
    if not isinstance(state, dict) or "model" not in state or "config" not in state:
        raise UserError(f"{path} is not a checkpoint of mopro_fast (it has no model and config)")
    return state
