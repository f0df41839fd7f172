"""The linear probe against OmniBenchmark's loop written out, and against another minimiser of the same objective."""

import itertools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from downstream_data import CLASSES, write_checkpoint, write_folders
from scipy.optimize import minimize
from torch import nn

from mopro_fast import cli
from mopro_fast.data.index import load_index
from mopro_fast.downstream import image_map, probe
from mopro_fast.downstream.features import EncoderConfig, Frozen
from mopro_fast.downstream.probe import Rows, accuracy, closure, fit, hold_out

LAMBDA = 0.05


def made(n: int, seed: int, dims: int = 8, scales: float = 0) -> Rows:
    """Three classes that overlap; scales: powers of ten between the first and the last dimension's."""
    means = torch.randn(3, dims, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (n,), generator=generator)
    features = means[labels] + 2 * torch.randn(n, dims, generator=generator)
    return Rows(features * torch.logspace(-scales, 0, dims), labels)


def test_the_loop_written_out():
    rows = {"train": made(407, 1, 30, 2), "val": made(400, 2, 30, 2), "test": made(900, 3, 30, 2)}
    found = fit(rows, 3, 1e-4, steps=5, every=2, seed=4)
    torch.manual_seed(4)
    net = nn.Linear(30, 3)
    optimizer = torch.optim.LBFGS(net.parameters())
    x, y = rows["train"].features, rows["train"].labels

    def objective():
        optimizer.zero_grad()
        for i in range(10):  # 407 images: nine segments of 40, the last takes 47
            part = slice(40 * i, 40 * i + 40 if i < 9 else None)
            loss = nn.CrossEntropyLoss()(net(x[part]), y[part])
            if i == 9:
                loss += 1e-4 * torch.sqrt((net.weight**2).sum())
            loss.backward()
        return loss

    expected, weights = [], []
    for step in range(1, 6):
        optimizer.step(objective)
        if step in (2, 4, 5):
            hits = [net(rows[name].features).argmax(1) == rows[name].labels for name in ("val", "test")]
            expected.append([step, *(100 * h.double().mean().item() for h in hits)])
            weights.append(net.weight.detach().clone())
    assert [[r["step"], r["val"]["top1"], r["test"]["top1"]] for r in found] == expected
    steps = [(b - a).norm() / a.norm() for a, b in itertools.pairwise(weights)]
    assert min(steps) > 0.01, steps  # it had not arrived yet


def test_it_arrives_at_the_minimum():
    train = made(200, 1)
    net = nn.Linear(8, 3)
    optimizer = torch.optim.LBFGS(net.parameters())
    objective = closure(net, optimizer, train, LAMBDA)
    for _ in range(30):
        optimizer.step(objective)
    x, y = train.features.double(), train.labels

    def value(parameters):
        p = torch.from_numpy(parameters).requires_grad_()
        w, b = p[:24].view(3, 8), p[24:]
        losses = [F.cross_entropy(x[i : i + 20] @ w.T + b, y[i : i + 20]) for i in range(0, 200, 20)]
        total = sum(losses) + LAMBDA * w.norm()
        total.backward()
        return total.item(), p.grad.numpy()

    best = minimize(value, np.random.default_rng(0).normal(size=27), jac=True, method="BFGS")
    ours = np.concatenate([p.detach().double().numpy().ravel() for p in net.parameters()])
    assert value(ours)[0] == pytest.approx(best.fun, abs=1e-5)
    np.testing.assert_allclose(ours[:24], best.x[:24], atol=0.01)  # the biases share a direction without effect


def test_accuracy_by_hand():
    net = nn.Linear(2, 4)
    with torch.no_grad():
        net.weight.zero_()
        net.bias.copy_(torch.tensor([0.0, 1, 0, 0]))
        net.weight[2, 0] = 5
    rows = Rows(
        torch.tensor([[1.0, 0]] * 3 + [[0.0, 0]] * 2), torch.tensor([2, 2, 1, 1, 0])
    )  # 3 × class 2, 2 × class 1
    assert accuracy(net, rows, 4) == {"top1": 60.0, "mean_per_class": 50.0}  # of the classes 0, 1, 2: 0, 1/2, 1


def test_hold_out_takes_its_share_of_each_class():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 3], [10, 20, 4]))
    kept, held = hold_out(labels, 0.25, seed=0)
    assert sorted([*kept, *held]) == list(range(34))
    assert np.bincount(labels[held]).tolist() == [2, 5, 0, 1]
    assert np.array_equal(held, hold_out(labels, 0.25, seed=0)[1])
    assert not np.array_equal(held, hold_out(labels, 0.25, seed=1)[1])


def test_lambda_and_step_are_chosen_on_the_validation_images():
    def at(step, val, test):
        return {"step": step, **{n: {"top1": v, "mean_per_class": v} for n, v in (("val", val), ("test", test))}}

    o = probe.Probe(checkpoint="c", data="d", out="o", lambdas=(0.1, 0.2, 0.3))
    results = {"0.1": [at(100, 50, 90), at(200, 60, 40)], "0.2": [at(100, 70, 30), at(200, 70, 80)], "0.3": []}
    found = probe.report(o, {}, 3, results)
    assert (found["lambda"], found["step"], found["test"]["top1"]) == (0.2, 100, 30)
    assert found["lambdas"]["0.1"]["best_on_test"]["top1"] == 90 and found["diverged"] == [0.3]
    assert "0.3 diverged" in probe.table(found)


def test_a_diverging_lambda_ends_without_a_result():
    train = Rows(torch.full((20, 2), torch.inf), torch.arange(20) % 2)
    assert fit({"train": train, "val": train}, 2, 0.1, steps=4, every=2, seed=0) == []


def run(*args):
    try:
        cli.main([str(a) for a in args])
    except SystemExit as stop:
        return stop.code or 0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("probe") / "c.pt")


OPTIONS = ["--device", "cpu", "--lambdas", "0.001", "0.1", "--steps", "10", "--evaluate-every", "5"]


@pytest.mark.medium
def test_class_folders(tmp_path, checkpoint, capsys):
    data = write_folders(tmp_path / "data", {"train": 20, "val": 5})
    assert run("probe", checkpoint, "--data", data, "--out", tmp_path / "out", *OPTIONS) == 0
    result = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert result["images"] == {"train": 108, "test": 30, "val": 12}
    assert result["test"]["top1"] > 200 / len(CLASSES) and len(result["lambdas"]) == 2
    assert "<- chosen" in capsys.readouterr().out
    write_folders(data, {"test": 3}, seed=1)  # with a test/, val/ is for choosing
    assert run("probe", checkpoint, "--data", data, "--out", tmp_path / "out", *OPTIONS) == 0
    result = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert result["images"] == {"train": 120, "test": 18, "val": 30}


@pytest.mark.medium
def test_interrupted_it_goes_on_with_the_next_lambda(tmp_path, checkpoint, monkeypatch):
    data = write_folders(tmp_path / "data", {"train": 4, "val": 2})
    arguments = ["probe", checkpoint, "--data", data, "--out", tmp_path / "out", *OPTIONS, "--holdout", "0.25"]
    whole, asked = fit, []

    def dies(rows, classes, lam, *rest):
        asked.append(lam)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return whole(rows, classes, lam, *rest)

    monkeypatch.setattr(probe, "fit", dies)
    assert run(*arguments) == 130 and not (tmp_path / "out" / "probe.json").exists()
    assert run(*arguments) == 0 and asked == [0.001, 0.1, 0.1]
    interrupted = (tmp_path / "out" / "probe.json").read_text()
    assert run(*arguments) == 0 and asked == [0.001, 0.1, 0.1, 0.001, 0.1]
    assert (tmp_path / "out" / "probe.json").read_text() == interrupted


@pytest.mark.medium
def test_a_realm_of_omnibenchmark(tmp_path, checkpoint, monkeypatch):
    realm = write_folders(tmp_path / "n015", {"images": 12})
    lists = realm / "annotations" / "v2"
    lists.mkdir(parents=True)
    for name, numbers in (("train", range(8)), ("val", (8, 9)), ("test", (10, 11))):
        lines = [f"images/{c}/{i}.png {label}\n" for label, c in enumerate(CLASSES) for i in numbers]
        unlabelled = "images/n01/11.png -1\n" if name == "train" else ""
        (lists / f"{name}.txt").write_text("".join(lines) + unlabelled)
    options = ["--image-size", "14", *OPTIONS]
    assert run("probe", checkpoint, "--data", realm, "--out", tmp_path / "out", *options) == 0
    result = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert result["images"] == {"train": 48, "val": 12, "test": 12} and result["classes"] == 6
    # The features are those of bicubic images whose shorter side is that of the crop: no others are there.
    config, folder = EncoderConfig(image_size=14, eval_resize=14, device="cpu"), tmp_path / "out" / "features"
    monkeypatch.setattr(image_map, "EvalLoader", None)
    index = load_index(str(lists / "test.txt"), "val", num_classes=None, root=str(realm))
    Frozen(str(checkpoint), config, folder, filter="cubic").features(index, "test")
    with pytest.raises(TypeError):
        Frozen(str(checkpoint), config, folder).features(index, "test")


def test_mistakes(tmp_path, checkpoint, capsys):
    data = write_folders(tmp_path / "data", {"": 2})
    other = write_folders(tmp_path / "other", {"": 1}, CLASSES[:3])
    (other / "n03").rename(other / "n09")
    for wrong, named in (
        ([], "--test"),
        (["--test", other], "class n09 is none of the"),
        (["--lambdas", "-1"], "--lambdas"),
        (["--steps", "0"], "--steps"),
        (["--holdout", "1"], "--holdout"),
        (["--test", data, "--holdout", "0.1"], "no image for val"),
    ):
        assert run("probe", checkpoint, "--data", data, "--out", tmp_path / "out", "--device", "cpu", *wrong) == 2
        error = capsys.readouterr().err.splitlines()
        assert named in error[-1] and error[-1].startswith("mopro-fast: error: ")
