"""The step with bfloat16 weights, and with the keys in float16, against the float32 step on the plain PyTorch backend:
losses, corrected labels and keys on real images.

    python bench/numerics.py TRAIN-LIST TEST-LIST [--root FOLDER] [--seeds 3] [--epochs 8] [--part 2000] ...

Recipe "small" on the first images of a shuffled list, every seed with all precisions; interrupted, it goes on. A CPU
has no fast float16: there, a convolution of the keys takes float16 values, adds up in float32 and rounds, as a GPU's.
"""

import argparse
import copy
import json
import statistics
from pathlib import Path

import numpy as np
import record

# isort: split
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mopro_fast import demo, ops
from mopro_fast.config import recipe
from mopro_fast.errors import UserError
from mopro_fast.models.speedups import turn_on
from mopro_fast.training.loop import Trainer
from mopro_fast.training.tasks import task_of

PRECISIONS = ("fp32", "bf16", "half-keys")
IMAGES = 512  # whose keys are compared


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--root", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--part", type=int)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--width", type=float, default=1)
    parser.add_argument("--bn-group", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--runs", type=Path, default=Path("runs/numerics"))
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    a = parser.parse_args()
    if a.seeds < 2:
        parser.error("--seeds must be at least 2: their spread is what a difference is compared with")
    lines = a.train.read_text().splitlines()
    lines = [lines[i] for i in np.sort(np.random.default_rng(0).permutation(len(lines))[: a.part])]
    a.runs.mkdir(parents=True, exist_ok=True)
    (a.runs / "train_list.txt").write_text("".join(f"{line}\n" for line in lines))
    images = first_images(lines, a.root or a.train.parent, a.image_size)
    runs, log_every, assigned = [], 5, {}
    for seed in range(a.seeds):
        for precision in PRECISIONS:
            c = recipe("small")
            c.model.arch, c.model.bn_group = a.arch, a.bn_group
            c.model.width, c.optim.epochs, c.optim.batch_size, c.run.seed = a.width, a.epochs, a.batch_size, seed
            c.mopro.start_clean, c.mopro.threshold, c.mopro.calibrate = max(1, a.epochs // 2), 0.8, False
            c.mopro.queue_size = 2 * a.batch_size
            c.data.path, c.data.root = str(a.runs / "train_list.txt"), str(a.root or a.train.parent)
            c.data.val = str(a.test)
            c.data.image_size = c.data.eval_resize = a.image_size
            c.run.precision, c.run.log_every = "fp32" if precision == "fp32" else "bf16", log_every
            c.run.cuda_graph = precision != "fp32"
            c.run.out = str(a.runs / f"seed{seed}" / precision)
            task = task_of(c)
            if precision == "half-keys":
                task.build = lambda build=task.build: turn_on(build(), "half-keys")
            with ops.use_backend("reference" if precision == "fp32" else "auto"):
                trainer = Trainer(task)
                if received := trainer.run():
                    return 128 + received
            assigned[seed, precision] = torch.load(Path(c.run.out) / "labels.pt")
            entries = [json.loads(line) for line in (Path(c.run.out) / "log.jsonl").read_text().splitlines()]
            windows = [e for e in entries if e["split"] == "train"]
            per_epoch = max(e["step"] for e in windows)
            steps = [e["epoch"] * per_epoch + e["step"] for e in windows]
            losses = [e["loss"] for e in windows]
            last = [e["loss"] for e in entries if e["split"] == "epoch"][-1]
            top1 = demo.curve(Path(c.run.out), "val", "top1")[-1]
            runs.append(
                {"seed": seed, "precision": precision, "steps": steps, "losses": losses, "loss": last, "top1": top1}
            )
            runs[-1]["same_labels"] = {
                other: percent(labels == assigned[seed, precision])
                for (of, other), labels in assigned.items()
                if of == seed
            }
            if precision != "fp32":
                dtype = torch.float16 if precision == "half-keys" else torch.bfloat16
                runs[-1]["cosines"] = key_cosines(trainer.model.encoder_k, images, dtype)
    seeds = [percent(assigned[i, "bf16"] == assigned[j, "bf16"]) for i in range(a.seeds) for j in range(i)]
    settings = {name: getattr(a, name) for name in ("seeds", "epochs", "image_size", "arch", "width", "bn_group")}
    settings |= {"images": len(lines), "batch_size": a.batch_size, "log_every": log_every}
    print(record.write("numerics", {"settings": settings, "runs": runs, "same_labels_of_seeds": seeds}, a.results))
    for precision in PRECISIONS:
        own = [run for run in runs if run["precision"] == precision]
        print(precision, *(f"{k} {statistics.mean(r[k] for r in own):.3f}" for k in ("loss", "top1")))
    return 0


def first_images(lines: list[str], root: Path, size: int) -> Tensor:
    """uint8 [IMAGES, size, size, 3]"""
    files = [Image.open(root / line.rsplit(maxsplit=1)[0]).convert("RGB") for line in lines[:IMAGES]]
    return torch.stack([torch.from_numpy(np.array(file.resize((size, size)))) for file in files])


def percent(which: Tensor) -> float:
    return 100 * which.double().mean().item()


@torch.no_grad()
def key_cosines(encoder: nn.Module, images: Tensor, dtype: torch.dtype) -> dict[str, float]:
    """Between keys computed in ``dtype`` and in float32, of the same weights: mean and least."""
    device, keys = next(encoder.parameters()).device, []
    for enabled in (True, False):
        with torch.autocast(device.type, dtype, enabled=enabled):
            keys.append(copy.deepcopy(encoder).train()(ops.normalize(images.to(device)))[1])
    cosines = (keys[0].double() * keys[1].double()).sum(1)
    return {"mean": cosines.mean().item(), "min": cosines.min().item()}


def half_as_float32(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In the place of Conv2d._conv_forward on a CPU."""
    with torch.autocast("cpu", enabled=False):
        wide = (t if t is None else t.half().float() for t in (x, weight, bias))
        return F.conv2d(*wide, conv.stride, conv.padding, conv.dilation, conv.groups).half()


def on_a_cpu(forward):
    def conv_forward(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        half = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.float16
        return (half_as_float32 if half and not x.is_cuda else forward)(conv, x, weight, bias)

    return conv_forward


if __name__ == "__main__":
    nn.Conv2d._conv_forward = on_a_cpu(nn.Conv2d._conv_forward)
    try:
        raise SystemExit(main())
    except UserError as error:
        raise SystemExit(f"bench/numerics.py: {error}") from None
