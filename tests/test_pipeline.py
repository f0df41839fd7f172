"""The loaders on small images made here. Those on a GPU run the same checks where there is one."""

import dataclasses
import io
import math
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from odd_images import encoded, examined
from PIL import Image, ImageOps

from mopro_fast.config import AugmentConfig
from mopro_fast.data import decode, pipeline
from mopro_fast.data.augment import crop_boxes, draw
from mopro_fast.data.index import load_index
from mopro_fast.data.order import epoch_order
from mopro_fast.data.pipeline import EvalLoader, TrainLoader
from mopro_fast.data.reader import Broken, Verified
from mopro_fast.errors import UserError
from mopro_fast.ops.colour import color_jitter

if sys.platform != "linux":
    pytest.skip("DALI is for Linux", allow_module_level=True)

CPU = torch.device("cpu")
SHAPES = [(40, 56), (61, 30), (33, 33), (24, 120), (100, 21), (48, 64), (57, 50), (1, 1), (3, 90), (35, 47), (64, 64)]
PLAIN = AugmentConfig(grayscale=0, brightness=0, contrast=0, saturation=0, hue=0)


def picture(i, height, width):
    """uint8 [height, width, 3]: smooth waves, another in every image."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / (5 + c) + i) + np.cos(y / (4 + i % 3) - c) for c in range(3)]
    return (127 + 60 * np.stack(waves, axis=2)).astype(np.uint8)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """37 lossless images of odd shapes, one of them under a name outside ASCII; labels of 4 classes and none."""
    root = tmp_path_factory.mktemp("images")
    lines = []
    for i in range(37):
        name = f"sub {i % 2}/{'ü' if i == 5 else ''}{i}.png"
        (root / name).parent.mkdir(exist_ok=True)
        Image.fromarray(picture(i, *SHAPES[i % len(SHAPES)])).save(root / name)
        lines.append(f"{name} {i % 5 - 1}")
    (root / "list.txt").write_text("\n".join(lines))
    return examined(load_index(root / "list.txt", "train", num_classes=4))


def loader(index, **changes):
    arguments = dict(batch_size=8, rank=0, world_size=1, seed=0, image_size=32, augment=AugmentConfig())
    return TrainLoader(index, **{**arguments, "device": CPU, "threads": 2, **changes})


def equal(a, b):
    return all(x is y is None or torch.equal(x, y) for x, y in zip(a, b, strict=True))


def rows_of(loader, epoch):
    return torch.cat([batch.ids for batch in loader.epoch(epoch)]).tolist()


def test_batch(index):
    train = loader(index)
    assert train.steps_per_epoch == 4  # the last 5 images are dropped
    batches = list(train.epoch(0))
    assert len(batches) == 4
    for batch in batches:
        for view in (batch.view_q, batch.view_k):
            assert view.shape == (8, 32, 32, 3) and view.dtype == torch.uint8 and view.is_contiguous()
        assert batch.labels.dtype == batch.ids.dtype == torch.int64
        assert (batch.labels.numpy() == index.labels[batch.ids.numpy()]).all()
        assert not torch.equal(batch.view_q, batch.view_k)


def test_one_view(index):
    batch = next(loader(index, two_views=False).epoch(0))
    assert batch.view_k is None
    assert torch.equal(batch.view_q, next(loader(index).epoch(0)).view_q)


def test_order_is_a_function_of_seed_and_epoch(index):
    train = loader(index)
    first, second = rows_of(train, 0), rows_of(train, 1)
    assert len(set(first)) == len(set(second)) == 32 and first != second
    assert rows_of(loader(index), 1) == second
    assert rows_of(loader(index, seed=1), 0) not in (first, second)


def test_batches_outlive_the_next_ones(index):
    train = loader(index)
    kept = list(train.epoch(0))
    copies = [[x.clone() for x in batch] for batch in kept]
    list(train.epoch(1))
    assert all(equal(a, b) for a, b in zip(kept, copies, strict=True))


@pytest.mark.parametrize("prefetch", [0, 1, 2, 5])
def test_resume_is_exact_at_every_step(index, prefetch):
    whole = {(e, s): batch for e in (0, 1, 2) for s, batch in enumerate(loader(index).epoch(e))}
    train = loader(index, prefetch=prefetch)
    for epoch, start in ((1, 2), (2, 0), (0, 3), (1, 0), (0, 0), (0, 0)):  # new, going on, back, on, back, again
        batches = list(train.epoch(epoch, start))
        assert len(batches) == 4 - start
        assert all(equal(batch, whole[epoch, start + i]) for i, batch in enumerate(batches))
    next(train.epoch(2))
    assert equal(next(train.epoch(0, 1)), whole[0, 1])  # from the middle of an epoch
    train.close()
    assert equal(next(train.epoch(2, 2)), whole[2, 2])


def test_ranks_share_the_batch_of_one_rank(index):
    one = loader(index)
    two = [loader(index, batch_size=4, world_size=2, rank=rank) for rank in (0, 1)]
    for epoch in (0, 1):
        halves = zip(*(part.epoch(epoch) for part in two), strict=True)
        for batch, parts in zip(one.epoch(epoch), halves, strict=True):
            assert equal(batch, [torch.cat(pair) for pair in zip(*parts, strict=True)])


def whole_epoch(make, images, epoch=0, size=8, ranks=1):
    """(views, label) by id of the real rows of an epoch on so many ranks; every id must be there once."""
    found = {}
    for rank in range(ranks):
        train = make(batch_size=size // ranks, world_size=ranks, rank=rank, whole=True)
        assert train.steps_per_epoch == -(-images // size)
        for step, batch in enumerate(train.epoch(epoch)):
            assert len(batch.ids) == size // ranks
            for i, row in enumerate(batch.ids.tolist()):
                if (step * ranks + rank) * (size // ranks) + i < images:
                    assert row not in found
                    found[row] = batch.view_q[i], batch.view_k[i], batch.labels[i]
        train.close()
    return found


@pytest.mark.parametrize("size", [8, 38, 74, 112])
def test_a_whole_epoch_shows_every_image_once_on_any_number_of_ranks(index, size):
    """37 images: a fifth batch of 5, and batches that are larger than the data."""
    one, two = (whole_epoch(lambda **c: loader(index, **c), 37, size=size, ranks=ranks) for ranks in (1, 2))
    assert sorted(one) == sorted(two) == list(range(37))
    assert all(equal(one[row], two[row]) for row in one)
    assert all(index.labels[row] == label for row, (*_, label) in one.items())


def test_a_whole_epoch_is_filled_with_its_first_rows(index):
    shown = rows_of(loader(index, whole=True), 3)
    assert shown[37:] == shown[:3] and shown[:32] == rows_of(loader(index), 3)
    five = dataclasses.replace(index, left_out=np.arange(5, 37))
    shown = rows_of(loader(five, batch_size=12, whole=True), 0)
    assert shown == (shown[:5] * 3)[:12] and sorted(shown[:5]) == list(range(5))
    train = loader(five, batch_size=2, whole=True)
    both = [rows_of(train, epoch) for epoch in (0, 1)]  # also across the end of an epoch
    assert train.steps_per_epoch == 3 and all(sorted(rows[:5]) == list(range(5)) for rows in both)


def test_a_whole_epoch_of_nothing(index):
    with pytest.raises(UserError, match=r"^no image of \S*list.txt without the 37 of --holdout can be shown"):
        loader(dataclasses.replace(index, held_out=np.arange(37)), whole=True)


def test_three_ranks_show_no_image_twice(index):
    shown = [i for rank in range(3) for i in rows_of(loader(index, batch_size=4, world_size=3, rank=rank), 0)]
    assert len(shown) == len(set(shown)) == 36


def test_next_epoch_and_step_differ_in_augmentation(index):
    """Also where (seed, epoch, step) differ by a zero only, which numpy's seeding does not tell apart by itself."""
    drawn = [
        loader(index, seed=seed)._draw(epoch, step).q.place[0, 0]
        for seed in (0, 1)
        for epoch in (0, 1)
        for step in (0, 1)
    ]
    assert len(set(drawn)) == 8
    first_word = np.random.default_rng((0, 0, 0)).random()
    assert first_word not in drawn


def pillow_crop(image, box, size):
    top, left, height, width = (int(v) for v in box)
    crop = Image.fromarray(image).crop((left, top, left + width, top + height))
    return np.asarray(crop.resize((size, size), Image.BILINEAR)).astype(int)


def inner(view, box, size):
    """The part of a view that no pixel beyond the crop has touched."""
    height, width = (max(int(v), 1) for v in box[2:])
    y, x = (math.ceil(max(1, size / side)) for side in (height, width))
    return view[y:-y, x:-x]


def check_views(train, index, tolerance, border=False):
    """border: DALI's filter sees the pixels beyond a crop, so those next to its border are not compared."""
    compared = flips = 0
    for step, batch in enumerate(train.epoch(0)):
        drawn = train._draw(0, step)
        images = [np.asarray(Image.open(index.full_path(i)).convert("RGB")) for i in batch.ids.tolist()]
        shapes = np.array([image.shape[:2] for image in images])
        for view, crops in ((batch.view_q.cpu(), drawn.q), (batch.view_k.cpu(), drawn.k)):
            for image, result, box, flip in zip(
                images, view.numpy(), crop_boxes(shapes, crops), crops.flip, strict=True
            ):
                expected = pillow_crop(image, box, len(result))
                result = result[:, ::-1].astype(int) if flip else result.astype(int)
                difference = abs(inner(result - expected, box, len(result)) if border else result - expected)
                assert difference.size == 0 or difference.max() <= tolerance, (shapes, box)
                compared += difference.size > 0
                flips += flip
    assert compared > 50 and 15 < flips < 50


def test_views_equal_pillow_within_rounding(index):
    check_views(loader(index, augment=PLAIN), index, tolerance=1)
    check_views(loader(index, augment=PLAIN, crop_in_dali=True), index, tolerance=1, border=True)


def test_crops_by_dali_differ_in_nothing_but_their_pixels(index):
    for a, b in zip(loader(index).epoch(1, 1), loader(index, crop_in_dali=True).epoch(1, 1), strict=True):
        assert equal(a[2:], b[2:])
        assert (a.view_q.int() - b.view_q.int()).abs().float().mean() < 3


def test_colours_of_view_k_alone_change(index):
    plain, coloured = loader(index, augment=PLAIN), loader(index)
    for step, (a, b) in enumerate(zip(plain.epoch(0), coloured.epoch(0), strict=True)):
        assert torch.equal(a.view_q, b.view_q)
        assert torch.equal(color_jitter(a.view_k, coloured._draw(0, step).jitter), b.view_k)


def test_flip_is_the_mirrored_view(index):
    with_flips = {"augment": AugmentConfig(**{**vars(PLAIN), "flip": 1.0})}
    without = {"augment": AugmentConfig(**{**vars(PLAIN), "flip": 0.0})}
    for a, b in zip(loader(index, **with_flips).epoch(0), loader(index, **without).epoch(0), strict=True):
        assert (a.view_q.flip(2).int() - b.view_q.int()).abs().max() <= 1


APART = AugmentConfig(**{**vars(PLAIN), "scale": (0.8, 1.0), "scale_k": (0.1, 0.3)})


@pytest.mark.parametrize("in_dali", [False, True])
def test_view_k_has_areas_of_its_own(index, in_dali):
    """view_q alone follows scale, view_k scale_k: its pixels are those of scale=scale_k, in the other loader too."""
    both, k, q = (
        loader(index, augment=augment, crop_in_dali=in_dali)
        for augment in (
            APART,
            dataclasses.replace(PLAIN, scale=(0.1, 0.3)),
            dataclasses.replace(PLAIN, scale=(0.8, 1.0)),
        )
    )
    for a, b, c in zip(both.epoch(0), k.epoch(0), q.epoch(0), strict=True):
        assert torch.equal(a.view_k, b.view_k) and torch.equal(a.view_q, c.view_q)
        assert not torch.equal(a.view_k, c.view_k) and not torch.equal(a.view_q, b.view_q)
    check_views(loader(index, augment=APART, crop_in_dali=in_dali), index, tolerance=1, border=in_dali)


def test_boxes_in_dali_equal_crop_boxes():
    """Through the ROI itself, for shapes with no image file: DALI's arithmetic against numpy's."""
    from nvidia.dali import Pipeline, fn

    rng, n = np.random.Generator(np.random.PCG64(9)), 2000
    shapes = np.column_stack([rng.integers(1, 3000, (n, 2)), np.full(n, 3)])
    shapes[: n // 2, 0] = rng.integers(1, 60, n // 2)
    shapes[:100, :2] = rng.integers(1, 3, (100, 2))  # where an attempt may have no pixel
    drawn = draw(rng, n, AugmentConfig())
    pipe = Pipeline(batch_size=n, num_threads=2, device_id=None, prefetch_queue_depth=1)
    with pipe:
        boxes = pipeline._crops(fn, fn.external_source(name="shapes"), fn.external_source(name="numbers"), 2)
        pipe.set_outputs(*(corner for box in boxes for corner in box))
    pipe.feed_input("shapes", shapes)
    pipe.feed_input("numbers", pipeline._pack([drawn.q, drawn.k]))
    pipe.schedule_run()
    corners = [np.asarray(out.as_tensor()).astype(int) for out in pipe.share_outputs()]
    for crops, (start, end) in zip((drawn.q, drawn.k), (corners[:2], corners[2:]), strict=True):
        low, high = np.minimum(start, end), np.maximum(start, end)
        assert (np.column_stack([low, high - low]) == crop_boxes(shapes[:, :2], crops)).all()
        assert ((start[:, 1] > end[:, 1]) == crops.flip).all() and (start[:, 0] < end[:, 0]).all()


@pytest.mark.parametrize("in_dali", [False, True])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_to_size_and_pixels(tmp_path, orientation, in_dali):
    (tmp_path / "c").mkdir()
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(picture(0, 90, 30))
    for i in range(4):
        image.save(tmp_path / "c" / f"{i}.jpg", quality=95, exif=exif)
    index = examined(load_index(tmp_path, "train", num_classes=1))
    train = loader(index, batch_size=4, augment=PLAIN, crop_in_dali=in_dali)
    batch, crops = next(train.epoch(0)), train._draw(0, 0).q
    upright = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "c" / "0.jpg")))
    boxes = crop_boxes(np.tile(upright.shape[:2], (4, 1)), crops)
    for view, box, flip in zip(batch.view_q.numpy(), boxes, crops.flip, strict=True):
        view = (view[:, ::-1] if flip else view).astype(int)
        assert abs(inner(view - pillow_crop(upright, box, 32), box, 32)).max() <= 2
    images, *_ = next(iter(eval_loader(index, image_size=30, resize=30)))
    top, left = ((side - 30) // 2 for side in upright.shape[:2])
    assert abs(images[0].numpy().astype(int) - upright[top : top + 30, left : left + 30]).max() <= 2


def test_batch_larger_than_the_data(index):
    with pytest.raises(UserError, match="batch larger than the data: 38 rows over all ranks, 37 images"):
        loader(index, batch_size=19, world_size=2)
    assert loader(index, batch_size=37).steps_per_epoch == 1


def test_dali_absent(index, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(UserError, match="pip install nvidia-dali-cuda130"):
        loader(index)


@pytest.fixture
def photos(tmp_path):
    """13 JPEGs in one class; what a check finds is filled in."""
    (tmp_path / "c").mkdir()
    for i in range(13):
        Image.fromarray(picture(i, 40, 50)).save(tmp_path / "c" / f"{i:02}.jpg")
    return examined(load_index(tmp_path, "train", num_classes=1))


def damage(path, how):
    content = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes({"text": b"<html></html>" * 20, "empty": b"", "cut": content[: len(content) // 2]}[how])
    return content


@pytest.mark.parametrize("how", ["text", "empty", "gone", "cut"])
@pytest.mark.parametrize("in_dali", [False, True])
def test_a_file_that_breaks_is_replaced_and_named(photos, how, in_dali):
    def new():
        return loader(photos, batch_size=2, world_size=2, crop_in_dali=in_dali)

    whole = list(new().epoch(0))
    bad = int(whole[1].ids[1])
    path = Path(photos.full_path(bad))
    train = new()
    order = epoch_order(photos, 0, 0, 0)
    content = damage(path, how)
    batches = list(train.epoch(0))
    assert all(equal(batches[i], whole[i]) for i in (0, 2))
    assert batches[1].ids.tolist() == [whole[1].ids[0], order[-1]]  # the image that this epoch leaves out
    assert torch.equal(batches[1].view_k[0], whole[1].view_k[0])
    ((epoch, step, lost),) = train.lost
    assert (epoch, step, lost.row, lost.by) == (0, 1, bad, order[-1]) and lost.reason
    path.write_bytes(content)
    assert equal(next(train.epoch(0, 1)), whole[1])  # repaired


def test_the_reason_is_the_check_s(photos):
    damage(Path(photos.full_path(4)), "text")
    train = loader(examined(photos), batch_size=12)
    for epoch in (0, 1):
        list(train.epoch(epoch))
    found = {(lost.row, lost.reason) for _, _, lost in train.lost}
    assert found == {(4, "not an image: it begins with b'<html></html'")}


def test_a_broken_image_is_replaced_where_the_one_left_out_is_broken_too(photos):
    order = epoch_order(photos, 0, 0, 0)
    for row in (order[0], order[-1]):  # 13 images are 3 batches of 4
        damage(Path(photos.full_path(row)), "gone")
    train = loader(photos, batch_size=4)
    shown = rows_of(train, 0)
    assert shown[1:] == order[1:12].tolist() and shown[0] in order[1:12]
    assert [lost.row for _, _, lost in train.lost] == [order[0]]


def test_a_changed_file_that_is_whole_is_shown(photos):
    Image.fromarray(picture(99, 70, 60)).save(photos.full_path(3))
    train = loader(photos, batch_size=13)
    assert sorted(next(train.epoch(0)).ids.tolist()) == list(range(13)) and train.lost == []


@pytest.mark.parametrize("how", ["zeros", "cut", "other", "odd"])
def test_other_bytes_of_the_same_size_and_time(photos, how):
    """Only a checksum tells: the size and the time of change are those of the check."""
    row, path = 3, Path(photos.full_path(3))
    content, status = path.read_bytes(), path.stat()
    image = Image.fromarray(picture(99, 20, 25)).convert("L")
    new = {
        "zeros": bytes(len(content)),
        "cut": content[: len(content) // 2],
        "other": encoded(image),
        "odd": encoded(image.resize((9, 8)), "GIF"),
    }[how]
    assert len(new) <= len(content)
    path.write_bytes(new.ljust(len(content), b"\0"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    train = loader(photos, batch_size=12)
    whole = how in ("other", "odd")
    for epoch in range(3):
        batch = next(train.epoch(epoch))
        assert row in batch.ids if whole else row not in batch.ids
    assert {lost.row for _, _, lost in train.lost} == (set() if whole else {row})
    assert all(lost.reason.startswith("changed since it was checked; ") for _, _, lost in train.lost)
    train.close()


def test_bytes_that_end_their_process(photos, monkeypatch):
    """They end one of its own, and are named; that they were closed meanwhile says nothing about them."""
    monkeypatch.setattr(decode, "judged", deadly)
    Path(photos.full_path(5)).write_bytes(b"deadly")
    images = Verified(photos, 1)
    for _ in range(2):
        with pytest.raises(Broken, match=r"changed since .*; it ends the process that decodes it \(signal 11\)"):
            images.read_clean(5)
    assert images.read(6) == (photos.read(6), decode.OK)
    images.close()


def deadly(*_):
    os.kill(os.getpid(), signal.SIGSEGV)


def test_the_storage_is_gone(photos, tmp_path):
    (tmp_path / "c").rename(tmp_path / "d")
    train = loader(photos, batch_size=4)
    with pytest.raises(UserError, match=r"cannot read .*jpg \(No such file.*nor any of 21 images .* is the storage"):
        next(train.epoch(0))
    (tmp_path / "d").rename(tmp_path / "c")
    assert equal(next(train.epoch(0)), next(loader(photos, batch_size=4).epoch(0)))


@pytest.mark.parametrize("in_dali", [False, True])
def test_bytes_that_dali_refuses_are_found_cleaned_or_replaced(photos, monkeypatch, in_dali):
    """Whatever the check says: DALI's pipeline is built anew, and the batches are those of an index without faults."""
    whole = list(loader(photos, batch_size=4, crop_in_dali=in_dali).epoch(0))
    gif, text = (int(whole[1].ids[i]) for i in (0, 2))
    image = Image.open(photos.full_path(gif)).convert("L")
    image.save(photos.full_path(gif), "GIF")
    Path(photos.full_path(text)).write_text("no image")
    wrong = decode.examine
    monkeypatch.setattr(decode, "examine", lambda data: wrong(data)._replace(verdict=decode.OK))
    with monkeypatch.context() as patch:
        patch.setattr(decode, "clean", lambda data: right_clean(data, wrong))
        train = loader(examined(photos), batch_size=4, crop_in_dali=in_dali)
        refusals = monkeypatch_distrust(train, patch)
        batches = [batch for epoch in (0, 1) for batch in train.epoch(epoch)]
    assert all(equal(batches[i], whole[i]) for i in (0, 2))
    assert batches[1].ids[0] == gif and batches[1].ids[2] != text
    assert batches[1].ids[[1, 3]].tolist() == whole[1].ids[[1, 3]].tolist()
    assert {lost.row for _, _, lost in train.lost} == {text}
    assert set(refusals) == {gif, text}


def monkeypatch_distrust(train, patch):
    """-> the rows that DALI is found to refuse, as they come."""
    reader, rows = train._stream.reader, []
    really = reader.distrust
    patch.setattr(reader, "distrust", lambda row, reason: (rows.append(row), really(row, reason)))
    return rows


def right_clean(data, examine):
    if examine(data).verdict == decode.UNREADABLE:
        raise decode.DecodeError("not an image")
    file = io.BytesIO()
    Image.fromarray(decode.decode(data)).save(file, "PNG")
    return file.getvalue()


def test_evaluation_leaves_out_what_breaks(photos):
    left_out = dataclasses.replace(photos, left_out=np.array([2]))
    each = eval_loader(left_out, batch_size=3)
    damage(Path(photos.full_path(3)), "gone")
    damage(Path(photos.full_path(9)), "cut")
    for _ in range(2):
        assert torch.cat([ids for _, _, ids in each]).tolist() == [0, 1, 4, 5, 6, 7, 8, 10, 11, 12]
        assert [lost.row for lost in each.lost] == [3, 9]
    for i in (0, 1):
        damage(Path(photos.full_path(i)), "gone")  # and with them the first batch
    assert [ids.tolist() for _, _, ids in each] == [[4, 5, 6], [7, 8], [10, 11, 12]]


def test_left_out_images_are_never_shown(photos):
    train = loader(dataclasses.replace(photos, left_out=np.array([0, 5])), batch_size=11)
    assert sorted(rows_of(train, 0)) == [1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12]


def test_memory_is_stated(photos):
    assert loader(photos, batch_size=4).memory() == (
        "read and decoded ahead: 2 batches of views (0 MB), 2 of whole images (0 MB), 4 of files (0 MB)"
    )
    big = loader(photos, batch_size=13, image_size=224, crop_in_dali=True)
    assert big.memory().startswith("read and decoded ahead: 3 batches of views (12 MB), 5 of files (")


def resize_and_crop(path, resize, size):
    """torchvision's Resize(resize) and CenterCrop(size), with Pillow."""
    image = Image.open(path).convert("RGB")
    width, height = image.size
    short, long = min(width, height), max(width, height)
    new_long = int(resize * long / short)
    width, height = (resize, new_long) if width <= height else (new_long, resize)
    left, top = round((width - size) / 2.0), round((height - size) / 2.0)
    image = image.resize((width, height), Image.BILINEAR)
    return np.asarray(image.crop((left, top, left + size, top + size))).astype(int)


def eval_loader(index, **changes):
    arguments = dict(batch_size=8, rank=0, world_size=1, image_size=28, resize=32, device=CPU, threads=2)
    return EvalLoader(index, **{**arguments, **changes})


def test_eval_shows_every_image_once_in_every_pass(index):
    for ranks in (1, 2, 3):
        loaders = [eval_loader(index, world_size=ranks, rank=rank) for rank in range(ranks)]
        for _ in range(2):
            passes = [list(each) for each in loaders]
            ids = [torch.cat([ids for _, _, ids in batches]) for batches in passes]
            assert all(part.tolist() == list(range(rank, 37, ranks)) for rank, part in enumerate(ids))
            for images, labels, numbers in (batch for batches in passes for batch in batches):
                assert len(images) == len(labels) == len(numbers) <= 8
                assert labels.tolist() == index.labels[numbers.numpy()].tolist()


def test_eval_last_batch_and_rank_without_images(index):
    sizes = [len(ids) for _, _, ids in eval_loader(index)]
    assert sizes == [8, 8, 8, 8, 5] and len(eval_loader(index)) == 5
    assert [len(ids) for _, _, ids in eval_loader(index, batch_size=50)] == [37]
    assert list(eval_loader(index, rank=37, world_size=40)) == []


def test_eval_pass_after_an_abandoned_one(index):
    each = eval_loader(index)
    next(iter(each))
    assert all(equal(a, b) for a, b in zip(each, eval_loader(index), strict=True))
    each.close()
    assert len(list(each)) == 5


@pytest.mark.parametrize("resize, size", [(32, 28), (37, 28), (28, 28), (90, 61)])
def test_eval_pixels_equal_pillow(index, resize, size):
    for images, _, ids in eval_loader(index, image_size=size, resize=resize):
        assert images.shape[1:] == (size, size, 3) and images.dtype == torch.uint8
        for image, i in zip(images.numpy().astype(int), ids.tolist(), strict=True):
            difference = abs(image - resize_and_crop(index.full_path(i), resize, size))
            # Pillow rounds to 8 bits between the two passes and has fixed-point weights.
            assert difference.max() <= 2 and difference.mean() < 0.6, index.full_path(i)


def test_eval_crop_larger_than_the_resized_image(index):
    with pytest.raises(UserError, match="--eval-resize"):
        eval_loader(index, image_size=33)


@pytest.mark.gpu
def test_loaders_on_a_gpu(index):
    gpu = torch.device("cuda")
    train = loader(index, device=gpu)
    batches = list(train.epoch(0, 1))
    assert all(x.device.type == "cuda" for x in batches[0])
    again = list(loader(index, device=gpu).epoch(0))[1:]
    assert all(equal(a, b) for a, b in zip(batches, again, strict=True))
    check_views(loader(index, augment=PLAIN, device=gpu), index, tolerance=2, border=True)
    for (a, *_), (b, *_) in zip(eval_loader(index), eval_loader(index, device=gpu), strict=True):
        assert (a.int() - b.cpu().int()).abs().max() <= 2
