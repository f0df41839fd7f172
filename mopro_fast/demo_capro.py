"""``mopro-fast demo capro``: the way from captions to CAPro, beside MoPro and cross-entropy, on the demo's images.

Every image has a caption, made by a fixed rule from what it really shows (text/captions.py). What follows are commands
as anybody types them; all three methods see as many images.
"""

import csv
import io
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import tyro

from mopro_fast import demo
from mopro_fast.console import tell
from mopro_fast.data.anchors import TABLE
from mopro_fast.files import own_folder, replacing, write_json, writing
from mopro_fast.text.captions import captions

CLASSES = [
    ("zero", "round closed ring hollow oval circle"),
    ("one", "single vertical stroke straight upright line"),
    ("two", "curved top neck swan flat bottom"),
    ("three", "double open bumps facing left curves"),
    ("four", "open corner crossing vertical angular sail"),
    ("five", "flat top belly hook below"),
    ("six", "tall stem curling into closed bottom loop"),
    ("seven", "flat roof slanted diagonal stroke"),
    ("eight", "double closed loops stacked snowman"),
    ("nine", "closed upper loop above tail balloon"),
]
METHODS = {"ce": "cross-entropy", "mopro": "MoPro", "capro": "CAPro"}
OPTIONS = {
    "ce": "--method ce",
    "mopro": "",
    "vanilla": "--method capro --epochs 15",
    "match": "--anchors 20",
    "capro": "--method capro --epochs 15 --init-proto 0 --start-clean 5 --threshold 0.4",
}
"""What each step does otherwise than `train demo` and `text match`; docs/capro.md says how it was chosen."""
TRAINED = ("ce", "mopro", "vanilla", "capro")


@dataclass
class CAProDemo:
    """Train cross-entropy, MoPro and CAPro on the demo's digits, with a caption for every image."""

    out: str = "runs/demo"
    """Folder for the images, captions, all runs and capro.json. What `mopro-fast demo` trained there is used."""
    seed: int = 0
    """Decides the noise, the captions, the initial weights, the order and the augmentations."""


def main(argv: list[str]) -> int:
    options = tyro.cli(CAProDemo, args=argv, prog="mopro-fast demo capro")
    out = Path(options.out)
    with own_folder(out, "demo", demo.made_by):
        results = run(out, options.seed)
        if "stopped" in results:
            return 128 + results["stopped"]
        tell(table(results))
        tell(f"\nnumbers: {out / 'capro.json'}    what CAPro did, image by image, and its anchors:")
        return command("report", str(out / "capro"))


def run(out: Path, seed: int) -> dict:
    """Write images and captions, run all commands, measure; goes on where an interrupted call stopped."""
    with writing(f"--out {out}", "name another folder"):
        demo.write_images(out / "images", seed)
        write_captions(out / "images", seed)
    for words in commands(out, out / "images", seed).values():
        if status := command(*words):
            return {"stopped": status - 128}
    results: dict = {"seed": seed} | {f"{m}_top1": demo.curve(out / m, "val", "top1")[-1] for m in TRAINED}
    for method in ("mopro", "capro"):
        found = demo.judge(*demo.decisions(out, method))
        results |= {f"{method}_{name}": value for name, value in found.items()}
    results |= anchors(out / "images", out / "text")
    write_json(out / "capro.json", results)
    return results


def write_captions(images: Path, seed: int) -> None:
    """captions.csv and classes.csv, as `text read` and `text embed` take them."""
    rows = demo.truth(images)
    texts = captions(np.array([int(r["true"]) for r in rows]), CLASSES, seed)
    _write_csv(images / "captions.csv", ("path", "text"), [(r["path"], t) for r, t in zip(rows, texts, strict=True)])
    _write_csv(images / "classes.csv", ("label", "name", "description"), [(i, *c) for i, c in enumerate(CLASSES)])


def commands(
    out: Path,
    images: Path,
    seed: int,
    options: Mapping[str, str] = OPTIONS,
    data: Sequence[str] = (),
    vanilla: Path | None = None,
) -> dict[str, list[str]]:
    """The words of every step after `mopro-fast`.

    options: of the steps besides `text read` and `embed`; data: of each training, where it is not --data images;
    vanilla: where the first stage is, if not in out.
    """
    text, first = str(out / "text"), str(vanilla or out / "vanilla")

    def train(name: str, folder: str, *more: str) -> list[str]:
        where = data or ("--data", str(images))
        return ["train", "demo", *where, "--seed", str(seed), *shlex.split(options[name]), *more, "--out", folder]

    return {name: train(name, str(out / name)) for name in ("ce", "mopro") if name in options} | {
        "read": ["text", "read", str(images), "--texts", str(images / "captions.csv"), "--out", text],
        "embed": ["text", "embed", text, "--classes", str(images / "classes.csv")],
        "vanilla": train("vanilla", first),
        "match": ["text", "match", text, "--features", first, *shlex.split(options["match"])],
        "capro": train("capro", str(out / "capro"), "--init", first, "--anchors", text),
    }


def command(name: str, *words: str) -> int:
    """Run `mopro-fast NAME WORDS` in this process, shown first."""
    tell(f"\n$ mopro-fast {shlex.join([name, *words])}")
    modules = {"train": "training.command", "text": "text.command", "report": "report.page"}
    return import_module(f"mopro_fast.{modules[name]}").main(list(words))


def anchors(images: Path, text: Path) -> dict[str, float]:
    """How many anchors there are, and the share of right labels among them and among all images."""
    chosen = pq.read_table(text / TABLE, columns=["path", "anchor"]).to_pydict()
    right = {r["path"]: r["given"] == r["true"] for r in demo.truth(images)}
    found = [right[p] for p, anchor in zip(chosen["path"], chosen["anchor"], strict=True) if anchor == 1]
    return {
        "anchors": len(found),
        "anchors_right": sum(found) / len(found),
        "labels_right": sum(right.values()) / len(right),
    }


def table(results: dict) -> str:
    def percent(name: str) -> str:
        value = results.get(name)
        return "     –" if value is None else f"{100 * value:4.1f} %"

    right = percent("labels_right")
    rows = "\n".join(
        f"  {label:15}{results[f'{m}_top1']:13.1f} %{percent(f'{m}_precision'):>24}{percent(f'{m}_recall'):>24}"
        for m, label in METHODS.items()
    )
    return f"""
after the last epoch, of as many images seen each
  method          test accuracy    changed labels right    wrong labels righted
{rows}
CAPro's first stage alone: {results["vanilla_top1"]:.1f} %
anchors: {results["anchors"]} images, {percent("anchors_right")} with the right label; of all images {right}"""


def _write_csv(path: Path, names: tuple[str, ...], rows: list[tuple]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([names, *rows])
    with replacing(path) as file:
        file.write(text.getvalue().encode())
