"""ops.two_views on every backend: the reference against Pillow, Triton's kernel against the reference, to the bit."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from mopro_fast import ops
from mopro_fast.config import AugmentConfig
from mopro_fast.data.augment import crop_boxes, draw
from mopro_fast.ops.colour import CONTRAST, HUE, Jitter, color_jitter
from mopro_fast.ops.two_views import largest_side

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLAIN = AugmentConfig(grayscale=0, brightness=0, contrast=0, saturation=0, hue=0)
SAME = np.float32([1, 1, 1, 0])  # factors that change nothing
BACKENDS = ("reference", "triton")


pytestmark = pytest.mark.usefixtures("nan_filled_memory")


def generator(seed):
    return np.random.Generator(np.random.PCG64(seed))


def arguments(images, boxes, flips, jitter=None):
    """From uint8 arrays [H, W, 3], int [n, V, 4] and bool [n, V]; some bytes that belong to no image lie in between."""
    n, pieces, places = len(images), [], []
    for image in images:
        pieces += [np.full(5, 255, np.uint8), image.reshape(-1)]
        places.append((sum(map(len, pieces)) - image.size, *image.shape[:2]))
    jitter = jitter or Jitter(np.zeros(n, bool), np.tile(SAME, (n, 1)), np.empty((n, 0), np.int64))
    numbers = [np.array(places, np.int64).reshape(n, 3), boxes, flips, jitter.gray, jitter.factors, jitter.order]
    pixels = np.concatenate([*pieces, np.full(5, 255, np.uint8)])
    return [torch.from_numpy(np.array(x)).to(DEVICE) for x in (pixels, *numbers)]


def drawn(shapes, seed, config=AugmentConfig()):  # noqa: B008
    """-> images of noise with a smooth part, and what augment.draw gives for them."""
    rng, shapes = generator(seed), np.array(shapes)
    images = [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in shapes]
    for image in images[::2]:
        image[:] = image // 4 + np.linspace(0, 190, image.shape[1], dtype=np.uint8)[:, None]
    views = draw(rng, len(shapes), config)
    boxes = np.stack([crop_boxes(shapes, views.q), crop_boxes(shapes, views.k)], axis=1)
    return images, boxes, np.stack([views.q.flip, views.k.flip], axis=1), views.jitter


def on(backend, given, size):
    with ops.use_backend(backend):
        return ops.two_views(*given, size)


def check_backends(given, size):
    """-> the views; Triton's equal to the reference's in every value."""
    expected, result = on("reference", given, size), on("triton", given, size)
    assert result.shape == expected.shape and result.dtype == torch.uint8 and result.is_contiguous()
    difference = (result.int() - expected.int()).abs()
    assert not difference.any(), f"{(difference > 0).sum()} of {difference.numel()} differ, by up to {difference.max()}"
    return expected


SHAPES = [(40, 30), (1, 1), (8, 64), (64, 9), (17, 17), (3, 2), (1, 23), (31, 1), (12, 15), (33, 21)]


def pillow(image, box, flip, size):
    top, left, height, width = (int(v) for v in box)
    crop = Image.fromarray(image).crop((left, top, left + width, top + height))
    crop = crop.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else crop).astype(int)


@pytest.mark.parametrize("size", [8, 15, 32, 112])
def test_reference_equals_pillow_within_rounding(size):
    for seed in range(4):
        images, boxes, flips, _ = drawn(SHAPES, seed)
        result = on("reference", arguments(images, boxes, flips), size).cpu().numpy()
        for i, v in itertools.product(range(len(images)), range(2)):
            difference = abs(result[v, i] - pillow(images[i], boxes[i, v], flips[i, v], size))
            assert difference.max() <= 1, (seed, i, v)  # Pillow rounds to 8 bits between its two passes


@pytest.mark.medium
@pytest.mark.parametrize("size", [8, 15, 32])
def test_triton_equals_the_reference(size):
    images, boxes, flips, jitter = drawn(SHAPES, 10 + size)
    assert flips.any() and not flips.all()
    given = arguments(images, boxes, flips, jitter)
    views = check_backends(given, size)
    assert size > 8 or torch.equal(on("triton", given, size), views)  # again
    plain = on("reference", arguments(images, boxes, flips), size)
    assert torch.equal(views[0], plain[0])
    assert torch.equal(views[1].cpu(), color_jitter(plain[1].cpu(), jitter))


@pytest.mark.medium
def test_boxes_at_every_border():
    image, sides = generator(1).integers(0, 256, (9, 5, 3), dtype=np.uint8), []
    for top, left in itertools.product((0, 4), (0, 1)):
        sides.append([(top, left, 5, 4), (2 * top, 4 * left, 1, 1)])
    sides.append([(0, 0, 9, 5), (0, 0, 1, 5)])
    flips = np.tile([False, True], (len(sides), 1))
    for size in (1, 6):
        check_backends(arguments([image] * len(sides), np.array(sides), flips), size)


@pytest.mark.medium
def test_sums_of_32_and_of_64_bits():
    """Of a white box of 16·1600 px at 16 px they are the largest of 32 bits; the third one has the longest line. Of the
    last box, one pixel would differ if its sums had a common factor."""
    shapes = [(16, 1600), (16, 2100), (1, largest_side(16))]
    images = [np.full((*shape, 3), 255, np.uint8) for shape in shapes]
    images.append(generator(2009).integers(0, 256, (600, 1, 3), dtype=np.uint8))
    boxes = np.array([[(0, 0, *image.shape[:2])] for image in images])
    views = check_backends(arguments(images, boxes, np.zeros((4, 1), bool)), 16)
    assert (views[0, :3] == 255).all()


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter tells what is read")
def test_no_byte_outside_a_box_is_read(monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder

    def spied(builder, pointers, mask, *rest):
        if pointers.get_element_ty().name == "uint8":
            read.update((pointers.data[mask.data] - given[0].data_ptr()).tolist())
        return load(builder, pointers, mask, *rest)

    load = InterpreterBuilder.create_masked_load
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", spied)
    image = np.zeros((7, 9, 3), np.uint8)
    for box, size in itertools.product(
        [(0, 0, 7, 9), (6, 8, 1, 1), (1, 0, 6, 1), (6, 2, 1, 7), (4, 6, 3, 3)], (1, 2, 5)
    ):
        read, given = set(), arguments([image], np.array([[box]]), np.ones((1, 1), bool))
        on("triton", given, size)
        (top, left, height, width), inside = box, np.zeros(image.shape, bool)
        inside[top : top + height, left : left + width] = True
        assert read == set((np.flatnonzero(inside) + int(given[1][0, 0])).tolist()), (box, size)


def test_the_whole_image_at_its_own_size_is_itself():
    image = generator(2).integers(0, 256, (24, 24, 3), dtype=np.uint8)  # 576 pixels: more than a block
    views = check_backends(arguments([image], np.array([[[0, 0, 24, 24]] * 2]), np.array([[False, True]])), 24)
    assert (views[0, 0].cpu().numpy() == image).all() and (views[1, 0].cpu().numpy() == image[:, ::-1]).all()


def coloured(images, jitter):
    """Views of whole images of S by S pixels."""
    n, size = len(images), len(images[0])
    boxes, flips = np.tile([0, 0, size, size], (n, 2, 1)), np.zeros((n, 2), bool)
    result = check_backends(arguments(images, boxes, flips, jitter), size)
    assert torch.equal(result[1].cpu(), color_jitter(torch.from_numpy(np.stack(images)), jitter))


@pytest.mark.medium
def test_all_orders_of_jitter():
    rng, orders = generator(3), np.array(list(itertools.permutations(range(4))))
    factors = rng.uniform([0.6, 0.6, 0.6, -0.4], [1.4, 1.4, 1.4, 0.4], (24, 4)).astype(np.float32)
    coloured(list(rng.integers(0, 256, (24, 5, 5, 3), dtype=np.uint8)), Jitter(np.arange(24) % 5 == 0, factors, orders))


@pytest.mark.parametrize("operation", range(4))
def test_single_operations_over_their_range(operation):
    factors = np.tile(SAME, (6, 1))
    factors[:, operation] = np.linspace(-0.5, 0.5, 6) if operation == HUE else np.linspace(0, 3, 6)
    images = list(generator(4).integers(0, 256, (6, 9, 9, 3), dtype=np.uint8))
    coloured(images, Jitter(np.arange(6) == 1, factors, np.full((6, 1), operation)))


@pytest.mark.medium
def test_the_turn_next_to_whole_steps():
    """It is cut off to whole 255ths in float32, in augment.py in float64."""
    k = np.array([1, 51, 64, 101])
    above = (k / 255).astype(np.float32)  # the nearest
    below = np.nextafter(above, np.float32(0))
    factors = np.tile(SAME, (4 * len(k), 1))
    factors[:, HUE] = np.concatenate([above, below, -above, -below])
    assert len({int(f * 255) for f in factors[:, HUE].astype(np.float64)}) == 15
    images = list(generator(5).integers(0, 256, (len(factors), 8, 8, 3), dtype=np.uint8))
    coloured(images, Jitter(np.zeros(len(factors), bool), factors, np.full((len(factors), 1), HUE)))


def test_contrast_takes_the_mean_of_the_view_at_that_point():
    """Means just on both sides of a half, over more than one block of pixels."""
    images = [np.full((24, 24, 3), 100, np.uint8) for _ in range(3)]
    for image, count in zip(images, (287, 288, 289), strict=True):
        image.reshape(-1, 3)[:count] = 101
    factors = np.tile(SAME, (3, 1))
    factors[:, CONTRAST] = 0
    coloured(images, Jitter(np.zeros(3, bool), factors, np.full((3, 1), CONTRAST)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_view_and_strengths_of_zero(backend):
    images, boxes, flips, jitter = drawn(SHAPES[3:6], 6, PLAIN)
    assert jitter.order.shape == (3, 0)
    both = on(backend, arguments(images, boxes, flips, jitter), 5)
    one = on(backend, arguments(images, boxes[:, :1], flips[:, :1], jitter), 5)
    assert one.shape == (1, 3, 5, 5, 3) and torch.equal(one[0], both[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend):
    empty = arguments([], np.empty((0, 2, 4), np.int64), np.empty((0, 2), bool))
    assert on(backend, empty, 4).shape == (2, 0, 4, 4, 3)


@pytest.mark.medium
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_lies_outside_is_black(backend):
    image = np.full((4, 6, 3), 200, np.uint8)
    good = (0, 0, 4, 6)
    boxes = [(-1, 0, 2, 2), (0, -1, 2, 2), (3, 0, 2, 2), (0, 5, 2, 2), (0, 0, 0, 2), (0, 0, 2, -1), (0, 0, 5, 6)]
    boxes += [(2**62, 0, 2**62, 1), (0, 2**32, 1, 2), *[good] * 9]
    jitter = Jitter(np.zeros(18, bool), np.tile(np.float32([1.4, 1.4, 1.4, 0.4]), (18, 1)), np.tile(range(4), (18, 1)))
    given = arguments([image] * 18, np.stack([np.array(boxes)] * 2, axis=1), np.ones((18, 2), bool), jitter)
    given[0] = torch.cat([given[0], torch.full((100_000,), 200, dtype=torch.uint8, device=DEVICE)])
    places = given[1]
    places[9, 0], places[10, 0], places[11, 0] = -1, len(given[0]) - 71, 2**62
    places[12, 1], places[13, 2], places[14, 2] = 0, largest_side(3) + 1, -6
    places[15, 1:] = 2**32  # the product overflows to 0
    places[16, 1] = largest_side(3) + 1
    result = on(backend, given, 3)
    assert not result[:, :17].any() and (result[0, 17] == 200).all() and result[1, 17].any()


def test_compiles_without_graph_breaks():
    given = arguments(*drawn(SHAPES[4:6], 7))

    def step(*given):
        return ops.normalize(ops.two_views(*given, 4)[1], dtype=torch.bfloat16)

    torch.use_deterministic_algorithms(False)
    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(*given), step(*given))


@pytest.mark.parametrize(
    "place, value, message",
    [
        (0, torch.zeros(9), r"pixels must be uint8, got float32"),
        (1, torch.zeros(2, 4, dtype=torch.int64), r"images must have shape \[N, 3\], got \[2, 4\]"),
        (2, torch.zeros(2, 3, 4, dtype=torch.int64), "boxes must hold 1 or 2 views, got 3"),
        (2, torch.zeros(2, 2, 4, dtype=torch.int32), "boxes must be int64, got int32"),
        (3, torch.zeros(2, 1, dtype=torch.bool), r"flips must have shape \[2, 2\], got \[2, 1\]"),
        (5, torch.zeros(2, 4, dtype=torch.float64), "factors must be float32, got float64"),
        (6, torch.zeros(2, 5, dtype=torch.int64), "order must have at most 4 columns, got 5"),
        (6, torch.zeros(2, 4, dtype=torch.int64, device="meta"), "order must be on cpu, got meta"),
        (7, 0, "size must be above 0, got 0"),
    ],
)
def test_mistakes_are_named(place, value, message):
    given = [*(x.cpu() for x in arguments(*drawn(SHAPES[4:6], 8))), 4]
    given[place] = value
    with pytest.raises(ValueError, match=message):
        ops.two_views(*given)


@pytest.mark.gpu
def test_at_full_size_on_a_gpu():
    images, boxes, flips, jitter = drawn([(300, 400), (224, 224), (500, 333), (112, 150)] * 4, 9)
    check_backends(arguments(images, boxes, flips, jitter), 224)
