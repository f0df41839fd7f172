"""Checkpoints and weights with something wrong in them: given a seed, always the same."""

import contextlib
import copy
import json
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mopro_fast.config import TrainConfig
from mopro_fast.training.loop import Trainer
from mopro_fast.training.tasks import task_of

CLASSES = ("a", "b")

JUNK: list[Any] = [
    None, True, False, 0, 1, 3, -1, 10**9, 2**40, 2**70, 10**5000, 0.5, -2.5, float("nan"), float("inf"), "", "x", "3",
    "\udcff\n", [], [None], [1, 2], [0, 0, 0], [-1, -1], [[0, 0]], ["a", "b", "c"], {}, {"a": None}, {1: 2}, (), (0, 0),
    b"bytes", 1j, np.float64(0.5), np.int64(3), np.bool_(True), torch.float32, torch.Size([2]),
]  # fmt: skip


def config(folder: Path, out: Path) -> TrainConfig:
    """Of a small training of folder/images."""
    c = TrainConfig()
    c.data.path, c.data.num_classes, c.data.cache = str(folder / "images"), 2, "device"
    c.data.image_size = c.data.eval_resize = 8
    c.data.threads, c.data.holdout = 1, "0.2"
    c.model.arch, c.model.width, c.model.stem, c.model.embed_dim = "resnet18", 1 / 64, "small", 4
    c.mopro.queue_size, c.mopro.start_clean, c.mopro.calibrate = 8, 1, True
    c.optim.epochs, c.optim.batch_size, c.optim.lr = 2, 4, 0.01
    c.run.out, c.run.device, c.run.tensorboard, c.run.checkpoint_every = str(out), "cpu", False, 1
    return c


def write_run(folder: Path) -> Path:
    """folder/images, and folder/run as it was in the middle of its second epoch; -> the run."""
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (folder / "images" / name).mkdir(parents=True)
        for i in range(10):
            Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(folder / f"images/{name}/{i}.png")
    trainer = Trainer(task_of(config(folder, folder / "run")))
    step = trainer._train_step

    def stop(*batch):
        if trainer.global_step == 6:
            raise KeyboardInterrupt
        step(*batch)

    trainer._train_step = stop
    with contextlib.suppress(KeyboardInterrupt):
        trainer.run()
    return folder / "run"


def tensors(t: Tensor, rng: random.Random) -> Any:
    """Another one in its place."""
    numbers = t.detach().clone()
    whole = numbers.reshape(-1)
    odd = {
        "a row more": lambda: torch.cat([whole, whole[:1]]) if t.dim() < 2 else torch.cat([numbers, numbers[:1]]),
        "a row less": lambda: numbers[:-1] if t.dim() else whole[:0],
        "flat": lambda: whole,
        "a dimension more": lambda: numbers[None],
        "empty": lambda: whole[:0],
        "turned": lambda: numbers.T if t.dim() == 2 else numbers[None, None],
        "float64": numbers.double,
        "float16": numbers.half,
        "int32": lambda: numbers.int(),
        "int64": numbers.long,
        "uint8": lambda: numbers.to(torch.uint8),
        "bool": numbers.bool,
        "complex": lambda: numbers.float() + 0j,
        "sparse": lambda: numbers.to_sparse(),
        "quantised": lambda: torch.quantize_per_tensor(numbers.float(), 0.1, 0, torch.quint8),
        "parameter": lambda: nn.Parameter(numbers.float()),
        "NaN": lambda: torch.full_like(numbers.float(), float("nan")),
        "infinite": lambda: torch.full_like(numbers.float(), float("inf")),
        "negative": lambda: -numbers.abs() - 7,
        "far": lambda: numbers * 0 + 10**9,
        "backwards": lambda: numbers.flip(0) if t.dim() else numbers,
        "a number": lambda: 3,
        "a list": lambda: whole[:9].tolist(),
        "array": lambda: whole[:9].numpy(),
        "vast": lambda: torch.zeros(1, dtype=t.dtype).expand(*([1 << 20] * max(1, t.dim()))),
        "vast and empty": lambda: torch.zeros([1 << 30, *([0] * max(0, t.dim() - 1))], dtype=t.dtype)[:0],
    }
    name = rng.choice([*odd])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # quantised tensors go
            return name, odd[name]()
    except RuntimeError:
        return "flat", whole


def mutated(entries: dict[str, Any], seed: int) -> tuple[dict[str, Any], str]:
    """-> a copy with one thing wrong, seldom two, and what."""
    rng = random.Random(seed)
    found, notes = copy.deepcopy(entries), []
    for _ in range(rng.choice([1, 1, 1, 2])):
        config = found.get("config")
        if isinstance(config, str) and rng.random() < 0.15:
            notes.append(_config(found, config, rng))
            continue
        place, where = found, []
        while True:
            names = [n for n in place if not where or rng.random() < 0.9] if isinstance(place, dict) else []
            if not names:
                break
            name = rng.choice(names)
            where.append(name)
            inner = place[name]
            if not (isinstance(inner, dict | list) and inner) or rng.random() < 0.3:
                notes.append(_change(place, name, rng, ".".join(map(str, where))))
                break
            place = inner
            if isinstance(place, list):
                i = rng.randrange(len(place))
                if isinstance(place[i], dict) and rng.random() < 0.8:
                    place = place[i]
                    continue
                place[i] = rng.choice(JUNK)
                notes.append(f"{'.'.join(map(str, where))}[{i}] = {_told(place[i])}")
                break
    return found, "; ".join(notes) or "nothing"


def _told(value: Any) -> str:
    return "an int" if type(value) is int else ascii(value)[:20]


def _config(found: dict[str, Any], config: str, rng: random.Random) -> str:
    values = json.loads(config)
    place, where = values, []
    while True:
        name = rng.choice([*place])
        where.append(name)
        if not (isinstance(place[name], dict) and place[name]) or rng.random() < 0.2:
            break
        place = place[name]
    what = _change(place, name, rng, "config." + ".".join(where))
    try:
        found["config"] = rng.choice([json.dumps(values)] * 5 + [config[:-9], "[" * 100_000, "3", "null"])
    except (TypeError, ValueError):
        found["config"] = values
    return what


def _change(place: dict, name: Any, rng: random.Random, where: str) -> str:
    value, way = place[name], rng.choice(["drop", "junk", "junk", "tensor", "tensor", "tensor", "rename", "nest"])
    if way == "tensor" and isinstance(value, Tensor):
        what, place[name] = tensors(value, rng)
        return f"{where}: {what}"
    if way == "drop":
        del place[name]
    elif way == "rename":
        place[rng.choice([f"{name}x", f"module.{name}", 7, ("a", 1), "", f"backbone.{name}", "fc.weight"])] = value
        del place[name]
    elif way == "nest":
        place[name] = rng.choice([{"state_dict": value}, {name: value}, [value], {"model": {"net": value}}])
    else:
        way, place[name] = "junk", rng.choice(JUNK)
        return f"{where} = {_told(place[name])}"
    return f"{where}: {way}"
