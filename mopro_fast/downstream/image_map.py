"""A function of every readable image of an index, over all ranks; an interrupted call goes on from files on the disk.

The batches depend on the index and the batch size alone, and a batch's bits do not depend on the number of threads: the
result has the same bytes whatever the number of ranks and interruptions.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mopro_fast.console import say
from mopro_fast.data.index import Index
from mopro_fast.data.pipeline import EvalLoader
from mopro_fast.distributed import gather_lists, world
from mopro_fast.downstream import row_map

_NAMED = 3  # lost images named in the message

Step = Callable[[Tensor, Tensor], Tensor]  # images uint8 [N, S, S, 3], labels int64 [N] -> [N, width]


def compute(
    index: Index,
    path: Path,
    step: Step,
    width: int,
    loader_options: dict[str, Any],
    batches: list[np.ndarray] | None = None,
    again: Path | None = None,
) -> np.ndarray:
    """Write step(images, labels) of every image to ``path``, a .npy file.

    Returns it memory-mapped: float32 [n, width], NaN where an image cannot be read; such images are named. Finished
    parts lie beside it until it is whole. Raises UserError while another process computes it.

    path: NAME-KEY.npy; NAME stands before the progress bar. batches: int [n] rows of each (default: the usable ones,
    batch_size at a time). again: what the user should remove to have lost images tried again (default: path).
    """
    if batches is None:
        rows, size = index.usable, loader_options["batch_size"]
        batches = [rows[first : first + size] for first in range(0, len(rows), size)]
    mine: list[int] = []  # rows that could not be read

    def values(batches: list[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        @torch.inference_mode()
        def computing(images: Tensor, labels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
            return ids, step(images, labels)

        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
        with contextlib.closing(EvalLoader(index, rank=0, world_size=1, batches=batches, **loader_options)) as loader:
            yield from row_map.in_order(computing, loader, loader_options["device"])
            mine.extend(lost.row for lost in loader.lost)

    found = row_map.compute(path, len(index), width, batches, values)
    lost = gather_lists(mine)
    if lost and world()[0] == 0:
        named = ", ".join(index.name(row) for row in lost[:_NAMED]) + ", ..." * (len(lost) > _NAMED)
        say(
            f"{len(lost)} images could not be read and are left out: {named}; to try them again, remove {again or path}"
        )
    return found
