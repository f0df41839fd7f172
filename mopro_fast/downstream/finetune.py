"""``mopro-fast finetune CKPT --data DATA --out FOLDER --share 0.01``: all weights on a share of labelled data."""

import os
from dataclasses import dataclass, field

import numpy as np

from mopro_fast.data.index import Index
from mopro_fast.data.lists import read_names
from mopro_fast.data.order import place_in_class
from mopro_fast.data.paths import plain, shown
from mopro_fast.downstream import supervised
from mopro_fast.downstream.supervised import OneView, SupervisedConfig, SupervisedData, SupervisedOptim, SupervisedTask
from mopro_fast.errors import UserError
from mopro_fast.labels import NO_LABEL

CHOICE = 4  # first word of the generator's seed; supervised.py has 3


@dataclass
class Finetune(SupervisedConfig):
    """Train encoder and classifier on a share of a labelled set. The defaults are the official settings."""

    share: float = 1.0
    """Share of the training images, drawn by --seed (0.01 and 0.1 in the paper)."""
    balanced: bool = False
    """Draw this share of every class, at least one image of each, instead of all images alike."""
    list: str | None = None
    """Take the images that this file names, a path or a file's name per line, instead of a share."""
    freeze: bool = False
    """Train the classifier alone; the encoder stays in evaluation mode (see --moving-statistics)."""
    data: SupervisedData = field(default_factory=lambda: SupervisedData(augment=OneView(scale=(0.08, 1.0))))
    optim: SupervisedOptim = field(
        default_factory=lambda: SupervisedOptim(epochs=40, lr=0.005, milestones=(20, 30), decay=0.2, weight_decay=0.0)
    )


def main(argv: list[str]) -> int:
    return supervised.main(argv, "finetune", lambda _: Finetune(), FinetuneTask)


class FinetuneTask(SupervisedTask):
    """Trains on the chosen images."""

    command = "finetune"
    free = frozenset({"list"})

    def labelled(self, index: Index) -> Index:
        return with_share(self.config, index)


def with_share(config: Finetune, index: Index) -> Index:
    """The index with the label −1 for all images but the chosen ones."""
    if config.list is not None:
        if config.share != 1 or config.balanced:
            raise UserError("--list names the images: it goes with neither --share nor --balanced")
        chosen = _named(config.list, index)
    else:
        chosen = choose(index.labels, config.share, config.balanced, config.run.seed)
    labels = np.full(len(index), NO_LABEL)
    labels[chosen] = index.labels[chosen]
    return index.with_labels(labels)


def choose(labels: np.ndarray, share: float, balanced: bool, seed: int) -> np.ndarray:
    """int64: the rows drawn from those that have a label."""
    rows = np.random.default_rng((CHOICE, seed)).permutation(np.flatnonzero(labels >= 0))
    if not balanced:
        return rows[: max(1, int(share * len(rows)))]
    _, inverse, sizes = np.unique(labels[rows], return_inverse=True, return_counts=True)
    return rows[place_in_class(labels[rows]) < np.maximum(1, np.round(share * sizes))[inverse]]


def _named(path: str, index: Index) -> np.ndarray:
    """The rows of the images that the file names; a label after the path is passed over."""
    row_of: dict[str, int] = {}
    names = index.paths.tolist()
    for row, name in enumerate(map(os.path.basename, names)):
        row_of[name] = -1 if name in row_of else row
    for spelled in (plain(names, index.root), names):
        row_of |= {name: row for row, name in enumerate(spelled)}

    def find(name: str) -> int | None:
        row = row_of.get(name)
        return row_of.get(plain([name], index.root)[0]) if row is None else row

    found = read_names(path, find, index.source)
    for number, name, row in found:
        if row < 0:
            raise UserError(f"{path}:{number}: several images are called {shown(name)!r}: give their paths")
    if not found:
        raise UserError(f"{path} names no image")
    return np.unique([row for _, _, row in found])
