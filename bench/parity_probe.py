"""OmniBenchmark's linear_probe/main.py as it is, and ours, on the same features; and the calibration error's source.

    python bench/parity_probe.py CLONE_OF_ZhangYuanhan-AI/OmniBenchmark CLONE_OF_hendrycks/natural-adv-examples

The script runs whole, on the CPU, once for each λ; its data set is replaced by made-up features and its network by one
that hands them on. Its first weights depend on how many random numbers its loaders drew; here both start from the same.
Compared is every accuracy that it logs. The calibration error is computed on made-up predictions. The script needs
PyYAML.
"""

import argparse
import contextlib
import importlib.util
import io
import logging
import os
import re
import runpy
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from unittest import mock

import numpy as np
import record
import torch
import torch.distributed as dist
import yaml

from mopro_fast.downstream import evaluate, probe

CLASSES, FEATURES = 12, 64
IMAGES = {"train": 603, "val": 300, "test": 500}
STEPS, EVERY = 20, 2
LAMBDAS = probe.Probe(checkpoint="", data="", out="").lambdas


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("omnibenchmark", type=Path)
    parser.add_argument("natural_adv_examples", type=Path)
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    a = parser.parse_args()
    rows = made()
    result = {
        "lambdas": [compared(a.omnibenchmark / "linear_probe", rows, i) for i in range(len(LAMBDAS))],
        "calibration": calibration(a.natural_adv_examples),
    }
    print(record.write("parity_probe", result, a.results))
    return 0


def made() -> dict[str, probe.Rows]:
    """Classes that overlap, dimensions of very different size: LBFGS has work to do."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(CLASSES, FEATURES, generator=generator)
    rows = {}
    for name, n in IMAGES.items():
        labels = torch.randint(CLASSES, (n,), generator=generator)
        features = means[labels] + 3 * torch.randn(n, FEATURES, generator=generator)
        rows[name] = probe.Rows(features * torch.logspace(-2, 0, FEATURES), labels)
    return rows


def compared(script: Path, rows: dict[str, probe.Rows], number: int) -> dict:
    theirs = run_official(script, rows, number)
    found = probe.fit(rows, CLASSES, LAMBDAS[number], STEPS, EVERY, seed=0)
    ours = [[r["step"], r["val"]["top1"], r["val"]["mean_per_class"], r["test"]["top1"]] for r in found]
    assert [r[0] for r in ours] == [r[0] for r in theirs][: len(ours)]
    ours += [[r[0], *ours[-1][1:]] for r in theirs[len(ours) :]]  # ours had arrived
    result = {
        "lambda": LAMBDAS[number],
        "evaluations": len(theirs),
        "official": theirs[-1][3],
        "ours": ours[-1][3],
        "largest_difference": float(np.abs(np.subtract(theirs, ours)).max()),
    }
    print(result)
    return result


def run_official(script: Path, rows: dict[str, probe.Rows], number: int) -> list[list[float]]:
    """-> step, accuracy and mean accuracy of the classes on val, accuracy on test, in percent, of every evaluation."""
    modules = {name: types.ModuleType(name) for name in ("torchvision", "torchvision.transforms", "easydict")}
    modules |= {name: types.ModuleType(name) for name in ("dataset", "models")}
    modules["torchvision"].transforms = transforms = modules["torchvision.transforms"]
    for name in ("Compose", "Resize", "CenterCrop", "ToTensor", "Normalize"):
        setattr(transforms, name, lambda *_, **__: None)
    modules["easydict"].EasyDict = Nested
    modules["dataset"].made = lambda of, **_: torch.utils.data.TensorDataset(rows[of].features, rows[of].labels)
    modules["models"].identity = torch.nn.Identity
    splits = {name: {"type": "made", "kwargs": {"of": name}} for name in rows}
    config = {"save_path": "exps", "total_iter": STEPS, "val_freq": EVERY, "manual_seed": 0, "lam": list(LAMBDAS)}
    config["data"] = {**splits, "batch_size": 100, "num_classes": CLASSES}
    model = {"model": {"type": "identity", "output_dim": FEATURES}, "data": {}}
    argv = ["main.py", "--config", "configs/made.yaml", "--model_config", "configs/model.yaml"]
    slurm = {"SLURM_PROCID": str(number), "SLURM_NTASKS": "7", "SLURM_NODELIST": "here"}
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(contextlib.chdir(folder))
        os.mkdir("configs")
        Path("configs/made.yaml").write_text(yaml.safe_dump(config))
        Path("configs/model.yaml").write_text(yaml.safe_dump(model))
        sys.modules.update(modules)
        for name in [*modules, "utils"]:
            stack.callback(sys.modules.pop, name, None)
        stack.enter_context(mock.patch.dict(os.environ, slurm))
        stack.enter_context(mock.patch.object(sys, "path", [str(script), *sys.path]))
        stack.enter_context(mock.patch.object(sys, "argv", argv))
        stack.enter_context(mock.patch.object(subprocess, "getoutput", lambda _: "here"))
        for owner, name, stub in (
            (torch.Tensor, "cuda", lambda self: self),
            (torch.nn.Module, "cuda", lambda self: self),
            (torch.nn, "Linear", seeded),
            (torch.cuda, "device_count", lambda: 1),
            (torch.cuda, "set_device", lambda _: None),
            (dist, "init_process_group", lambda **_: None),
            (dist, "get_rank", lambda: number),
            (dist, "get_world_size", lambda: 7),
        ):
            stack.enter_context(mock.patch.object(owner, name, stub))
        for stream in (contextlib.redirect_stdout, contextlib.redirect_stderr):
            stack.enter_context(stream(io.StringIO()))
        runpy.run_path(str(script / "main.py"), run_name="__main__")
        log = next(Path("exps").rglob("log.txt")).read_text()
        logging.getLogger("global").handlers.clear()
    val = re.findall(r"Iter \[(\d+)/\d+\] val acc: ([\d.]+) val per: ([\d.]+)", log)
    test = re.findall(r"test acc: ([\d.]+)", log)
    return [
        [int(step), 100 * float(acc), 100 * float(per), 100 * float(last)]
        for (step, acc, per), last in zip(val, test, strict=True)
    ]


LINEAR = torch.nn.Linear


def seeded(*sizes: int) -> torch.nn.Linear:
    torch.manual_seed(0)
    return LINEAR(*sizes)


class Nested(dict):
    """A dict whose entries are attributes too."""

    def __init__(self, values: dict) -> None:
        super().__init__({k: Nested(v) if isinstance(v, dict) else v for k, v in values.items()})

    def __getattr__(self, name: str):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value) -> None:
        self[name] = value


def calibration(clone: Path) -> dict:
    """The largest differences of the RMS calibration error over a hundred made-up sets of predictions."""
    spec = importlib.util.spec_from_file_location("calibration_tools", clone / "calibration_tools.py")
    tools = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tools)
    rng = np.random.default_rng(0)
    differences = []
    for images in rng.integers(200, 8000, 100):
        confidence = rng.random(images)
        correct = rng.random(images) < confidence**2
        theirs = tools.calib_err(confidence, correct, p="2")
        differences.append(abs(theirs - evaluate.rms_calibration(confidence, correct, last_bin=False)))
    print({"sets": len(differences), "largest_difference": float(max(differences))})
    return {"sets": len(differences), "largest_difference": 100 * float(max(differences))}


if __name__ == "__main__":
    raise SystemExit(main())
