import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from torch.utils._python_dispatch import TorchDispatchMode

from mopro_fast.config import AugmentConfig
from mopro_fast.data import views
from mopro_fast.data.augment import Crops, crop_boxes, draw
from mopro_fast.errors import UserError
from mopro_fast.ops import colour
from mopro_fast.ops.colour import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    IMAGENET_MEAN,
    IMAGENET_STD,
    SATURATION,
    Jitter,
    color_jitter,
    normalize,
)

SAME_FACTORS = (1.0, 1.0, 1.0, 0.0)


def generator(seed=0):
    return np.random.Generator(np.random.PCG64(seed))


def get_params(height, width, area_fractions, ratios, place):
    """RandomResizedCrop.get_params written out, from given uniforms."""
    area = height * width
    for fraction, ratio in zip(area_fractions, ratios, strict=True):
        w = round(math.sqrt(area * fraction * ratio))
        h = round(math.sqrt(area * fraction / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(place[0] * (height - h + 1)), int(place[1] * (width - w + 1)), h, w
    in_ratio = width / height
    if in_ratio < 3 / 4:
        w, h = width, round(width / (3 / 4))
    elif in_ratio > 4 / 3:
        w, h = round(height * (4 / 3)), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


def test_boxes_equal_get_params():
    rng = generator(1)
    n = 4000
    shapes = rng.integers(1, 700, (n, 2))
    shapes[:1000, 0] = rng.integers(1, 40, 1000)  # banners, where many attempts fail
    shapes[-100:] = rng.integers(1, 3, (100, 2))  # where an attempt may have no pixel
    area, ratio = rng.uniform(0.2, 1, (n, 10)), np.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3), (n, 10)))
    place = rng.random((n, 2))
    crops = Crops(np.stack([np.sqrt(area / ratio), np.sqrt(area * ratio)], axis=2), place, np.zeros(n, bool))
    boxes = crop_boxes(shapes, crops)
    expected = [get_params(*map(int, s), a, r, p) for s, a, r, p in zip(shapes, area, ratio, place, strict=True)]
    assert (boxes == expected).all()
    assert ((boxes[:, :2] >= 0) & (boxes[:, :2] + boxes[:, 2:] <= shapes)).all()
    banners = (boxes[:1000, 2] == shapes[:1000, 0]).mean()
    assert banners > 0.5  # the fallback was reached


def test_a_rank_draws_its_own_rows_of_the_batch():
    whole = draw(generator(3), 12, AugmentConfig())
    part = draw(generator(3), 4, AugmentConfig(), skip=8)
    for a, b in ((whole.q, part.q), (whole.k, part.k)):
        assert all((getattr(a, name)[8:] == getattr(b, name)).all() for name in ("sides", "place", "flip"))
    tail = whole.jitter[8:]
    assert len(tail) == 4
    assert all((getattr(tail, name) == getattr(part.jitter, name)).all() for name in ("gray", "factors", "order"))


def test_statistics_of_draw():
    n = 20000
    views = draw(generator(4), n, AugmentConfig())
    for crops in (views.q, views.k):
        height, width = np.moveaxis(crops.sides, 2, 0)
        area, ratio = height * width, np.log(width / height)
        assert 0.2 <= area.min() < 0.2001 and 0.9999 < area.max() <= 1
        assert abs(area.mean() - 0.6) < 0.002 and abs(area.std() - 0.8 / math.sqrt(12)) < 0.002  # uniform
        assert abs(ratio).max() <= math.log(4 / 3) + 1e-12 and abs(ratio.mean()) < 0.002
        assert abs(ratio.std() - 2 * math.log(4 / 3) / math.sqrt(12)) < 0.002
        assert abs(crops.place.mean(0) - 0.5).max() < 0.01
        assert abs(crops.flip.mean() - 0.5) < 0.015
    jitter = views.jitter
    assert abs(jitter.gray.mean() - 0.2) < 0.012
    low, high = jitter.factors.min(0), jitter.factors.max(0)
    np.testing.assert_allclose(low, [0.6, 0.6, 0.6, -0.4], atol=1e-3)
    np.testing.assert_allclose(high, [1.4, 1.4, 1.4, 0.4], atol=1e-3)
    np.testing.assert_allclose(jitter.factors.mean(0), SAME_FACTORS, atol=0.01)
    np.testing.assert_allclose(jitter.factors.std(0), 0.8 / math.sqrt(12), atol=0.005)  # uniform
    orders, counts = np.unique(jitter.order, axis=0, return_counts=True)
    assert len(orders) == 24 and counts.min() > 0.8 * n / 24 and counts.max() < 1.2 * n / 24
    # The numbers are independent of each other: no column repeats another.
    columns = [jitter.gray, *jitter.factors.T]
    for crops in (views.q, views.k):
        height, width = crops.sides[:, 0].T
        columns += [height * width, width / height, crops.sides[:, 1].prod(1), *crops.place.T, crops.flip]
    correlations = np.corrcoef(np.stack(columns)) - np.eye(len(columns))
    assert abs(correlations).max() < 0.03


def boxes_of(get_box, n=6000, height=400, width=533):
    """Area over the image's, log of the ratio, and the place among those where the box fits."""
    top, left, h, w = np.array([get_box(height, width) for _ in range(n)], float).T
    return h * w / (height * width), np.log(w / h), top / (height - h + 1), left / (width - w + 1)


def assert_same_distributions(ours, theirs):
    """Two-sample Kolmogorov-Smirnov: beyond this once in a million."""
    for a, b in zip(ours, theirs, strict=True):
        both = np.sort(np.concatenate([a, b]))
        distance = abs(
            np.searchsorted(np.sort(a), both, "right") / len(a) - np.searchsorted(np.sort(b), both, "right") / len(b)
        )
        assert distance.max() < 2.7 * math.sqrt(1 / len(a) + 1 / len(b))


def our_boxes(n=6000):
    boxes = iter(crop_boxes(np.tile([400, 533], (n, 1)), draw(generator(11), n, AugmentConfig()).q).tolist())
    return boxes_of(lambda *_: next(boxes), n)


def test_boxes_have_the_distribution_of_random_resized_crop():
    uniform = generator(12).uniform

    def box(height, width):
        ratios = np.exp(uniform(math.log(3 / 4), math.log(4 / 3), 10))
        return get_params(height, width, uniform(0.2, 1, 10), ratios, uniform(size=2))

    assert_same_distributions(our_boxes(), boxes_of(box))


def test_boxes_and_colours_have_the_distribution_of_torchvision():
    transforms = pytest.importorskip("torchvision.transforms", exc_type=(ImportError, RuntimeError))
    torch.manual_seed(13)
    crop = transforms.RandomResizedCrop(224, scale=(0.2, 1.0))
    image = Image.new("RGB", (533, 400))
    assert_same_distributions(our_boxes(), boxes_of(lambda *_: crop.get_params(image, crop.scale, crop.ratio)))
    colours = transforms.ColorJitter(0.4, 0.4, 0.4, 0.4)
    strengths = colours.brightness, colours.contrast, colours.saturation, colours.hue
    theirs = np.array([colours.get_params(*strengths)[1:] for _ in range(6000)]).T
    assert_same_distributions(draw(generator(14), 6000, AugmentConfig()).jitter.factors.T, theirs)


def test_view_k_may_have_areas_of_its_own():
    """All else that is drawn stays the same, to the bit."""
    plain, given = (draw(generator(6), 500, AugmentConfig(scale_k=k)) for k in (None, (0.2, 1.0)))
    apart = draw(generator(6), 500, AugmentConfig(scale=(0.8, 1.0), scale_k=(0.2, 0.4)))
    assert (given.k.sides == plain.k.sides).all()
    for crops, low, high in ((apart.q, 0.8, 1.0), (apart.k, 0.2, 0.4)):
        area = crops.sides.prod(2)
        assert low <= area.min() < low + 0.01 and high - 0.01 < area.max() <= high
    for a, b in ((apart.q, plain.q), (apart.k, plain.k)):
        assert (a.place == b.place).all() and (a.flip == b.flip).all()
        np.testing.assert_allclose(a.sides[..., 1] / a.sides[..., 0], b.sides[..., 1] / b.sides[..., 0], rtol=1e-14)
    assert all((a == b).all() for a, b in zip(vars(apart.jitter).values(), vars(plain.jitter).values(), strict=True))


def test_a_draw_without_areas_of_its_own_is_that_of_earlier_versions():
    views = draw(generator(7), 2, AugmentConfig(), skip=3)
    sides = [crops.sides[1, 2] for crops in (views.q, views.k)]
    expected = [[0.7303437992754728, 0.9021955745396673], [0.7190116205438747, 0.7016128757680504]]
    np.testing.assert_allclose(sides, expected, rtol=1e-14)


def test_settings_reach_draw():
    config = AugmentConfig(scale=(0.5, 0.6), flip=0, grayscale=1, brightness=0, contrast=0.1, saturation=0, hue=0)
    views = draw(generator(5), 500, config)
    area = views.q.sides.prod(2)
    assert area.min() >= 0.5 and area.max() <= 0.6
    assert not views.q.flip.any() and not views.k.flip.any() and views.jitter.gray.all()
    assert (views.jitter.order == CONTRAST).all() and views.jitter.order.shape == (500, 1)
    assert abs(views.jitter.factors[:, CONTRAST] - 1).max() <= 0.1 + 1e-6


@pytest.mark.parametrize(
    "setting",
    [
        *({"scale": (0, 1)}, {"scale": (0.5, 0.4)}, {"scale": (0.5, 1.1)}),
        *({"scale_k": (0, 1)}, {"scale_k": (0.5, 0.4)}, {"flip": 1.1}, {"hue": 0.6}, {"contrast": -1}),
    ],
)
def test_impossible_settings(setting):
    with pytest.raises(UserError, match=next(iter(setting)).replace("_", "-")):
        AugmentConfig(**setting)


def hue_of_pillow(image, factor):
    h, s, v = image.convert("HSV").split()
    turned = (np.asarray(h, np.int64) + int(factor * 255)) % 256
    return Image.merge("HSV", (Image.fromarray(turned.astype(np.uint8)), s, v)).convert("RGB")


PILLOW = {
    BRIGHTNESS: lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    CONTRAST: lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    SATURATION: lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    HUE: hue_of_pillow,
}


def with_pillow(image, gray, factors, order):
    image = Image.fromarray(image)
    if gray:
        image = image.convert("L").convert("RGB")
    for operation in order:
        image = PILLOW[operation](image, float(factors[operation]))
    return np.asarray(image)


def check_jitter(images, jitter):
    """Equal to Pillow to the bit: stricter than needed, but truncation makes a near miss a wrong hue."""
    given = images.copy()
    result = color_jitter(torch.from_numpy(images), jitter)
    assert result.dtype == torch.uint8 and result.is_contiguous() and (images == given).all()
    if views._views is not None:
        views._color(given := images.copy(), jitter)
        assert (given == result.numpy()).all()
    for i in range(len(images)):
        expected = with_pillow(images[i], jitter.gray[i], jitter.factors[i], jitter.order[i])
        assert (result[i].numpy() == expected).all(), jitter[i : i + 1]


def noise_and_gradients(n, height, width, seed=0):
    images = generator(seed).integers(0, 256, (n, height, width, 3), dtype=np.uint8)
    y, x = np.mgrid[:height, :width]
    ramp = np.stack([255 * y / height, 255 * x / width, 255 * (x + y) / (height + width)], axis=2)
    images[1::3] = ramp.astype(np.uint8)
    images[2::3] //= 4
    images[2::3] += 100  # dull colours
    return images


def test_jitter_equals_pillow_in_all_24_orders():
    orders = np.array(list(itertools.permutations(range(4))))
    factors = generator(6).uniform([0.6, 0.6, 0.6, -0.4], [1.4, 1.4, 1.4, 0.4], (24, 4)).astype(np.float32)
    check_jitter(noise_and_gradients(24, 40, 37), Jitter(np.arange(24) % 5 == 0, factors, orders))


@pytest.mark.parametrize("operation", range(4))
def test_single_operations_equal_pillow(operation):
    factors = np.tile(np.float32(SAME_FACTORS), (8, 1))
    factors[:, operation] = np.linspace(-0.5, 0.5, 8) if operation == HUE else np.linspace(0, 3, 8)
    check_jitter(noise_and_gradients(8, 33, 16), Jitter(np.zeros(8, bool), factors, np.full((8, 1), operation)))


def test_drawn_jitter_equals_pillow():
    check_jitter(noise_and_gradients(30, 24, 24), draw(generator(7), 30, AugmentConfig()).jitter)


def test_hue_of_every_saturated_and_many_other_colours_equals_pillow():
    high = np.stack(np.meshgrid(np.arange(256), np.arange(256), [255, 85, 170, 51], indexing="ij"), -1).reshape(-1, 3)
    colours = np.concatenate([high, high[:, [1, 2, 0]], high[:, [2, 0, 1]]]).astype(np.uint8).reshape(3, 512, 512, 3)
    factors = np.tile(np.float32([1, 1, 1, 0.33]), (3, 1))
    factors[1, HUE] = -0.2
    check_jitter(colours, Jitter(np.zeros(3, bool), factors, np.full((3, 1), HUE)))


def test_contrast_s_mean_at_a_half():
    check_jitter(*means_at_a_half())


def means_at_a_half():
    """Of 112² pixels: 1/112² times their sum is below the half for 155 of 256 levels. The mean alone remains."""
    images = np.arange(0, 255, 7, dtype=np.uint8)[:, None, None, None].repeat(112, 1).repeat(112, 2).repeat(3, 3)
    images[:, ::2] += 1
    n = len(images)
    factors = np.tile(np.float32([1, 0, 1, 0]), (n, 1))
    return images, Jitter(np.zeros(n, bool), factors, np.full((n, 1), CONTRAST))


class Divisors(TorchDispatchMode):
    """What is divided by, as a CUDA device would get it; a mean divides by a number."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0].rstrip("_")
        if name in ("div", "true_divide", "mean", "reciprocal", "floor_divide"):
            self.seen.append(args[1] if name == "div" else name)
        return func(*args, **(kwargs or {}))


def test_nothing_is_divided_by_a_number(monkeypatch):
    """On a GPU that is a multiplication by the reciprocal, by a 0-dim CPU tensor, too."""
    monkeypatch.setattr(colour, "to_device", lambda array, device: torch.from_numpy(array).to(device))
    images = torch.empty(6, 9, 9, 3, dtype=torch.uint8, device="meta")
    with Divisors() as divisors:
        color_jitter(images, draw(generator(8), 6, AugmentConfig()).jitter)
    assert len(divisors.seen) > 5
    assert all(isinstance(x, torch.Tensor) and x.device == images.device for x in divisors.seen), divisors.seen
    arguments = 6, torch.float32, images.device
    assert colour._divisor(*arguments) is colour._divisor(*arguments)  # made once: a graph can be captured
    with Divisors() as divisors:  # what this test would see
        images.float().div_(6), images / torch.tensor(6.0), images.float().mean((1, 2))
    assert [getattr(x, "device", x) for x in divisors.seen] == [6, torch.device("cpu"), "mean"]


def test_jitter_without_operations():
    images = noise_and_gradients(6, 9, 9)
    order = np.empty((6, 0), np.int64)
    check_jitter(images, Jitter(np.zeros(6, bool), np.tile(np.float32(SAME_FACTORS), (6, 1)), order))
    check_jitter(images, Jitter(np.arange(6) < 2, np.tile(np.float32(SAME_FACTORS), (6, 1)), order))
    with pytest.raises(ValueError, match="6 rows, images has 5"):
        color_jitter(torch.from_numpy(images[:5]), Jitter(np.zeros(6, bool), np.zeros((6, 4), np.float32), order))


def test_normalize():
    images = torch.from_numpy(noise_and_gradients(3, 8, 10))
    result = normalize(images)
    assert result.shape == (3, 3, 8, 10) and result.dtype == torch.float32
    assert result.is_contiguous(memory_format=torch.channels_last)
    mean, std = torch.tensor(IMAGENET_MEAN).double(), torch.tensor(IMAGENET_STD).double()
    expected = ((images.double() / 255 - mean) / std).permute(0, 3, 1, 2)
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.gpu
def test_jitter_on_a_gpu_equals_the_cpu_without_waiting():
    images, jitter = noise_and_gradients(64, 60, 50), draw(generator(8), 64, AugmentConfig()).jitter
    expected = color_jitter(torch.from_numpy(images), jitter)
    on_gpu = torch.from_numpy(images).cuda()
    color_jitter(on_gpu, jitter), normalize(on_gpu)  # the first call may wait: it allocates
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = color_jitter(on_gpu, jitter)
        normalize(result)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(result.cpu(), expected)
    images, jitter = means_at_a_half()
    on_gpu = torch.from_numpy(images).cuda()
    assert torch.equal(color_jitter(on_gpu, jitter).cpu(), color_jitter(torch.from_numpy(images), jitter))
