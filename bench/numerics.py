"""The step with bfloat16 weights against the float32 step on the plain PyTorch backend: losses on real images.

    python bench/numerics.py TRAIN-LIST TEST-LIST [--root FOLDER] [--seeds 3] [--epochs 8] [--part 2000] ...

Recipe "small" on the first images of a shuffled list, every seed with both precisions; interrupted, it goes on.
"""

import argparse
import json
import statistics
from pathlib import Path

import numpy as np
import record

from mopro_fast import demo, ops
from mopro_fast.config import recipe
from mopro_fast.errors import UserError
from mopro_fast.training.loop import Trainer
from mopro_fast.training.tasks import task_of


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--root", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--part", type=int)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--width", type=float, default=1)
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
    runs, log_every = [], 5
    for seed in range(a.seeds):
        for precision in ("fp32", "bf16"):
            c = recipe("small")
            c.model.width, c.optim.epochs, c.optim.batch_size, c.run.seed = a.width, a.epochs, a.batch_size, seed
            c.mopro.start_clean, c.mopro.threshold, c.mopro.calibrate = max(1, a.epochs // 2), 0.8, False
            c.mopro.queue_size = 2 * a.batch_size
            c.data.path, c.data.root = str(a.runs / "train_list.txt"), str(a.root or a.train.parent)
            c.data.val = str(a.test)
            c.data.image_size = c.data.eval_resize = a.image_size
            c.run.precision, c.run.log_every, c.run.cuda_graph = precision, log_every, precision == "bf16"
            c.run.out = str(a.runs / f"seed{seed}" / precision)
            with ops.use_backend("reference" if precision == "fp32" else "auto"):
                if received := Trainer(task_of(c)).run():
                    return 128 + received
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
    settings = {name: getattr(a, name) for name in ("seeds", "epochs", "image_size", "width")}
    settings |= {"images": len(lines), "log_every": log_every}
    print(record.write("numerics", {"settings": settings, "runs": runs}, a.results))
    for precision in ("fp32", "bf16"):
        own = [run for run in runs if run["precision"] == precision]
        print(precision, *(f"{k} {statistics.mean(r[k] for r in own):.3f}" for k in ("loss", "top1")))
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except UserError as error:
        raise SystemExit(f"bench/numerics.py: {error}") from None
