"""Captions of images whose true class is known, by a fixed rule: what tests, the demo and the benchmarks match."""

from collections.abc import Sequence

import numpy as np

EMPTY = 0.2  # of all captions; the others are, 15 : 30 : 45, of the three kinds below
KINDS = {"another": 15, "about": 30, "name": 45}
_FILLING = """
photo picture image gallery wallpaper album stock download best free amazing beautiful vintage original weekend
holiday garden market museum street family friends morning summer winter collection archive review blog news travel
postcard poster print canvas hobby project student teacher budget catalogue
"""
_FILLER = _FILLING.split()


def captions(true: np.ndarray, classes: Sequence[tuple[str, str]], seed: int) -> list[str]:
    """A caption per image: nothing; another class's name; words about its class without its name; or its name.

    Filler stands around all but the empty ones. true: int [n], the class of each image; -1: none, whose caption is
    filler alone where it would be about its class. classes: of each its name and a line about it.
    """
    rng = np.random.default_rng(seed)
    kinds = rng.choice(len(KINDS), len(true), p=np.array([*KINDS.values()]) / sum(KINDS.values()))
    kinds = np.where(rng.random(len(true)) < EMPTY, -1, kinds)
    return [
        _caption(rng, c, None if kind < 0 else list(KINDS)[kind], classes) for c, kind in zip(true, kinds, strict=True)
    ]


def _caption(rng: np.random.Generator, c: int, kind: str | None, classes: Sequence[tuple[str, str]]) -> str:
    if kind is None:
        return ""
    words: list[str] = []
    if kind == "another":
        words = classes[rng.choice([i for i in range(len(classes)) if i != c])][0].split()
    elif c >= 0 and kind == "name":
        words = classes[c][0].split()
    elif c >= 0:
        name, about = classes[c]
        about = [word for word in about.lower().split() if word not in name.lower().split()]
        words = rng.choice(about, min(4, len(about)), replace=False).tolist()
    filler = rng.choice(_FILLER, rng.integers(2, 6), replace=False).tolist()
    at = rng.integers(len(filler) + 1)
    return " ".join([*filler[:at], *words, *filler[at:]])
