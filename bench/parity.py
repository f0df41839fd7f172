"""The official code and this package side by side: python bench/parity.py CLONE [--results FOLDER]

CLONE is a checkout of github.com/salesforce/MoPro. A random ResNet-50 in its checkpoint format and random images go
through its scripts and through ours; bench/results/parity.json has how far the results are apart.

Its scripts run as they are. Where torchvision or tensorboard_logger cannot be imported, stand-ins take their place
(:func:`stand_in`: the four transforms that the scripts use, on Pillow images as torchvision does them, and no logger);
on a machine without a GPU ``.cuda()`` does nothing.
"""

import argparse
import json
import pickle
import runpy
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import record
import torch
from PIL import Image
from torch import nn

CLASSES, IMAGES, SQUARE = 20, 72, 36  # the first SQUARE images are PNGs that no side resizes
THRESHOLD = 0.65  # θ
NEAR = 0.1  # a score within this share of a threshold may fall on either side where the pixels differ


def stand_in() -> list[str]:
    """Make the official scripts importable and runnable here; -> what had to be replaced."""
    replaced = []
    try:
        import torchvision  # noqa: F401
    except ImportError:
        replaced.append("torchvision's transforms (Resize, CenterCrop, ToTensor, Normalize: Pillow)")
        vision = types.ModuleType("torchvision")
        vision.transforms = _transforms()
        vision.datasets = types.ModuleType("torchvision.datasets")
        sys.modules |= {f"torchvision.{n}": getattr(vision, n) for n in ("transforms", "datasets")}
        sys.modules["torchvision"] = vision
    try:
        import tensorboard_logger  # noqa: F401
    except ImportError:
        replaced.append("tensorboard_logger (not called)")
        sys.modules["tensorboard_logger"] = types.ModuleType("tensorboard_logger")
    if not torch.cuda.is_available():
        replaced.append(".cuda() (the CPU)")
        torch.Tensor.cuda = nn.Module.cuda = lambda self, *_, **__: self
    return replaced


def _transforms() -> types.ModuleType:
    class Compose:
        def __init__(self, steps):
            self.steps = steps

        def __call__(self, x):
            for step in self.steps:
                x = step(x)
            return x

    class Resize:
        def __init__(self, size):
            self.size = size

        def __call__(self, image):
            w, h = image.size
            short = min(w, h)
            if short == self.size:
                return image
            return image.resize((w * self.size // short, h * self.size // short), Image.Resampling.BILINEAR)

    class CenterCrop:
        def __init__(self, size):
            self.size = size

        def __call__(self, image):
            left, top = (round((side - self.size) / 2) for side in image.size)
            return image.crop((left, top, left + self.size, top + self.size))

    class ToTensor:
        def __call__(self, image):
            return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 255

    class Normalize:
        def __init__(self, mean, std):
            self.mean, self.std = (torch.tensor(x)[:, None, None] for x in (mean, std))

        def __call__(self, x):
            return (x - self.mean) / self.std

    module = types.ModuleType("torchvision.transforms")
    for part in (Compose, Resize, CenterCrop, ToTensor, Normalize):
        setattr(module, part.__name__, part)
    return module


def make_images(root: Path) -> None:
    """WebVision's layout: smooth random images, the first ones 256 px PNGs, then JPEGs of any size."""
    rng = np.random.default_rng(0)
    lines = []
    for sub in ("info", "google", "flickr"):
        (root / sub).mkdir(parents=True)
    for i in range(IMAGES):
        size = (256, 256) if i < SQUARE else tuple(rng.integers(180, 500, 2).tolist())
        colour, texture = rng.integers(0, 256, 3), rng.integers(-60, 60, (9, 9, 3))  # images differ in their means
        image = Image.fromarray((colour + texture).clip(0, 255).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
        grain = rng.normal(
            0, 12, (*image.size[::-1], 1)
        )  # as photographs have: without it rounding is all that is fine
        image = Image.fromarray((np.array(image) + grain).clip(0, 255).astype(np.uint8))
        name = f"{'google' if i < SQUARE else 'flickr'}/{i:03d}.{'png' if i < SQUARE else 'jpg'}"
        image.save(root / name, **({} if i < SQUARE else {"quality": 95}))
        lines.append(f"{name} {rng.integers(CLASSES)}\n")
    (root / "info/train_filelist_google.txt").write_text("".join(lines[:SQUARE]))
    (root / "info/train_filelist_flickr.txt").write_text("".join(lines[SQUARE:]))


def make_checkpoint(path: Path, images: torch.Tensor) -> None:
    """As train.py saves it, with fitting BatchNorm statistics, unsure of some images and sure of others.

    Residual branches are small, as in trained networks: else one level of one pixel changes what it sees.
    """
    from model import MoPro
    from resnet import Bottleneck, resnet50

    torch.manual_seed(0)
    options = argparse.Namespace(num_class=CLASSES, low_dim=128, moco_queue=256)
    model = MoPro(resnet50, options, width=1).train()
    with torch.no_grad():
        for m in model.encoder_q.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.momentum = None  # the plain mean
            if isinstance(m, Bottleneck):
                m.bn3.weight.fill_(0.1)
        model.encoder_q(images)
        model.eval()
        e = model.encoder_q
        logits, _ = e(images)
        e.classifier.weight.mul_(6 / (logits - logits.mean(0)).std())
        e.classifier.bias.sub_(e(images)[0].mean(0))
        before = []
        handle = e.fc2.register_forward_hook(lambda _module, _inputs, out: before.append(out))
        e(images)
        handle.remove()
        e.fc2.bias.sub_(before[0].mean(0))
        model.prototypes.copy_(e(images)[1][:CLASSES])
        model.queue_ptr.fill_(64)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    for p in model.encoder_q.parameters():
        optimizer.state[p]["momentum_buffer"] = torch.randn_like(p)
    state = {f"module.{name}": t for name, t in model.state_dict().items()}
    torch.save({"epoch": 90, "arch": "resnet50", "state_dict": state, "optimizer": optimizer.state_dict()}, path)


def official_model(path: Path) -> nn.Module:
    from model import MoPro
    from resnet import resnet50

    model = MoPro(resnet50, argparse.Namespace(num_class=CLASSES, low_dim=128, moco_queue=256), width=1)
    state = torch.load(path, weights_only=True)["state_dict"]
    model.load_state_dict({name.removeprefix("module."): t for name, t in state.items()})
    return model.eval()


def official_script(clone: Path, name: str, *arguments: str) -> None:
    """Run one of its scripts in a process of its own."""
    command = [sys.executable, __file__, str(clone), "--script", name, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr}")


def row(what: str, unit: str, difference: float, limit: float, of: int) -> dict:
    """of: how many were compared."""
    difference, ok = float(difference), bool(difference <= limit)
    print(f"{what}: {difference:g} {unit} (limit {limit:g}, {of}) {'ok' if ok else 'FAILED'}", flush=True)
    return {"what": what, "unit": unit, "difference": difference, "limit": limit, "of": of, "passed": ok}


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def outputs(checkpoint: Path, pixels: torch.Tensor) -> list[dict]:
    """pixels: uint8 [N, 224, 224, 3]. Both against the official model in float64."""
    from mopro_fast import ops
    from mopro_fast.checkpoints.weights import load_encoder

    def official(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        model, found = official_model(checkpoint).to(dtype), {}
        model.encoder_q.classifier.register_forward_pre_hook(lambda _, inputs: found.update(features=inputs[0]))
        found["logits"], found["embeddings"] = model.encoder_q(normalised.to(dtype).contiguous())
        return found

    encoder, _ = load_encoder(checkpoint, torch.device("cpu"))
    normalised = ops.normalize(pixels)
    rows = []
    with torch.inference_mode():
        features = encoder.features(normalised)
        ours = {"features": features, "logits": encoder.classifier(features), "embeddings": encoder.project(features)}
        theirs, exact = official(torch.float32), official(torch.float64)
    for name, found in ours.items():
        limit = 2 * relative(theirs[name], exact[name])  # twice what float32 costs the official code itself
        rows.append(
            row(
                f"{name}, against the official model in float64",
                "relative RMS",
                relative(found, exact[name]),
                limit,
                len(pixels),
            )
        )
        rows.append(
            row(f"{name}, against it in float32", "relative RMS", relative(found, theirs[name]), 5e-6, len(pixels))
        )
    return rows


def cleaning(clone: Path, checkpoint: Path, images: Path, folder: Path) -> list[dict]:
    """noise_cleaning.py and `mopro-fast clean`, on the official checkpoint and on our export of our import of it."""
    from mopro_fast.cli import main

    def ours(*arguments) -> None:
        try:
            main([str(a) for a in arguments])
        except SystemExit as stop:
            if stop.code:
                raise

    def theirs(path: Path, annotation: Path) -> dict[str, int]:
        options = {"data": f"{images}/", "resume": path, "annotation": annotation, "num-class": CLASSES}
        options |= {"moco_queue": 256, "workers": 0, "batch-size": 32, "pseudo_th": THRESHOLD}
        official_script(clone, "noise_cleaning.py", *(str(x) for k, v in options.items() for x in (f"--{k}", v)))
        return labels(annotation)

    def labels(path: Path) -> dict[str, int]:
        found = json.loads(path.read_text())
        return dict(zip(found["images"], found["labels"], strict=True))

    judged = theirs(checkpoint, folder / "official.json")
    options = ["--threshold", THRESHOLD, "--batch-size", 32, "--device", "cpu"]
    ours("clean", checkpoint, "--data", images, "--out", folder / "clean", *options)
    table = pq.read_table(folder / "clean/cleaned.parquet").to_pylist()
    got = labels(folder / "clean/pseudo_label.json")
    near = set()
    for r in table[SQUARE:]:
        distances = abs(r["score_best"] / THRESHOLD - 1), abs(r["score_given"] * CLASSES - 1)
        near |= {r["path"]} if min(distances) < NEAR else set()
    verdicts = {v: sum(r["verdict"] == v for r in table) for v in ("kept", "relabelled", "removed")}
    rows = []
    for name, paths in {
        "the same pixels": [r["path"] for r in table[:SQUARE]],
        f"JPEGs of any size but {len(near)} near a threshold": [
            r["path"] for r in table[SQUARE:] if r["path"] not in near
        ],
    }.items():
        wrong = sum(judged.get(p) != got.get(p) for p in paths)
        rows.append(row(f"pseudo labels, {name}", "images that differ", wrong, 0, len(paths)))
    if not all(verdicts.values()):
        raise RuntimeError(f"these images do not show every verdict: {verdicts}")

    ours("import", checkpoint, folder / "ours.pt")
    ours("export", folder / "ours.pt", folder / "back.tar", "--format", "official")
    official_model(folder / "back.tar")
    again = theirs(folder / "back.tar", folder / "again.json")
    differ = sum(judged.get(p) != again.get(p) for p in judged | again)
    rows.append(row("noise_cleaning.py on our export", "images that differ", differ, 0, IMAGES))
    ours("export", checkpoint, folder / "ours.pkl", "--format", "detectron2")
    official_script(clone, "detection/convert-pretrain-to-detectron2.py", str(checkpoint), str(folder / "theirs.pkl"))
    mine, other = (pickle.loads((folder / f"{n}.pkl").read_bytes())["model"] for n in ("ours", "theirs"))
    differ = sum(n not in mine or n not in other or (mine[n] != other[n]).any() for n in mine | other)
    return [*rows, row("detectron2 pickle", "tensors that differ", differ, 0, len(other))]


def resumed(checkpoint: Path, folder: Path) -> list[dict]:
    """The optimizer of train.py takes our export's state, with the momentum of the same parameters."""
    from mopro_fast.checkpoints.weights import load_weights
    from mopro_fast.downstream.export import export

    export(load_weights(checkpoint), folder / "same.tar", "official")
    model = official_model(folder / "same.tar")
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    optimizer.load_state_dict(torch.load(folder / "same.tar", weights_only=True)["optimizer"])
    before = torch.load(checkpoint, weights_only=True)["optimizer"]["state"]
    differ = sum(
        not torch.equal(optimizer.state[p]["momentum_buffer"], before[i]["momentum_buffer"])
        for i, p in enumerate(model.encoder_q.parameters())
    )
    return [row("momentum in train.py's optimizer, from our export", "tensors that differ", differ, 0, len(before))]


def sampling(folder: Path) -> list[dict]:
    """How often dataloader_balance.py repeats an image, by class; 1000 classes of very different sizes."""
    import DataLoader.dataloader_balance as official

    from mopro_fast.data.order import balancing_repeats

    rng = np.random.default_rng(0)
    sizes = np.maximum(1, rng.lognormal(5, 1, 1000).astype(int))
    labels = np.repeat(np.arange(1000), sizes)
    annotation = {"images": [str(i) for i in range(len(labels))], "labels": labels.tolist()}
    (folder / "sizes.json").write_text(json.dumps(annotation))
    weights = {}

    def shuffle(_list: list) -> None:
        weights.update(sys._getframe(1).f_locals["weight"])

    kept, official.random.shuffle = official.random.shuffle, shuffle
    try:
        official.webvision_dataset("", str(folder / "sizes.json"), None, "train").repeat()
    finally:
        official.random.shuffle = kept
    ours = balancing_repeats(labels, np.arange(len(labels)))[sizes.cumsum() - 1]
    differ = int((ours != np.array([weights[c] for c in range(1000)])).sum())
    return [row("sampling weights of classifier re-training", "classes that differ", differ, 0, 1000)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path)
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    parser.add_argument("--script", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if not (a.clone / "noise_cleaning.py").is_file():
        parser.error(f"{a.clone} is no checkout of salesforce/MoPro: it has no noise_cleaning.py")
    sys.path.insert(0, str(a.clone.resolve()))
    sys.dont_write_bytecode = True
    replaced = stand_in()
    if a.script:
        sys.argv = a.script
        runpy.run_path(str(a.clone / a.script[0]), run_name="__main__")
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_images(folder / "images")
        squares = [Image.open(folder / f"images/google/{i:03d}.png").crop((16, 16, 240, 240)) for i in range(SQUARE)]
        pixels = torch.from_numpy(np.stack([np.array(image) for image in squares]))
        from mopro_fast import ops

        make_checkpoint(folder / "official.tar", ops.normalize(pixels).contiguous())
        rows = outputs(folder / "official.tar", pixels)
        rows += cleaning(a.clone, folder / "official.tar", folder / "images", folder)
        rows += resumed(folder / "official.tar", folder) + sampling(folder)
    record.write("parity", {"stand_ins": replaced, "rows": rows}, a.results)
    return 0 if all(r["passed"] for r in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
