"""One part of a command, called alone, in whichever checkout is on the path: bench/scale.py starts it.

    python bench/scale_drivers.py clean|labels|order LIST CLASSES FOLDER

Prints seconds (of labels and order the median of three calls), peak memory and a checksum of the result as a line of
JSON; reading the list is not counted as time.
"""

import hashlib
import inspect
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mopro_fast.config import MoProConfig
from mopro_fast.data.index import Index, load_index

REPEATS = 3  # of what takes less than a second


def clean(index: Index, folder: Path) -> Callable[[], list[np.ndarray]]:
    from mopro_fast.downstream import clean

    settings = {name: getattr(MoProConfig, name) for name in ("alpha", "threshold", "temperature")} | {"batch_size": 64}

    def tables() -> list[np.ndarray]:
        clean._finish(folder, index, np.load(folder / "scores.npy", mmap_mode="r"), settings, [])
        return [np.memmap(folder / name, mode="r") for name in (clean.TABLE, clean.OFFICIAL)]

    return tables


def labels(index: Index, folder: Path) -> Callable[[], list[np.ndarray]]:
    from mopro_fast.downstream import retrain

    config = retrain.Retrain(cleaned=str(folder))
    config.data.num_classes = int(index.labels.max()) + 1
    return lambda: [retrain.with_cleaned_labels(config, index).labels]


def order(index: Index, _folder: Path) -> Callable[[], list[np.ndarray]]:
    from mopro_fast.data.order import balancing_repeats, epoch_order

    def rows() -> list[np.ndarray]:
        if len(inspect.signature(balancing_repeats).parameters) == 1:  # before it took the rows
            return [epoch_order(index, 0, 0, 0, balancing_repeats(index.labels[index.usable]))]
        return [epoch_order(index, 0, 0, 0, balancing_repeats(index.labels, index.usable))]

    return rows


def main() -> None:
    name, data, classes, folder = sys.argv[1:]
    index = load_index(data, "train", num_classes=int(classes), missing=True)
    call = {"clean": clean, "labels": labels, "order": order}[name](index, Path(folder))
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on, with what is there
    taken = []
    for _ in range(1 if name == "clean" else REPEATS):
        began = time.perf_counter()
        results = call()
        taken.append(time.perf_counter() - began)
    seconds = statistics.median(taken)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    found = {"seconds": seconds, "peak_mb": int(status["VmHWM"].split()[0]) * 1024 / 1e6}
    sha = hashlib.sha256()
    for array in results:
        sha.update(array if array.dtype == np.uint8 else array.astype(np.int64))  # files, or numbers of any width
    print(json.dumps(found | {"sha256": sha.hexdigest()}), flush=True)


if __name__ == "__main__":
    main()
