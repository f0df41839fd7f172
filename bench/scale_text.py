"""From texts to anchors at size: time, memory, and whether the bytes depend on processes or interruptions.

    python bench/scale_text.py [--texts 1000000] [--graph 100000] [--width 512] [--out FOLDER] [--results FOLDER]

Stages: read, embed (hash) and match many short texts in 1,000 classes as they are (--keep 0); match fewer with the
graph of their features, memory-mapped. The latter again with two processes, and killed (SIGKILL) in its midst and
started again: anchors.parquet must have the same bytes. Time nothing while other work runs. Rehearsal, in a minute:
--texts 20000 --graph 6000 --results FOLDER.
"""

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import record

from mopro_fast.files import sha256_of
from mopro_fast.text import graph

CLASSES, WORDS = 1000, 20_000
WEBVISION = 2_439_574, 2048  # images of WebVision 1.0's training set, features of a ResNet-50


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=1_000_000)
    parser.add_argument("--graph", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--out", type=Path, default=Path("runs/scale_text"))
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    o = parser.parse_args()
    shutil.rmtree(o.out, ignore_errors=True)
    result = {"texts": o.texts, "graph": o.graph, "width": o.width, "classes": CLASSES}

    many, few = o.out / "many", o.out / "few"
    write_texts(many, o.texts)
    result["read"] = timed("read", many / "data.txt", "--texts", many / "texts.csv", "--out", many / "T")
    result["embed"] = timed("embed", many / "T", "--classes", many / "classes.csv")
    result["match"] = timed("match", many / "T", "--keep", 0)
    shutil.rmtree(many)

    write_texts(few, o.graph)
    write_features(few / "features.npy", o.graph, o.width)
    timed("read", few / "data.txt", "--texts", few / "texts.csv", "--out", few / "T")
    timed("embed", few / "T", "--classes", few / "classes.csv")
    match = ("match", few / "T", "--features", few / "features.npy")
    result["graph_one"] = timed(*match)
    result["graph_two"] = timed(*match, processes=2)
    result["graph_killed"] = timed(*match, kill_after=result["graph_one"]["seconds"] * 0.8)
    result["graph_again"] = timed(*match, fresh=False)
    digests = {result[name]["sha256"] for name in ("graph_one", "graph_two", "graph_again")}
    result["same_bytes"] = len(digests) == 1 and not result["graph_killed"]["sha256"]
    result["webvision"] = counted(*WEBVISION)
    print(record.write("scale_text", result, o.results))
    shutil.rmtree(o.out)
    return not result["same_bytes"]


def write_texts(folder: Path, rows: int) -> None:
    """data.txt, texts.csv and classes.csv: 4 to 15 words of a text, drawn as in language, two thirds with a name."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(rows)
    words = np.array([f"{a}{b}{c}{d}" for a, b, c, d in rng.choice(["ka", "lo", "mi", "nu", "re", "sta"], (WORDS, 4))])
    labels = rng.integers(CLASSES, size=rows)
    counts = rng.integers(4, 16, rows)
    drawn = words[(WORDS ** rng.random(counts.sum())).astype(int)]  # the n-th word as often as 1/n
    named = rng.random(rows) < 2 / 3
    with open(folder / "data.txt", "w") as data, open(folder / "texts.csv", "w") as texts:
        texts.write("path,text\n")
        for i, some in enumerate(np.split(drawn, counts.cumsum()[:-1])):
            name = f"{words[-labels[i] - 1]} " if named[i] else ""
            data.write(f"{i % 1000:03d}/{i:07d}.jpg {labels[i]}\n")
            texts.write(f"{i % 1000:03d}/{i:07d}.jpg,{name}{' '.join(some)}\n")
    with open(folder / "classes.csv", "w") as file:
        file.write("label,name\n")
        file.writelines(f"{c},{words[-c - 1]}\n" for c in range(CLASSES))


def write_features(path: Path, rows: int, width: int) -> None:
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((CLASSES, width), dtype=np.float32)
    found = np.lib.format.open_memmap(path, "w+", np.float32, (rows, width))
    for first in range(0, rows, 10_000):
        some = rng.standard_normal((min(10_000, rows - first), width), dtype=np.float32)
        found[first : first + len(some)] = centres[rng.integers(CLASSES, size=len(some))] + some
    found.flush()


def timed(
    step: str, folder: Path, *words: object, processes: int = 1, kill_after: float = 0, fresh: bool = True
) -> dict:
    """A step in processes of its own; -> seconds, peak_mb of the largest, and what the table of anchors has.

    fresh: remove what match has kept.
    """
    for path in folder.glob("*") if step == "match" and fresh else ():
        if path.name.startswith(("graph-", "matches-", "anchors")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    command = [sys.executable, "-m", "mopro_fast"]
    if processes > 1:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = str(found.getsockname()[1])
        ranks = ["--nproc-per-node", str(processes), "--master-addr", "127.0.0.1", "--master-port", port]
        command = [sys.executable, "-m", "torch.distributed.run", *ranks, "-m", "mopro_fast"]
    begun = time.monotonic()
    process = subprocess.Popen([*command, "text", step, str(folder), *map(str, words)], start_new_session=True)
    if kill_after:
        time.sleep(kill_after)
        os.killpg(process.pid, signal.SIGKILL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)  # or the object waits again
    if process.returncode and not kill_after:
        sys.exit(f"text {step} ended with status {process.returncode}")
    table = folder / "anchors.parquet"
    sha256 = sha256_of(table) if step == "match" and table.is_file() else None
    return {"seconds": time.monotonic() - begun, "peak_mb": used.ru_maxrss / 1024, "sha256": sha256}


def counted(rows: int, width: int) -> dict:
    """What the graph takes at another size, counted: float32 and float64 operations, and bytes."""
    candidates, points, batch = graph.NEAREST + graph._SPARE, graph.NEAREST + 1, graph._ROWS["cuda"]
    batches = -(-rows // batch)
    return {
        "rows": rows,
        "width": width,
        "float32_flop": 2 * rows * rows * width,
        "float64_flop": 2 * rows * width * (candidates + points**2),
        "feature_bytes": 4 * rows * width,
        "reread_bytes": 4 * rows * width * (batches + 1 + candidates),  # of the GPU: tiles per batch, rows, candidates
        "batches": batches,
        "kept_bytes": 8 * graph.KEEP * rows,
    }


if __name__ == "__main__":
    sys.exit(main())
