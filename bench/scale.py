"""Time and memory by the number of images: start of training, check, cleaning, re-training's order, report.

    python bench/scale.py --sizes 400000 2440000 16000000 --before CHECKOUT --out FOLDER

Measures this checkout and, stage by stage in turn, another one of the project (--before). Its data (scale_data.py) are
made in FOLDER, in less than 6 GB, and removed once they are measured. Each stage runs in processes of its own, has a
limit of time and of memory, and is written down when it ends: interrupted, the same command goes on, and --only
measures some stages again after a commit. Rehearsal, in three minutes: --sizes 20000 --results FOLDER.
"""

import argparse
import contextlib
import ctypes
import hashlib
import json
import mmap
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import record
import scale_data
import tables

HERE = Path(__file__).parent
RANKS, STEPS = 8, 4  # of them, and how many they take
CHECKING = ("first-check-1", "first-check-2", "first-check-4", "raw-first")
LEAST_FREE = 1.5e9  # bytes: with less left on the machine a stage is ended
OPTIONS = (
    "--width 0.125 --embed-dim 16 --image-size 32 --eval-resize 32 --batch-size 16 --queue-size 64 --log-every 1 "
    "--checkpoint-every 1000000 --tensorboard False --device cpu"
)


class Tree(NamedTuple):
    """A checkout."""

    name: str
    commit: str
    environment: dict[str, str]


class Process(NamedTuple):
    words: list[str]
    environment: dict[str, str]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[400_000, 2_440_000, 16_000_000])
    parser.add_argument("--before", type=Path, help="another checkout, with what it builds")
    parser.add_argument("--most-before", type=int, default=2_440_000, help="rows of raw data for it")
    parser.add_argument("--first-check-most", type=int, default=16_000_000, help="above, the result of a check is made")
    parser.add_argument("--only", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--out", type=Path, default=Path("runs/scale"))
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    a = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what it started goes with it
    if any(size % 20_000 for size in a.sizes):
        parser.error("sizes are multiples of 20000: folders have 4,000 images, shards 10,000")
    out = a.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    folders = {"before": a.before, "after": HERE.parent}
    trees = [tree_of(name, folder.resolve(), out) for name, folder in folders.items() if folder]
    result = tables.read("scale", a.results) or {"rows": []}
    rows = result["rows"]
    for size in sorted(a.sizes):
        for kind in ("raw", "pack"):
            todo = [
                (name, tree)
                for name in a.only
                for tree in trees
                if STAGES[name].kind == kind
                and not (kind == "raw" and tree.name == "before" and size > a.most_before)
                and not (name in CHECKING and size > a.first_check_most)
                and not (name in ("first-check-1", "first-check-4") and size > min(a.sizes))
                and (name, size, tree.name, tree.commit)
                not in {(r["stage"], r["size"], r["tree"], r["commit"]) for r in rows}
            ]
            if not todo:
                continue
            data = Data(out / kind, kind, size, trees[-1].environment)
            for name, tree in todo:
                stage = STAGES[name]
                limit = 120 + stage.seconds * size / 1e6
                row = {"stage": name, "size": size, "tree": tree.name, "commit": tree.commit}
                row |= stage.measure(data, tree, limit)
                rows[:] = [r for r in rows if any(r[key] != row[key] for key in ("stage", "size", "tree"))] + [row]
                record.write("scale", {"settings": settings(out), "rows": rows}, a.results)
                print(said(row), flush=True)
            shutil.rmtree(data.folder)
    print(tables.table("scale", a.results))
    return 0


def tree_of(name: str, folder: Path, out: Path) -> Tree:
    cache = {"XDG_CACHE_HOME": str(out / f"cache-{name}"), "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "2"}
    return Tree(name, record.commit(folder), os.environ | cache)


def settings(out: Path) -> dict:
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    _, kind = max((m for m in mounts if out.is_relative_to(m[0])), key=lambda m: len(m[0]))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = {"memory_gb": round(memory / 1e9, 1), "file_system": kind, "options": OPTIONS, "ranks": RANKS}
    return found | {"files": scale_data.FILES, "shard": scale_data.SHARD}


def said(row: dict) -> str:
    what = row.get("failed") or row.get("skipped") or f"{row['seconds']:.2f} s"
    memory = [f"{name[:-3]} {row[name]:.0f} MB" for name in row if name.endswith("_mb")]
    return f"{row['size']:,} {row['stage']}, {row['tree']}: {', '.join([what, *memory])}"


class Data:
    """The data of one size and kind, and what earlier stages leave for later ones."""

    def __init__(self, folder: Path, kind: str, size: int, environment: dict[str, str]) -> None:
        self.folder, self.size, self.environment = folder, size, environment
        self.classes = 5000 if size > 10_000_000 else 1000
        self.work, made = folder / "work", folder / "made.json"
        self.path = folder / "data" / (scale_data.LIST if kind == "raw" else scale_data.PACK)
        self.place = self.path.parent if kind == "raw" else self.path
        if not made.is_file() or json.loads(made.read_text())["size"] != size:
            shutil.rmtree(folder, ignore_errors=True)
            self.work.mkdir(parents=True)
            write = scale_data.write_raw if kind == "raw" else scale_data.write_pack
            apart(write, self.path.parent, size, self.classes, environment)
            made.write_text(json.dumps({"size": size, "names": os.listdir(self.place)}))
        self.names = frozenset(json.loads(made.read_text())["names"])

    def forget(self) -> None:
        """Whatever was found out about the images."""
        (self.work / "known").unlink(missing_ok=True)
        for cache in self.folder.parent.glob("cache-*"):
            shutil.rmtree(cache)
        for name in set(os.listdir(self.place)) - self.names:
            path = self.place / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def know(self) -> None:
        """What `mopro-fast check` finds out about files, if no stage has; a pack's images are known."""
        known = self.work / "known"
        if self.path.is_file() and not known.exists():
            self.forget()
            apart(scale_data.write_known, self.place, self.size, self.classes, self.environment)
            scale_data.command(self.environment, "check", str(self.path))  # this checkout may keep more than that file
            known.touch()

    @property
    def index(self) -> Path:
        return Path(f"{self.path}.index.parquet")

    def scores(self) -> Path:
        """The folder of a cleaning, with the scores that its tables are made of."""
        folder = self.work / "clean"
        if not (folder / "scored").is_file():
            folder.mkdir(exist_ok=True)
            apart(scale_data.write_scores, folder / "scores.npy", self.size, self.classes)
            (folder / "scored").touch()
        return folder

    def run(self, tree: Tree) -> Path:
        return self.work / f"run-{tree.name}"

    def terminal(self) -> Path:
        return self.work / "terminal.txt"


def first_check(workers: int) -> Callable:
    def measure(data: Data, tree: Tree, limit: float) -> dict:
        data.forget()
        found = watched([command(tree, "check", str(data.path), "--workers", str(workers))], limit, data.terminal())
        if "failed" in found:
            return found
        (data.work / "known").touch()
        return found | {"sha256": digest(data.index)}

    return measure


def check(data: Data, tree: Tree, limit: float) -> dict:
    data.know()
    return watched([command(tree, "check", str(data.path), "--workers", "2")], limit, data.terminal())


def first(data: Data, tree: Tree, limit: float) -> dict:
    """Nothing is known of the images, or of the pack."""
    data.forget()
    shutil.rmtree(data.run(tree), ignore_errors=True)
    found = train(data, tree, limit)
    if "failed" not in found:
        (data.work / "known").touch()
    return found


def fresh(data: Data, tree: Tree, limit: float) -> dict:
    data.know()
    shutil.rmtree(data.run(tree), ignore_errors=True)
    return train(data, tree, limit)


def resumed(data: Data, tree: Tree, limit: float) -> dict:
    data.know()
    if not any(data.run(tree).glob("checkpoints/step_*.pt")):
        fresh(data, tree, limit)
    return train(data, tree, limit)


def cold(data: Data, tree: Tree, limit: float) -> dict:
    if not any(data.run(tree).glob("checkpoints/step_*.pt")):
        fresh(data, tree, limit)
    dropped, left = drop([data.path, data.run(tree), Path(tree.environment["XDG_CACHE_HOME"])])
    if left > 0.1 * dropped:
        return {"seconds": None, "skipped": f"{left / 1e6:.0f} of {dropped / 1e6:.0f} MB stay in the page cache"}
    return train(data, tree, limit) | {"dropped_mb": dropped / 1e6}


def train(data: Data, tree: Tree, limit: float) -> dict:
    """Until its first step of this start; then it is stopped, and saves."""
    run = data.run(tree)
    words = train_words(data, run, "--threads", "2")
    return watched([command(tree, *words)], limit, data.terminal(), steps_of(run), end=signal.SIGTERM)


def eight(data: Data, tree: Tree, limit: float) -> dict:
    """Memory: the sum of the ranks' PSS less that of as many processes which only import mopro_fast."""
    idle = Process([sys.executable, "-c", "import mopro_fast, time; time.sleep(60)"], tree.environment)
    began = time.monotonic()
    imports = watched([idle] * RANKS, 30, data.terminal(), lambda: int(time.monotonic() > began + 2))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(RANKS), "OMP_NUM_THREADS": "1"}
    own |= {"LOCAL_WORLD_SIZE": str(RANKS)}
    run = data.work / "run-ranks"
    shutil.rmtree(run, ignore_errors=True)
    words = train_words(data, run, "--threads", "1")
    ranks = [command(tree, *words, environment=own | {"RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(RANKS)]
    found = watched(ranks, limit, data.terminal(), steps_of(run), STEPS)
    return found | {"imports_mb": imports["pss_mb"], "over_imports_mb": found["pss_mb"] - imports["pss_mb"]}


def driver(name: str) -> Callable:
    def measure(data: Data, tree: Tree, limit: float) -> dict:
        folder = data.scores()
        if name == "labels" and not (folder / "cleaned.parquet").is_file():
            driver("clean")(data, tree, limit)
        words = [sys.executable, str(HERE / "scale_drivers.py"), name, str(data.path), str(data.classes), str(folder)]
        found = watched([Process(words, tree.environment)], limit, data.terminal())
        return found if "failed" in found else found | json.loads(data.terminal().read_text().splitlines()[-1])

    return measure


def report(data: Data, tree: Tree, limit: float) -> dict:
    folder, run = data.scores(), data.work / "run-report"
    if not (folder / "cleaned.parquet").is_file():
        driver("clean")(data, tree, limit)
    run.mkdir(exist_ok=True)
    config = {"data": {"path": str(data.path), "num_classes": data.classes}, "run": {"out": str(run)}}
    (run / "config.json").write_text(json.dumps(config))
    words = ["report", str(run), "--table", str(folder / "cleaned.parquet"), "--images", "0"]
    found = watched([command(tree, *words)], limit, data.terminal())
    if "failed" in found:
        return found
    page = (run / "report.html").read_text()
    contents = json.loads(re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.S)[1])
    numbers = json.dumps(contents["labels"], sort_keys=True).encode()  # the page also lists the settings of its version
    return found | {"sha256": hashlib.sha256(numbers).hexdigest()}


def apart(write: Callable, *arguments: object) -> None:
    """In a process of its own, whose memory goes with it."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        pool.submit(write, *arguments).result()


class Stage(NamedTuple):
    kind: str
    """raw or pack."""
    seconds: float
    """Limit, for a million rows."""
    measure: Callable[[Data, Tree, float], dict]


STAGES = {f"first-check-{workers}": Stage("raw", 400 / workers, first_check(workers)) for workers in (1, 4, 2)}
STAGES |= {
    "check": Stage("raw", 60, check),
    "raw-first": Stage("raw", 260, first),
    "raw-fresh": Stage("raw", 60, fresh),
    "raw-resumed": Stage("raw", 60, resumed),
    "clean": Stage("raw", 60, driver("clean")),
    "labels": Stage("raw", 60, driver("labels")),
    "order": Stage("raw", 60, driver("order")),
    "report": Stage("raw", 60, report),
    "pack-first": Stage("pack", 30, first),
    "pack-fresh": Stage("pack", 30, fresh),
    "pack-resumed": Stage("pack", 30, resumed),
    "pack-cold": Stage("pack", 30, cold),
    "ranks": Stage("pack", 60, eight),
}


def command(tree: Tree, *words: str, environment: dict[str, str] | None = None) -> Process:
    return Process([sys.executable, "-m", "mopro_fast", *words], tree.environment | (environment or {}))


def train_words(data: Data, run: Path, *more: str) -> list[str]:
    words = ["train", "small", "--data", str(data.path), "--out", str(run), "--num-classes", str(data.classes)]
    return [*words, *OPTIONS.split(), *more]


def steps_of(run: Path) -> Callable[[], int]:
    """How many steps its log has more than now."""

    def count() -> int:
        try:
            return (run / "log.jsonl").read_bytes().count(b'{"split": "train"')
        except FileNotFoundError:
            return 0

    before = count()
    return lambda: count() - before


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def watched(
    commands: list[Process],
    limit: float,
    log: Path,
    steps: Callable[[], int] | None = None,
    enough: int = 1,
    end: int = signal.SIGKILL,
) -> dict:
    """Run processes side by side until ``steps()`` are ``enough`` or, without it, until they end by themselves.

    -> seconds until the first step or the end; peak_mb: the largest process's peak; rss_anon_mb: its anonymous memory
    at the first step; pss_mb: the largest sum of all processes' PSS, those of their children included. ``failed`` says
    why there are no seconds: an error, ``limit`` seconds, or no memory left on the machine.
    """
    found: dict = {"seconds": None, "peak_mb": 0.0, "pss_mb": 0.0}
    running: list[subprocess.Popen] = []
    began = time.perf_counter()
    next_sum = 0.0
    try:
        with log.open("w") as terminal:
            for words, environment in commands:
                options = {"env": environment, "cwd": log.parent, "stdout": terminal, "stderr": terminal}
                running.append(subprocess.Popen(words, start_new_session=True, **options))
                with contextlib.suppress(OSError):  # of all processes on the machine this one goes first
                    Path(f"/proc/{running[-1].pid}/oom_score_adj").write_text("1000")
        while True:
            done, ended = steps() if steps else 0, [p.poll() is not None for p in running]
            seconds = time.perf_counter() - began
            if done and found["seconds"] is None:
                found |= {"seconds": seconds, "rss_anon_mb": max(memory(p.pid)["RssAnon"] for p in running)}
            found["peak_mb"] = max(found["peak_mb"], *(memory(p.pid)["VmHWM"] for p in running))
            if seconds >= next_sum or done >= enough:
                found["pss_mb"] = max(found["pss_mb"], sum(pss(pid) for p in running for pid in family(p.pid)))
                next_sum = seconds + max(0.2, 9 * (time.perf_counter() - began - seconds))
            if done >= enough:
                break
            if any(ended) and (steps or any(p.returncode for p in running if p.returncode is not None)):
                return found | {"seconds": None, "failed": last_line(log)}
            if all(ended):
                found["seconds"] = seconds
                break
            if seconds > limit:
                return found | {"seconds": None, "failed": f"more than {limit:.0f} s"}
            if available() < LEAST_FREE:
                return found | {"seconds": None, "failed": "no memory is left"}
            time.sleep(0.02)
        for p in running:
            p.send_signal(end)
            with contextlib.suppress(subprocess.TimeoutExpired):
                p.wait(limit)
        return found
    finally:
        for p in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(p.pid, signal.SIGKILL)
            p.wait()


def memory(pid: int) -> dict[str, float]:
    """MB, of a process that is there; 0 of one that has ended."""
    found = {"VmHWM": 0.0, "RssAnon": 0.0}
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in found:
                found[name] = int(value.split()[0]) * 1024 / 1e6
    return found


def pss(pid: int) -> float:
    """MB; 0 of a process that has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024 / 1e6
    return 0.0


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += family(int(child))
    return found


def available() -> int:
    """Bytes that processes could still have."""
    (line,) = [line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable")]
    return int(line.split()[1]) * 1024


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    return lines[-1] if lines else "it ended without a word"


def drop(places: Iterable[Path]) -> tuple[int, int]:
    """Ask the kernel to forget the pages of all files below; -> their bytes, and those that it still has."""
    os.sync()
    files = {file.stat().st_ino: file for place in places for file in place.rglob("*") if file.is_file()}
    total = left = 0
    for path in files.values():
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                total, left = total + size, left + resident(file.fileno(), size)
    return total, left


def resident(file: int, size: int) -> int:
    """Bytes of an open file that are in the page cache."""
    page = resource.getpagesize()
    with mmap.mmap(file, size, prot=mmap.PROT_READ) as mapped:
        content, pages = np.frombuffer(mapped, np.uint8), np.zeros(-(-size // page), np.uint8)
        status = ctypes.CDLL(None, use_errno=True).mincore(
            ctypes.c_void_p(content.ctypes.data), ctypes.c_size_t(size), ctypes.c_void_p(pages.ctypes.data)
        )
        del content  # a map in use cannot be closed
    if status:
        raise OSError(ctypes.get_errno(), "mincore")
    return min(size, int((pages & 1).sum()) * page)


if __name__ == "__main__":
    raise SystemExit(main())
