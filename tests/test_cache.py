"""The loaders with all images on the device, against pipeline.py's, on JPEGs made here."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from odd_images import examined
from PIL import Image

from mopro_fast import ops
from mopro_fast.config import AugmentConfig, recipe
from mopro_fast.data import cache, inputs
from mopro_fast.data.cache import DeviceEvalLoader, DeviceTrainLoader
from mopro_fast.data.decode import DecodeError
from mopro_fast.data.index import load_index
from mopro_fast.data.pipeline import EvalLoader, TrainLoader
from mopro_fast.errors import UserError
from mopro_fast.ops.colour import color_jitter

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PLAIN = AugmentConfig(grayscale=0, brightness=0, contrast=0, saturation=0, hue=0)
SHAPES = [(40, 56), (61, 30), (33, 33), (24, 120), (100, 21), (48, 64), (57, 50), (1, 1), (3, 90), (35, 47), (64, 64)]


def save(path, i):
    """A JPEG: waves and noise, another in every image; one in four is stored lying on its side."""
    height, width = SHAPES[i % len(SHAPES)]
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / (5 + c) + i) + np.cos(y / (4 + i % 3) - c) for c in range(3)]
    noise = np.random.default_rng(i).normal(0, 9, (height, width, 3))
    pixels = (127 + 55 * np.stack(waves, axis=2) + noise).clip(0, 255).astype(np.uint8)
    exif = Image.Exif()
    if i % 4 == 3:
        exif[0x0112] = 6
    Image.fromarray(pixels).save(path, quality=92, subsampling=2 * (i % 2), exif=exif)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """37 JPEGs; labels of 4 classes and none."""
    root = tmp_path_factory.mktemp("images")
    for i in range(37):
        save(root / f"{i}.jpg", i)
    (root / "list.txt").write_text("".join(f"{i}.jpg {i % 5 - 1}\n" for i in range(37)))
    return root


@pytest.fixture(scope="module")
def index(folder):
    return examined(load_index(folder / "list.txt", "train", num_classes=4))


def arguments(**changes):
    given = dict(batch_size=8, rank=0, world_size=1, seed=0, image_size=32, augment=AugmentConfig())
    return {**given, "device": DEVICE, "threads": 2, **changes}


def on_device(index, **changes):
    return DeviceTrainLoader(index, **arguments(**changes))


def equal(a, b):
    return all(x is y is None or torch.equal(x, y) for x, y in zip(a, b, strict=True))


def differences(a, b):
    return (a.int() - b.int()).abs()


def test_view_k_has_areas_of_its_own(index):
    augments = [
        AugmentConfig(**{**vars(PLAIN), **scales})
        for scales in ({"scale": (0.8, 1), "scale_k": (0.1, 0.3)}, {"scale": (0.1, 0.3)}, {"scale": (0.8, 1)})
    ]
    for a, b, c in zip(*(on_device(index, augment=augment).epoch(0) for augment in augments), strict=True):
        assert torch.equal(a.view_k, b.view_k) and torch.equal(a.view_q, c.view_q)
        assert not torch.equal(a.view_k, c.view_k) and not torch.equal(a.view_q, b.view_q)


def test_a_whole_epoch_is_that_of_the_pipeline_on_any_number_of_ranks(index):
    """37 images in batches of 8: each is real once, the first 3 come again. Broken ones are replaced as ever."""
    theirs = list(TrainLoader(index, **arguments(augment=PLAIN, crop_in_dali=False, whole=True)).epoch(0))
    ours = list(on_device(index, augment=PLAIN, whole=True).epoch(0))
    halves = [on_device(index, augment=PLAIN, whole=True, batch_size=4, world_size=2, rank=r) for r in (0, 1)]
    assert len(ours) == len(theirs) == 5
    for a, b, *parts in zip(ours, theirs, *(half.epoch(0) for half in halves), strict=True):
        assert equal(a[2:], b[2:]) and differences(a.view_q, b.view_q).max() <= 1
        assert equal(a, [torch.cat(pair) for pair in zip(*parts, strict=True)])
    ids = torch.cat([batch.ids for batch in ours]).tolist()
    assert sorted(ids[:37]) == list(range(37)) and ids[37:] == ids[:3]
    assert on_device(index, batch_size=40, whole=True).steps_per_epoch == 1


@pytest.mark.parametrize("kept", ["no", "device"])
def test_the_loader_of_a_run_can_be_whole(index, kept):
    c = recipe("demo")
    c.data.cache, c.data.threads, c.optim.batch_size = kept, 2, 74
    loader = inputs.train_loader(c, index, DEVICE, two_views=False, whole=True)
    assert isinstance(loader, DeviceTrainLoader if kept == "device" else TrainLoader)
    (batch,) = loader.epoch(0)
    assert sorted(batch.ids.tolist()) == sorted(2 * list(range(37)))
    loader.close()
    with pytest.raises(UserError, match="batch larger than the data"):
        inputs.train_loader(c, index, DEVICE, two_views=False)


def test_images_labels_and_boxes_are_those_of_the_pipeline(index):
    """On a CPU the pipeline's resize rounds to 8 bits between its passes, as Pillow's does.

    Measured on 400 photographs of 112 px, without colours, of all values: 17 % differ, by 1. With colours the largest
    difference is 13 levels, the mean 0.2: hue has steps of several levels.
    """
    ours, theirs = on_device(index, augment=PLAIN), TrainLoader(index, **arguments(augment=PLAIN, crop_in_dali=False))
    assert ours.steps_per_epoch == theirs.steps_per_epoch == 4
    for epoch in (0, 1):
        for a, b in zip(ours.epoch(epoch), theirs.epoch(epoch), strict=True):
            assert equal(a[2:], b[2:]) and a.labels.dtype == a.ids.dtype == torch.int64
            for x, y in zip(a[:2], b[:2], strict=True):
                assert x.shape == (8, 32, 32, 3) and x.dtype == torch.uint8 and x.is_contiguous()
                assert differences(x, y).max() <= 1 and differences(x, y).float().mean() < 0.3
    theirs.close()


def test_pixels_equal_those_resized_by_dali_inside_the_crop(index):
    """DALI's filter sees the pixels beyond a crop's border. Measured as above: of all values 2 % differ, 0.7 % by more
    than 2, at most 41; further inside 0.03 %, by 1."""
    ours, theirs = on_device(index, augment=PLAIN), TrainLoader(index, **arguments(augment=PLAIN, crop_in_dali=True))
    inner = []
    for a, b in zip(ours.epoch(0), theirs.epoch(0), strict=True):
        for x, y, image_is_small in (
            (x, y, i % 11 in (7, 8)) for i, x, y in zip(a.ids, a.view_q, b.view_q, strict=True)
        ):
            if not image_is_small:
                inner.append(differences(x, y)[8:-8, 8:-8])
    inner = torch.stack(inner)
    assert inner.max() <= 1 and inner.float().mean() < 0.01
    theirs.close()


def test_colours_of_view_k_alone_change(index):
    plain, coloured = on_device(index, augment=PLAIN), on_device(index)
    for step, (a, b) in enumerate(zip(plain.epoch(0), coloured.epoch(0), strict=True)):
        assert torch.equal(a.view_q, b.view_q)
        assert torch.equal(color_jitter(a.view_k.cpu(), coloured._draw(0, step).jitter), b.view_k.cpu())


def test_one_view(index):
    batch = next(on_device(index, two_views=False).epoch(0))
    assert batch.view_k is None and torch.equal(batch.view_q, next(on_device(index).epoch(0)).view_q)


def test_resume_is_exact_at_every_step_also_after_close(index):
    train = on_device(index)
    whole = {(e, s): batch for e in (0, 1) for s, batch in enumerate(train.epoch(e))}
    again = on_device(index)
    for epoch, start in ((1, 2), (0, 3), (1, 0), (0, 0)):
        batches = list(again.epoch(epoch, start))
        assert len(batches) == 4 - start
        assert all(equal(batch, whole[epoch, start + i]) for i, batch in enumerate(batches))
        again.close()


def test_ranks_share_the_batch_of_one_rank(index):
    two = [on_device(index, batch_size=4, world_size=2, rank=rank) for rank in (0, 1)]
    halves = zip(*(part.epoch(1) for part in two), strict=True)
    for batch, parts in zip(on_device(index).epoch(1), halves, strict=True):
        assert equal(batch, [torch.cat(pair) for pair in zip(*parts, strict=True)])


@pytest.mark.medium
@pytest.mark.skipif(DEVICE.type == "cuda", reason="the backend of this device anyway")
def test_triton_makes_the_same_batch(index):
    small = {"batch_size": 4, "image_size": 8}
    expected = next(on_device(index, **small).epoch(0))
    with ops.use_backend("triton"):
        assert equal(next(on_device(index, **small).epoch(0)), expected)


def test_a_broken_image_is_replaced_as_by_the_pipeline(tmp_path):
    for i in range(23):
        save(tmp_path / f"{i}.jpg", i + 1)
    (tmp_path / "5.jpg").write_bytes(b"<html></html>" * 20)
    (tmp_path / "list.txt").write_text("".join(f"{i}.jpg 0\n" for i in range(23)))
    index = load_index(tmp_path / "list.txt", "train", num_classes=1)
    (tmp_path / "9.jpg").unlink()
    ours, theirs = on_device(index, batch_size=5), TrainLoader(index, **arguments(batch_size=5))
    for epoch in (0, 1, 1):
        a, b = ([batch.ids.tolist() for batch in loader.epoch(epoch)] for loader in (ours, theirs))
        assert a == b and not {5, 9} & {i for ids in a for i in ids}
    found = [(epoch, step, lost.row, lost.by) for epoch, step, lost in ours.lost]
    assert found == [(epoch, step, lost.row, lost.by) for epoch, step, lost in theirs.lost]
    assert {row for _, _, row, _ in found} == {5, 9} and all(lost.reason for _, _, lost in ours.lost)
    ours.close()
    (tmp_path / "2.jpg").unlink()
    assert 2 not in [i for batch in ours.epoch(0) for i in batch.ids.tolist()]  # decoded anew
    theirs.close()


def test_an_image_that_is_not_as_large_as_its_header_says(index, monkeypatch):
    shapes = cache._shapes(index, index.usable, 2)
    shapes[3] -= 1
    monkeypatch.setattr(cache, "_shapes", lambda *_: shapes)
    train = on_device(index, batch_size=37)
    batch = next(train.epoch(0))
    assert 3 not in batch.ids.tolist() and "that its header names" in train.lost[0][2].reason


def test_nothing_readable(index, monkeypatch):
    monkeypatch.setattr(cache.decode, "decode", lambda _: (_ for _ in ()).throw(DecodeError("No such device")))
    with pytest.raises(UserError, match=r"cannot read .*jpg \(No such device\), nor any of 25 images"):
        next(on_device(index).epoch(0))


def test_more_than_fits(index, monkeypatch):
    needed = 3 * sum(h * w for h, w in (SHAPES[i % len(SHAPES)] for i in range(37)))
    assert needed == len(on_device(index)._pixels)
    monkeypatch.setattr(cache, "_free", lambda _: needed - 1)
    monkeypatch.setattr(cache, "decoded", None)  # it is known before
    expected = f"needs {needed} bytes for 37 images, {DEVICE} has {needed - 1} free.*--size.*, or use --cache no$"
    with pytest.raises(UserError, match=expected):
        on_device(index)
    with pytest.raises(UserError, match=f"needs {3 * 37 * 300**2} bytes for 37 images"):
        eval_on_device(index, image_size=300, resize=300)


def test_what_is_decoded_ahead_is_bounded(index, monkeypatch):
    """However slow the device: it also bounds how long an interruption takes."""
    monkeypatch.setattr(cache, "_CHUNK", 5)
    begun = []
    images = cache.decoded(index, index.usable, 2, False, lambda image: begun.append(1) or image)
    for _ in range(7):
        next(images)
    images.close()
    assert 7 <= len(begun) <= 10


def test_free_memory():
    assert 1 << 20 < cache._free(DEVICE) < 1 << 50


def test_an_image_with_too_long_a_side(index, monkeypatch):
    monkeypatch.setattr(cache, "largest_side", lambda _: 119)
    with pytest.raises(UserError, match=r"3\.jpg has 24x120 pixels, --cache device takes sides of at most 119"):
        on_device(index)


def test_batch_larger_than_the_data(index):
    with pytest.raises(UserError, match="batch larger than the data: 38 rows over all ranks, 37 images"):
        on_device(index, batch_size=19, world_size=2)


def eval_on_device(index, **changes):
    given = dict(batch_size=8, rank=0, world_size=1, image_size=28, resize=32, device=DEVICE, threads=2)
    return DeviceEvalLoader(index, **{**given, **changes})


def test_eval(index):
    for ranks in (1, 3, 40):
        for rank in range(min(ranks, 38)):
            ours = eval_on_device(index, rank=rank, world_size=ranks)
            for _ in range(2):
                batches = list(ours)
                assert len(batches) == len(ours) and all(len(images) <= 8 for images, _, _ in batches)
                shown = [i for _, _, ids in batches for i in ids.tolist()]
                assert shown == list(range(rank, 37, ranks))
                assert all((index.labels[ids.cpu()] == labels.cpu().numpy()).all() for _, labels, ids in batches)
            ours.close()
            assert len(list(ours)) == len(batches)


def test_eval_pixels_equal_the_pipeline(index):
    given = dict(batch_size=8, rank=0, world_size=1, image_size=28, resize=37, device=DEVICE, threads=2)
    theirs = EvalLoader(index, **given)
    for (a, *_), (b, *_) in zip(DeviceEvalLoader(index, **given), theirs, strict=True):
        assert a.shape[1:] == (28, 28, 3) and a.dtype == torch.uint8
        assert differences(a, b).max() <= 2 and differences(a, b).float().mean() < 0.6
    theirs.close()


def test_eval_leaves_out_what_cannot_be_read(index, monkeypatch):
    real = cache.decode.decode
    broken = index.read(4), index.read(20)
    monkeypatch.setattr(cache.decode, "decode", lambda data: real(b"" if data in broken else data))
    ours = eval_on_device(index)
    assert [(len(images), len(labels)) for images, labels, _ in ours] == [(8, 8)] * 4 + [(3, 3)]
    assert [i for _, _, ids in ours for i in ids.tolist()] == [i for i in range(37) if i not in (4, 20)]
    assert [(lost.row, lost.by, lost.reason) for lost in ours.lost] == [(4, -1, "empty file"), (20, -1, "empty file")]
    assert (next(iter(eval_on_device(index, batch_size=37)))[0][4] == next(iter(ours))[0][4]).all()


def test_eval_crop_larger_than_the_resized_image(index):
    with pytest.raises(UserError, match="--eval-resize"):
        eval_on_device(index, image_size=33)


@pytest.mark.medium
def test_without_dali(folder):
    code = f"""
import sys, torch
for name in ("nvidia.dali", "nvidia.dali.plugin.pytorch"):
    sys.modules[name] = None
from mopro_fast.config import AugmentConfig
from mopro_fast.data.cache import DeviceEvalLoader, DeviceTrainLoader
from mopro_fast.data.index import load_index
index = load_index({str(folder / "list.txt")!r}, "train", num_classes=4)
given = dict(batch_size=8, rank=0, world_size=1, image_size=8, device=torch.device("cpu"), threads=2)
train = DeviceTrainLoader(index, seed=0, augment=AugmentConfig(), **given)
val = DeviceEvalLoader(index, resize=9, **given)
print(sum(len(batch.ids) for epoch in (0, 1) for batch in train.epoch(epoch)), sum(len(ids) for _, _, ids in val))
print([name for name, module in sys.modules.items() if "dali" in name and module is not None])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "64 37\n[]\n", result.stderr


@pytest.mark.parametrize("columns", [0, 4])
def test_arrays_go_to_the_device_in_one_copy(columns):
    given = [
        np.arange(-3, 4),
        np.arange(7 * columns).reshape(7, columns)[:, ::-1],
        np.float32([1.5, -2]),
        np.arange(3) > 0,
    ]
    got = cache._together(given, DEVICE)
    assert len({x.untyped_storage().data_ptr() for x in got}) == 1
    for a, b in zip(given, got, strict=True):
        assert a.dtype == b.cpu().numpy().dtype and (a == b.cpu().numpy()).all() and b.is_contiguous()


@pytest.mark.gpu
def test_a_batch_does_not_wait_for_the_device(index):
    train = on_device(index)
    next(train.epoch(0))  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        list(train.epoch(0))
    finally:
        torch.cuda.set_sync_debug_mode("default")
