"""A small checkpoint and small images of its classes, for the tools that judge a trained encoder."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mopro_fast.config import TrainConfig, recipe
from mopro_fast.models.build import build

SIDE = 16
CLASSES = ("n01", "n02", "n03", "n04", "n05", "n06")


def config(classes: int = len(CLASSES)) -> TrainConfig:
    c = recipe("demo")
    c.data.path, c.run.out = "data", "out"
    c.data.num_classes, c.data.image_size, c.data.eval_resize = classes, SIDE, SIDE
    c.model.width = 0.125
    return c


def write_checkpoint(path: Path, classes: int = len(CLASSES), seed: int = 0) -> Path:
    """Random weights in this package's format; BatchNorm as after some training."""
    torch.manual_seed(seed)
    model = build(config(classes))
    state = model.state_dict()
    for name, value in state.items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2)
    torch.save({"model": state, "config": config(classes).to_json(), "epoch": 3}, path)
    return path


def picture(c: int, rng: np.random.Generator, noise: float = 60, side: int = SIDE) -> Image.Image:
    """Stripes whose colour and direction tell the class, under noise."""
    y, x = np.mgrid[:side, :side]
    wave = np.sin((x * np.cos(c) + y * np.sin(c)) * (0.5 + c / 6))
    colour = 60 * np.array([np.cos(2 * c), np.cos(c + 1), np.sin(c)])
    noisy = 128 + wave[..., None] * colour + colour / 2 + rng.normal(0, noise, (side, side, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def write_folders(root: Path, splits: dict[str, int], classes: tuple[str, ...] = CLASSES, seed: int = 0) -> Path:
    """root/SPLIT/CLASS/NUMBER.png, so many images of each class; a split "" has no folder of its own."""
    rng = np.random.default_rng(seed)
    for split, each in splits.items():
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(each):
                picture(CLASSES.index(name), rng).save(folder / f"{i}.png")
    return root
