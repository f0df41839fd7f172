"""Crops and colours on a CPU, by csrc/views.cpp and by PyTorch. Colours against Pillow: test_augment.py."""

import shutil
import time

import numpy as np
import pytest
import torch

from mopro_fast.config import AugmentConfig
from mopro_fast.data import views
from mopro_fast.data.augment import crop_boxes, draw

BUILT = pytest.mark.skipif(views._views is None, reason="built without a C++ compiler")


def generator(seed):
    return np.random.Generator(np.random.PCG64(seed))


def weights(length, size):
    """float64 [size, length]: a triangle as wide as the scale, its sums 1. Pillow's BILINEAR."""
    scale = length / size
    distance = np.arange(length) + 0.5 - (np.arange(size)[:, None] + 0.5) * scale
    triangles = np.maximum(0, 1 - abs(distance) / max(scale, 1))
    return triangles / triangles.sum(1, keepdims=True)


def resized(image, box, flip, size):
    """float64 [S, S, 3], not rounded."""
    top, left, height, width = box
    part = image[top : top + height, left : left + width].astype(np.float64)
    lines = np.tensordot(weights(height, size), part, 1)  # [S, W, 3]
    result = np.tensordot(lines, weights(width, size), (1, 1)).transpose(0, 2, 1)
    return result[:, ::-1] if flip else result


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
def test_built():
    assert views._views is not None, "a compiler is here: install again"


@BUILT
@pytest.mark.parametrize("size", [1, 8, 15, 112])
@pytest.mark.parametrize("shape", [(40, 30), (1, 1), (8, 64), (64, 9), (1, 23), (31, 1), (230, 317), (700, 500)])
def test_crop_is_the_exact_resize_rounded_once(shape, size):
    """From one tap to hundreds. Within float32's rounding of a half either neighbour is right."""
    rng, n = generator(size), 8
    images = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for _ in range(n)]
    images[1][:] = 255  # never beyond it
    boxes, flips = (
        crop_boxes(np.tile(shape, (n, 1)), draw(rng, n, AugmentConfig(scale=(0.01, 1))).q),
        np.arange(n) % 2 > 0,
    )
    boxes[0] = 0, 0, *shape
    out = np.full((n + 1, size, size, 3), 77, np.uint8)
    views._views.crop(images, boxes, flips, out[:n])
    assert (out[n] == 77).all()
    for image, box, flip, result in zip(images, boxes, flips, out, strict=False):
        exact = resized(image, box, flip, size)
        assert abs(result - exact).max() < 0.5 + 1e-3


@BUILT
def test_identity_and_mirror():
    image = generator(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    out = np.empty((2, 24, 24, 3), np.uint8)
    views._views.crop([image, image], np.tile([0, 0, 24, 24], (2, 1)), np.array([False, True]), out)
    assert (out[0] == image).all() and (out[1] == image[:, ::-1]).all()


@BUILT
@pytest.mark.parametrize("both", [True, False])
def test_without_a_compiler_the_views_are_the_same_within_a_level(both, monkeypatch):
    rng, n = generator(3), 23
    images = [rng.integers(0, 256, (*rng.integers(20, 90, 2), 3), dtype=np.uint8) for _ in range(n)]
    plain = AugmentConfig(grayscale=0, brightness=0, contrast=0, saturation=0, hue=0)
    monkeypatch.setattr(views, "_PIXELS", 5 * 32 * 32)  # several tasks

    def made(config):
        cropper = views.Cropper(32, threads=3)
        result = cropper.start(images, draw(generator(4), n, config), both)()
        cropper.close()
        assert len(result) == 1 + both
        return result

    ours, coloured = made(plain), made(AugmentConfig())
    jitter = draw(generator(4), n, AugmentConfig()).jitter
    monkeypatch.setattr(views, "_views", None)
    theirs = made(plain)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.uint8 and a.shape == (n, 32, 32, 3)
        assert (a.int() - b.int()).abs().max() <= 1 and (a != b).float().mean() < 0.25  # noise; PyTorch rounds twice
    if both:
        again = ours[1].numpy().copy()
        views._color(again, jitter)
        assert (again == coloured[1].numpy()).all() and (again != ours[1].numpy()).any()


def test_a_task_that_fails_is_reported_when_no_other_reads_the_images_any_more(monkeypatch):
    n, ended = 3, []

    def crop(images, *_):
        if not images[0].any():
            raise ValueError("the first one")
        time.sleep(0.1)
        ended.append(1)

    monkeypatch.setattr(views, "_crop", crop)
    cropper = views.Cropper(8, threads=n)
    images = [np.full((9, 9, 3), i, np.uint8) for i in range(n)]
    result = cropper.start(images, draw(generator(0), n, AugmentConfig()), both=False)
    with pytest.raises(ValueError, match="the first one"):
        result()
    assert len(ended) == n - 1
    cropper.close()


@BUILT
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": np.array([[0, 0, 9, 8]])}, r"boxes\[0\] does not lie in images\[0\]"),
        ({"boxes": np.array([[0, -1, 8, 8]])}, r"boxes\[0\] does not lie"),
        ({"boxes": np.array([[1, 0, 2**63 - 1, 8]])}, r"boxes\[0\] does not lie"),
        ({"boxes": np.array([[0, 0, 0, 8]])}, r"boxes\[0\] does not lie"),
        ({"boxes": np.zeros((1, 3), np.int64)}, "boxes must be"),
        ({"flips": np.zeros(2, bool)}, "flips must be"),
        ({"images": [np.zeros((8, 8), np.uint8)]}, r"images\[0\] must be"),
        ({"images": [np.zeros((8, 8, 3), np.float32)]}, r"images\[0\] must be"),
        ({"images": [np.zeros((8, 16, 3), np.uint8)[:, ::2]]}, r"images\[0\] must be"),
        ({"images": []}, "out must be"),
        ({"out": np.empty((1, 4, 5, 3), np.uint8)}, "out must be"),
    ],
)
def test_wrong_crops_are_refused(change, message):
    arguments = {
        "images": [np.zeros((8, 8, 3), np.uint8)],
        "boxes": np.array([[0, 0, 8, 8]]),
        "flips": np.zeros(1, bool),
    }
    arguments["out"] = np.empty((1, 4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match=message):
        views._views.crop(**(arguments | change))


@BUILT
def test_wrong_colours_are_refused():
    arguments = dict(gray=np.zeros(2, bool), factors=np.ones((2, 4), np.float32), order=np.zeros((2, 1), np.int64))
    images = np.zeros((2, 4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match="order must hold operations 0 to 3"):
        views._views.color_jitter(images, **arguments | {"order": np.full((2, 1), 4)})
    for factor in (np.nan, -np.inf, 1e9):
        with pytest.raises(ValueError, match="factors must be numbers"):
            views._views.color_jitter(images, **arguments | {"factors": np.full((2, 4), factor, np.float32)})
    with pytest.raises(ValueError, match="gray must be"):
        views._views.color_jitter(images, **arguments | {"gray": np.zeros(3, bool)})
    with pytest.raises(TypeError):  # a copy would take the changes
        views._views.color_jitter(images[:, ::2], **arguments)
