"""What bench/traffic.py and bench/speedups.py say a speed-up saves, and their tables."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mopro_fast.models import speedups as switches
from mopro_fast.models.speedups import SPEEDUPS

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture(autouse=True)
def path(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))


@pytest.fixture
def traffic():
    return importlib.import_module("traffic")


@pytest.fixture
def speedups():
    return importlib.import_module("speedups")


def mb(values: float) -> float:
    return 2 * values / 1e6


def bottleneck(traffic, c: int, positions: int) -> tuple[list, object]:
    """Of 4·C channels in and out, without a shortcut: its layers and what its convolutions write."""
    p, flops = positions, 2 * c * c * positions
    layers = [
        traffic.Layer(4 * c * p, c * p, True, False, 4 * flops, False),
        traffic.Layer(c * p, c * p, True, False, 9 * flops, False),
        traffic.Layer(c * p, 4 * c * p, True, True, 4 * flops, False),
    ]
    return layers, traffic.Block(c * p, c * p, 4 * c * p)


def test_a_bottleneck_without_a_gradient(traffic) -> None:
    """34·C values a position: 5 and 2 of conv1 and conv2 each and 3 for their BatchNorms, 5 of conv3, 16 of bn3."""
    layers, block = bottleneck(traffic, 8, 10)
    one = traffic.Shapes(layers, [block], 0)
    plain, fused = (traffic.step_mb(one, ("key-convolutions",), blocks) for blocks in ((), (0,)))
    assert plain[1] == pytest.approx(mb(34 * 8 * 10)) and fused[1] == pytest.approx(mb(27 * 8 * 10))
    assert fused[0] == plain[0]


def test_a_bottleneck_with_its_gradient(traffic) -> None:
    """Forward 34·C. Backward of conv1 5+5 and its BatchNorm 5, of conv2 2+2 and 5, of conv3 5+5 and bn3 7·4; in front
    of the block, of what the first convolution has written a quarter, two gradients are added."""
    layers, block = bottleneck(traffic, 8, 10)
    for stem in (0, 4 * 320):
        s = traffic.Shapes(layers, [block, block], stem)
        pooling = 4.5 * stem  # beside the BatchNorm, whose layer is not there
        query, key = traffic.step_mb(s)
        assert query == pytest.approx(mb(80 * (34 + 62) + pooling + 3 * (stem // 4 + 320)))
        assert key == pytest.approx(mb(80 * 34 + 2.25 * stem))


def test_joins(traffic) -> None:
    """Of two blocks' outputs the first has two readers, and with the stem's kernel so has what it pools."""
    layers, block = bottleneck(traffic, 8, 10)
    s = traffic.Shapes(layers, [block, block], 1280)
    now, stem = traffic.step_mb(s), traffic.step_mb(s, ("stem",))
    assert [a - b for a, b in zip(now, stem, strict=True)] == pytest.approx([mb(7 * 1280), mb(3 * 1280)])

    def saved(*on: str) -> float:
        query, key = traffic.step_mb(s, on)
        assert key == (stem if "stem" in on else now)[1]
        return (stem if "stem" in on else now)[0] - query

    assert saved("residual-joins") == pytest.approx(mb(2 * 320))
    assert saved("residual-joins", "stem") == pytest.approx(mb(2 * 320 + 320))
    assert saved("sign-bits") == saved("sign-bits", "residual-joins") == pytest.approx(mb((2 + 7 / 8) * 320))
    assert saved("padded-input", "key-stream", "half-keys", "one-launch-norms") == 0


def test_the_shapes_are_those_of_a_resnet50(traffic) -> None:
    s = traffic.shapes(224)
    assert len(s.layers) == 53 and len(s.blocks) == 16 and s.stem == 64 * 112 * 112
    assert s.blocks[0] == (64 * 56 * 56, 64 * 56 * 56, 256 * 56 * 56)
    assert s.blocks[3] == (128 * 56 * 56, 128 * 28 * 28, 512 * 28 * 28)
    flops = {"forward": 0, "dgrad": 0, "wgrad": 0}
    for layer in s.layers:
        for name, done in traffic.flops(layer, backward=True).items():
            flops[name] += done
    assert [round(f / 1e9, 1) for f in flops.values()] == [8.2, 7.9, 8.2]  # images need no gradient


def test_limits_of_memory_and_of_convolutions(traffic, tmp_path) -> None:
    assert traffic.main(["--bandwidth", "1e12", "--results", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "traffic.json").read_text())
    for row in result["rows"]:
        assert row["limit"] == pytest.approx(1e6 / (row["mb_query"] + row["mb_key"]))
        assert row["limit_convolutions"] == pytest.approx(13109, abs=1)
    committed = json.loads((BENCH / "results" / "traffic.json").read_text())
    assert result["anchors"] == committed["anchors"] and result["parts"] == committed["parts"]
    of_h200 = result["anchors"][0]
    assert of_h200["tflop_per_s"] == pytest.approx(193, abs=1) and of_h200["mopro"] == pytest.approx(5960, abs=5)


def test_scaling_takes_the_speed_that_is_predicted(traffic) -> None:
    total = sum(h200 for *_, h200 in traffic.PARTS)
    assert importlib.import_module("scaling").Assumptions().images_per_second == round(256e3 / total, -1)


@pytest.mark.parametrize("name", SPEEDUPS)
def test_each_has_a_prediction(name, speedups) -> None:
    assert speedups.PREDICTIONS[name].what
    rows = json.loads((BENCH / "results" / "speedups.json").read_text())["rows"]
    assert [row["name"] for row in rows] == [*SPEEDUPS, "all"], "run bench/speedups.py and bench/tables.py"


def test_milliseconds(speedups, monkeypatch) -> None:
    """10 MB an image and 20 launches fewer, N=100, 88 % of 1 TB/s; some save more beside, or otherwise by launch."""
    fake = {
        "plain": speedups.Prediction("x"),
        "more": speedups.Prediction("x", beside=lambda _gpu, rows: (0.001 * rows, 0.002 * rows)),
        "other": speedups.Prediction("x", launch_us=(-1.0, 2.0)),
        "unsure": speedups.Prediction("x", of_bytes=(0.0, 0.5)),
    }
    monkeypatch.setattr(speedups, "PREDICTIONS", fake)
    monkeypatch.setitem(speedups.GPUS, "x", 1e12)
    moved, us = 10e6 * 100 / 0.88e12 * 1e3, 1e-3 * speedups.LAUNCH_US[0]

    def saved(*on: str, **own: tuple[float, int]) -> tuple:
        return speedups.saved_ms({"all": (10.0, 20), **own}, "all", on, "x", 100)

    assert saved("plain", plain=(10, 20)) == pytest.approx((moved + 20 * us,) * 2)
    assert saved("more", more=(10, 20)) == pytest.approx((moved + 20 * us + 0.1, moved + 20 * us + 0.2))
    assert saved("other", other=(10, 20)) == pytest.approx((moved - 0.02, moved + 0.04))
    assert saved("unsure", unsure=(10, 20)) == pytest.approx((20 * us, moved / 2 + 20 * us))
    assert saved(
        "plain", "more", "other", "unsure", plain=(5, 5), more=(1, 5), other=(0, 5), unsure=(4, 5)
    ) == pytest.approx((0.6 * moved + 15 * us + 0.1 - 0.005, 0.8 * moved + 15 * us + 0.2 + 0.01))


def test_the_blocks_without_a_gradient_are_those_switched_on(speedups, monkeypatch) -> None:
    assert speedups.fused_blocks(()) == []
    monkeypatch.setitem(
        switches.SPEEDUPS, "first", lambda model: setattr(model.encoder_k.layer1[1], "fused_conv", True)
    )
    assert speedups.fused_blocks(("first",)) == [1]


def test_the_table(speedups) -> None:
    gpus = speedups.GPUS
    ms = {gpu: {"256": [0.5, 1.5], "32": [-0.004, -0.004]} for gpu in gpus}
    base = {"mb_query": 380, "mb_key": 120, "launches": 800}
    rows = [{"name": "x", "what": "does x", "mb_query": 300, "mb_key": 100, "launches": 700, "ms": ms}]
    rows.append({**rows[0], "name": "all", "what": ""})
    settings = {"bandwidth": gpus, "efficiency": 0.88, "launch_us": [1.5, 1.5], "queue_size": 8192}
    settings["last_program_us"] = [0.6, 2.1]
    step = {gpu: {"256": 50.0, "32": 10.0} for gpu in gpus}
    result = {"settings": settings, "base": base, "step_ms": step, "rows": rows, "conditions": {"commit": "abc"}}
    tables = importlib.import_module("tables")
    text = tables.speedups(result)
    cells = "500 → 400 | 800 → 700 | 0.50 to 1.50 | 0.50 to 1.50 | 0.00 | 0.00 | not measured |"
    assert f"| `x` | does x | {cells}" in text and f"| **all** | – | {cells}" in text
    assert "| **the step, ms** | – | – | – | 50.0 → 48.5 to 49.5 | 50.0 → 48.5 to 49.5 | 10.0 → 10.0 to 10.0 |" in text
    assert "| 5,120 → 5,170 to 5,280 |" in text
    times = {"ours": 50, "ours, x on": 48.5, "ours, all speed-ups on": 51}
    variants = {name: {"step_ms": {"p20": ms - 0.1, "p50": ms, "p80": ms + 0.2}} for name, ms in times.items()}
    measured = {"cases": [{"batch": 256, "variants": variants}], "settings": {"arch": "resnet50"}}
    text = tables.speedups(result, measured | {"conditions": {"gpu": "G"}})
    assert "| N=256: 1.50 (1.20 to 1.80); G |" in text and "| N=256: −1.00 (−1.30 to −0.70); G |" in text
    for other in ({"conditions": {"gpu": None}}, {"conditions": {"gpu": "G"}, "settings": {"arch": "resnet18"}}):
        assert "G |" not in tables.speedups(result, measured | other)


@pytest.mark.slow
def test_launches_are_the_committed_ones(compiled, tmp_path) -> None:
    """The step is counted with every speed-up switched on."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, BENCH / "speedups.py", "--results", tmp_path, "--cache", compiled]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    found, committed = (json.loads((folder / "speedups.json").read_text()) for folder in (tmp_path, BENCH / "results"))
    assert all(found[part] == committed[part] for part in ("base", "step_ms", "rows"))
    assert found["base"]["launches"] > 9 * 53
