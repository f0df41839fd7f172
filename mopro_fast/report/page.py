"""``mopro-fast report RUN``: the run's page: its contents as plain values, which page.js shows, in one HTML file."""

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from mopro_fast.config import TrainConfig
from mopro_fast.console import escaped, plural, say, tell
from mopro_fast.errors import UserError
from mopro_fast.files import open_regular, output, replacing
from mopro_fast.labels import SHOWN, by_class, relabellings, verdicts
from mopro_fast.models.method import Method
from mopro_fast.models.mopro import MoPro
from mopro_fast.report import anchors, figures
from mopro_fast.report.images import Labels, cards, load_model, read_table
from mopro_fast.report.run import Run

LOSSES = {"loss": "sum", "loss_cls": "classification", "loss_proto": "prototypes", "loss_inst": "instances"}
ACCURACIES = {"acc_cls": "classifier", "acc_inst": "instance contrast"}
ALARMS = 50  # the latest that are shown
NOT_CURVES = {"split", "epoch", "step", "lr", "images", "replaced"}


@dataclass
class Report:
    """Write one self-contained HTML page about a run, finished or not: curves, label correction, images, prototypes."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run's folder (--out of `mopro-fast train`)."""
    out: str | None = None
    """The page (default: RUN/report.html)."""
    table: str | None = None
    """What `mopro-fast clean` wrote, the folder or its table: shown instead of the labels and scores of training."""
    images: int = 400
    """Images shown: a sample over verdicts and classes; of CAPro as many anchors again. Each adds about 4 kB at the
    default --thumb."""
    thumb: int = 96
    """Longer side of an image on the page, px."""
    only: tuple[str, ...] = ()
    """Show only images that have or get one of these classes: numbers or names."""
    seed: int = 0
    """Decides the sample."""
    data: str | None = None
    """Where the training data is now (default: where the run found it)."""
    root: str | None = None
    """Folder that the paths of a list file start from (default: as the run had it)."""
    anchors: str | None = None
    """CAPro: where the table of anchors is now (default: where the run found it)."""
    names: str | None = None
    """File with the classes' names, one per line (default: those of the data, if it has any)."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Computes the images' scores. A run in progress may need its GPU for itself."""


def main(argv: list[str]) -> int:
    options = tyro.cli(Report, args=argv, prog="mopro-fast report")
    if not 0 <= options.images <= 5000:
        raise UserError(f"--images must lie in [0, 5000], got {options.images}")
    if not 16 <= options.thumb <= 512:
        raise UserError(f"--thumb must lie in [16, 512] px, got {options.thumb}")
    out = Path(options.out or Path(options.run) / "report.html")
    Run(Path(options.run))  # it is a run: else nothing is written there
    with output(out, is_page) as path:
        contents = collect(options)
        size = write(contents, path)
    for name, why in contents["missing"].items():
        say(f"not in the report: {name}: {why}")
    unread = f", {len(contents['unread'])} could not be read" if contents["unread"] else ""
    of_capro = f", {plural(len(contents['anchors']['cards']), 'anchor')}" if "anchors" in contents else ""
    say(f"{size / 1e6:.1f} MB, {plural(len(contents['images']), 'image')}{unread}{of_capro}")
    tell(str(out))
    return 0


def collect(options: Report) -> dict[str, Any]:
    """Everything the page shows, as JSON values. Only wrong options raise; what the run lacks is in ``missing``."""
    run = Run(Path(options.run), options.data, options.root, other_data=options.table is not None)
    labels = _labels(run, options.table)
    used = [] if labels is None else [int(a.max(initial=-1)) + 1 for a in (labels.given, labels.new)]
    classes = max(run.config.data.num_classes if run.config else 0, *used, 0)
    names = run.class_names(options.names, classes)
    only = _class_numbers(options.only, names, classes)
    contents = {
        "summary": _summary(run),
        "config": _flat(run.raw_config),
        "defaults": _flat(json.loads(TrainConfig().to_json())),
        "charts": _charts(run),
        "alarms": [[e["epoch"] + 1, str(e.get("text"))] for e in run.log if e.get("split") == "alarm"][-ALARMS:],
        "names": names,
        "labels": None if labels is None else _label_numbers(labels, classes),
        "images": [],
        "unread": {},
        "thumb": options.thumb,
        "prototypes": _prototypes(run),
        "files": {name: run.listed(f"{name}.csv") for name in ("left_out", "replaced")},
    }
    table, model = anchors.find(run, options.anchors), None
    if run.index is not None and (labels or table):
        model = None if labels and labels.table and labels.table.scores else _model(run, options.device)
    how = (run.config, options.thumb, options.device)
    if labels is not None and run.index is not None:
        rows = figures.sample(labels.given, labels.new, options.images, options.seed, only)
        contents |= dict(zip(("images", "unread"), cards(labels, rows, run.index, model, *how), strict=True))
    if table is not None:
        rows = anchors.sample(table, options.images, options.seed, only)
        contents["anchors"] = anchors.collect(run, table, rows, classes, labels, model, *how)
    return contents | {"missing": run.missing}


def write(contents: dict[str, Any], out: Path) -> int:
    """Write the page, all of it or nothing; -> its bytes. Raises CannotWrite."""
    page = render(contents).encode()
    with replacing(out) as file:
        file.write(page)
    return len(page)


def is_page(path: Path) -> bool:
    """Whether a file is such a page, of this version or an earlier one."""
    try:
        with open_regular(path) as file:
            head = file.read(1 << 16).partition(b"<style>")[0]
    except OSError:
        return False
    return b'content="mopro_fast report">' in head or (
        b"content=\"default-src 'none'; img-src data:; style-src 'sha256-" in head and b": MoPro report</title>" in head
    )


def render(contents: dict[str, Any]) -> str:
    """One HTML file that loads nothing. Its policy lets the browser run page.js alone, whatever the strings hold."""
    contents = _escaped(contents)
    html_, css, js = (files(__package__).joinpath(f"page.{kind}").read_text("utf-8") for kind in ("html", "css", "js"))
    parts = {
        "policy": f"default-src 'none'; img-src data:; style-src {_hash(css)}; script-src {_hash(js)}",
        "title": html.escape(contents["summary"]["run"]),
        "css": css,
        "js": js,
        # In a script element only "<" can end it or begin a comment.
        "data": json.dumps(contents, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], html_)


def _escaped(value: Any) -> Any:
    """The same with every string as it can be shown: names may hold what reverses or hides the text around them."""
    if isinstance(value, dict):
        return {_escaped(name): _escaped(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return list(map(_escaped, value))
    return escaped(value) if isinstance(value, str) else value


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _labels(run: Run, table: str | None) -> Labels | None:
    if table is not None:
        return read_table(Path(table))
    if run.index is None or run.labels is None:
        return None
    new, source = run.labels
    if len(new) != len(run.index):
        run.missing["the corrected labels"] = f"there are {len(new)} labels, but {len(run.index)} images"
        return None
    return Labels(run.index.labels, new, source)


def _class_numbers(wanted: Iterable[str], names: list[str] | None, classes: int) -> np.ndarray | None:
    """Of --only: numbers or names."""
    numbers = []
    for name in wanted:
        if names and name in names:
            numbers.append(names.index(name))
        elif name.isdecimal() and int(name) < classes:
            numbers.append(int(name))
        else:
            close = get_close_matches(name, names or [], n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"give its name, or a number below {classes}"
            raise UserError(f"--only {name}: no such class: {hint}")
    return np.array(numbers) if numbers else None


def _steps_per_epoch(run: Run) -> int:
    """Of a first epoch in progress: from the number of images, or as far as it got."""
    ended = [e["step"] for e in run.log if e.get("split") == "epoch"]
    if not ended and run.index is not None and run.state is not None:
        ended = [(len(run.index) - len(run.state.left_out) - len(run.state.held_out)) // run.config.optim.batch_size]
    return max(1, ended[-1] if ended else max((e["step"] for e in run.log), default=1))


def _summary(run: Run) -> dict[str, Any]:
    c = run.config
    ended = [e for e in run.log if e.get("split") == "epoch"]
    best = {}
    for entry in run.log:
        if np.isfinite(entry.get("top1", np.nan)):
            first = best.setdefault(entry["split"], {"last": 0, "best": 0, "epoch": 0})
            first["last"] = round(entry["top1"], 2)
            if first["last"] > first["best"]:
                first |= {"best": first["last"], "epoch": entry["epoch"] + 1}
    return {
        "run": str(run.folder),
        "method": c.method if c else "",
        "data": c.data.path if c else "",
        "arch": c.model.arch if c else "",
        "epochs": c.optim.epochs if c else None,
        "ended": ended[-1]["epoch"] + 1 if ended else 0,
        "start_clean": c.mopro.start_clean if c and (c.method == "mopro" or _anchored(c)) else None,
        "top1": best,
        "replaced": sum(int(e.get("replaced") or 0) for e in ended),
    }


def _anchored(c: TrainConfig) -> bool:
    """CAPro with prototypes."""
    return c.method == "capro" and c.capro.init_proto != "never"


def _charts(run: Run) -> list[dict[str, Any]]:
    """Of log.jsonl and timing.jsonl. x counts epochs: an entry of step s of epoch e (from 0) is at e + s/steps."""
    steps = _steps_per_epoch(run)
    train = [e for e in run.log if e.get("split") == "train"]
    ended = [e for e in run.log if e.get("split") == "epoch"]
    splits = dict.fromkeys(e.get("split") for e in run.log if "top1" in e)

    def line(entries: list[dict], key: str, name: str, factor: float = 1) -> dict[str, Any] | None:
        points = [(e["epoch"] + e["step"] / steps, e[key]) for e in entries if isinstance(e.get(key), (int, float))]
        if not points:
            return None
        x, y = np.array(points, np.float64).T
        return {"name": name} | figures.thin(x, factor * y)

    def chart(title: str, about: str, lines: Iterable[dict | None], **more: Any) -> dict[str, Any]:
        lines = [one for one in lines if one]
        return {"title": title, "about": about, "unit": "", "lines": lines, "group": "training"} | more

    shares = [
        e | {"kept": e["kept"] - e["relabelled"], "removed": 1 - e["kept"]}
        for e in ended
        if isinstance(e.get("kept"), (int, float)) and "relabelled" in e
    ]
    classes = [e | figures.left_of_classes(e) for e in run.log if e.get("split") == "classes"]
    held_out = [e for e in run.log if e.get("split") == "holdout"]
    other = [k for k in dict.fromkeys(k for e in train for k in e) if k not in NOT_CURVES | {*MoPro.METRICS}]
    charts = [
        chart(
            "Accuracy",
            "On the evaluation data, with the labels it came with.",
            [
                line([e for e in run.log if e.get("split") == name], key, f"{name} top-{key[3:]}")
                for name in splits
                for key in ("top1", "top5")
            ],
            unit=" %",
        ),
        chart("Losses", "Their sum is minimised.", [line(train, k, name) for k, name in LOSSES.items()]),
        chart(
            "Accuracy on training batches",
            "Classifier: its first guess is the label it trains with. Contrast: the other view beats the queue.",
            [line(train, k, name, 100) for k, name in ACCURACIES.items()],
            unit=" %",
        ),
        chart("Learning rate", "", [line(train, "lr", "learning rate")]),
        chart(
            "Share of the training images",
            "Over each epoch: trained with the given label, with another one, or kept out of the losses.",
            [line(shares, verdict, verdict, 100) for verdict in SHOWN],
            unit=" %",
            stacked=True,
            group="labels",
        ),
        chart(
            "What is left of the classes",
            "Images that a class is trained with, of those it came with: the class with least, the median, with most.",
            [line(classes, name, name, 100) for name in ("least", "median", "most")],
            unit=" %",
            group="labels",
        ),
        chart(
            "How sure label correction is",
            "Mean score of the class it prefers; and on held-out images the share above θ, and how many of these have "
            "the label that it prefers.",
            [
                line(classes, "score", "mean score", 100),
                line(held_out, "sure", "held out: above θ", 100),
                line(held_out, "sure_right", "held out: of these the label is preferred", 100),
            ],
            unit=" %",
            group="labels",
        ),
        chart("Other values", "", [line(train, k, k) for k in other]),
        chart(
            "Images per second",
            "Of all ranks together.",
            [line(run.timing, "images_per_second", "images per second")],
            group="speed",
        ),
        chart(
            "Waiting for images",
            "Share of the time in which no batch was ready.",
            [line(run.timing, "data_wait", "waiting for images", 100)],
            unit=" %",
            group="speed",
        ),
    ]
    return [c for c in charts if c["lines"]]


def _label_numbers(labels: Labels, classes: int) -> dict[str, Any]:
    verdict = verdicts(labels.given, labels.new)
    return {
        "source": labels.source,
        "counts": {name: int(np.count_nonzero(verdict == v)) for v, name in enumerate(SHOWN)},
        "unseen": int(np.count_nonzero(verdict < 0)),
        "unlabelled": int((labels.given < 0).sum()),
        "classes": {k: v.tolist() for k, v in by_class(labels.given, labels.new, classes).items()},
        "pairs": relabellings(labels.given, labels.new),
    }


def _model(run: Run, device: str) -> Method | None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU here: leave it out")
    if run.state is None:
        return None
    try:
        return load_model(run.config, run.state, device)
    except UserError as error:
        run.missing["scores of the images"] = str(error)
        return None


def _prototypes(run: Run) -> dict[str, Any] | None:
    if run.state is None:
        return None
    if "prototypes" not in run.state.model:
        run.missing["prototypes"] = "this model has none"
        return None
    found = figures.similarity(run.state.model["prototypes"].float().numpy())
    if not found["order"]:
        run.missing["prototypes"] = "they are still zeros"
        return None
    return found


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Settings by dotted name."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, str) else json.dumps(value)
    return flat
