"""The runs whose checkpoints lie in tests/checkpoints, written by mopro_fast at commit ea549b1 (format 1).

Each ``NAME.pt.xz`` is a checkpoint in the middle of an epoch (of ``import``: what it writes), each ``NAME.jsonl`` the
log of the whole run, continued at that commit on a CPU with one thread. They are never written anew: users have such
files. An import of another checkpoint and its table of options are ``COMMANDS``.
"""

import hashlib
import json
import lzma
from pathlib import Path

import numpy as np
import torch
from PIL import Image

FOLDER = Path(__file__).with_name("checkpoints")
CLASSES, EACH, SIDE = 3, 12, 16
MODEL = ["--width", "0.015625", "--embed-dim", "2"]
DATA = ["--data", "images", "--num-classes", "3", "--image-size", "16", "--eval-resize", "16", "--cache", "device"]
STEPS = ["--batch-size", "8", "--epochs", "3", "--log-every", "1", "--checkpoint-every", "1", "--keep", "99"]
OPTIONS = [*DATA, *STEPS, "--device", "cpu", "--tensorboard", "False", "--warmup-epochs", "0", "--lr", "0.05"]
TRAIN = ["train", "demo", *OPTIONS, *MODEL, "--queue-size", "16", "--start-clean", "1", "--threshold", "0.4"]
COMMANDS = {
    "mopro": TRAIN,
    "ce": [*TRAIN, "--method", "ce"],
    "retrain": ["retrain", "weights.pt", "--cleaned", "cleaned.json", *OPTIONS],
    "finetune": ["finetune", "weights.pt", *OPTIONS, "--encoder-lr", "0.02", "--mixup", "0.4", "--share", "0.8"],
}
STEP = {"mopro": 6, "ce": 6, "retrain": 6, "finetune": 5}
"""The checkpoint that is kept: after so many steps. An epoch has 4, of finetune 3."""


def write_inputs(folder: Path) -> None:
    """images/, cleaned.json and weights.pt, the same everywhere."""
    rng = np.random.default_rng(0)
    names = [f"{c}/{i:02d}.png" for c in range(CLASSES) for i in range(EACH)]
    for split, each in (("train", EACH), ("val", 3)):
        for c in range(CLASSES):
            (folder / "images" / split / str(c)).mkdir(parents=True)
            for i in range(each):
                pixels = rng.integers(0, 160, (SIDE, SIDE, 3)) + np.array([90, 60, 30])[(np.arange(3) + c) % 3]
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"images/{split}/{c}/{i:02d}.png")
    labels = [(i * 7) % CLASSES for i in range(len(names) - 1)]
    (folder / "cleaned.json").write_text(json.dumps({"images": names[1:], "labels": labels}))
    (folder / "weights.pt").write_bytes(lzma.decompress((FOLDER / "weights.pt.xz").read_bytes()))


def write_checkpoint(name: str, path: Path) -> Path:
    """A kept checkpoint, as it was written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lzma.decompress((FOLDER / f"{name}.pt.xz").read_bytes()))
    return path


def this_machine() -> tuple[str, str]:
    """All that the last bits of a run on a CPU depend on: PyTorch, and what the CPU can do."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    about = sorted({line for line in lines if line.startswith(("vendor_id", "cpu family", "model\t", "flags"))})
    return torch.__version__, hashlib.sha256("\n".join(about).encode()).hexdigest()[:16]


WRITTEN_ON = ("2.13.0+cpu", "2094032cfb1bcd9d")
