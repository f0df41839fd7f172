"""The trainer as a user runs it, bit for bit: python tests/gpu_trainer.py nccl|resume [--device D] [--small] FOLDER

nccl: one rank of torchrun that goes the way of many, with DDP and NCCL (on a CPU gloo), ends
with the bits of a run without it; of MoPro, and of CAPro, which has a frozen encoder in its first epoch.
resume: a run stopped by SIGTERM and one killed end, gone on with, with the bits of a run left alone.
FOLDER, which must not be there yet, gets the runs and their images. --small: a tiny encoder, for a CPU.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent
# Prototypes begin in the second epoch, correction in the third. A run is interrupted at a step of the second that is
# replayed from a graph, two steps after a checkpoint.
EPOCHS, STEPS, CHECKPOINT, INTERRUPTED = 3, 10, 4, 6
COMMON = {
    "num-classes": 4, "epochs": EPOCHS, "start-clean": 2, "threshold": 0.3, "calibrate": False, "lr": 0.02,
    "cache": "device", "deterministic": True, "log-every": 1, "checkpoint-every": CHECKPOINT, "keep": 2,
    "tensorboard": False,
}  # fmt: skip
CAPRO = {"method": "capro", "init-proto": 0, "unfreeze-epoch": 1}
FULL = {"batch-size": 64, "arch": "resnet50", "stem": "imagenet", "image-size": 112, "queue-size": 256}
SMALL = {"batch-size": 8, "arch": "resnet18", "width": 1 / 16, "embed-dim": 8, "image-size": 16, "queue-size": 32}

RUNS: list["Run"] = []


class Mistake(Exception):
    """What is not as it must be, in one line."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("nccl", "resume"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--small", action="store_true")
    a = parser.parse_args()
    options = COMMON | (SMALL if a.small else FULL) | {"device": a.device}
    options["eval-resize"] = side = options["image-size"] * 8 // 7
    a.folder.mkdir(parents=True)
    write_images(a.folder / "images/train", STEPS * options["batch-size"], side)
    write_images(a.folder / "images/val", options["batch-size"], side)
    try:
        {"nccl": nccl, "resume": resume}[a.what](a.folder.resolve(), options)
    except Mistake as mistake:
        print(f"{a.what}: {mistake}")
        return 1
    finally:
        for run in RUNS:
            run.process.kill()
    return 0


def nccl(folder: Path, options: dict) -> None:
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", "1", "tests/one_rank.py")
    write_anchors(folder / "anchors.parquet", STEPS * options["batch-size"])
    pairs = {}
    for name, more in {"": {}, "capro-": CAPRO | {"anchors": folder / "anchors.parquet"}}.items():
        own = options | more
        pairs[name] = Run(folder / f"{name}plain", own), Run(folder / f"{name}torchrun", own, torchrun)
    for name, (plain, ranked) in pairs.items():
        plain.end()
        ranked.end(0, f"one rank: DDP {3 if name else 1} all_gather_into_tensor")  # frozen, unfrozen
        print(f"nccl: under torchrun {same(plain, ranked)}")


def resume(folder: Path, options: dict) -> None:
    whole = Run(folder / "whole", options)
    stopped = Run(folder / "stopped", options, interrupt=signal.SIGTERM)
    killed = Run(folder / "killed", options, interrupt=signal.SIGKILL)
    stopped.end(128 + signal.SIGTERM, "the same command goes on from there")
    killed.end(-signal.SIGKILL)
    resumed = {run: Run(run.folder, options) for run in (stopped, killed)}
    whole.end()
    for run, again in resumed.items():
        again.end(0, f"resuming {run.saved} at epoch 2, step")
        print(f"resume: {run.name}, resumed from {run.saved.name}, {same(whole, again)}")


class Run:
    """A training in a process of its own. Its lines are printed as they come; one of them interrupts it."""

    def __init__(self, folder: Path, options: dict, module: tuple = ("mopro_fast",), interrupt: int = 0) -> None:
        self.name, self.folder, self.interrupt, self.text = folder.name, folder, interrupt, ""
        if not folder.exists():  # images of its own: a check writes beside them, and two refuse to meet
            shutil.copytree(folder.parent / "images", folder / "images")
        options = options | {"data": folder / "images", "out": folder / "run"}
        words = [str(x) for name, value in options.items() for x in (f"--{name}", value)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", *module, "train", "small", *words],
            cwd=ROOT,
            # several run at a time
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.reader = Thread(target=self._read, daemon=True)
        self.reader.start()
        RUNS.append(self)

    def _read(self) -> None:
        for line in self.process.stdout:
            print(f"{self.name}: {line}", end="", flush=True)
            self.text += line
            if self.interrupt and line.startswith(f"epoch 2/{EPOCHS} step {INTERRUPTED}/"):
                self.process.send_signal(self.interrupt)

    def end(self, status: int = 0, says: str = "") -> None:
        """Wait for it; it must end with this status and have said that."""
        from mopro_fast.checkpoints import state as checkpoint  # while the runs import it, too

        found = self.process.wait()
        self.reader.join()
        if found != status:
            last = self.text.strip().rpartition("\n")[2]
            raise Mistake(f"{self.name} ended with status {found}, not {status}; it last said: {last}")
        if says not in self.text:
            raise Mistake(f"{self.name} did not say {says!r}")
        self.saved = checkpoint.all_of(self.folder / "run/checkpoints")[-1]


def same(one: Run, other: Run) -> str:
    """How much of two runs is the same; a Mistake names the first difference."""
    import torch

    from mopro_fast.checkpoints import state as checkpoint

    states = [vars(checkpoint.load(run.saved)) for run in (one, other)]
    for run, state in zip((one, other), states, strict=True):
        del state["config"]  # it names the folder
        state["log.jsonl"] = (run.folder / "run/log.jsonl").read_text().splitlines()
        state["labels.pt"] = torch.load(run.folder / "run/labels.pt", weights_only=True)
    if found := difference(*states, ""):
        raise Mistake(f"{one.name} and {other.name} differ in {found}")
    if states[0]["epoch"] != EPOCHS:
        raise Mistake(f"{one.name} ended in epoch {states[0]['epoch']}")
    weights, log = states[0]["model"], states[0]["log.jsonl"]
    top1 = next(entry["top1"] for entry in map(json.loads, reversed(log)) if "top1" in entry)
    return f"the same bits in {len(weights)} weights, {len(log)} lines of log and all else; top-1 {top1:.1f} %"


def difference(a: Any, b: Any, key: str) -> str | None:
    """The first key under which two states differ in a bit."""
    import torch

    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        pairs = [(a[name], b[name], f"{key}[{name!r}]") for name in a]
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        pairs = [(x, y, f"{key}[{i}]") for i, (x, y) in enumerate(zip(a, b, strict=True))]
    elif isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        a, b = (x.new_empty(x.shape).copy_(x).flatten().view(torch.uint8) for x in (a, b))
        return None if torch.equal(a, b) else key
    else:
        return None if a == b else f"{key}: {a} and {b}"
    return next((found for pair in pairs if (found := difference(*pair))), None)


def write_anchors(path: Path, count: int) -> None:
    """The first eight of ``count`` images."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = [f"class{i % 4}/{i}.jpg" for i in range(count)]
    pq.write_table(pa.table({"path": names, "anchor": [int(i < 8) for i in range(count)]}), path)


def write_images(folder: Path, count: int, side: int) -> None:
    """JPEGs of four classes: stripes across, along, both and none, under noise."""
    g = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side] * 8 * np.pi / side
    for i in range(count):
        along, across = i % 4 // 2, i % 2
        stripes = along * np.sin(x + g.uniform(0, 6)) + across * np.sin(y + g.uniform(0, 6))
        pixels = 128 + 30 * stripes[..., None] + g.normal(0, 20, (side, side, 3))
        path = folder / f"class{i % 4}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)


if __name__ == "__main__":
    sys.exit(main())
