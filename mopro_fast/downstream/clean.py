"""``mopro-fast clean CKPT --data DATA --out FOLDER``: the noise cleaning of the paper over a whole training set.

FOLDER/pseudo_label.json has the images that stay and their labels in the official format, FOLDER/cleaned.parquet a row
for every image. They are scored in batches that depend on the data and --batch-size alone, and finished parts lie on
the disk: the bytes are the same whatever the number of ranks and interruptions.
"""

import contextlib
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
import tyro
from torch import Tensor
from tqdm import tqdm

from mopro_fast import distributed, ops
from mopro_fast.checkpoints.formats import Weights, digest
from mopro_fast.checkpoints.weights import build_encoder, load_weights
from mopro_fast.config import DataConfig, MoProConfig
from mopro_fast.data import inputs
from mopro_fast.data.index import Index, load_index
from mopro_fast.data.pipeline import EvalLoader
from mopro_fast.downstream.in_order import in_order
from mopro_fast.errors import UserError
from mopro_fast.files import replacing, write_json
from mopro_fast.labels import DECISIONS

TABLE, OFFICIAL = "cleaned.parquet", "pseudo_label.json"
SCORES = ("score_given", "score_best", "classifier_given", "classifier_best", "prototype_given", "prototype_best")
_SCHEMA = pa.schema(
    [
        ("id", pa.int64()),  # row of the data's lists
        ("path", pa.string()),
        ("given", pa.int32()),  # label; -1: none
        ("label", pa.int32()),  # after cleaning; -1: removed
        ("verdict", pa.string()),
        ("best", pa.int32()),  # the class with the highest score; -1: no image
        *((name, pa.float32()) for name in SCORES),  # null where there is no label, or no image
    ]
)
_BATCHES = 16  # per part


@dataclass
class Clean:
    """Correct or remove every training label by the model's classifier and prototypes."""

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CKPT")]
    """A checkpoint with prototypes, of any format that this package reads, or a run's folder: its newest."""
    data: str = ""
    """Training data: a WebVision folder, a list file ("path label" per line), class folders, or packed shards."""
    out: str = ""
    """Folder for pseudo_label.json (the official format) and cleaned.parquet (a row per image)."""
    layout: Literal["auto", "webvision", "list", "folder", "shards"] = "auto"
    """Layout of the data; auto looks."""
    root: str | None = None
    """Folder that the paths of a list file start from (default: the list's own folder)."""
    alpha: float | None = None
    """Weight of the classifier against the prototypes (default: as trained, else 0.5)."""
    threshold: float | None = None
    """θ: relabel when the best score exceeds it (default: as trained, else 0.8)."""
    temperature: float | None = None
    """T of the prototypes' scores (default: as trained, else 0.1)."""
    image_size: int | None = None
    """Side of the central crop, px (default: as trained, else 224)."""
    eval_resize: int | None = None
    """Shorter side before that crop (default: as trained, else image_size·256/224)."""
    batch_size: int = 256
    """Images per batch of a rank. Another one changes the scores' last bits."""
    threads: int = 0
    """Decoding threads per rank (0: this machine's cores divided by its ranks)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU of each local rank if there is one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast, faster on a GPU; scores near the thresholds may fall on the other side."""


def main(argv: list[str]) -> int:
    o = tyro.cli(Clean, args=argv, prog="mopro-fast clean")
    if not o.data or not o.out:
        raise UserError("mopro-fast clean CKPT needs --data and --out")
    device = distributed.start(o.device)
    totals = clean(o, device)
    if distributed.world()[0] == 0:
        print(summary(totals, Path(o.out)))
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


def summary(totals: dict[str, int], out: Path) -> str:
    images = sum(totals.values())
    shares = ", ".join(f"{totals[v]} {v} ({100 * totals[v] / images:.1f} %)" for v in DECISIONS if totals[v])
    return f"{images} images: {shares}\ntable: {out / TABLE}    labels in the official format: {out / OFFICIAL}"


def clean(o: Clean, device: torch.device) -> dict[str, int]:
    """-> how many images have which verdict."""
    weights = load_weights(o.checkpoint)
    _fill_in(o, weights)
    index = load_index(
        o.data,
        "train",
        num_classes=weights.num_classes,
        layout=o.layout,
        root=o.root,
        keep_classes=_kept_classes(weights),
    )
    out = Path(o.out)
    settings = {name: getattr(o, name) for name in ("alpha", "threshold", "temperature", "image_size", "eval_resize")}
    settings |= {"batch_size": o.batch_size, "precision": o.precision, "device": device.type}
    settings |= {"weights": digest(weights.state), "data": index.digest(), "images": len(index)}
    finished = distributed.by_rank0(lambda: _begin(out, settings))
    if finished is not None:
        return finished
    index = inputs.readable(index, "train", inputs.threads(DataConfig(threads=o.threads)))
    _score_parts(o, weights, index, out / "parts", device)
    return distributed.by_rank0(lambda: _finish(out, index, settings, o.batch_size))


def _fill_in(o: Clean, weights: Weights) -> None:
    """What was not given, as the model was trained; then refuse what cannot be right."""
    trained = (weights.config or {}).get("mopro", {})
    for name in ("alpha", "threshold", "temperature"):
        if getattr(o, name) is None:
            setattr(o, name, trained.get(name, getattr(MoProConfig(), name)))
    if o.image_size is None:
        o.image_size, o.eval_resize = weights.image_size, o.eval_resize or weights.eval_resize
    if o.image_size is None:
        raise UserError(f"{o.checkpoint} does not say for which images it is: set --image-size")
    o.eval_resize = o.eval_resize or round(o.image_size * 256 / 224)
    for name in ("alpha", "threshold"):
        if not 0 <= getattr(o, name) <= 1:
            raise UserError(f"--{name} must lie in [0, 1], got {getattr(o, name)}")
    if not o.temperature > 0:
        raise UserError(f"--temperature must be above 0, got {o.temperature}")
    if o.batch_size < 1 or o.threads < 0:
        raise UserError(f"--batch-size and --threads must be positive, got {o.batch_size} and {o.threads}")
    if "prototypes" not in weights.state or weights.num_classes is None:
        raise UserError(f"{o.checkpoint} has no prototypes to clean with: give a checkpoint of MoPro's training")


def _kept_classes(weights: Weights) -> int | None:
    return (weights.config or {}).get("data", {}).get("keep_classes")


def _begin(out: Path, settings: dict) -> dict[str, int] | None:
    """-> the totals of a cleaning that is finished. Its settings must be ours."""
    state = out / "clean.json"
    if state.is_file():
        try:
            found = json.loads(state.read_text())
            changed = [name for name, value in settings.items() if found["settings"].get(name) != value]
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            raise UserError(f"{state} cannot be read: remove it, or choose another --out") from None
        if changed and any(path.exists() for path in (out / TABLE, *(out / "parts").glob("*.parquet"))):
            raise UserError(f"{out} holds another cleaning, with other {changed[0]}: choose another --out")
        if "totals" in found and (out / TABLE).is_file():
            print(f"{out} is finished", file=sys.stderr)
            shutil.rmtree(out / "parts", ignore_errors=True)
            return found["totals"]
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: name a folder")
    with _writing(out):
        (out / "parts").mkdir(parents=True, exist_ok=True)
    write_json(state, {"settings": settings})
    return None


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    """A full or unwritable disk ends in one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write into {out}: {error.strerror}: choose another --out") from None


def _parts(images: int, batch_size: int) -> list[range]:
    rows = _BATCHES * batch_size
    return [range(first, min(first + rows, images)) for first in range(0, images, rows)]


def _score_parts(o: Clean, weights: Weights, index: Index, folder: Path, device: torch.device) -> None:
    """Write the parts of this rank that are not there yet. No batch reaches over a part's end."""
    rank, ranks = distributed.world()
    parts = _parts(len(index), o.batch_size)
    missing = distributed.from_rank0([p for p in range(len(parts)) if not _part(folder, p).is_file()])
    mine = missing[rank::ranks]
    batches = []
    for p in mine:
        rows = np.setdiff1d(np.array(parts[p]), index.left_out)
        batches += [rows[i : i + o.batch_size] for i in range(0, len(rows), o.batch_size)]
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    encoder = build_encoder(weights).to(device, memory_format=torch.channels_last).eval()
    prototypes = weights.state["prototypes"].to(device)
    loader = EvalLoader(
        index,
        batch_size=o.batch_size,
        rank=rank,
        world_size=ranks,
        image_size=o.image_size,
        resize=o.eval_resize,
        device=device,
        threads=inputs.threads(DataConfig(threads=o.threads)),
        batches=batches,
    )
    scored: dict[int, list[tuple[Tensor, ...]]] = {p: [] for p in mine}  # not written yet; on the device
    total = sum(map(len, batches))

    @torch.inference_mode()
    def scoring(images: Tensor, labels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return ids, *score(encoder, prototypes, images, labels, o)

    with contextlib.closing(loader), _progress(total, rank, ranks) as bar:
        for ids, best, scores in in_order(scoring, loader, device):
            part = int(ids[0]) // (_BATCHES * o.batch_size)
            for earlier in [p for p in scored if p < part]:
                _write_part(
                    _part(folder, earlier), index, parts[earlier], scored.pop(earlier), o.threshold, len(prototypes)
                )
            scored[part].append((ids, best, scores))
            bar.update(len(ids))
        for p, batches in scored.items():
            _write_part(_part(folder, p), index, parts[p], batches, o.threshold, len(prototypes))


def _progress(total: int, rank: int, ranks: int) -> tqdm:
    name = "clean" if ranks == 1 else f"clean (1 of {ranks} ranks)"
    return tqdm(total=total, desc=name, unit="img", disable=True if rank else None, file=sys.stderr)


def _part(folder: Path, p: int) -> Path:
    return folder / f"{p:06d}.parquet"


def score(encoder, prototypes: Tensor, images: Tensor, labels: Tensor, o: Clean) -> tuple[Tensor, Tensor]:
    """-> the best class int64 [n], SCORES float32 [n, 6]; steps 5 and 6 of the method, without a momentum."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=o.precision == "bf16"):
        logits, q = encoder(ops.normalize(images))
    classifier = logits.float().softmax(1)
    prototype = (q @ prototypes.T / o.temperature).softmax(1)
    mixed = o.alpha * classifier + (1 - o.alpha) * prototype  # [n, C]
    best = mixed.argmax(1)
    given = labels.clamp(min=0)
    columns = [p.gather(1, rows[:, None]) for p in (mixed, classifier, prototype) for rows in (given, best)]
    scores = torch.cat(columns, 1)
    scores[:, ::2].masked_fill_(labels[:, None] < 0, float("nan"))
    return best, scores


def decide(given: np.ndarray, best: np.ndarray, scores: np.ndarray, threshold: float, classes: int) -> np.ndarray:
    """Verdicts uint8 [n] by the rule of the method: sure of the best class, else kept by the given label's score."""
    sure = scores[:, 1] > threshold
    kept = scores[:, 0] > 1 / classes
    return np.where(sure & (best != given), 1, np.where(sure | kept, 0, 2))


def _write_part(
    path: Path, index: Index, rows: range, batches: list[tuple[Tensor, ...]], threshold: float, classes: int
) -> None:
    given = index.labels[rows.start : rows.stop]
    best, verdict = np.full(len(rows), -1), np.full(len(rows), DECISIONS.index("unreadable"))
    scores = np.full((len(rows), len(SCORES)), np.nan, np.float32)
    if batches:
        ids, *found = (torch.cat(columns).cpu().numpy() for columns in zip(*batches, strict=True))
        at = ids - rows.start
        best[at], scores[at] = found
        verdict[at] = decide(given[at], *found, threshold, classes)
    label = np.choose(verdict, [given, best, -1, -1])
    columns = [np.array(rows), index.paths[rows.start : rows.stop].tolist(), given, label, np.array(DECISIONS)[verdict]]
    columns += [best, *scores.T]
    arrays = [pa.array(c, f.type, from_pandas=True) for c, f in zip(columns, _SCHEMA, strict=True)]
    with _writing(path.parent), replacing(str(path)) as file:
        pq.write_table(pa.table(arrays, schema=_SCHEMA), file)


def _finish(out: Path, index: Index, settings: dict, batch_size: int) -> dict[str, int]:
    """The parts, one after the other, into the table and the official file; -> the totals."""
    schema = _SCHEMA.with_metadata({"mopro_fast.clean": json.dumps(settings)})
    totals, labels = dict.fromkeys(DECISIONS, 0), []
    with _writing(out), replacing(str(out / TABLE)) as table, replacing(str(out / OFFICIAL)) as official:
        official.write(b'{"images": [')
        with pq.ParquetWriter(table, schema, compression="zstd") as writer:
            for p in range(len(_parts(len(index), batch_size))):
                part = pq.read_table(_part(out / "parts", p), schema=_SCHEMA)
                writer.write_table(part.replace_schema_metadata(schema.metadata))
                for verdict in DECISIONS:
                    totals[verdict] += pc.sum(pc.equal(part["verdict"], verdict)).as_py() or 0
                stay = part.filter(pc.is_in(part["verdict"], pa.array(DECISIONS[:2])))
                paths = [json.dumps(path) for path in stay["path"].to_pylist()]
                official.write((", " * bool(labels and paths) + ", ".join(paths)).encode())
                labels += stay["label"].to_pylist()
        official.write(b'], "labels": ' + json.dumps(labels).encode() + b"}")
    write_json(out / "clean.json", {"settings": settings, "totals": totals})
    shutil.rmtree(out / "parts")
    return totals
