"""The tools after training on two ranks: what one rank writes. All in one start of the processes, which costs most."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from downstream_data import CLASSES, write_checkpoint, write_folders
from processes import on_ranks

from mopro_fast import cli
from mopro_fast.checkpoints import state as checkpoint
from mopro_fast.checkpoints.weights import load_weights
from mopro_fast.data.index import load_index
from mopro_fast.downstream import clean as cleaning
from mopro_fast.downstream import probe, row_map
from mopro_fast.downstream.clean import OFFICIAL, TABLE, Clean, clean
from mopro_fast.downstream.features import EncoderConfig, Frozen
from mopro_fast.downstream.retrain import Retrain, RetrainTask
from mopro_fast.training.loop import Trainer

pytestmark = [pytest.mark.ranks, pytest.mark.medium]

EACH, BROKEN = 25, "n02/7.png"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With what two ranks and then one rank wrote."""
    folder = tmp_path_factory.mktemp("ranks")
    state = torch.load(write_checkpoint(folder / "c.pt"), weights_only=True)
    state["model"]["encoder_q.classifier.weight"].mul_(60)  # sure of some images
    state["model"]["prototypes"] = F.normalize(torch.randn(len(CLASSES), state["model"]["prototypes"].shape[1]), dim=1)
    torch.save(state, folder / "c.pt")
    write_folders(folder / "data", {"train": EACH, "val": 3})
    (folder / "data" / "train" / BROKEN).write_bytes(b"no image")

    with pytest.MonkeyPatch.context() as patch:
        write, written = row_map._write_part, []

        def dies(*args) -> None:
            if len(written) == 16:
                raise KeyboardInterrupt
            written.append(write(*args))

        patch.setattr(row_map, "_SAVE_EVERY", 0)  # a part is a batch
        patch.setattr(row_map, "_write_part", dies)
        with pytest.raises(KeyboardInterrupt):
            clean(options(folder, folder / "begun"))
    for ranks in (2, 1):
        on_ranks(ranks, work, folder, folder / f"of {ranks}")
    return folder


def options(folder: Path, out: Path) -> Clean:
    encoder = EncoderConfig(batch_size=4, device="cpu")
    return Clean(str(folder / "c.pt"), str(folder / "data"), str(out), alpha=0.8, encoder=encoder)


def work(rank: int, ranks: int, folder: Path, out: Path) -> None:
    score, scored = cleaning.score, []
    cleaning.score = lambda frozen, prototypes, images, *rest: (
        scored.append(len(images)) or score(frozen, prototypes, images, *rest)
    )
    for target in (out / "clean", folder / "begun"):
        clean(options(folder, target))
    cleaning.score = score
    # Groups of 64, 64 and 22 rows, the broken image in the first: 16, 16 and 6 batches, which ranks take in turn. The
    # begun cleaning lacks the last 22 of them, then none.
    expected = {1: [149], 2: [19 * 4 + 11 * 4, 17 * 4 + 3 + 2 + 10 * 4 + 2]}
    assert sum(scored) == expected[ranks][rank]

    shown = []
    frozen = Frozen(str(folder / "c.pt"), EncoderConfig(batch_size=8, device="cpu"), out / "features")
    encode = frozen.encoder.features
    frozen.encoder.features = lambda images: shown.append(len(images)) or encode(images)
    frozen.features(load_index(folder / "data", "val", num_classes=None), "set")
    assert shown == ([8, 8, 2] if ranks == 1 else [[8, 2], [8]][rank])

    c = Retrain(cleaned=str(out / "clean"))
    c.data.path, c.data.num_classes, c.data.image_size, c.data.eval_resize = str(folder / "data"), len(CLASSES), 16, 16
    c.data.threads, c.optim.epochs, c.optim.batch_size, c.optim.lr = 1, 2, 8, 0.1
    c.run.out, c.run.device, c.run.tensorboard = str(out / "retrain"), "cpu", False
    assert Trainer(RetrainTask(c, load_weights(folder / "c.pt"))).run() == 0

    fit = probe.fit

    def noted(rows, classes, lam, *rest):
        with (out / f"fitted by {rank}").open("a") as file:
            file.write(f"{lam:g} ")
        return fit(rows, classes, lam, *rest)

    probe.fit = noted
    try:
        command = ["probe", folder / "c.pt", "--data", folder / "data", "--out", out / "probe", "--device", "cpu"]
        command += ["--lambdas", 0.001, 0.01, 0.1, "--steps", 4, "--evaluate-every", 2]
        assert cli._run([str(word) for word in command]) == 0
    finally:
        probe.fit = fit


def files(out: Path) -> tuple[bytes, bytes]:
    return (out / TABLE).read_bytes(), (out / OFFICIAL).read_bytes()


def test_cleaning_has_the_same_bytes_and_goes_on_where_one_rank_stopped(folder):
    expected = files(folder / "of 1" / "clean")
    assert files(folder / "of 2" / "clean") == expected == files(folder / "begun")
    totals = json.loads((folder / "begun" / "clean.json").read_text())["totals"]
    assert sum(totals.values()) == EACH * len(CLASSES) and totals["unreadable"] == 1
    assert min(totals[v] for v in ("kept", "relabelled", "removed")) >= 10, totals


def test_features_have_the_same_bytes(folder):
    one, two = (list((folder / f"of {ranks}" / "features").iterdir()) for ranks in (1, 2))
    assert [p.name for p in one] == [p.name for p in two] and one[0].read_bytes() == two[0].read_bytes()


def test_the_same_classifier_is_trained(folder):
    one, two = (
        checkpoint.load(checkpoint.all_of(folder / f"of {ranks}" / "retrain" / "checkpoints")[-1]).model
        for ranks in (1, 2)
    )
    name = "encoder_q.classifier.weight"
    before = load_weights(folder / "c.pt").state[name]
    torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)
    assert (one[name] - before).abs().max() > 100 * (one[name] - two[name]).abs().max()


def test_ranks_share_the_lambdas_of_the_probe(folder):
    shares = [(folder / "of 2" / f"fitted by {rank}").read_text() for rank in (0, 1)]
    assert shares == ["0.001 0.1 ", "0.01 "]
    one, two = ((folder / f"of {ranks}" / "probe" / "probe.json").read_text() for ranks in (1, 2))
    assert one == two and len(json.loads(one)["lambdas"]) == 3
