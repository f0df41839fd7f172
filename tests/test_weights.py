"""Weights from and to every format, and files that must be refused."""

import argparse
import functools
import json
import os
import pickle
from pathlib import Path

import killed_run
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from mopro_fast import cli
from mopro_fast.checkpoints import state as checkpoint
from mopro_fast.checkpoints import weights
from mopro_fast.checkpoints.formats import digest
from mopro_fast.checkpoints.weights import load_encoder, load_weights
from mopro_fast.config import MoProConfig, TrainConfig
from mopro_fast.downstream import importing
from mopro_fast.downstream.export import export
from mopro_fast.errors import UserError
from mopro_fast.models.build import build
from mopro_fast.models.mopro import MoPro
from mopro_fast.training.loop import Trainer
from mopro_fast.training.tasks import task_of

CPU = torch.device("cpu")


def small_config() -> TrainConfig:
    c = TrainConfig(mopro=MoProConfig(queue_size=24))
    c.data.num_classes, c.data.image_size = 5, 64
    c.model.arch, c.model.width, c.model.embed_dim = "resnet18", 0.125, 6
    return c


def small_model() -> MoPro:
    """Weights as after some training: no two tensors alike."""
    torch.manual_seed(0)
    model = build(small_config())
    with torch.no_grad():
        for t in model.state_dict().values():
            t.copy_(torch.rand_like(t) + 0.1 if t.is_floating_point() else torch.full_like(t, 7))
    return model


def sgd_state(parameters: list[torch.Tensor], with_momentum: int) -> dict:
    """torch.optim.SGD's state dict; the first so many have a momentum buffer."""
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-4)
    for p in parameters[:with_momentum]:
        optimizer.state[p]["momentum_buffer"] = torch.rand_like(p)
    return optimizer.state_dict()


def official(model: MoPro) -> dict:
    """What train.py of the official code saves: all parameters in the optimizer, the key encoder's without momentum."""
    state = {f"module.{name}": t.clone() for name, t in model.state_dict().items()}
    state["module.queue"] = state["module.queue"].T.contiguous()
    query = len(list(model.encoder_q.parameters()))
    optimizer = sgd_state([p.detach().clone() for p in model.parameters()], query)
    return {"epoch": 90, "arch": "resnet50", "state_dict": state, "optimizer": optimizer}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """The same model in every format."""
    folder, model = tmp_path_factory.mktemp("weights"), small_model()
    files = {name: folder / f"{name}.pt" for name in ("mopro_fast", "official", "legacy", "torchvision", "bare")}
    files["safetensors"] = folder / "safetensors.safetensors"
    optimizer = sgd_state(list(model.encoder_q.parameters()), len(list(model.encoder_q.parameters())))
    ours = {"model": model.state_dict(), "config": small_config().to_json(), "epoch": 3, "optimizer": optimizer}
    torch.save(ours, files["mopro_fast"])
    theirs = official(model)
    torch.save(theirs, files["official"])
    group = theirs["optimizer"]["param_groups"][0]
    addresses = {i: 140_000_000 + 64 * (i * 7919 % 1000) for i in group["params"]}  # as PyTorch 1.4 named them
    theirs["optimizer"]["state"] = {addresses[i]: slot for i, slot in theirs["optimizer"]["state"].items()}
    group["params"] = [addresses[i] for i in group["params"]]
    theirs["args"] = argparse.Namespace(lr=0.1, schedule=[40, 80])
    torch.save(theirs, files["legacy"], _use_new_zipfile_serialization=False)
    names = {n: t for n, t in model.encoder_q.state_dict().items() if not n.startswith(("fc1", "fc2"))}
    names = {n.replace("classifier", "fc"): t for n, t in names.items()}
    torch.save({n: t for n, t in names.items() if not n.endswith("tracked")}, files["torchvision"])
    torch.save({"state_dict": {f"module.{n}": t for n, t in names.items() if "fc." not in n}}, files["bare"])
    save_file(dict(model.state_dict()), files["safetensors"])
    return files


@pytest.mark.parametrize("name", ["mopro_fast", "official", "legacy", "safetensors"])
def test_whole_models_are_the_same_from_every_format(files, name):
    weights, expected = load_weights(files[name]), small_model().state_dict()
    assert weights.kind == ("official" if name == "legacy" else name)
    assert weights.state.keys() == expected.keys()
    for tensor in expected:
        assert torch.equal(weights.state[tensor], expected[tensor]), tensor
    assert (weights.model.arch, weights.model.width, weights.model.embed_dim) == ("resnet18", 0.125, 6)
    assert (weights.model.stem, weights.num_classes) == ("imagenet", 5)
    assert weights.epoch == {"mopro_fast": 3, "safetensors": None}.get(name, 90)
    ours = name == "mopro_fast"
    assert (weights.image_size, weights.eval_resize) == ((64, 73) if ours else (224, 256))


def test_momentum_is_mapped_by_the_order_of_the_parameters(files):
    query = list(small_model().encoder_q.parameters())
    for name in ("official", "legacy"):
        saved = checkpoint.read(files[name])["optimizer"]
        theirs = [saved["state"][key]["momentum_buffer"] for key in saved["param_groups"][0]["params"][: len(query)]]
        ours = load_weights(files[name]).optimizer
        assert ours["param_groups"][0]["params"] == list(range(len(query)))
        assert ours["param_groups"][0]["weight_decay"] == 1e-4
        assert all(torch.equal(ours["state"][i]["momentum_buffer"], b) for i, b in enumerate(theirs))
        torch.optim.SGD(query, lr=0.1).load_state_dict(ours)


@pytest.mark.parametrize("name, classes", [("torchvision", 5), ("bare", None)])
def test_a_torchvision_model_has_the_same_features_and_no_embedding(files, name, classes):
    encoder, weights = load_encoder(files[name], CPU)
    whole, _ = load_encoder(files["official"], CPU)
    images = torch.rand(2, 3, 64, 64)
    assert (weights.kind, weights.num_classes, weights.optimizer) == ("torchvision", classes, None)
    assert not encoder.training and encoder.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.equal(encoder.features(images), whole.features(images))
        logits, embedding = encoder(images)
        assert classes is None or torch.equal(logits, whole(images)[0])
    assert not embedding.any()


def test_initial_weights_of_every_format(files):
    expected = small_model().state_dict()
    for name in ("mopro_fast", "official", "safetensors", "torchvision"):
        model = build(small_config())
        before = {n: t.clone() for n, t in model.state_dict().items()}
        weights.initialise(model, files[name])
        for tensor, t in model.state_dict().items():
            if name != "torchvision":
                assert torch.equal(t, expected[tensor]), tensor
            elif tensor.endswith("num_batches_tracked"):
                assert t == 0
            elif ".fc" in tensor or tensor in ("queue", "queue_ptr", "prototypes"):
                assert torch.equal(t, before[tensor]), tensor
            else:
                assert torch.equal(t, expected[tensor.replace("encoder_k", "encoder_q")]), tensor


class Malicious:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (self.victim,)


def damaged_files(files: dict[str, Path], folder: Path) -> dict[Path, str]:
    """-> files that must be refused, and what the message must say."""
    whole = checkpoint.read(files["official"])

    def changed(name: str, change) -> Path:
        found = {**whole, "state_dict": dict(whole["state_dict"])}
        change(found["state_dict"])
        torch.save(found, folder / name)
        return folder / name

    cases = {}
    for name in ("official", "legacy", "safetensors"):
        data = files[name].read_bytes()
        cut = folder / f"cut-{files[name].name}"
        cut.write_bytes(data[: len(data) * 2 // 3])
        cases[cut] = "is it a whole file"
    data = bytearray(files["official"].read_bytes())
    data[len(data) // 2] ^= 0x40
    (folder / "flipped.pt").write_bytes(data)
    cases[folder / "flipped.pt"] = "does not match its checksum"
    export(load_weights(files["mopro_fast"]), folder / "flipped.safetensors", "safetensors")
    data = bytearray((folder / "flipped.safetensors").read_bytes())
    data[-3] ^= 0x40
    (folder / "flipped.safetensors").write_bytes(data)
    cases[folder / "flipped.safetensors"] = "do not match their checksum"
    hook = {"state_dict": {}, "hook": Malicious(folder / "executed")}
    torch.save(hook, folder / "malicious-zip.tar")
    (folder / "malicious-2.tar").write_bytes(pickle.dumps(hook, 2))
    (folder / "malicious-4.tar").write_bytes(pickle.dumps(hook, 4))
    cases |= {folder / f"malicious-{name}.tar": "it holds code (posix.mkdir)" for name in ("zip", "2")}
    cases[folder / "malicious-4.tar"] = "cannot read"
    (folder / "empty.pt").write_bytes(b"")
    cases[folder / "empty.pt"] = "is it a whole file"
    for name, content in {
        "vit": nn.TransformerEncoderLayer(8, 2).state_dict(),
        "list": [1, 2],
        "number": {"state_dict": {"conv1.weight": 3}},
    }.items():
        torch.save(content, folder / f"{name}.pt")
    cases |= {folder / "vit.pt": "holds no ResNet", folder / "list.pt": "holds a list"}
    cases[folder / "number.pt"] = "no checkpoint of"
    cases[folder / "absent.pt"] = "no checkpoint at"
    cases[folder] = "no run's folder"
    q = "module.encoder_q.layer2.0.conv1.weight"
    cases[changed("lost.pt", lambda s: s.pop(q))] = "layer2.0.conv1.weight is absent, expected 16×8×3×3"
    cases[changed("wide.pt", lambda s: s.update({q: torch.zeros(3, 3)}))] = "layer2.0.conv1.weight is 3×3"
    cases[changed("more.pt", lambda s: s.update({"module.encoder_q.fc3.bias": torch.zeros(3)}))] = "fc3.bias is 3"
    cases[changed("nan.pt", lambda s: s[q].fill_(float("nan")))] = "not finite everywhere"
    cases[changed("int.pt", lambda s: s.update({q: s[q].int()}))] = "layer2.0.conv1.weight is of type int32"
    cases[changed("complex.pt", lambda s: s.update({q: s[q] + 0j}))] = "layer2.0.conv1.weight is of type complex64"
    count = "module.encoder_q.bn1.num_batches_tracked"
    cases[changed("count.pt", lambda s: s.update({count: torch.tensor(1.5)}))] = "tracked is of type float32"
    cases[changed("far.pt", lambda s: s["module.queue_ptr"].fill_(24))] = "queue_ptr 24 points outside the queue"
    ours = checkpoint.read(files["mopro_fast"])
    torch.save({**ours, "config": '{"data": {"image_size": -3}}'}, folder / "size.pt")
    cases[folder / "size.pt"] = "image_size must lie in"
    short = torch.zeros(4, 6)
    cases[changed("classes.pt", lambda s: s.update({"module.prototypes": short}))] = "prototypes is 4×6, expected 5×6"
    cases[changed("deep.pt", lambda s: s.update({"module.encoder_q.layer1.2.x": short}))] = "(3, 2, 2, 2) BasicBlocks"
    return cases


@pytest.mark.medium
def test_bad_files_are_refused_in_one_line_and_nothing_is_executed(files, tmp_path):
    for path, expected in damaged_files(files, tmp_path).items():
        with pytest.raises(UserError) as caught:
            load_weights(path)
        message = str(caught.value)
        assert path.name in message and expected in message and "\n" not in message, message
    assert not (tmp_path / "executed").exists()
    pickle.loads((tmp_path / "malicious-4.tar").read_bytes())
    assert (tmp_path / "executed").exists(), "the malicious files are harmless: the test proves nothing"


@pytest.mark.parametrize("format", ["official", "safetensors"])
def test_a_whole_model_comes_back_from_an_export_the_same(files, tmp_path, format):
    weights = load_weights(files["mopro_fast"])
    export(weights, tmp_path / "out", format)
    back = load_weights(tmp_path / "out")
    assert back.keys_updated and back.kind == format and back.config == weights.config and back.epoch == 3
    assert all(torch.equal(t, weights.state[name]) for name, t in back.state.items())
    assert back.state.keys() == weights.state.keys()
    importing.main([str(tmp_path / "out"), str(tmp_path / "ours.pt")])
    ours = load_weights(tmp_path / "ours.pt")
    assert digest(ours.state) == digest(weights.state), "imported, it is not the model that was exported"
    if format == "official":
        for i, slot in weights.optimizer["state"].items():
            assert torch.equal(ours.optimizer["state"][i]["momentum_buffer"], slot["momentum_buffer"])


def test_an_official_file_is_exported_as_it_was(files, tmp_path):
    export(load_weights(files["official"]), tmp_path / "out.tar", "official")
    before, after = checkpoint.read(files["official"]), checkpoint.read(tmp_path / "out.tar")
    assert before["state_dict"].keys() == after["state_dict"].keys() and after["epoch"] == 90
    assert all(torch.equal(t, after["state_dict"][name]) for name, t in before["state_dict"].items())
    parameters = [p.detach() for p in small_model().parameters()]
    torch.optim.SGD(parameters, lr=0.1, momentum=0.9).load_state_dict(after["optimizer"])  # as train.py does
    assert after["optimizer"]["param_groups"][0]["params"] == before["optimizer"]["param_groups"][0]["params"]
    for i, slot in before["optimizer"]["state"].items():
        assert torch.equal(slot["momentum_buffer"], after["optimizer"]["state"][i]["momentum_buffer"])


def test_an_import_moves_the_key_encoder_once(files, tmp_path):
    importing.main([str(files["official"]), str(tmp_path / "ours.pt")])
    before, after = load_weights(files["official"]).state, load_weights(tmp_path / "ours.pt").state
    for name, t in before.items():
        if name.startswith("encoder_k.") and not name.endswith(("running_mean", "running_var", "tracked")):
            t = t.double() * 0.999 + 0.001 * before[name.replace("_k.", "_q.")].double()
            assert torch.allclose(after[name].double(), t, rtol=1e-6, atol=0) and not torch.equal(
                after[name], before[name]
            )
        else:
            assert torch.equal(after[name], t)


@pytest.mark.parametrize("classifier", [True, False])
@pytest.mark.parametrize("name", ["out.pth", "out.safetensors"])
def test_a_torchvision_state_dict(files, tmp_path, name, classifier):
    export(load_weights(files["mopro_fast"]), tmp_path / name, "torchvision", classifier)
    found = load_file(tmp_path / name) if name.endswith("safetensors") else checkpoint.read(tmp_path / name)
    encoder = small_model().encoder_q.state_dict()
    expected = {n for n in encoder if not n.startswith(("fc", "classifier"))}
    assert found.keys() == expected | ({"fc.weight", "fc.bias"} if classifier else set())
    assert all(torch.equal(found[n], encoder[n]) for n in expected)
    assert not classifier or torch.equal(found["fc.weight"], encoder["classifier.weight"])
    assert load_weights(tmp_path / name).num_classes == (5 if classifier else None)


def test_the_detectron2_pickle_has_its_names(files, tmp_path):
    export(load_weights(files["mopro_fast"]), tmp_path / "out.pkl", "detectron2")
    found = pickle.loads((tmp_path / "out.pkl").read_bytes())
    assert found["matching_heuristics"] is True
    model, encoder = found["model"], small_model().encoder_q
    for theirs, ours in {
        "stem.conv1.weight": encoder.conv1.weight,
        "stem.conv1.norm.running_var": encoder.bn1.running_var,
        "res3.0.shortcut.weight": encoder.layer2[0].downsample[0].weight,
        "res3.0.shortcut.norm.bias": encoder.layer2[0].downsample[1].bias,
        "res5.1.conv2.norm.weight": encoder.layer4[1].bn2.weight,
    }.items():
        assert (model[theirs] == ours.detach().numpy()).all()
    assert len(model) == len([n for n in encoder.state_dict() if not n.startswith(("fc", "classifier"))])


@pytest.mark.slow
def test_the_onnx_file_computes_the_same_on_any_size(files, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    export(load_weights(files["mopro_fast"]), tmp_path / "out.onnx", "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "out.onnx")
    encoder, _ = load_encoder(files["mopro_fast"], CPU)
    assert json.loads(session.get_modelmeta().custom_metadata_map["mean"])[0] == 0.485
    for shape in ((1, 3, 64, 64), (3, 3, 96, 80)):
        images = torch.rand(shape)
        features, logits = session.run(["features", "logits"], {"images": images.numpy()})
        with torch.no_grad():
            expected = encoder.features(images)
            torch.testing.assert_close(torch.from_numpy(features), expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(torch.from_numpy(logits), encoder.classifier(expected), rtol=1e-4, atol=1e-3)


@pytest.mark.medium
def test_exported_to_the_official_format_and_imported_a_training_goes_on_with_the_same_bits(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    for i in range(32):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(images / f"{i}.png")
    (images / "32.png").write_bytes(b"no image")  # left out by the training, so by its continuation
    (images / "list.txt").write_text("".join(f"{i}.png {i % 4}\n" for i in range(33)))
    c = killed_run.config(images / "list.txt", tmp_path / "whole")
    assert Trainer(task_of(c)).run() == 0
    after_one, finished = (
        tmp_path / "whole/checkpoints/step_000000004.pt",
        checkpoint.all_of(tmp_path / "whole/checkpoints"),
    )
    export(load_weights(after_one), tmp_path / "official.tar", "official")
    config = str(tmp_path / "whole/config.json")
    importing.main([str(tmp_path / "official.tar"), str(tmp_path / "ours.pt"), config])
    c.run.out, c.run.resume = str(tmp_path / "resumed"), str(tmp_path / "ours.pt")
    assert Trainer(task_of(c)).run() == 0
    a, b = (load_weights(p) for p in (finished[-1], tmp_path / "resumed"))  # of a folder the newest
    assert (a.epoch, b.epoch) == (2, 2) and digest(a.state) == digest(b.state)
    assert b.path.name == a.path.name
    c.optim.sgd, c.run.cuda_graph = "apex", False  # for another machine: none is needed to import
    (tmp_path / "apex.json").write_text(c.to_json())
    importing.main([str(tmp_path / "official.tar"), str(tmp_path / "apex.pt"), str(tmp_path / "apex.json")])
    c.mopro.queue_size = 32
    (tmp_path / "other.json").write_text(c.to_json())
    with pytest.raises(UserError, match="another architecture: queue is 64×8 there and 32×8"):
        importing.main([str(tmp_path / "official.tar"), str(tmp_path / "no.pt"), str(tmp_path / "other.json")])


def test_the_command_line(files, tmp_path, capsys):
    def status(*args) -> int:
        with pytest.raises(SystemExit) as caught:
            cli.main([str(a) for a in args])
        return caught.value.code

    assert status("export", files["official"], tmp_path / "o.pth", "--format", "timm", "--classifier", "False") == 0
    said = capsys.readouterr()
    assert "timm, resnet18 of width 0.125, 5 classes" in said.out and "width 0.125 multiplies" in said.err
    assert status("import", tmp_path / "o.pth", tmp_path / "ours.pt") == 0
    assert "no classes, from torchvision" in capsys.readouterr().out
    assert status("import", tmp_path / "o.pth") == 2 and status("export", tmp_path / "no", "x", "--format", "timm") == 2
    assert status("export", files["official"], tmp_path / "no/x", "--format", "timm") == 2
    assert capsys.readouterr().err.count("\n") == 3


@functools.cache
def torchvision_names(classifier: bool = True) -> dict[str, torch.Tensor]:
    names = {n: t for n, t in small_model().encoder_q.state_dict().items() if not n.startswith(("fc1", "fc2"))}
    return {n.replace("classifier", "fc"): t for n, t in names.items() if classifier or not n.startswith("classifier")}


def behind(prefix: str, state: dict) -> dict:
    return {prefix + name: t for name, t in state.items()}


@pytest.mark.parametrize("wrap", [
    lambda s: {"model": s, "optimizer": {}, "epoch": 3},
    lambda s: {"model_state_dict": s},
    lambda s: {"net": {"state_dict": s}, "best": np.float64(71.2), "count": np.int64(3), "is": np.bool_(True)},
    lambda s: {"state_dict": {"model": {"net": s}}, "args": argparse.Namespace(lr=np.float32(0.1))},
    lambda s: {"model": s, "model_ema": s},
    lambda s: {"weights": s},
], ids=["references", "model_state_dict", "net", "three", "ema", "another"])  # fmt: skip
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model.module.", "encoder."])
def test_a_resnet_is_found_in_entries_and_behind_prefixes(tmp_path, capsys, wrap, prefix):
    torch.save(wrap(behind(prefix, torchvision_names())), tmp_path / "other.pt")
    found, expected = load_weights(tmp_path / "other.pt"), small_model().encoder_q.state_dict()
    assert (found.kind, found.num_classes, found.note) == ("torchvision", 5, "")
    assert found.encoder().keys() == {n for n in expected if not n.startswith(("fc1", "fc2"))}
    assert all(torch.equal(t, expected[n]) for n, t in found.encoder().items())
    assert capsys.readouterr().err == ""


def test_the_head_of_mmpretrain_is_the_classifier(tmp_path, capsys):
    head = {"head.fc.weight": torch.rand(7, 64), "head.fc.bias": torch.rand(7), "neck.x": torch.rand(1)}
    torch.save({"state_dict": behind("backbone.", torchvision_names(False)) | head}, tmp_path / "mm.pt")
    found = load_weights(tmp_path / "mm.pt")
    assert found.num_classes == 7 and torch.equal(found.state["encoder_q.classifier.bias"], head["head.fc.bias"])
    assert capsys.readouterr().err == f"note: {tmp_path / 'mm.pt'}: not taken: neck.x\n"


@pytest.mark.parametrize("version", [1, 2])
def test_of_moco_the_query_encoder_is_taken(tmp_path, version):
    trunk = torchvision_names(False)
    if version == 1:
        heads = {"fc.weight": torch.rand(8, 64), "fc.bias": torch.rand(8)}
    else:
        heads = {"fc.0.weight": torch.rand(2048, 64), "fc.0.bias": torch.rand(2048)}
        heads |= {"fc.2.weight": torch.rand(8, 2048), "fc.2.bias": torch.rand(8)}
    state = behind("module.encoder_q.", trunk | heads) | behind("module.encoder_k.", trunk | heads)
    state |= {"module.queue": torch.rand(8, 32), "module.queue_ptr": torch.zeros(1, dtype=torch.int64)}
    torch.save({"epoch": 200, "arch": "resnet18", "state_dict": state}, tmp_path / "moco.pt")
    found = load_weights(tmp_path / "moco.pt")
    assert (found.kind, found.num_classes, found.epoch) == ("torchvision", None, 200)
    assert found.note.endswith(f"encoder_k.* ({len(trunk | heads)}), queue, queue_ptr")
    assert ("encoder_q.fc.weight" in found.note) == (version == 1)
    assert not any(name.startswith("encoder_k") or "queue" in name for name in found.state)
    names = found.encoder()
    if version == 2:
        assert torch.equal(names["fc1.weight"], heads["fc.0.weight"]) and found.model.embed_dim == 8
        assert torch.equal(names["fc2.bias"], heads["fc.2.bias"])
    else:
        assert not any(name.startswith("fc") for name in names)


@pytest.mark.parametrize("content, expected", [
    (lambda s: {"student": s, "teacher": behind("module.", s)}, "entries student, teacher: save one of them alone"),
    (lambda s: behind("backbone.", s) | behind("momentum.", s), "behind backbone. and momentum.: save one of them"),
    (lambda s: {"epoch": len(s), "optimizer": {}}, "it holds no ResNet: .*; its entries are epoch, optimizer"),
    (lambda s: {"model": s | {"conv1.zero_point": torch.zeros(3)}}, "conv1.zero_point is 3, expected absent: save a"),
    (lambda s: {"model": s | {"layer1.0.conv1.scale": 0.5}}, "layer1.0.conv1.scale is of type float, not a tensor"),
    (lambda s: {"model": s | {"module.conv1.weight": s["conv1.weight"]}}, "two tensors conv1.weight"),
    (lambda s: {"model": s | {"bn1.bias": s["bn1.bias"].to_sparse()}}, "bn1.bias is not a dense tensor"),
], ids=["entries", "prefixes", "none", "buffer", "number", "twice", "sparse"])  # fmt: skip
def test_what_is_refused_says_why(tmp_path, content, expected):
    torch.save(content(torchvision_names()), tmp_path / "other.pt")
    with pytest.raises(UserError, match=expected) as caught:
        load_weights(tmp_path / "other.pt")
    assert "\n" not in str(caught.value) and "other.pt" in str(caught.value)


@pytest.mark.parametrize("number", [np.float16(0.5), np.float32(0.5), np.float64(-2), np.int8(-3), np.uint64(2**63),
                                    np.bool_(True), np.dtype(">f8").type(3)])  # fmt: skip
def test_numbers_of_numpy_are_read_without_numpy(tmp_path, number):
    torch.save({"n": number}, tmp_path / "n.pt")
    found = checkpoint.read(tmp_path / "n.pt")["n"]
    assert found == number.item() and type(found) is type(number.item())


def test_a_file_of_numpy_1_and_what_no_number_is(tmp_path):
    torch.save({"n": 3, "of": np.float64(0.25)}, tmp_path / "n.pt", _use_new_zipfile_serialization=False)
    data = (tmp_path / "n.pt").read_bytes()
    assert b"numpy._core" in data or b"numpy.core" in data
    (tmp_path / "n.pt").write_bytes(data.replace(b"numpy._core", b"numpy.core"))
    assert checkpoint.read(tmp_path / "n.pt") == {"n": 3, "of": 0.25}
    torch.save({"text": np.str_("x"), "long": np.longdouble(1)}, tmp_path / "n.pt")
    assert checkpoint.read(tmp_path / "n.pt") == {"text": None, "long": None}
