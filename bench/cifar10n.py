"""Real human label noise: settings of `mopro-fast train small` against each other, on CIFAR-10N or data like it.

    python bench/cifar10n.py FOLDER --run ce="--method ce" --run "mopro=--start-clean {3,10} --threshold 0.8" ...

FOLDER holds train_list.txt, test_list.txt ("path label" per line) and train_truth.txt ("path true-label", -1 for an
out-of-distribution image). Alternatives in braces become a run each. One process a core; interrupted, the same command
goes on. The result file is written anew whenever a run ends. The others are compared with the first run, seed by seed.
With --part, --rest of the other training images are held out: settings are to be chosen by the agreement with the
labels given to them, never by the test accuracy.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import record
import tables
import torch

from mopro_fast import demo
from mopro_fast.config import TrainConfig
from mopro_fast.data.check import check
from mopro_fast.data.index import load_index
from mopro_fast.errors import UserError
from mopro_fast.files import write_json
from mopro_fast.report.figures import left_of_classes
from mopro_fast.training.command import parse

CORES = len(os.sched_getaffinity(0))
OWN = {"--data", "--root", "--val", "--out", "--seed", "--tensorboard", "--threads"}
# glibc gives the memory of every larger tensor back to the kernel, and half of a step on a CPU goes into getting it
# again: 200 img/s without these, 290 with them (ResNet-18, width 0.25, 32 px, one core).
MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "8000000000", "MALLOC_TOP_PAD_": "200000000"}


@dataclass
class Run:
    """One training."""

    name: str
    seed: int
    own: list[str]
    """The options of this name."""
    options: list[str]
    """All."""
    folder: Path
    identity: str
    """Digest of its resolved settings and of the lists."""
    process: subprocess.Popen | None = None

    def ended(self) -> bool:
        return self.process.poll() is not None

    @property
    def result(self) -> Path:
        return self.folder / "result.json"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--run", action="append", metavar="NAME=OPTIONS", help="repeatable")
    parser.add_argument("--common", default="", metavar="OPTIONS", help="of every run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--part", type=int, help="train on the first N images of a shuffled list")
    parser.add_argument("--rest", type=int, default=6000, help="held-out images of --part")
    parser.add_argument("--test", type=int, help="test on N images, as many of each class as the list has shares")
    processes = 1 if torch.cuda.is_available() else CORES
    parser.add_argument(
        "--processes", type=int, default=processes, help="at a time (default: one a core, or one on a GPU)"
    )
    parser.add_argument("--chosen", default="not tuned", help="how the settings were chosen, for the table")
    parser.add_argument("--name", default="cifar10n", help="of the result file")
    parser.add_argument("--runs", type=Path, default=Path("runs/cifar10n"))
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    a = parser.parse_args(argv)
    given, true = write_lists(a.folder, a.runs, a.part, a.rest, a.test)
    data = ["--data", f"{a.runs}/train_list.txt", "--val", f"{a.runs}/test_list.txt", "--root", str(a.folder)]
    environment = os.environ | MEMORY
    environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(max(1, CORES // a.processes)))
    settings = {
        "common": a.common,
        "images": len(true),
        "out_of_distribution": int((true < 0).sum()),
        "wrong": float((given != true)[true >= 0].mean()),
        "test_images": len((a.runs / "test_list.txt").read_text().splitlines()),
        "chosen": a.chosen,
    }
    runs = []
    for name, options in expand(a.run or ["ce=--method ce", "mopro="]):
        words = shlex.split(a.common) + options
        identity = digest(checked(words, data), a.runs)
        for seed in range(a.seeds):
            folder = a.runs / re.sub(r"[^\w.=-]+", "_", name) / f"seed{seed}"
            ours = [*data, "--out", str(folder), "--seed", str(seed), "--tensorboard", "False", "--threads", "1"]
            runs.append(Run(name, seed, options, words + ours, folder, identity))
            if runs[-1].result.is_file() and json.loads(runs[-1].result.read_text()).get("identity") != identity:
                raise SystemExit(
                    f"{folder} holds a run with other settings or images: choose another --runs, or remove it"
                )
    runs.sort(key=lambda run: run.seed)  # after the first seed all can be compared
    for split, file in (("train", "train_list.txt"), ("val", "test_list.txt")):
        check(load_index(a.runs / file, split, num_classes=None, root=a.folder), workers=a.processes, progress=False)

    def write() -> Path:
        done = [json.loads(run.result.read_text()) for run in runs if run.result.is_file()]
        result = {"settings": settings, "runs": done, "paired": paired(done, runs[0].name)}
        result["failed"] = [[run.name, run.seed] for run in runs if run.process and run.process.poll()]
        return record.write(a.name, result, a.results)

    def done(run: Run) -> None:
        finish(run, a.folder, given, true, environment)
        write()

    stopped, failed = train(runs, a.processes, environment, done)
    path = write()
    if any(run.result.is_file() for run in runs):
        print(tables.cifar10n(json.loads(path.read_text())))
    print(f"\n{path}")
    return 128 + stopped if stopped else bool(failed)


def write_lists(
    folder: Path, runs: Path, part: int | None, rest: int, test: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """The lists of these runs -> the given and the true labels of the training images."""
    if not (folder / "train_truth.txt").is_file():
        raise SystemExit(f"{folder} has no train_truth.txt: unpack CIFAR-10N there first")
    given, truth, tests = (
        (folder / f"{n}.txt").read_text().splitlines() for n in ("train_list", "train_truth", "test_list")
    )
    order = np.random.default_rng(0).permutation(len(given)) if part else np.arange(len(given))
    part = part or len(given)
    rows, others = np.sort(order[:part]), np.sort(order[part : part + rest])
    runs.mkdir(parents=True, exist_ok=True)
    shown = tests[:: max(1, len(tests) // test)][:test] if test else tests  # the list may be sorted by class
    lists = {"train_list.txt": [given[i] for i in rows], "rest_list.txt": [given[i] for i in others]}
    for name, lines in (lists | {"test_list.txt": shown}).items():
        text = "".join(line + "\n" for line in lines)
        if not (runs / name).is_file() or (runs / name).read_text() != text:
            (runs / name).write_text(text)
    return tuple(np.array([int(lines[i].rsplit(None, 1)[1]) for i in rows]) for lines in (given, truth))


def expand(given: list[str], flag: str = "--run") -> list[tuple[str, list[str]]]:
    """NAME=OPTIONS with {a,b} in them -> (name with what differs, options) for every combination."""
    runs = []
    for one in given:
        name, equals, options = one.partition("=")
        if not equals or not name:
            raise SystemExit(f"{flag} {one}: expected NAME=OPTIONS, such as ce='--method ce'")
        parts = re.split(r"\{([^}]*)\}", options)  # text, alternatives, text, …
        if not all(before.strip() for before in parts[0:-1:2]):
            raise SystemExit(f"{flag} {one}: write {{…}} after the option that it belongs to")
        for chosen in itertools.product(*(alternatives.split(",") for alternatives in parts[1::2])):
            text = parts[0] + "".join(c + after for c, after in zip(chosen, parts[2::2], strict=True))
            named = [f"{before.split()[-1].lstrip('-')}={c}" for before, c in zip(parts[0::2], chosen, strict=False)]
            runs.append((" ".join([name, *named]), shlex.split(text)))
    names = [name for name, _ in runs]
    if len({*names}) < len(names):
        raise SystemExit(f"{flag}: two runs have the name {statistics.mode(names)!r}")
    return runs


def checked(words: list[str], data: list[str], recipe: str = "small", own: Collection[str] = OWN) -> TrainConfig:
    """The config of these options; ends with one line for one that cannot be."""
    for word in words:
        if word.partition("=")[0].replace("_", "-") in own:
            raise SystemExit(f"{word} is set by this bench: leave it out")
    config = parse([recipe, *words, *data, "--out", "runs"])
    config.validate()
    return config


def digest(config: TrainConfig, runs: Path) -> str:
    """Of the settings, whatever the recipe was when they were given, and of the lists of images."""
    lists = [(runs / f"{name}_list.txt").read_bytes() for name in ("train", "rest", "test")]
    settings = config.as_dict()
    settings["data"] |= {"path": "", "root": "", "val": ""}
    parts = [json.dumps(settings).encode(), *lists]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:16]


def train(runs: list[Run], processes: int, environment: dict, done) -> tuple[int, list[Run]]:
    """-> the signal that stopped it or 0, and the runs that failed. ``done(run)`` is called for each that ends well."""
    waiting = [run for run in runs if not run.result.is_file()]
    running: list[Run] = []
    failed: list[Run] = []
    received: list[int] = []
    told = False
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, _: received.append(n))
    say(f"{len(waiting)} of {len(runs)} runs to go, {processes} at a time")
    try:
        while running or (waiting and not received):
            while waiting and len(running) < processes and not received:
                run = waiting.pop(0)
                run.folder.mkdir(parents=True, exist_ok=True)
                command = [sys.executable, "-m", "mopro_fast", "train", "small", *run.options]
                with log_of(run).open("a") as log:  # in a group of its own: Ctrl-C reaches it once, from here
                    run.process = subprocess.Popen(
                        command, stdout=log, stderr=log, env=environment, start_new_session=True
                    )
                running.append(run)
                say(f"{run.name}, seed {run.seed}: begins; its terminal: {log_of(run)}")
            time.sleep(0.5)
            if received and not told:  # once: a second Ctrl-C would end a training without a checkpoint
                told = True
                for run in running:
                    run.process.send_signal(received[0])
            for run in [run for run in running if run.ended()]:
                running.remove(run)
                if run.process.returncode == 0:
                    done(run)
                elif not received:
                    failed.append(run)
                    say(f"{run.name}, seed {run.seed}: FAILED with status {run.process.returncode}:")
                    say("\n".join(log_of(run).read_text().splitlines()[-5:]))
    finally:  # after an error of this bench no training goes on alone
        for run in running:
            run.process.terminate()
    return (received[0] if received else 0), failed


def log_of(run: Run) -> Path:
    return run.folder.parent / f"{run.folder.name}.log"


def finish(run: Run, folder: Path, given: np.ndarray, true: np.ndarray, environment: dict) -> None:
    """The numbers of a training that ended, into its folder and the result file."""
    entries = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    curves = {s: [e["top1"] for e in entries if e["split"] == s] for s in ("val", "holdout")}
    epochs = [e for e in entries if e["split"] == "epoch"]
    curves |= {name: [round(e[name], 4) for e in epochs if name in e] for name in ("kept", "relabelled")}
    corrected = [{"epoch": e["epoch"] + 1} | left_of_classes(e) for e in entries if e["split"] == "classes"]
    lists = {n: run.folder.parents[1] / f"{n}_list.txt" for n in ("test", "rest")}
    lists = {n: path for n, path in lists.items() if path.stat().st_size}
    sets = evaluate(run.folder, lists, environment, "--root", str(folder))
    classes = sets["test"]["per_class"]
    result = {
        "name": run.name,
        "seed": run.seed,
        "options": shlex.join(run.own),
        "identity": run.identity,
        "top1": curves["val"][-1],
        "curves": curves,
        "classes": corrected,
        "agreement": sets["rest"]["top1"] if "rest" in sets else None,
        "class_recall": [c["top1"] for c in classes],
        "alarms": [{"epoch": e["epoch"] + 1, "text": e["text"]} for e in entries if e["split"] == "alarm"],
        "commit": record.conditions()["commit"],
    }
    assigned = torch.load(run.folder / "labels.pt", weights_only=True).numpy()
    kept = assigned >= 0
    result |= demo.judge(given, true, assigned) | {
        "kept_right": float((assigned == true)[kept].mean()),
        "classes_lost": int((np.bincount(assigned[kept], minlength=len(classes)) == 0).sum()),
    }
    write_json(run.result, result)
    say(f"{run.name}, seed {run.seed}: {result['top1']:.2f} % on test images, {len(result['alarms'])} alarms")


def evaluate(run: Path, sets: dict[str, Path], environment: Mapping[str, str], *options: str) -> dict[str, dict]:
    """What ``mopro-fast eval`` finds of each set for the newest checkpoint of a run."""
    named = [f"{name}={path}" for name, path in sets.items()]
    command = [
        sys.executable,
        "-m",
        "mopro_fast",
        "eval",
        str(run),
        "--val",
        *named,
        "--out",
        str(run / "eval"),
        *options,
    ]
    ended = subprocess.run(command, capture_output=True, text=True, start_new_session=True, env=environment)
    if ended.returncode:
        raise UserError(f"{run}: {' '.join(command[2:4])} failed: {ended.stderr.strip().splitlines()[-1:]}")
    return json.loads((run / "eval" / "eval.json").read_text())["sets"]


def paired(results: list[dict], peer_name: str) -> dict[str, dict]:
    """Each run against the peer, over the seeds that both have: points of test accuracy."""
    of_run: dict[str, dict[int, dict]] = {}
    for r in results:
        of_run.setdefault(r["name"], {})[r["seed"]] = r
    peer = of_run.get(peer_name, {})
    found = {}
    for name, mine in of_run.items():
        seeds = sorted(mine.keys() & peer.keys())
        if name == peer_name or not seeds:
            continue
        gains = [mine[s]["top1"] - peer[s]["top1"] for s in seeds]
        spread = statistics.stdev(gains) if len(gains) > 1 else None
        below = [
            sum(a < b / 2 for a, b in zip(mine[s]["class_recall"], peer[s]["class_recall"], strict=True)) for s in seeds
        ]
        found[name] = {
            "peer": peer_name,
            "seeds": seeds,
            "mean": statistics.mean(gains),
            "sd": spread,
            "standard_error": None if spread is None else spread / math.sqrt(len(gains)),
            "classes_below_half": below,
        }
    return found


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except UserError as error:
        raise SystemExit(f"bench/cifar10n.py: {error}") from None
