"""python epoch_of.py DATA CHECKED THREADS: one epoch of the loader; prints what it has shown and lost, as JSON.

CHECKED: 1: with what a check of the files knows; packs need none.
"""

import json
import resource
import sys

import numpy as np
import torch

from mopro_fast.config import AugmentConfig
from mopro_fast.data.check import check, load_splits
from mopro_fast.data.decode import UNREADABLE
from mopro_fast.data.inputs import readable
from mopro_fast.data.pipeline import TrainLoader

BATCH = 32


def main(data: str, checked: str, threads: str) -> None:
    index = load_splits(data, "auto", None)["train"]
    if checked == "1":
        index = readable(index, "train", 2)
        again = check(index, workers=1, progress=False)
        assert again.read == (again.verdict == UNREADABLE)[again.size < 0].sum()
    options = {"batch_size": BATCH, "rank": 0, "world_size": 1, "seed": 0, "image_size": 32}
    loader = TrainLoader(
        index, **options, augment=AugmentConfig(), device=torch.device("cpu"), threads=int(threads), two_views=True
    )
    ids = [int(i) for batch in loader.epoch(0) for i in batch.ids]
    lost = [lost for _, _, lost in loader.lost]
    loader.close()
    found = {
        "usable": len(index.usable),
        "left out": len(index.left_out),
        "shown": ids,
        "lost": [[index.paths[row], by, reason] for row, by, reason in lost],
        "wanted": sorted(np.setdiff1d(ids, [by for _, by, _ in lost]).tolist() + [row for row, _, _ in lost]),
        "megabytes": max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        / 1024,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
