"""`mopro-fast bench`: its variants train the same thing, and its table says what was measured."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mopro_fast import ops
from mopro_fast.benchmark import command, report, throughput
from mopro_fast.benchmark.command import Bench
from mopro_fast.benchmark.throughput import OFFICIAL, OURS, PARTS, Case
from mopro_fast.errors import UserError
from mopro_fast.models.resnet import GroupedBatchNorm2d

TINY = Case(8, classes=5, image_size=16, arch="resnet18", width=0.125, stem="small", queue=32, device="cpu")


def test_the_official_step_computes_what_ours_does():
    ours, official = throughput.ours(TINY), throughput.official_step(TINY, fast=False)
    model, peer = ours.step.model, official.__closure__
    peer = next(cell.cell_contents for cell in peer if hasattr(cell.cell_contents, "prototypes"))
    peer.encoder_q.load_state_dict(model.encoder_q.state_dict())
    peer.encoder_k.load_state_dict(model.encoder_k.state_dict())
    peer.queue.copy_(model.queue)
    peer.prototypes.copy_(model.prototypes)
    for _ in range(3):
        torch.testing.assert_close(ours(), official(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.prototypes, peer.prototypes, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.queue, peer.queue, rtol=1e-4, atol=1e-5)


def test_peers_have_none_of_our_kernels(monkeypatch):
    """On a GPU "auto" would give their encoders ops.batch_norm_act, and --bn-group groups of rows."""
    case = replace(TINY, bn_group=4)
    monkeypatch.setattr(ops.backends, "is_fused", lambda *_: True)
    peers = [
        throughput.official_step(case, fast=False),
        throughput.official_step(case, fast=True),
        throughput.supervised_plain(case),
    ]

    def refuse(*_, **__):
        raise AssertionError("one of ours")

    for name in ("batch_norm_act", "normalize"):
        monkeypatch.setattr(ops, name, refuse)
    monkeypatch.setattr(GroupedBatchNorm2d, "_by_groups", refuse)
    for peer in peers:
        peer()
    with pytest.raises(AssertionError, match="one of ours"):
        throughput.ours(case)()


@pytest.mark.medium
def test_every_variant_trains_and_the_table_has_it():
    made = throughput.variants(TINY, None, everything=True)
    found = throughput.measure(TINY, made, seconds=0.02)
    assert list(found) == list(made) and OURS in found
    for v in found.values():
        assert v["images_per_second"] == pytest.approx(8e3 / v["step_ms"]["p50"])
    parts = throughput.parts(TINY, steps=2)
    assert set(parts) == {*PARTS, "rest"} and all(parts[name] > 0 for name in PARTS)
    case = {"batch": 8, "classes": 5, "variants": found, "parts_ms": parts, "on_images": {}}
    case["on_images"] = {"images_per_second": 12.0, "data_wait": 0.05}
    text = report.table({"settings": {"device": "cpu"}, "cases": [case]})
    assert all(f"| {name} |" in text or f"| **{name}** |" in text for name in made)
    assert "head's share" in text and "| 8 | 5 | 12 | 5.0 % |" in text
    assert report.over_official(case) == pytest.approx(
        found[OURS]["images_per_second"] / found[OFFICIAL]["images_per_second"]
    )


@pytest.mark.medium
def test_the_command_and_its_mistakes(tmp_path, capsys):
    small = {"device": "cpu", "image_size": 32, "width": 0.125, "queue_size": 32, "seconds": 0.01}
    options = Bench(batch_sizes=(4, 8), classes=(3,), out=tmp_path / "a" / "out.json", **small)
    result = command.run(options)
    assert [c["batch"] for c in result["cases"]] == [4, 8] and result["not_reached"] == []
    late = command.run(Bench(batch_sizes=(4,), minutes=0, **small))
    assert late["not_reached"] == ["N=4 C=100"] and "in time (--minutes): N=4 C=100." in report.table(late)
    arguments = ["--device", "cpu", "--image-size", "32", "--width", "0.125", "--seconds", "0.01"]
    assert command.main([*arguments, "--batch-sizes", "4", "--out", str(options.out)]) == 0
    assert json.loads(options.out.read_text())["conditions"]["torch"].startswith(torch.__version__)
    assert "| **ours** |" in capsys.readouterr().out
    for wrong, message in [
        (Bench(batch_sizes=(1,), **small), "leaves one row per rank"),
        (Bench(batch_sizes=(6,), bn_group=4, **small), "--bn-group 4 does not divide"),
        (Bench(batch_sizes=(6,), bn_group=-4, **small), "bn-group must be at least 0"),
        (Bench(classes=(0,), **small), "num-classes must be at least 1"),
        (Bench(**small | {"width": 0}), "--width must be at least"),
        (Bench(batch_sizes=(4,), official=tmp_path, **small), "no model.py there; name a clone"),
    ]:
        with pytest.raises(UserError, match=message):
            command.run(wrong)
    with pytest.raises(UserError, match="is a folder: name a file"):
        command.main([*arguments, "--out", str(tmp_path)])
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="PyTorch sees no GPU"):
            command.run(Bench(device="cuda"))


def test_requirements_of_a_gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "bench"))
    sys.modules.pop("throughput", None)
    import throughput as bench

    def variant(speed, **more):
        return {"images_per_second": speed, "step_ms": {"p50": 1 / speed}} | more

    counted = {"synchronisations": 0, "host_launches": {"graphs": 1}}
    rows = {OURS: variant(5000, **counted), OFFICIAL: variant(800), throughput.ENCODERS: variant(5100)}
    cases = [{"batch": n, "classes": 1000, "variants": rows} for n in (32, 256)]
    found = bench.requirements({"cases": cases})
    assert len(found) == 6 and all(q["passed"] for q in found)
    rows[OURS] |= {"images_per_second": 3000, "step_ms": {"p50": 1 / 3000}, "synchronisations": 2}
    assert [q["passed"] for q in bench.requirements({"cases": cases})] == [False] * 5 + [True]
    assert all(q["passed"] is None for q in bench.requirements({"cases": []}))
