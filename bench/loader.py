"""Images a second (two views each) of the loader, against the official pipeline in the same run.

    python bench/loader.py NAME=LIST=PX ... [--threads 2] [--batch 64] [--rounds 5] [--seconds 4] [--work FOLDER]

Each set is a list file ("path label" per line) and the side of its views. Every loader has a process of its own, all
with ``--threads`` threads or workers, and they take turns. Official: Pillow and a torch DataLoader, as DataLoader/ of
salesforce/MoPro; its transforms are torchvision's, written out, and torchvision's own where it can be imported. Each
delivers what its training step takes: the official one normalised float32 tensors, ours uint8 (the GPU normalises).
"""

import argparse
import importlib.util
import math
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import record
import torch
from PIL import Image, ImageEnhance

from mopro_fast.config import AugmentConfig
from mopro_fast.data.index import load_index
from mopro_fast.data.inputs import readable
from mopro_fast.data.pipeline import TrainLoader
from mopro_fast.ops.colour import IMAGENET_MEAN, IMAGENET_STD

OFFICIAL, TORCHVISION = "official", "official, torchvision"
PACKS = {"shards, 256 px": "256", "shards, original": "0"}
CLASSES = 1 << 20  # any label will do
WARM_UP = 6  # batches: more than any loader prepares while it waits for its turn


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", metavar="NAME=LIST=PX")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--work", type=Path, default=Path("runs/loader"))
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    a = parser.parse_args()
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    cases = []
    for given in a.sets:
        name, path, size = given.split("=")
        data = prepare(Path(path), a.work / name, a.batch)
        loaders = [(OFFICIAL, "cpu", data["files"])]
        if importlib.util.find_spec("torchvision"):
            loaders.append((TORCHVISION, "cpu", data["files"]))
        loaders += [(kind, device, folder) for device in devices for kind, folder in data.items()]
        children = [Child(kind, device, folder, int(size), a.threads, a.batch) for kind, device, folder in loaders]
        for _ in range(a.rounds):
            for child in children:
                child.turn(a.seconds)
        cases += [{"set": name, "px": int(size), **child.result(children[0])} for child in children]
        for case in cases[-len(children) :]:
            print(f"{name} {case['loader']} ({case['device']}): {case['images_per_second']['p50']:.0f} img/s")
    settings = {"threads": a.threads, "batch": a.batch, "rounds": a.rounds, "seconds": a.seconds}
    missing = [] if importlib.util.find_spec("torchvision") else ["torchvision's transforms (cannot be imported)"]
    missing += [] if "cuda" in devices else ["decoding on a GPU"]
    print(record.write("loader", {"settings": settings, "cases": cases, "not_measured": missing}, a.results))
    return 0


def prepare(listed: Path, work: Path, batch: int) -> dict[str, str]:
    """-> the set as a list of readable files, repeated until it fills batches enough, and as packs."""
    index = load_index(listed, "train", num_classes=CLASSES)
    index = readable(index, str(listed), len(os.sched_getaffinity(0)))
    lines = [f"{os.path.abspath(index.full_path(i))} {index.labels[i]}\n" for i in index.usable]
    work.mkdir(parents=True, exist_ok=True)
    (work / "list.txt").write_text("".join(lines * math.ceil(20 * batch / len(lines))))
    folders = {"files": str(work / "list.txt")}
    for kind, size in PACKS.items():
        folders[kind] = str(work / f"pack{size}")
        command = [sys.executable, "-m", "mopro_fast", "pack", str(work / "list.txt"), folders[kind], "--size", size]
        subprocess.run([*command, "--shard-images", "1000"], check=True)
    return folders


class Child:
    """A loader in its own process."""

    def __init__(self, kind: str, device: str, data: str, size: int, threads: int, batch: int) -> None:
        self.kind, self.device = kind, device
        self.pipe, theirs = get_context("spawn").Pipe()
        self.turns: list[dict] = []
        arguments = (theirs, kind, device, data, size, threads, batch)
        self.process = get_context("spawn").Process(target=serve, args=arguments)
        self.process.start()

    def turn(self, seconds: float) -> None:
        self.pipe.send(seconds)
        self.turns.append(self.pipe.recv())

    def result(self, official: "Child") -> dict:
        self.pipe.send(None)
        self.process.join()
        speeds = [turn["images"] / turn["seconds"] for turn in self.turns]
        ratios = [s * o["seconds"] / o["images"] for s, o in zip(speeds, official.turns, strict=True)]
        total = sum(turn["images"] for turn in self.turns)
        parts = sum((Counter(turn["parts"]) for turn in self.turns), Counter())
        return {
            "loader": self.kind,
            "device": self.device,
            "images_per_second": dict(zip(("p20", "p50", "p80"), np.percentile(speeds, (20, 50, 80)), strict=True)),
            "over_official": statistics.median(ratios),
            "cpu_ms_per_image": {name: 1000 * seconds / total for name, seconds in parts.items()},
            "memory_mb": max(turn["memory"] for turn in self.turns) / 1e6,
        }


def serve(pipe, kind: str, device: str, data: str, size: int, threads: int, batch: int) -> None:
    torch.set_num_threads(1)
    batches = official(data, size, threads, batch, kind) if kind in (OFFICIAL, TORCHVISION) else None
    batches = batches or ours(data, size, threads, batch, torch.device(device))
    while (seconds := pipe.recv()) is not None:
        for _ in range(WARM_UP):
            next(batches)
        before, began, images = cpu_seconds(), time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            next(batches)
            images += batch
        if device == "cuda":
            torch.cuda.synchronize()
        elapsed = time.perf_counter() - began
        pipe.send({"images": images, "seconds": elapsed, "parts": cpu_seconds() - before, "memory": memory()})
    os._exit(0)


def ours(data: str, size: int, threads: int, batch: int, device: torch.device) -> Iterator:
    index = readable(load_index(data, "train", num_classes=CLASSES), data, threads)
    loader = TrainLoader(
        index,
        batch_size=batch,
        rank=0,
        world_size=1,
        seed=0,
        image_size=size,
        augment=AugmentConfig(),
        device=device,
        threads=threads,
    )
    epoch = 0
    while True:
        yield from loader.epoch(epoch)
        epoch += 1


def official(data: str, size: int, workers: int, batch: int, kind: str) -> Iterator:
    files = [line.rsplit(maxsplit=1) for line in Path(data).read_text().splitlines()]
    views = torchvision_views(size) if kind == TORCHVISION else (PillowView(size, False), PillowView(size, True))
    images = Images(files, views)
    # One endless epoch: its workers never start anew. Real epochs are long, those of a small set are not.
    endless = torch.utils.data.RandomSampler(images, replacement=True, num_samples=1 << 40)
    yield from torch.utils.data.DataLoader(images, batch, sampler=endless, num_workers=workers)


class Images(torch.utils.data.Dataset):
    def __init__(self, files, views) -> None:
        self.files, self.views = files, views

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int):
        path, label = self.files[i]
        image = Image.open(path).convert("RGB")
        return self.views[0](image), self.views[1](image), int(label), i


def torchvision_views(size: int):
    from torchvision import transforms as t

    end = [t.RandomHorizontalFlip(), t.ToTensor(), t.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    crop = t.RandomResizedCrop(size, scale=(0.2, 1.0))
    colours = [t.RandomGrayscale(0.2), t.ColorJitter(0.4, 0.4, 0.4, 0.4)]
    return t.Compose([crop, *end]), t.Compose([crop, *colours, *end])


class PillowView:
    """What torchvision's transforms do to a Pillow image."""

    def __init__(self, size: int, colours: bool) -> None:
        self.size, self.colours = size, colours
        self.mean, self.std = (torch.tensor(x)[:, None, None] for x in (IMAGENET_MEAN, IMAGENET_STD))

    def __call__(self, image: Image.Image) -> torch.Tensor:
        image = self.crop(image)
        if self.colours:
            if random.random() < 0.2:
                image = image.convert("L").convert("RGB")
            image = self.jitter(image)
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image, np.uint8, copy=True)).permute(2, 0, 1).contiguous()
        return pixels.to(torch.float32).div(255).sub_(self.mean).div_(self.std)

    def crop(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        w, h, left, top = width, height, 0, 0
        for _ in range(10):
            area = width * height * random.uniform(0.2, 1)
            ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
            tried = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < tried[0] <= width and 0 < tried[1] <= height:
                w, h = tried
                left, top = random.randint(0, width - w), random.randint(0, height - h)
                break
        box = image.crop((left, top, left + w, top + h))
        return box.resize((self.size, self.size), Image.Resampling.BILINEAR)

    def jitter(self, image: Image.Image) -> Image.Image:
        kinds = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color, None]
        for kind in random.sample(kinds, 4):
            image = kind(image).enhance(random.uniform(0.6, 1.4)) if kind else self.hue(image)
        return image

    @staticmethod
    def hue(image: Image.Image) -> Image.Image:
        hue, saturation, value = image.convert("HSV").split()
        turned = np.array(hue, np.uint8)
        turned += np.uint8(int(random.uniform(-0.4, 0.4) * 255) % 256)
        return Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")


def cpu_seconds() -> Counter:
    """By what it was spent for: this process's threads, and its children."""
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    parts: Counter = Counter()
    for task in Path("/proc/self/task").iterdir():
        comm, seconds = _stat(task / "stat")
        name = names.get(int(task.name), comm)
        kinds = {"mopro_fast-read": "reading", "mopro_fast-view": "views", "[DALI]": "decoding"}
        parts[next((kind for start, kind in kinds.items() if name.startswith(start)), "other")] += seconds
    for child in _children():
        parts["workers"] += _stat(Path(f"/proc/{child}/stat"))[1]
    return parts


def _stat(path: Path) -> tuple[str, float]:
    try:
        name, _, rest = path.read_text().partition("(")[2].rpartition(")")
    except OSError:  # it has ended meanwhile
        return "", 0.0
    fields = rest.split()
    return name, (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _children() -> list[str]:
    tasks = Path("/proc/self/task").iterdir()
    return [child for task in tasks for child in (task / "children").read_text().split()]


def memory() -> float:
    """Bytes of this process and its children, shared pages counted once."""
    total = 0
    for process in ["self", *_children()]:
        rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
        total += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    return 1024.0 * total


if __name__ == "__main__":
    raise SystemExit(main())
