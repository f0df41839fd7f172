"""What bench/capro_step.py counts of CAPro's step, its table, and the tables of CAPro's other benchmarks."""

import importlib
import json
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture(scope="module")
def capro_step():
    """The script, with shapes that take no time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        script = importlib.import_module("capro_step")
        tiny = {"image_size": 16, "arch": "resnet18", "width": 0.125, "stem": "small", "device": "cpu"}
        patch.setattr(script, "SHAPES", (script.Case(8, 5, queue_size=64, **tiny),))
        patch.setattr(script, "TIMED", (script.Case(4, 3, queue_size=8, **tiny),))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield script
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def result(capro_step, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("results")
    assert capro_step.main(["--rounds", "1", "--results", str(folder)]) == 0
    return json.loads((folder / "capro_step.json").read_text())


@pytest.mark.medium
def test_counted_products_are_those_worked_out(result) -> None:
    """And no part moves fewer bytes than it must."""
    (case,) = result["counted"]
    parts = {part["part"]: part for part in case["parts"]}
    assert parts.keys() == {*importlib.import_module("capro_step").PARTS, "the rest"}
    for part in parts.values():
        if part["least_bytes"] is not None:
            assert part["flops"] == part["least_flops"] and part["bytes"] >= 0.8 * part["least_bytes"], part
    # MoPro's key encoder has a classifier, whose logits nobody reads.
    assert parts["the rest"]["flops"] == -2 * 8 * 64 * 5
    assert parts["reconstruction head"]["forward"] == 4  # a cast of z, two layers, ReLU
    assert [name for name, p in parts.items() if p["backward"] == 0] == [
        "collective targets", "SGD of all heads, no momentum copy",
    ]  # fmt: skip
    assert case["waits"] == {"mopro": 0, "capro": 0}
    added = sum(p["forward"] + p["backward"] for p in parts.values())
    assert case["launches"]["labels corrected"] == added < case["launches"]["vanilla"]  # there z gets a gradient


@pytest.mark.medium
def test_a_queue_of_many_slices_takes_more_launches(capro_step, monkeypatch) -> None:
    monkeypatch.setattr(capro_step.reference, "SLICE_VALUES", 8 * 16)
    parts = capro_step.count(capro_step.SHAPES[0], "capro")[capro_step.CORRECTED]
    own = [o for o in parts.operators if o.part == capro_step.TARGETS]
    assert sum(o.flops > 0 for o in own) == 4 * 4  # four products in each of four slices


@pytest.mark.parametrize(
    "operator, moved",
    [
        (lambda x, _: x + 1, 2 * 48), (lambda x, _: x.relu_(), 2 * 48), (lambda x, _: x.copy_(x + 1), 4 * 48),
        (lambda x, _: x[:1].expand(3, 4) * 2, 16 + 48 + 32), (lambda x, y: x.gather(1, y), 3 * (8 + 4 + 4)),
        (lambda x, _: torch._foreach_add_([x, x], [x, x]), 6 * 48), (lambda x, _: x.t(), 0),
    ],
)  # fmt: skip
def test_bytes_of_an_operator(capro_step, operator, moved) -> None:
    x, y = torch.zeros(3, 4), torch.zeros(3, 1, dtype=torch.int64)
    with capro_step.Parts() as parts:
        operator(x, y)
    assert sum(o.bytes for o in parts.operators) == moved


def test_the_backward_pass_is_charged_to_the_part_of_its_forward_pass(capro_step) -> None:
    x = torch.randn(3, 4, requires_grad=True)
    with capro_step.Parts() as parts:
        y = x * 2
        with parts.part("inner"):
            z = y.exp()
        z.sum().backward()
    found = [(o.part, o.backward) for o in parts.operators]
    assert found.count(("inner", False)) == found.count(("inner", True)) == 1
    assert found.count((capro_step.REST, True)) == 1  # of x * 2; the sum's is a view


@pytest.mark.medium
def test_the_table_says_what_was_counted_predicted_and_timed(result, capro_step) -> None:
    result = result | {"conditions": {"gpu": None, "cpu": "a CPU", "torch": "2", "commit": "abc"}}
    text = importlib.import_module("tables").capro_step(result)
    lines = text.splitlines()
    (case,) = result["counted"]
    us = sum(part["us"]["H200"] for part in case["parts"])
    (total,) = (line for line in lines if line.startswith("| **all**"))
    launches = [sum(p[name] for p in case["parts"]) for name in ("forward", "backward")]
    assert total.startswith(f"| **all** | {launches[0]} | {launches[1]} |") and f"| {us:.0f} |" in total
    (share,) = (line for line in lines if "at 7,000 and 5,370 img/s" in line)
    assert f"| {100 * us / (8 / 7000 * 1e6):.1f} |" in share
    assert "The host waits for the device: none." in text and "predicted, not measured" in text
    assert "| CAPro's step over MoPro's, on a CPU | Q=8, C=3 |" in lines
    (frozen,) = (line for line in lines if line.startswith("| labels corrected, encoder frozen |"))
    of_frozen = result["timed"][0]["stages"][capro_step.FROZEN]
    assert f"× {of_frozen['ratio']:.2f} ({of_frozen['capro_ms']:.0f} /" in frozen
    assert "medians of 1 rounds" in text and text.endswith("a CPU; PyTorch 2; commit abc.")


@pytest.mark.usefixtures("capro_step")
def test_the_table_of_accuracies() -> None:
    tables = importlib.import_module("tables")

    def run(name: str, seed: int, top1: float, **more) -> dict:
        labels = {"corrections": 0 if name == "ce" else 9, "precision": 0.5, "recall": 0.25 + 0.05 * seed}
        labels |= {"kept_right": 0.7, "classes_lost": seed, "alarms": [{}] * seed, "minutes": 7.0 + seed}
        return {"name": name, "seed": seed, "top1": top1, "commit": "abc"} | labels | more

    runs = [run("ce", 0, 50.0), run("ce", 1, 52.0)]
    runs += [run("capro", s, 60.0 + s, retrained={"plain": 61.0, "mixup": 62.0 + 2 * s}) for s in (0, 1)]
    runs += [run("mopro", s, 55.0, retrained={"plain": 56.0}) for s in (0, 1)]
    settings = {"images": 3000, "wrong": 0.5, "anchors_per_class": 5, "test_images": 390}
    settings |= {"common": "--width 0.25", "chosen": "by hand"}
    pairs = {"capro": {"mean": 9.5, "standard_error": 0.5}, "mopro": {"mean": -4.0, "standard_error": None}}
    conditions = {"gpu": None, "cpu": "a CPU", "torch": "2", "commit": "xyz"}
    text = tables.capro_accuracy({"settings": settings, "runs": runs, "paired": pairs, "conditions": conditions})
    ce, capro, mopro = text.splitlines()[2:5]
    assert ce == "| ce | 51.0 ± 1.4 | – | – | – | 70.0 ± 0.0 | – | – | 0, 1 | 0, 1 | 7.5 ± 0.7 |"
    assert capro.startswith("| capro | 60.5 ± 0.7 | +9.5 ± 0.5 | 50.0 ± 0.0 | 27.5 ± 3.5 | 70.0 ± 0.0 | 61.0 ± 0.0 |")
    assert capro.endswith("| 63.0 ± 1.4 | 0, 1 | 0, 1 | 7.5 ± 0.7 |")
    assert "| -4.0 | 50.0 ± 0.0 |" in mopro and "| 56.0 ± 0.0 | – | 0, 1 |" in mopro
    for words in ("3000 images, 50 % with a wrong label", "5 anchors a class", "390 test images", "`--width 0.25`"):
        assert words in text
    assert "2 seeds" in text and text.endswith("Settings: by hand. a CPU; PyTorch 2; commit abc.")


@pytest.mark.usefixtures("capro_step")
def test_the_table_of_anchors_right_has_a_row_per_way() -> None:
    tables = importlib.import_module("tables")

    def row(encoder: str, way: str, k: int, seed: int, right: int, similar: float | None = None) -> dict:
        found = {"anchor_images": 10 * k, "anchors_right": right, "similar_right": similar}
        return {"encoder": encoder, "way": way, "K": k, "seed": seed} | found

    rows = [row("hash", "random", k, s, 5 * k) for s in (0, 1) for k in (5, 20)]
    rows += [row("minilm", "smoothed", k, s, 40 + s, 0.25) for s in (0, 1) for k in (5, 20)]
    settings = {"images": 300, "wrong": 0.5, "common": "--width 0.25", "top1": 31.25, "seeds": 2, "absent": []}
    conditions = {"gpu": None, "cpu": "a CPU", "torch": "2", "commit": "xyz"}
    result = {"settings": settings, "rows": rows, "conditions": conditions}
    text = tables.capro_anchors(result)
    assert text.splitlines()[0] == "| anchors right, % | | K = 5 | K = 20 |"
    assert text.splitlines()[2] == "| – | random | 50.0 ± 0.0 | 50.0 ± 0.0 |"
    assert text.splitlines()[3] == "| minilm | smoothed | 81.0 ± 1.4 | 20.2 ± 0.4 |"
    assert "25 % are of the same true class" in text and "Not installed" not in text
    settings["absent"] = ["minilm"]
    assert "Not installed, so not measured: minilm." in tables.capro_anchors(result)
