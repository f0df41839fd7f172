"""The benchmark of the ops: its peers compute the same, its floors are right, and what is wrong is not timed."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import fake_apex
import pytest
import torch
import torch.nn.functional as F

from mopro_fast.ops import reference

BENCH = Path(__file__).parent.parent / "bench"
H200 = {"copy_bytes_per_s": 4.3e12, "flop_per_s": 790e12}  # what the design's table of floors assumes


@pytest.fixture(scope="module", autouse=True)
def bench():
    """bench/ops.py as a module; the others by their names."""
    sys.path.insert(0, str(BENCH))
    yield importlib.import_module("ops")
    sys.path.remove(str(BENCH))


def unit(*size, seed=0):
    return F.normalize(torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1)


def random_head(n, classes, slots, d, seed):
    g = torch.Generator().manual_seed(seed)
    return {
        "logits": 3 * torch.randn(n, classes, generator=g, dtype=torch.float64),
        "labels": torch.randint(classes, (n,), generator=g),
        "kept": torch.rand(n, generator=g) < 0.6,
        "q": unit(n, d, seed=seed + 1),
        "k": unit(n, d, seed=seed + 2),
        "queue": unit(slots, d, seed=seed + 3),
        "prototypes": unit(classes, d, seed=seed + 4),
    }


def close(a, b):
    torch.testing.assert_close(a.double(), b.double(), rtol=1e-6, atol=1e-9)  # the reference stores losses in float32


SIZES = [(16, 10, 32, 8), (33, 57, 99, 32), (8, 300, 64, 128)]


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.8])
@pytest.mark.parametrize("n, classes, slots, d", SIZES)
def test_official_losses_and_decisions_are_the_reference_s(n, classes, slots, d, threshold):
    official = importlib.import_module("mopro_fast.benchmark.official")
    x = random_head(n, classes, slots, d, n)
    q = x["q"].requires_grad_()

    loss, hit = official.info_nce(q, x["k"], x["queue"], 0.1)
    want, want_hit, want_grad = reference.info_nce(q.detach(), x["k"], x["queue"], 0.1)
    close(loss, want)
    assert torch.equal(hit, want_hit)
    close(torch.autograd.grad(loss.sum(), q)[0], want_grad)

    settings = {"alpha": 0.5, "threshold": threshold, "temperature": 0.1}
    labels, kept = official.correct_labels(x["logits"], q.detach(), x["prototypes"], x["labels"], **settings)
    decided = reference.correct_labels(x["logits"], q.detach(), x["prototypes"], x["labels"], 0.5, threshold, 0.1)
    assert torch.equal(labels, decided[0]) and torch.equal(kept, decided[1])
    assert kept.sum() > 0 and (threshold == 0.8 or (labels != x["labels"]).any())

    loss = official.prototype_contrast(q, x["prototypes"], x["labels"], x["kept"], 0.1)
    want, want_grad = reference.prototype_contrast(q.detach(), x["prototypes"], x["labels"], x["kept"], 0.1)
    close(loss, want.double()[x["kept"]].mean())
    close(torch.autograd.grad(loss, q)[0], want_grad / x["kept"].sum())


@pytest.mark.parametrize("n, classes, slots, d", SIZES)
def test_the_official_step_s_losses_are_mopro_loss(n, classes, slots, d):
    from mopro_fast import ops

    official = importlib.import_module("mopro_fast.benchmark.official")
    x = random_head(n, classes, slots, d, n)
    labels, kept = reference.correct_labels(x["logits"], x["q"], x["prototypes"], x["labels"], 0.5, 0.3, 0.1)[:2]
    used = torch.where(kept, labels, -1)
    found = []
    for function, given, settings in [
        (ops.mopro_loss, used, {}),
        (official.mopro_loss, used, {}),
        (official.corrected_loss, x["labels"], {"alpha": 0.5, "threshold": 0.3}),
    ]:
        logits, q = (x[name].clone().requires_grad_() for name in ("logits", "q"))
        with ops.use_backend("reference"):
            out = function(
                logits, q, x["k"], x["queue"], x["prototypes"], given,
                temperature=0.1, w_proto=0.7, w_inst=0.3, **settings,
            )  # fmt: skip
        found.append((out.loss, *torch.autograd.grad(out.loss, (logits, q))))
    assert torch.equal(out.labels, labels) and torch.equal(out.kept, kept)
    for ours, of_used, of_given in zip(*found, strict=True):
        close(of_used, ours)
        close(of_given, ours)


@pytest.mark.parametrize("n, classes, slots, d", SIZES)
def test_official_soft_labels_are_the_reference_s(n, classes, slots, d):
    official = importlib.import_module("mopro_fast.benchmark.official")
    x = random_head(n, classes, slots, d, n)
    z, keys, weight = x["q"], x["queue"], 3 * unit(classes, d, seed=9)
    want = reference.collective_targets(z, keys, weight, x["prototypes"], 0.3, 0.1, "linear", None)
    close(official.collective_targets(z, keys, weight, x["prototypes"], alpha=0.3, temperature=0.1), want)
    values = torch.eye(classes, dtype=torch.float64)[torch.arange(slots) % classes]
    want = reference.soft_neighbour_labels(z, keys, values, 0.1, "softmax")
    close(official.soft_neighbour_labels(z, keys, values, temperature=0.1), want)


def test_official_updates_are_the_reference_s():
    official = importlib.import_module("mopro_fast.benchmark.official")
    x = random_head(40, 7, 80, 16, 5)
    want, got = x["prototypes"].clone(), x["prototypes"].clone()
    reference.prototype_update_(want, x["q"], x["labels"], x["kept"], 0.9)
    official.prototype_update_(got, x["q"], x["labels"], x["kept"], 0.9)
    close(got, want)

    queues = [x["queue"].clone() for _ in range(2)]
    cursors = [torch.tensor([40]) for _ in range(2)]
    for keys in (x["k"], x["q"], x["k"]):
        reference.queue_enqueue_(queues[0], cursors[0], keys)
        official.queue_enqueue_(queues[1], cursors[1], keys)
    assert torch.equal(*queues) and torch.equal(*cursors)


def test_every_peer_of_every_op_computes_the_same(bench):
    """In float64: ours through its official form, torch.optim.SGD and torch._foreach against the oracle."""
    cases, variants = (importlib.import_module(name) for name in ("cases", "variants"))
    for case in cases.quick():
        op = variants.OPS[case.op]
        oracle = bench.outputs(case, op.official(cases.float64(case.state("cpu")))())
        for name, factory in op.others.items():
            if not isinstance(factory, str) and "compiled" not in name and "apex" not in name:
                errors = bench.compare(bench.outputs(case, factory(cases.float64(case.state("cpu")))()), oracle)
                assert max(errors.values()) < 1e-9, (case.name, name, errors)
        if case.shape.dtype in ("float32", "uint8"):
            assert bench.check(case, op.ours, oracle, {}, "cpu")["passed"], case.name


@pytest.mark.parametrize("n, classes, slots, threshold", [(256, 1000, 8192, 0.8), (64, 5000, 512, 0.6)])
def test_the_inputs_hold_all_kinds_of_rows_far_from_every_threshold(n, classes, slots, threshold):
    cases = importlib.import_module("cases")
    s = cases.head_state(cases.Shape(N=n, C=classes, Q=slots), "cpu")
    mixed = 0.5 * s.logits.softmax(1) + 0.5 * (s.q @ s.prototypes.T / 0.1).softmax(1)
    top = mixed.topk(2).values
    given = mixed.gather(1, s.labels[:, None])[:, 0]
    sure = top[:, 0] > threshold
    kept = sure | (given > 1 / classes)
    assert s.threshold == threshold
    assert (top[:, 0] - threshold).abs().min() > 0.01
    assert (top[sure, 0] - top[sure, 1]).min() > 0.01
    assert (classes * given - 1).abs().min() > 0.01
    kinds = [sure & (mixed.argmax(1) != s.labels), sure & (mixed.argmax(1) == s.labels), kept & ~sure, ~kept]
    assert [int(kind.sum()) for kind in kinds] == [n // 4] * 4
    hit = (s.q * s.k).sum(1) >= (s.q @ s.queue.T).max(1).values
    assert n // 2 <= hit.sum() < n


def test_floors_are_those_worked_out_by_hand():
    cases, floor = (importlib.import_module(name) for name in ("cases", "floor"))

    def us(cost):
        return floor.floor_us(cost, H200["copy_bytes_per_s"], H200["flop_per_s"])

    million = 10**6
    assert us(floor.ema_update_(28 * million, False)) == pytest.approx(78, abs=0.5)  # 12 bytes each
    assert us(floor.sgd_ema_update_(28 * million, True)) == pytest.approx(208, abs=0.5)  # 32 bytes each
    # The design's 2 and 65 µs are three products of 2·N·Q·D; forward and gradient in one pass need two.
    assert us(floor.info_nce(256, 8192, 128, 2)) == pytest.approx(2.04 * 2 / 3, abs=0.01)
    assert us(floor.info_nce(1024, 65536, 128, 2)) == pytest.approx(65.2 * 2 / 3, abs=0.1)
    # The design's 0.3 and 1.3 µs write every prototype; those of 256 and 1024 rows are enough.
    assert us(floor.prototype_update_(256, 1000, 128, 4)) == pytest.approx(0.27 - 4 * 744 * 128 / 4.3e6, abs=0.01)
    assert us(floor.prototype_update_(1024, 5000, 128, 4)) == pytest.approx(1.3 - 4 * 3976 * 128 / 4.3e6, abs=0.05)
    assert us(floor.queue_enqueue_(256, 128, 2)) == pytest.approx(0.03, abs=0.001)
    assert us(floor.queue_enqueue_(1024, 128, 2)) == pytest.approx(0.12, abs=0.003)
    # Similarity + correction + prototype loss, logits in float32: 0.4 and 5.6 µs.
    for n, c, want in ((256, 1000, 0.4), (1024, 5000, 5.6)):
        logits = n * c * 4
        rest = floor.prototype_contrast(n, c, 128, 4)
        assert us(rest._replace(bytes=rest.bytes + logits)) == pytest.approx(want, abs=0.1)
    # An H200 normalises 256 images of 224 px to bfloat16 in 27 µs; two_views reads 54 % of 256 px squared.
    assert us(floor.normalize(256, 224, 2)) == pytest.approx(26.9, abs=0.1)
    cost = cases.Case("two_views", cases.Shape(N=256, S=224, dtype="uint8")).cost()
    read = 2 * 256 * 256**2 * 3
    assert cost.bytes == pytest.approx(0.54 * read + 2 * 256 * 224**2 * 3, rel=0.01) and us(cost) < 31
    # One number each: 4 + 4 + 8 + 1 + 1 + 4 bytes would be logits, q, labels, kept; and C·D prototypes.
    assert floor.correct_labels(1, 1, 1, 4) == floor.Cost(4 + 4 + 4 + 8 + 8 + 1, 2)
    # CAPro's page counts 2·Q·D·2C + 2·N·Q·D + 2·N·Q·C; z, a key, two weights and the target, of one number each
    cost = floor.collective_targets(1024, 5000, 65536, 128, 2)
    assert cost.flops == pytest.approx((168 + 17 + 671) * 1e9, rel=0.001)
    assert floor.collective_targets(1, 1, 1, 1, 2) == floor.Cost(4 * 2 + 4, 8)
    assert floor.soft_neighbour_labels(1, 1, 1, 1, 2) == floor.Cost(3 * 2 + 4, 4)
    # x, residual, y and three gradients; weight, bias, both running statistics; these two and two gradients written
    assert floor.batch_norm_act(1, 1, 1, 4).bytes == 6 * 4 + 8 * 4
    # two of 25 and two of 9 numbers; vectors as before
    assert floor.batch_norm_relu_pool(1, 1, 5, 4).bytes == 2 * 25 * 4 + 2 * 9 * 4 + 8 * 4
    # x, weight, y; four vectors of the norm; y's two statistics, both running ones read and written
    assert floor.conv1x1_stats_(1, 1, 1, 1, 4) == floor.Cost(3 * 4 + 4 * 4 + 6 * 4, 2)
    # logits and their gradient; q, its gradient, k, queue; prototypes; labels; loss and metrics
    assert floor.mopro_loss(1, 1, 1, 1, 4, 4, 4).bytes == 2 * 4 + 4 * 4 + 4 + 8 + 8 * 4
    # labels and kept as corrected, a row of the queue, one of the prototypes
    assert floor.head(1, 1, 1, 1, 1, 4, 4).bytes == floor.mopro_loss(1, 1, 1, 1, 4, 4, 4).bytes + 9 + 4 + 4


def test_a_wrong_result_is_not_timed_and_the_status_is_1(bench, monkeypatch, tmp_path, capsys):
    variants = importlib.import_module("variants")
    monkeypatch.setattr(bench.timing, "ceilings", lambda _: dict.fromkeys(CEILINGS, 1e12))

    def broken(q, k, queue, temperature):
        loss, hit = variants.official.info_nce(q, k, queue, temperature)
        return loss * 1.001, hit

    monkeypatch.setattr(variants.ops, "info_nce", broken)
    status = bench.main(
        ["--quick", "--device", "cpu", "--only", "info_nce", "--compile-seconds", "0", "--results", str(tmp_path)]
    )
    result = json.loads((tmp_path / "ops_cpu.json").read_text())
    assert status == 1
    wrong = [r for r in result["cases"] if r["dtype"] == "float32"]
    assert wrong
    for r in wrong:
        assert not r["check"]["passed"] and "loss" in r["check"]["message"]
        assert "ours" not in r and "peers" not in r
    printed = capsys.readouterr().out
    assert "WRONG, not timed: loss" in printed and "FAILED  every op at every shape run: results that differ" in printed


def test_an_op_that_raises_is_reported_and_the_run_goes_on(bench, monkeypatch, capsys):
    variants = importlib.import_module("variants")
    monkeypatch.setattr(bench.timing, "ceilings", lambda _: dict.fromkeys(CEILINGS, 1e12))

    def broken(*_):
        raise RuntimeError("the kernel is not there")

    monkeypatch.setattr(variants.ops, "queue_enqueue_", broken)
    assert bench.main(["--check", "--device", "cpu", "--only", "queue_enqueue_", "info_nce"]) == 1
    printed = capsys.readouterr().out
    assert "WRONG, not timed: RuntimeError: the kernel is not there" in printed and "info_nce N=7 Q=21" in printed


@pytest.mark.slow
@pytest.mark.parametrize("script", ["ops.py --check --quick --device cpu --only queue_enqueue_", "tables.py --check"])
def test_as_a_command(script):
    name, *words = script.split()
    assert subprocess.run([sys.executable, BENCH / name, *words]).returncode == 0


@pytest.mark.slow
def test_from_end_to_end(bench, tmp_path):
    only = ["--only", "info_nce", "head", "ema_update_", "sgd_ema_update_"]
    options = ["--quick", "--device", "cpu", "--compile-seconds", "0", "--results", str(tmp_path)]
    assert bench.main([*options, *only]) == 0
    result = json.loads((tmp_path / "ops_cpu.json").read_text())
    assert {"triton", "extension", "commit", "torch", "cpu"} <= set(result["conditions"])
    assert {r["op"] for r in result["cases"]} == set(only[1:])
    for r in result["cases"]:
        assert r["check"]["passed"] and r["ours"]["eager_us"]["p20"] <= r["ours"]["eager_us"]["p80"]
        assert r["ours"]["launches"] is None and "replay_us" not in r["ours"]
        assert r["peers"]["official"]["eager_ratio"] > 0
        assert "spent" in r["peers"]["official, compiled"]["skipped"] or "storage" in str(r) or "unrolled" in str(r)
    assert "SGD(fused) + foreach" in next(r for r in result["cases"] if r["op"] == "sgd_ema_update_")["peers"]
    assert [q["name"] for q in result["requirements"] if q["passed"] is not None] == [
        "every op at every shape run: results that differ from float64's"
    ]


CEILINGS = ("copy_bytes_per_s", "bf16_flop_per_s", "tf32_flop_per_s")


def made_up_gpu_result(bench) -> dict:
    """What a GPU run would write, with numbers that no GPU gave."""
    cases, variants = (importlib.import_module(name) for name in ("cases", "variants"))

    def times(us):
        return {"p20": us, "p50": us, "p80": us, "repeats": 50}

    rows = []
    for case in cases.full():
        cost = case.cost()
        us = bench.floor.floor_us(cost, 4e12, 8e14)
        measured = {"launches": 9, "synchronisations": 0, "extra_bytes": 10**6}
        ours = measured | {"eager_us": times(20 + 2 * us), "replay_us": times(1.1 * us)}
        official = measured | {
            "launches": 5000,
            "synchronisations": 3,
            "eager_us": times(10**5),
            "eager_ratio": 10**5 / (20 + 2 * us),
            "not_replayed": "it waits",
        }
        peers = {"official": official, "official, compiled": {"skipped": "made up"}}
        peers |= {name: {"skipped": "made up"} for name in variants.OPS[case.op].others}
        rows.append(
            {
                "op": case.op, "settings": case.settings, "dtype": case.shape.dtype,
                "bytes": cost.bytes, "flops": cost.flops,
                "floor_us": us, "backend": {}, "check": {"passed": True, "message": "", "errors": {}, "limits": {}},
                "ours": ours, "peers": peers,
            }
        )  # fmt: skip
    memory = [
        {"op": op, "dimension": d, "extra_bytes": [10**6, 10**6], "entries": 10**7, "excepted": 0}
        for op, d in bench.GROWTH
    ]
    result = {
        "conditions": {"gpu": "MADE UP GPU", "driver": "0", "torch": "2", "triton": "3", "commit": "abc"},
        "device": "cuda", "quick": False, "ceilings": dict(zip(CEILINGS, (4e12, 8e14, 4e14), strict=True)),
        "cases": rows, "not_reached": [], "memory": memory, "seconds": 1.0,
    }  # fmt: skip
    return result | {"requirements": bench.requirements(result)}


def test_requirements_follow_the_numbers(bench):
    result = made_up_gpu_result(bench)
    found = {q["name"]: q for q in result["requirements"]}
    assert all(q["passed"] for q in found.values()), [n for n, q in found.items() if not q["passed"]]
    assert found["ema_update_, float32 alone: share of the copy bandwidth"]["value"] == pytest.approx(1 / 1.1)

    for r in result["cases"]:
        r["ours"]["launches"] = 13
        r["ours"]["synchronisations"] = 1
        r["ours"]["replay_us"]["p50"] = max(101.0, r["floor_us"] * 1.3)
        r["peers"]["official"]["eager_ratio"] = 49.0
    for m in result["memory"]:
        m["extra_bytes"][1] += m["entries"]
    failed = {q["name"] for q in bench.requirements(result) if q["passed"] is False}
    assert set(found) - failed == {
        "every op at every shape run: not replayable from a CUDA graph",
        "every op at every shape run: results that differ from float64's",
    }
    for r in result["cases"]:
        r["ours"].pop("replay_us")
        r["ours"]["launches"] = None
    missing = [q["name"] for q in bench.requirements(result) if q["passed"] is None]
    assert len(missing) == 10


@pytest.mark.medium
def test_tables_and_figure_come_from_the_result(bench, tmp_path, monkeypatch, capsys):
    tables = importlib.import_module("tables")
    (tmp_path / "results").mkdir()
    document = tmp_path / "performance.md"
    document.write_text(
        "".join(f"<!-- table {n} -->\nold\n<!-- end -->\n" for n in ("ops", "ops_requirements", "ops_figure"))
    )
    monkeypatch.setattr(tables, "HERE", tmp_path)
    monkeypatch.setattr(tables, "DOCUMENTS", [document])
    monkeypatch.setattr(tables, "DOCS", tmp_path)

    assert tables.main([]) == 0
    assert document.read_text().count("Not measured yet.") == 3 and not (tmp_path / "ops.svg").exists()
    assert tables.main(["--check"]) == 0

    result = made_up_gpu_result(bench)
    file = tmp_path / "results" / "ops_gpu.json"
    file.write_text(json.dumps(result))
    assert tables.main(["--check"]) == 1
    assert tables.main([]) == 0 and tables.main(["--check"]) == 0
    text, figure = document.read_text(), (tmp_path / "ops.svg").read_text()
    assert "MADE UP GPU" in text and "](ops.svg)" in text and "<svg" in figure and "info_nce" in figure
    lines = [
        line for line in text.splitlines() if line.startswith("| `head` | N=256, C=1000, Q=8192, M=2048 | bfloat16")
    ]
    assert len(lines) == 1 and lines[0].count("|") == 11 and "official" in lines[0] and " / –" in lines[0]
    assert not any("N=4096" in line for line in text.splitlines() if line.startswith("| `"))
    assert text.count("| yes |") == len(result["requirements"])

    file.write_text(json.dumps(result | {"seconds": 2.0}))
    assert tables.main(["--check"]) == 1 and "ops.svg is out of date" in capsys.readouterr().out
    file.unlink()
    assert tables.main([]) == 0 and not (tmp_path / "ops.svg").exists()
    file.write_text(json.dumps(result))
    assert tables.main(["--print", "ops_requirements", "--results", str(tmp_path / "results")]) == 0
    assert "| yes |" in capsys.readouterr().out and not (tmp_path / "ops.svg").exists()


def test_the_report_names_what_failed_and_what_was_skipped(bench):
    result = made_up_gpu_result(bench)
    wrong = next(r for r in result["cases"] if r["op"] == "ema_update_")
    del wrong["ours"], wrong["peers"]
    wrong["check"] = {"passed": False, "message": "targets: 1e-3 is above 1e-6", "errors": {}, "limits": {}}
    result["requirements"] = bench.requirements(result)
    result["not_reached"] = ["head N=1"]
    text = bench.report(result)
    assert "targets: 1e-3 is above 1e-6" in text and "not reached: head N=1" in text
    assert "FAILED  every op at every shape run: results that differ from float64's: 1 (at most 0)" in text
    assert "skipped official, compiled: made up" in text and "1 requirements not measured" in text


@pytest.mark.slow
def test_launches_are_the_committed_ones(compiled, tmp_path):
    """bench/launches.py counts them without a GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, BENCH / "launches.py", "--results", tmp_path, "--cache", compiled]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    folders = tmp_path, BENCH / "results"
    found, committed = (json.loads((folder / "launches.json").read_text())["rows"] for folder in folders)
    assert found == committed
    assert found[0]["op"] == "head" and found[0]["ours"]["launches"] <= 12 and found[0]["ours"]["waits"] == 0


def test_the_batch_norm_of_apex_gets_what_it_takes(tmp_path, monkeypatch):
    """Arguments and layouts, forward and backward, on a stand-in."""
    peers = importlib.import_module("apex_peers")
    fake_apex.install(tmp_path, monkeypatch, without=fake_apex.MODULES)
    assert "apex is not installed" in peers.missing()
    fake_apex.install(tmp_path, monkeypatch, without=("bnp",))
    assert "without --bnp" in peers.missing()
    fake_apex.install(tmp_path, monkeypatch)
    assert peers.missing() is None

    g = torch.Generator().manual_seed(0)
    x, residual, dy = (
        torch.randn(4, 8, 3, 5, generator=g).half().to(memory_format=torch.channels_last) for _ in range(3)
    )
    weight, bias, mean, var = (torch.rand(8, generator=g) for _ in range(4))
    weight.requires_grad_()
    want_mean, want_var = mean.clone(), var.clone()
    want = F.relu(F.batch_norm(x.float(), want_mean, want_var, weight, bias, True, 0.3, 1e-3) + residual)
    call = peers.batch_norm_act(weight, bias, mean, var, 0.3, 1e-3, True)
    y = call(x, residual)
    torch.testing.assert_close(y, want.half())
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(mean, want_mean) and torch.equal(var, want_var)
    y.backward(dy)
    (want_grad,) = torch.autograd.grad(want, weight, dy.float())
    torch.testing.assert_close(call.weight.grad, want_grad)
    assert call.bias.grad is None


@pytest.mark.parametrize("shadows", [False, True])
def test_the_kernels_of_apex_get_what_they_take(tmp_path, monkeypatch, shadows):
    cases, variants = (importlib.import_module(name) for name in ("cases", "variants"))
    fake_apex.install(tmp_path, monkeypatch)
    apex, torchs = (cases.model_state(cases.Shape(model="few", shadows=shadows), "cpu") for _ in range(2))
    for _ in range(2):
        got = variants.apex_sgd(apex)()
        want = variants.torch_sgd(torchs, variants.foreach_ema, foreach=True)()
    torch.testing.assert_close(got, want)
