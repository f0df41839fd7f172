"""``mopro-fast probe CKPT``: a linear classifier on frozen features, OmniBenchmark's protocol.

Zhang et al., "Benchmarking omni-vision representation through the lens of visual realms" (2022). As in their code: the
features as they are, of images whose shorter side becomes 224 px (bicubic) and whose central square is taken; LBFGS
with PyTorch's defaults on the sum of the mean cross-entropies of ten consecutive segments of the training images
plus λ·‖W‖ (the norm, not its square); seven λ. As their protocol asks, λ and the step are chosen on
validation images; the best result on the test images, which their code prints, is given beside it.
"""

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from mopro_fast.console import Progress, tell
from mopro_fast.data.index import Index, load_index, val_layout
from mopro_fast.data.order import place_in_class
from mopro_fast.distributed import by_rank0, gather_lists, leave, world
from mopro_fast.downstream.done import Done
from mopro_fast.downstream.features import EncoderConfig, Frozen, folders
from mopro_fast.errors import UserError
from mopro_fast.files import write_json

SEGMENTS = 10
REALM_LISTS = "annotations/v2"
_HOLDOUT = 0x40  # word of the generator's seed


@dataclass
class Probe:
    """Train a linear classifier on a frozen encoder's features with LBFGS, for every λ; choose λ on validation data."""

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CKPT")]
    """A checkpoint of any format that this package reads, or a run's folder: its newest."""
    data: str
    """A realm of OmniBenchmark (a folder with annotations/v2/), or training images in any layout of `mopro-fast
    train`."""
    out: str
    """Folder for probe.json and, while it works, what is done so far."""
    val: str | None = None
    """Images to choose λ on (default: the realm's; val/ where there is a test/; else --holdout)."""
    test: str | None = None
    """Images to test on (default: the realm's, or those that come with the data: test/, val/, WebVision's list)."""
    root: str | None = None
    """Folder that the paths of list files start from (default: each list's own folder)."""
    holdout: float = 0.1
    """Without validation images: share of each class's training images that is used for choosing λ only."""
    lambdas: tuple[float, ...] = (1e-5, 1e-4, 3e-4, 1e-3, 1e-2, 1e-1, 1.0)
    """The values of λ. Ranks share them."""
    steps: int = 1000
    """Steps of LBFGS, of up to 20 iterations each."""
    evaluate_every: int = 100
    """Steps between two evaluations."""
    seed: int = 0
    """Of the first weights and of the images held out."""
    features: str | None = None
    """Folder where features are kept for the next time (default: features/ in --out)."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)


class Rows(NamedTuple):
    """Images as a classifier sees them."""

    features: Tensor
    """float32 [n, F]."""
    labels: Tensor
    """int64 [n]."""


def main(argv: list[str]) -> int:
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff)
    o = tyro.cli(Probe, args=argv, prog="mopro-fast probe", config=config)
    _validate(o)
    with folders("probe", o.checkpoint, o.out, o.features or "", o.encoder.device):
        return probe(o)


def probe(o: Probe) -> int:
    """Write probe.json and print the table; -> 0."""
    sets = by_rank0(lambda: load(o))
    out = Path(o.out)
    folder = Path(o.features) if o.features else out / "features"
    frozen = Frozen(o.checkpoint, o.encoder, folder, filter="cubic", margin=1)
    classes = 1 + max(int(index.labels.max()) for index in sets.values())
    rows, files = {}, []
    for name, index in sets.items():
        features = frozen.features(index, name)
        files.append(os.path.basename(features.filename))
        usable = ~np.isnan(features[:, 0]) & (index.labels >= 0)
        values = (torch.from_numpy(x[usable]).to(frozen.device) for x in (features, index.labels))
        rows[name] = Rows(*values)
    if "val" not in rows:
        features, labels = rows["train"]
        parts = hold_out(labels.cpu().numpy(), o.holdout, o.seed)
        rows["train"], rows["val"] = (Rows(features[part], labels[part]) for part in parts)
    for name, of in rows.items():
        if not len(of.labels):
            raise UserError(f"no image for {name} is left: give more images, or other --val and --test")

    settings = {"features": files, "holdout": o.holdout, "steps": o.steps, "every": o.evaluate_every, "seed": o.seed}
    done = Done(out, "probe", settings)
    rank, ranks = world()
    todo = [lam for lam in o.lambdas if repr(lam) not in done.results]
    for lam in todo[rank::ranks]:
        done.add(repr(lam), fit(rows, classes, lam, o.steps, o.evaluate_every, o.seed))
    results = dict(gather_lists(list(done.results.items()), patient=True))
    leave()
    if rank == 0:
        result = report(o, {name: len(of.labels) for name, of in rows.items()}, classes, results)
        write_json(out / "probe.json", result)
        done.remove()
        tell(table(result))
    return 0


def load(o: Probe) -> dict[str, Index]:
    """By name: train, test and, where there are such images, val."""

    classes: list[str] | None = None

    def listed(path: str, split: str, root: str | None = o.root) -> Index:
        return load_index(path, split, num_classes=None, root=root, classes=classes, missing=o.encoder.trust_index)

    lists = {name: os.path.join(o.data, REALM_LISTS, f"{name}.txt") for name in ("train", "val", "test")}
    if os.path.isfile(lists["train"]):
        given = {"train": lists["train"], "val": o.val or lists["val"], "test": o.test or lists["test"]}
        return {name: listed(path, "train" if name == "train" else "val", o.data) for name, path in given.items()}
    sets = {"train": listed(o.data, "train")}
    classes = sets["train"].classes
    own_test = os.path.join(o.data, "test")
    if o.test or os.path.isdir(own_test):
        sets["test"] = listed(o.test or own_test, "val")
        if o.val or (not o.test and val_layout(o.data)):
            sets["val"] = listed(o.val or o.data, "val")
    elif val_layout(o.data):
        sets["test"] = listed(o.data, "val")
        if o.val:
            sets["val"] = listed(o.val, "val")
    else:
        raise UserError(f"{o.data} comes without images to test on: name them with --test")
    return sets


def hold_out(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """-> int64 rows kept and held out, both sorted: of each class's images this share, rounded."""
    rng = np.random.default_rng([seed, _HOLDOUT])
    order = rng.permutation(len(labels))
    held = place_in_class(labels[order]) < np.round(share * np.bincount(labels))[labels[order]]
    return np.sort(order[~held]), np.sort(order[held])


def fit(rows: dict[str, Rows], classes: int, lam: float, steps: int, every: int, seed: int) -> list[dict]:
    """Train on rows["train"]; -> the accuracies on the others, in percent, after every ``every`` steps and the last.

    Empty where the weights were not finite any more by then: LBFGS without a line search may diverge.
    """
    train = rows["train"]
    torch.manual_seed(seed)
    net = nn.Linear(train.features.shape[1], classes).to(train.features.device)
    optimizer = torch.optim.LBFGS(net.parameters())
    objective = closure(net, optimizer, train, lam)
    found, before = [], None
    with Progress(f"λ={lam:g}", steps, "steps", active=world()[0] == 0) as bar:
        for step in range(1, steps + 1):
            optimizer.step(objective)
            bar.update()
            if step % every and step != steps:
                continue
            weights = nn.utils.parameters_to_vector(net.parameters()).detach()
            if not weights.isfinite().all():
                break
            accuracies = {name: accuracy(net, of, classes) for name, of in rows.items() if name != "train"}
            found.append({"step": step, **accuracies})
            if before is not None and torch.equal(weights, before):
                break  # a whole round without any change: there will be none
            before = weights
    return found


def closure(net: nn.Linear, optimizer: torch.optim.Optimizer, train: Rows, lam: float) -> Callable[[], Tensor]:
    """The objective as the source computes it: it returns the last segment's part, gradients are of the sum."""
    n = len(train.labels)
    segments = min(SEGMENTS, n)
    bounds = [i * (n // segments) for i in range(segments)] + [n]
    parts = [(train.features[a:b], train.labels[a:b]) for a, b in itertools.pairwise(bounds)]

    def objective() -> Tensor:
        optimizer.zero_grad()
        for i, (features, labels) in enumerate(parts):
            loss = F.cross_entropy(net(features), labels)
            if i == len(parts) - 1:
                loss = loss + lam * net.weight.norm()
            loss.backward()
        return loss

    return objective


@torch.no_grad()
def accuracy(net: nn.Linear, rows: Rows, classes: int) -> dict[str, float]:
    """Percent: of all images, and the mean over the classes that have any."""
    hit = net(rows.features).argmax(1) == rows.labels
    hits, images = (torch.bincount(x, minlength=classes).cpu().double() for x in (rows.labels[hit], rows.labels))
    of_class = (hits / images)[images > 0]
    return {"top1": float(100 * hits.sum() / images.sum()), "mean_per_class": float(100 * of_class.mean())}


def report(o: Probe, images: dict[str, int], classes: int, results: dict[str, list[dict]]) -> dict:
    """The result file: per λ the step that is best on the validation images, and the best λ."""
    by_lambda = {}
    for lam in o.lambdas:
        rounds = results[repr(lam)]
        if rounds:
            chosen = max(rounds, key=lambda r: r["val"]["top1"])  # the first of equals
            best = {name: max(r["test"][name] for r in rounds) for name in ("top1", "mean_per_class")}
            by_lambda[repr(lam)] = {**chosen, "best_on_test": best}
    if not by_lambda:
        raise UserError("every λ diverged: are the features those of a trained encoder?")
    lam = max(by_lambda, key=lambda name: by_lambda[name]["val"]["top1"])
    return {
        "checkpoint": o.checkpoint,
        "data": o.data,
        "classes": classes,
        "images": images,
        "settings": {"steps": o.steps, "evaluate_every": o.evaluate_every, "seed": o.seed},
        "lambda": float(lam),
        **{name: by_lambda[lam][name] for name in ("step", "val", "test")},
        "lambdas": by_lambda,
        "diverged": [value for value in o.lambdas if not results[repr(value)]],
    }


def table(result: dict) -> str:
    lines = ["       λ   step  val top-1  test top-1  per class  best on test"]
    for lam, r in result["lambdas"].items():
        cells = (r["val"]["top1"], r["test"]["top1"], r["test"]["mean_per_class"], r["best_on_test"]["top1"])
        mark = "  <- chosen" if float(lam) == result["lambda"] else ""
        lines.append(
            "{:>8g} {:>6d} {:>10.2f} {:>11.2f} {:>10.2f} {:>13.2f}".format(float(lam), r["step"], *cells) + mark
        )
    lines += [f"{lam:>8g} diverged" for lam in result["diverged"]]
    return "\n".join(lines)


def _validate(o: Probe) -> None:
    if not o.lambdas or min(o.lambdas) < 0 or len(set(o.lambdas)) < len(o.lambdas):
        raise UserError(f"--lambdas must be different numbers, none below 0, got {' '.join(map(str, o.lambdas))}")
    for name in ("steps", "evaluate_every"):
        if getattr(o, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(o, name)}")
    if not 0 < o.holdout < 1:
        raise UserError(f"--holdout must lie between 0 and 1, got {o.holdout}")
