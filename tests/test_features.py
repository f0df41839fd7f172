"""A frozen encoder's outputs: those of the plain computation, whoever computes them and however often interrupted."""

import dataclasses

import numpy as np
import pytest
import torch
from downstream_data import SIDE, write_checkpoint, write_folders
from PIL import Image

from mopro_fast import ops
from mopro_fast.data.index import load_index
from mopro_fast.data.pipeline import EvalLoader
from mopro_fast.downstream import image_map, row_map
from mopro_fast.downstream.features import EncoderConfig, Frozen
from mopro_fast.downstream.image_map import compute
from mopro_fast.errors import UserError

OPTIONS = dict(batch_size=8, image_size=SIDE, resize=SIDE, device=torch.device("cpu"), threads=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    write_checkpoint(folder / "c.pt")
    write_folders(folder / "data", {"": 5})
    return folder


@pytest.fixture(scope="module")
def index(folder):
    return load_index(folder / "data", "val", num_classes=None)


def pixels(index) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.array(Image.open(index.full_path(i)))) for i in index.ids])


def sums(images, _labels=None):
    """Three numbers of every image, exact in float32."""
    return images.sum((1, 2)).float()


def frozen(folder, out="kept", **changes):
    return Frozen(str(folder / "c.pt"), EncoderConfig(batch_size=8, device="cpu", **changes), folder / out)


def test_features_are_those_of_the_encoder(folder, index):
    judge = frozen(folder)
    found = judge.features(index, "set")
    with torch.no_grad():
        expected = judge.encoder.features(ops.normalize(pixels(index)))
    assert found.shape == (30, judge.encoder.feature_dim) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_the_cubic_filter_is_pillows(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 57, 3), np.uint8))
    (tmp_path / "c").mkdir()
    image.save(tmp_path / "c" / "0.png")
    index = load_index(tmp_path, "val", num_classes=None)
    resized = image.resize((22, SIDE), Image.Resampling.BICUBIC)  # int(57·16/40)
    expected = np.asarray(resized.crop((3, 0, 3 + SIDE, SIDE))).astype(int)
    gaps = {}
    for filter in ("cubic", "linear"):
        ((images, _, _),) = EvalLoader(index, rank=0, world_size=1, filter=filter, **OPTIONS)
        gaps[filter] = np.abs(images[0].numpy() - expected).mean()
    assert gaps["cubic"] < 1 < 3 < gaps["linear"], gaps  # levels of 256, in an image of noise


def test_what_is_there_is_not_computed_again(folder, index, monkeypatch):
    first = frozen(folder).features(index, "set")
    monkeypatch.setattr(image_map, "EvalLoader", None)
    assert np.array_equal(frozen(folder).features(index, "set"), first)
    for changes in ({"image_size": 8, "eval_resize": 16}, {"precision": "bf16"}, {"eval_resize": 20}):
        with pytest.raises(TypeError):  # other settings, another file
            frozen(folder, **changes).features(index, "set")
    judge = frozen(folder)
    with torch.no_grad():
        judge.encoder.classifier.weight += 1
    judge.features(index, "set")  # the classifier is no part of it
    with torch.no_grad():
        judge.encoder.conv1.weight += 1
    with pytest.raises(TypeError):
        judge.features(index, "set")
    relabelled = dataclasses.replace(index, paths=index.paths[::-1])
    with pytest.raises(TypeError):
        frozen(folder).features(relabelled, "set")


def test_interrupted_it_goes_on(tmp_path, index, monkeypatch):
    monkeypatch.setattr(row_map, "_SAVE_EVERY", 0)
    path, shown = tmp_path / "x.npy", []

    def step(images, _labels):
        if len(shown) == 2:
            raise MemoryError
        shown.append(len(images))
        return sums(images)

    with pytest.raises(MemoryError):
        compute(index, path, step, 3, OPTIONS)
    assert not path.exists() and shown == [8, 8]

    def rest(images, _labels):
        shown.append(len(images))
        return sums(images)

    found = compute(index, path, rest, 3, OPTIONS)
    assert sum(shown) == 30 and np.array_equal(found, sums(pixels(index)))
    assert [p.name for p in tmp_path.iterdir()] == ["x.npy"]


def test_the_file_is_that_of_numpy_wherever_its_parts_begin(tmp_path, index, monkeypatch):
    monkeypatch.setattr(row_map, "_SAVE_EVERY", 0)
    monkeypatch.setattr(row_map, "_PIECE", 50)  # four rows
    rows = np.delete(index.ids, [0, 4, 17, 18]).astype(np.int32)
    compute(index, tmp_path / "x.npy", sums, 3, OPTIONS, [rows[i::4] for i in range(4)])
    expected = np.full((30, 3), np.nan, np.float32)
    expected[rows] = sums(pixels(index))[rows]
    np.save(tmp_path / "y.npy", expected)
    assert (tmp_path / "x.npy").read_bytes() == (tmp_path / "y.npy").read_bytes()


def test_broken_images_are_left_out_and_named(tmp_path, folder, capsys):
    write_folders(tmp_path / "data", {"": 2})
    broken = tmp_path / "data" / "n02" / "1.png"
    broken.write_bytes(broken.read_bytes()[:20])
    index = load_index(tmp_path / "data", "val", num_classes=None)
    found = frozen(folder, tmp_path / "kept").features(index, "set")
    assert np.isnan(found).any(1).nonzero()[0].tolist() == [3]
    assert "n02/1.png" in capsys.readouterr().err
    # One that breaks between the check and its turn.
    found = compute(index, tmp_path / "y.npy", sums, 3, OPTIONS)
    assert np.isnan(found).all(1).nonzero()[0].tolist() == [3]
    assert f"remove {tmp_path / 'y.npy'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "margin, changes, resize", [(None, {}, SIDE), (None, {"image_size": 28}, 32), (1, {"image_size": 28}, 28)]
)
def test_the_shorter_side_before_the_crop(folder, tmp_path, margin, changes, resize):
    config = EncoderConfig(device="cpu", **changes)
    assert Frozen(str(folder / "c.pt"), config, tmp_path, margin=margin).loader_options["resize"] == resize


def test_two_at_a_time_are_refused(tmp_path, index):
    with row_map.locked(tmp_path / "x.npy"), pytest.raises(UserError, match=r"another process computes .*x\.npy"):
        compute(index, tmp_path / "x.npy", sums, 3, OPTIONS)


def test_the_size_must_be_known(tmp_path):
    from downstream_data import config

    from mopro_fast.models.build import build_encoder

    torch.save(build_encoder(config()).state_dict(), tmp_path / "bare.pt")
    with pytest.raises(UserError, match="--image-size"):
        Frozen(str(tmp_path / "bare.pt"), EncoderConfig(device="cpu"), tmp_path)


@pytest.mark.parametrize("option, least", [("image_size", 1), ("eval_resize", 1), ("batch_size", 1), ("threads", 0)])
def test_options_that_cannot_be_right_are_refused(folder, tmp_path, option, least):
    config = EncoderConfig(device="cpu", **{option: least - 1})
    with pytest.raises(UserError, match=f"--{option.replace('_', '-')} must be at least {least}, got {least - 1}"):
        Frozen(str(folder / "c.pt"), config, tmp_path)
