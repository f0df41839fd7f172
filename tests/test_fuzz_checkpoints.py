"""Checkpoints and weights with something wrong in them are refused in one line, or they work.

MOPRO_FAST_FUZZ=400 tries so many of each kind instead of a few.
"""

import os
import shutil
import traceback
from pathlib import Path

import capro_model
import fuzz_checkpoints
import numpy as np
import pytest
import torch
from fuzz_checkpoints import config, write_run

from mopro_fast.checkpoints import formats, state, weights
from mopro_fast.downstream import importing
from mopro_fast.downstream.export import export
from mopro_fast.errors import UserError
from mopro_fast.models.build import build
from mopro_fast.report.run import Run
from mopro_fast.training.loop import Trainer
from mopro_fast.training.tasks import task_of

FULL = int(os.environ.get("MOPRO_FAST_FUZZ", "0"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """images/ and run/."""
    return write_run(tmp_path_factory.mktemp("fuzz")).parent


def refused(function, *names: str) -> str:
    """Its UserError, which is one line that names the file; empty: it worked."""
    try:
        function()
    except UserError as error:
        text = str(error)
        assert "\n" not in text and text.isprintable(), text
        assert any(name in text for name in names), text
        return text
    return ""


def told(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {str(error)[:200]} ({frame.filename}:{frame.lineno})"


def passes_through(path: Path, model: torch.nn.Module) -> None:
    """Whatever reads weights: they are refused, or what is made of them can be read."""
    name = path.name
    if refused(lambda: weights.load_weights(path), name):
        return
    out = path.parents[1] / "made"
    refused(lambda: weights.initialise(model, path), name)
    loaded = weights.load_weights(path)
    for format in ("capro" if loaded.capro else "official", "safetensors", "torchvision", "detectron2"):
        export(loaded, out, format)
        if format != "detectron2":
            weights.load_weights(out)
        out.unlink()
    if not refused(lambda: importing.main([str(path), str(out)]), name):
        state.load(out)
        weights.load_weights(out)
        out.unlink()


@pytest.mark.medium
@pytest.mark.parametrize("part", range(2))
def test_a_run_goes_on_from_a_wrong_checkpoint_or_says_why_not(trained, tmp_path, part):
    newest = state.all_of(trained / "run/checkpoints")[-1]
    whole, folder, goes_on, failures = state.read(newest), tmp_path / "run", 0, []
    count = FULL // 2 or 15
    for seed in range(part * count, (part + 1) * count):
        found, what = fuzz_checkpoints.mutated(whole, seed)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(trained / "run", folder)
        torch.save(found, folder / "checkpoints" / newest.name)
        try:
            refused(lambda: state.load(folder / "checkpoints" / newest.name), newest.name)
            passes_through(folder / "checkpoints" / newest.name, build(config(trained, folder)))
            assert Run(folder).state is not None
            message = refused(lambda: Trainer(task_of(config(trained, folder))).run(), newest.name)
            goes_on += not message
        except Exception as error:
            failures.append(f"seed {seed}, {what}: {told(error)}")
    assert not failures
    assert 0 < goes_on < count


def foreign(trained: Path) -> dict[str, dict]:
    """Weights as others keep them."""
    loaded = weights.load_weights(trained / "run")
    bare = {k: v for k, v in formats.torchvision(loaded, classifier=True).items() if "tracked" not in k}
    trunk = {k: v for k, v in bare.items() if not k.startswith("fc.")}
    args = {"epoch": 3, "best": np.float64(0.5), "optimizer": loaded.optimizer}
    of_capro = config(trained, trained)
    of_capro.method = "capro"
    moco = {f"module.encoder_{x}.{k}": v for x in "qk" for k, v in bare.items()}
    return {
        "bare": bare,
        "wrapped": {"model": {f"_orig_mod.module.{k}": v for k, v in bare.items()}, **args},
        "official": formats.official(loaded),
        "capro": formats.official_capro(weights.load_weights(capro_model.write(trained / "capro.pt", of_capro))),
        "moco": {"state_dict": moco | {"module.queue": torch.rand(4, 8)}, **args},
        "mmpretrain": {
            "state_dict": {f"backbone.{k}": v for k, v in trunk.items()}
            | {f"head.{k}": v for k, v in bare.items() if k.startswith("fc.")},
            "meta": {"epoch": 3},
        },
        "dino": {"student": {f"module.backbone.{k}": v for k, v in trunk.items()}, "teacher": trunk, **args},
    }


@pytest.mark.medium
def test_wrong_weights_of_others_are_refused_or_work(trained, tmp_path):
    kinds = foreign(trained)
    model, failures = build(config(trained, tmp_path)), []
    for seed in range(FULL or 36):
        kind = [*kinds][seed % len(kinds)]
        found, what = fuzz_checkpoints.mutated(kinds[kind], seed)
        torch.save(found, tmp_path / "weights.pt")
        try:
            passes_through(tmp_path / "weights.pt", model)
        except Exception as error:
            failures.append(f"seed {seed}, {kind}, {what}: {told(error)}")
    assert not failures
