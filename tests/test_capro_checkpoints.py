"""Checkpoints of CAPro: its official files in and out, this package's own, and what else takes them."""

import functools
from pathlib import Path

import capro_model
import every_command
import pytest
import torch
from downstream_data import config as demo_config

from mopro_fast import cli
from mopro_fast.checkpoints import state as checkpoint
from mopro_fast.checkpoints import weights
from mopro_fast.checkpoints.weights import load_weights
from mopro_fast.config import TrainConfig, recipe
from mopro_fast.downstream import importing
from mopro_fast.downstream.export import export, notes
from mopro_fast.errors import UserError
from mopro_fast.models.build import build
from mopro_fast.models.method import Method
from mopro_fast.models.resnet import LAYERS, BasicBlock

RECORD = Path(__file__).parents[2] / "shared/data/capro-record/record.pt"
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
TRAINED = 73  # parameters, with a momentum each


def small_config() -> TrainConfig:
    c = recipe("capro-webvision-vanilla")
    c.data.num_classes, c.data.image_size, c.mopro.queue_size, c.mopro.temperature = 5, 64, 24, 0.2
    c.model.arch, c.model.width, c.model.embed_dim = "resnet18", 0.125, 6
    return c


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return capro_model.trained_state(small_config())


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Path:
    return capro_model.write(tmp_path_factory.mktemp("ours") / "ours.pt", small_config())


def optimizer_of(names: list[str], shapes: dict[str, torch.Tensor]) -> dict:
    """torch.optim.SGD's state dict over these, with a momentum for what has a gradient in the official code."""
    parameters = [torch.zeros_like(shapes[f"module.{name}"]) for name in names]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-4)
    for name, p in zip(names, parameters, strict=True):
        if not name.startswith(("encoder_k", "relation")):
            optimizer.state[p]["momentum_buffer"] = torch.rand_like(p)
    return optimizer.state_dict()


def parameters_of(file: dict[str, torch.Tensor], layout: str) -> list[str]:
    """What their optimizer has: all, without the key encoder (as they unfreeze it), or the heads alone."""
    names = [n.removeprefix("module.") for n in file if not n.endswith(STATISTICS)]
    left = {"all": (), "unfrozen": ("encoder_k",), "frozen": ("encoder_k", "encoder_q")}[layout]
    return [n for n in names if not n.startswith(("queue", "prototypes", *left))]


def write_official(path: Path, state: dict[str, torch.Tensor], layout: str = "all", **changes) -> Path:
    file = capro_model.official(state) | changes
    found = {
        "epoch": 7,
        "arch": "resnet50",
        "state_dict": file,
        "optimizer": optimizer_of(parameters_of(file, layout), file),
    }
    torch.save(found | {"best_acc_web": [70.5, 88.0], "epoch_best_web": 6}, path)
    return path


def test_an_official_file_has_this_packages_names(state, ours, tmp_path):
    read = load_weights(write_official(tmp_path / "theirs.tar", state))
    assert (read.kind, read.capro, read.epoch, read.keys_updated, read.note) == ("capro", True, 7, False, "")
    assert (read.model.arch, read.model.width, read.model.embed_dim, read.num_classes) == ("resnet18", 0.125, 6, 5)
    assert read.state.keys() == state.keys() and all(torch.equal(t, state[n]) for n, t in read.state.items())
    own = load_weights(ours)
    assert own.kind == "mopro_fast" and own.capro and own.keys_updated
    assert all(torch.equal(t, state[n]) for n, t in own.state.items())


@pytest.mark.parametrize("layout", ["all", "unfrozen", "frozen"])
def test_momentum_is_mapped_in_every_layout(state, tmp_path, layout):
    path = write_official(tmp_path / "theirs.tar", state, layout)
    read, theirs = load_weights(path), checkpoint.read(path)
    names = parameters_of(theirs["state_dict"], layout)
    buffers = {
        n: theirs["optimizer"]["state"][i]["momentum_buffer"]
        for i, n in enumerate(names)
        if i in theirs["optimizer"]["state"]
    }
    model = build(small_config())
    (trained,) = model.trained()
    named = {id(p): n for n, p in model.named_parameters()}
    for i, p in enumerate(trained):
        name = functools.reduce(lambda n, pair: n.replace(*pair), capro_model.THEIRS.items(), named[id(p)])
        slot = read.optimizer["state"].get(i)
        assert (slot is None) == (layout == "frozen" and name.startswith("encoder_q")), name
        assert slot is None or torch.equal(slot["momentum_buffer"], buffers[name]), name
    torch.optim.SGD(trained, 0.1).load_state_dict(read.optimizer)
    # Back: in the layout of a run that unfreezes its encoder at this epoch.
    read.config = {"capro": {"unfreeze_epoch": {"all": 0, "unfrozen": 5, "frozen": "never"}[layout]}}
    export(read, tmp_path / "back.tar", "capro")
    back = checkpoint.read(tmp_path / "back.tar")["optimizer"]
    assert back["param_groups"][0]["params"] == theirs["optimizer"]["param_groups"][0]["params"]
    assert back["state"].keys() == theirs["optimizer"]["state"].keys()
    assert all(torch.equal(slot["momentum_buffer"], buffers[names[i]]) for i, slot in back["state"].items())


def test_an_optimizer_of_another_model_is_not_taken(state, tmp_path):
    found = checkpoint.read(write_official(tmp_path / "theirs.tar", state))
    found["optimizer"]["param_groups"][0]["params"].pop()
    torch.save(found, tmp_path / "short.tar")
    assert load_weights(tmp_path / "short.tar").optimizer is None


def test_a_round_trip_is_bit_for_bit(state, tmp_path):
    theirs = checkpoint.read(write_official(tmp_path / "theirs.tar", state))["state_dict"]
    export(load_weights(tmp_path / "theirs.tar"), tmp_path / "back.tar", "capro")
    back = checkpoint.read(tmp_path / "back.tar")
    assert (back["epoch"], back["arch"], back["best_acc_web"]) == (7, "resnet18", [0, 0])
    assert {n: t.shape for n, t in back["state_dict"].items()} == {n: t.shape for n, t in theirs.items()}
    unused = {n for n in theirs if n.startswith(("module.relation", "module.prototypes_"))}
    assert {n for n, t in theirs.items() if not torch.equal(t, back["state_dict"][n])} == unused
    again = load_weights(tmp_path / "back.tar")
    assert again.kind == "capro" and not again.keys_updated and again.state.keys() == state.keys()


def test_the_records_state_dict_comes_back(tmp_path, monkeypatch):
    if not RECORD.is_file():
        pytest.skip(f"{RECORD} is not there")
    monkeypatch.setitem(LAYERS, "record", (BasicBlock, (1, 1, 1, 1)))
    record = torch.load(RECORD, weights_only=True)
    for name in ("init", "final"):
        found = record["single1"][name]
        torch.save({"state_dict": {f"module.{n}": t for n, t in found.items()}, "epoch": 0}, tmp_path / f"{name}.tar")
        read = load_weights(tmp_path / f"{name}.tar")
        assert (
            read.capro and read.state["queue"].shape == (32, 16) and not read.state["encoder_q.classifier.bias"].any()
        )
        export(read, tmp_path / f"{name}.back.tar", "capro")
        back = checkpoint.read(tmp_path / f"{name}.back.tar")["state_dict"]
        assert {n: (t.shape, t.dtype) for n, t in back.items()} == {
            f"module.{n}": (t.shape, t.dtype) for n, t in found.items()
        }
        used = [n for n in found if not n.startswith(("relation", "prototypes_"))]
        assert all(torch.equal(back[f"module.{n}"], found[n]) for n in used)
    multi = {f"module.{n}": t for n, t in record["multi1"]["init"].items()}
    torch.save({"state_dict": multi}, tmp_path / "multi.tar")
    with pytest.raises(UserError, match="multi-label"):
        load_weights(tmp_path / "multi.tar")


def test_files_that_are_refused(state, tmp_path):
    def refusal(path: Path) -> str:
        with pytest.raises(UserError) as caught:
            load_weights(path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    path, short = tmp_path / "x.tar", torch.zeros(3, 3)
    found = write_official(path, state, **{"module.projection_class.0.0.weight": short})
    assert "multi-label checkpoint of CAPro (NUS-WIDE), which is not supported yet" in refusal(found)
    write_official(path, state, **{"module.projection_back.2.weight": short})
    assert "reconstruction.2.weight is 3×3, expected 64×2048" in refusal(path)
    write_official(path, state, **{"module.classifier_projection.fc.weight": short})
    assert "auxiliary.weight is 3×3, expected 5×6" in refusal(path)
    write_official(path, state, **{"module.classifier.fc.weight": torch.tensor(1.0)})
    assert "no checkpoint that this package knows" in refusal(path)
    write_official(path, state, **{"module.encoder_k.fc1.bias": short})
    assert "encoder_k.fc1.bias is 3×3, expected absent" in refusal(path)
    torch.save({"model": {n: t for n, t in state.items() if "reconstruction.0" not in n}, "config": "{}"}, path)
    assert "reconstruction.0.weight is absent, expected 2048×6" in refusal(path)


def fresh() -> Method:
    torch.manual_seed(1)
    return build(second_stage())


def second_stage() -> TrainConfig:
    c = small_config()
    c.capro.init_proto = 1
    return c


@pytest.mark.parametrize("kind", ["ours", "official", "safetensors"])
def test_a_training_begins_from_all_of_it(state, ours, tmp_path, kind):
    path = ours if kind == "ours" else tmp_path / "x.safetensors"
    if kind == "official":
        path = write_official(tmp_path / "theirs.tar", state)
    elif kind == "safetensors":
        export(load_weights(ours), path, "safetensors")
    model = fresh()
    weights.initialise(model, path)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


def test_the_vanilla_stage_takes_no_prototypes(state, ours):
    model = build(small_config())
    weights.initialise(model, ours)
    assert not model.prototypes.any()
    assert torch.equal(model.queue, state["queue"])


def mopro_file(path: Path, classes: list[str] | None = None) -> dict[str, torch.Tensor]:
    c = small_config()
    c.method = "mopro"
    torch.manual_seed(2)
    state = build(c).state_dict()
    torch.save({"model": state, "config": c.to_json(), "classes": classes}, path)
    return state


def test_a_training_begins_from_a_file_of_mopro(tmp_path, capsys):
    mopro = mopro_file(tmp_path / "mopro.pt")
    assert mopro["encoder_q.classifier.bias"].any()
    model, before = fresh(), fresh().state_dict()
    weights.initialise(model, tmp_path / "mopro.pt")
    assert "its classifier's bias is not taken" in capsys.readouterr().err
    for name, t in model.state_dict().items():
        if name == "encoder_q.classifier.bias":
            assert not t.any()
        else:
            assert torch.equal(t, before[name] if name.startswith(("reconstruction", "auxiliary")) else mopro[name])


def test_a_training_begins_from_an_encoder_alone(state, ours, tmp_path):
    export(load_weights(ours), tmp_path / "trunk.pt", "timm", classifier=False)
    model, before = fresh(), fresh().state_dict()
    weights.initialise(model, tmp_path / "trunk.pt")
    for name, t in model.state_dict().items():
        trunk = name.startswith("encoder") and not name.startswith(("encoder_q.classifier", "encoder_q.fc"))
        assert torch.equal(t, state[name.replace("encoder_k", "encoder_q")] if trunk else before[name]), name


def test_other_classes_and_another_queue_are_not_taken(state, tmp_path):
    c = second_stage()
    state = state | {"queue_ptr": torch.tensor([9])}
    torch.save({"model": state, "config": c.to_json(), "classes": list("abcde")}, tmp_path / "x.pt")
    c.mopro.queue_size = 8
    model = build(c)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    weights.initialise(model, tmp_path / "x.pt", list("vwxyz"))
    kept = {n for n, t in model.state_dict().items() if not torch.equal(t, state[n]) or "classifier.bias" in n}
    own = {"queue", "queue_ptr", "prototypes", "auxiliary.weight", "encoder_q.classifier.weight"}
    assert kept == own | {"encoder_q.classifier.bias"}
    assert all(torch.equal(model.state_dict()[n], before[n]) for n in own)


def test_imported_it_is_a_checkpoint_of_capro(state, tmp_path, capsys):
    write_official(tmp_path / "theirs.tar", state)
    assert importing.main([str(tmp_path / "theirs.tar"), str(tmp_path / "ours.pt")]) == 0
    assert "5 classes, 7 epochs done, from capro" in capsys.readouterr().out
    read = load_weights(tmp_path / "ours.pt")
    assert (read.kind, read.config["method"], read.config["mopro"]["queue_size"]) == ("mopro_fast", "capro", 24)
    assert read.config["mopro"]["threshold"] == 0.6 and read.epoch == 7 and len(read.optimizer["state"]) == TRAINED
    for name, t in read.state.items():
        if name.startswith("encoder_k") and not name.endswith(STATISTICS):  # the average that theirs takes next
            t, expected = t, 0.999 * state[name] + 0.001 * state[name.replace("encoder_k", "encoder_q")]
            torch.testing.assert_close(t, expected, msg=name)
        else:
            assert torch.equal(t, state[name]), name


def test_a_training_goes_on_from_an_official_file(state, tmp_path):
    every_command.write_inputs(tmp_path)
    write_official(tmp_path / "theirs.tar", state)
    options = f"capro-webvision-vanilla --data {tmp_path / 'data'} --num-classes 5 --image-size 64 --queue-size 24"
    options += " --arch resnet18 --width 0.125 --embed-dim 6 --batch-size 6 --keep-classes 5 --threads 1"
    assert importing.main([str(tmp_path / "theirs.tar"), str(tmp_path / "ours.pt"), *options.split()]) == 0
    read = checkpoint.load(tmp_path / "ours.pt")
    assert read.epoch == 7 and read.model.keys() == state.keys() and len(read.optimizer["state"]) == TRAINED
    assert read.optimizer["param_groups"][0]["params"] == list(range(TRAINED))
    model = build(small_config())
    model.load_state_dict(read.model)
    torch.optim.SGD(*model.trained(), lr=0.1).load_state_dict(read.optimizer)
    mine = build(small_config())
    assert {n: t.shape for n, t in model.state_dict().items()} == {n: t.shape for n, t in mine.state_dict().items()}
    assert [[p.shape for p in m.trained()[0]] for m in (model, mine)] == [[p.shape for p in mine.trained()[0]]] * 2


def test_every_format_of_an_export(state, ours, tmp_path):
    own = load_weights(ours)
    with pytest.raises(UserError, match="set --format capro"):
        export(own, tmp_path / "x.tar", "official")
    assert not (tmp_path / "x.tar").exists()
    for format in ("torchvision", "detectron2"):
        export(own, tmp_path / format, format)
    plain = load_weights(tmp_path / "torchvision").state
    assert not plain["encoder_q.classifier.bias"].any() and "reconstruction.0.bias" not in plain
    export(own, tmp_path / "x.safetensors", "safetensors")
    again = load_weights(tmp_path / "x.safetensors")
    assert again.capro and again.kind == "safetensors" and again.config["method"] == "capro"
    assert all(torch.equal(t, state[n]) for n, t in again.state.items())
    export(own, tmp_path / "x.tar", "capro")
    theirs = checkpoint.read(tmp_path / "x.tar")
    assert theirs["epoch"] == 3 and (theirs["state_dict"]["module.prototypes_density"] == 0.2).all()
    assert [*notes(own, "capro")] == ["resnet18: the official code of CAPro has ResNet-50s, and does not load this"]


def test_what_is_no_model_of_capro_is_refused_or_told(state, tmp_path):
    mopro_file(tmp_path / "mopro.pt")
    with pytest.raises(UserError, match="CAPro's classifier has no bias"):
        export(load_weights(tmp_path / "mopro.pt"), tmp_path / "x.tar", "capro")
    retrained = {n: t for n, t in state.items() if n.startswith("encoder_q.")}
    torch.save({"model": retrained, "config": small_config().to_json()}, tmp_path / "retrained.pt")
    read = load_weights(tmp_path / "retrained.pt")
    export(read, tmp_path / "x.tar", "capro")
    lacks = "projection_back, classifier_projection, encoder_k, queue, prototypes: not in this checkpoint"
    assert any(note.startswith(lacks) for note in notes(read, "capro"))
    again = load_weights(tmp_path / "x.tar")
    assert again.kind == "capro" and not again.capro
    assert again.state.keys() == retrained.keys() and all(torch.equal(t, retrained[n]) for n, t in again.state.items())


@pytest.mark.medium
def test_every_command_takes_a_checkpoint_of_capro(tmp_path):
    every_command.write_inputs(tmp_path)
    c = demo_config()
    c.method = "capro"
    capro_model.write(tmp_path / "c.pt", c)
    for command in ("eval", "lowshot", "probe", "finetune", "retrain", "clean"):
        with pytest.raises(SystemExit) as ended:
            cli.main(every_command.arguments(command, tmp_path, tmp_path / f"out-{command}"))
        assert ended.value.code == 0, command
    for folder in ("out-finetune", "out-retrain"):
        (newest,) = checkpoint.all_of(tmp_path / folder / "checkpoints")[-1:]
        before, after = load_weights(tmp_path / "c.pt").state, load_weights(newest).state
        assert all(n.startswith("encoder_q.") for n in after)
        moved = {n for n, t in after.items() if not torch.equal(t, before[n])}
        assert "encoder_q.classifier.weight" in moved and not any(".fc" in n for n in moved)
        if folder == "out-retrain":
            assert all(n.endswith(STATISTICS) or n == "encoder_q.classifier.weight" for n in moved)
            assert "encoder_q.bn1.running_mean" in moved
