"""Every command that writes, small: its arguments, and what it reads."""

import json
import shutil
from pathlib import Path

from downstream_data import CLASSES, write_checkpoint, write_folders

_TRAINED = "--device cpu --epochs 1 --batch-size 6 --threads 1 --tensorboard False --log-every 1"
_JUDGED = "--device cpu --threads 1 --batch-size 4"
FOLDERS = {  # with --out FOLDER
    "train": f"train demo --data data --num-classes 6 --image-size 16 --queue-size 12 --width 0.125 {_TRAINED}",
    "retrain": f"retrain c.pt --cleaned cleaned.json --data data {_TRAINED}",
    "finetune": f"finetune c.pt --data data --share 1 {_TRAINED}",
    "clean": f"clean c.pt --data data {_JUDGED}",
    "eval": f"eval c.pt --data data {_JUDGED}",
    "lowshot": f"lowshot c.pt --data data --k 1 --runs 1 --jobs 1 {_JUDGED}",
    "probe": f"probe c.pt --data data --steps 2 --evaluate-every 1 --lambdas 0.1 --holdout 0.34 {_JUDGED}",
    "pack": "pack data OUT --size 16 --workers 1",
    "text": "text read data/train --texts texts.csv --workers 1",
    "demo": "demo",
}
FILES = {
    "report": "report run --images 4 --out OUT",
    "export": "export c.pt OUT --format torchvision",
    "import": "import c.pt OUT",
    "check": "check data/train --workers 1 --index OUT",
    "bench": "bench --device cpu --arch resnet18 --batch-sizes 2 --classes 3 --width 0.0625 --image-size 16 "
    "--queue-size 4 --seconds 0.01 --out OUT",
}


def write_inputs(folder: Path) -> Path:
    """data/, c.pt, cleaned.json and texts.csv, and as run/ what there is of a run before its first epoch."""
    write_folders(folder / "data", {"train": 3, "val": 2})
    write_checkpoint(folder / "c.pt")
    images = [f"{name}/{i}.png" for name in CLASSES for i in range(3)]
    labels = [c for c in range(len(CLASSES)) for _ in range(3)]
    (folder / "cleaned.json").write_text(json.dumps({"images": images, "labels": labels}))
    (folder / "texts.csv").write_text("path,text\n" + "".join(f"{image},a cat\n" for image in images))
    (folder / "run").mkdir()
    shutil.copy(folder / "cleaned.json", folder / "run/config.json")
    return folder


def arguments(command: str, inputs: Path, out: Path) -> list[str]:
    """Of the command line; with absolute paths."""
    words = (FOLDERS | FILES)[command].split()
    words += [] if "OUT" in words else ["--out", "OUT"]
    there = {path.name: str(path) for path in inputs.iterdir()} | {"OUT": str(out)}
    return [str(inputs / word) if "/" in word else there.get(word, word) for word in words]
