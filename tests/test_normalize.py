"""ops.normalize on both backends."""

import numpy as np
import pytest
import torch

from mopro_fast import ops
from mopro_fast.ops.colour import IMAGENET_MEAN, IMAGENET_STD

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16_STEP = 2**-8 if DEVICE == "cuda" else 2**-7  # Triton's interpreter cuts off where a GPU rounds


def every_value(height, width):
    """uint8 [3, height, width, 3]: all 256 values in every channel of every image."""
    assert height * width >= 256
    values = torch.arange(height * width, device=DEVICE) % 256
    return torch.stack([(values[:, None] + torch.arange(3, device=DEVICE) * k).byte() for k in range(3)]).view(
        3, height, width, 3
    )


def exactly(images):
    """Of the float32 constants, rounded once: what PyTorch's addcmul gives where the processor fuses it."""
    mean, std = np.array(IMAGENET_MEAN), np.array(IMAGENET_STD)
    shift, scale = (
        torch.tensor(x, dtype=torch.float32, device=DEVICE).double() for x in (-mean / std, 1 / (255 * std))
    )
    return (images.double() * scale + shift).float().permute(0, 3, 1, 2)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("height, width", [(16, 16), (1, 700), (67, 19), (301, 1)])
@pytest.mark.parametrize("flip", [False, True])
def test_normalize(height, width, flip, backend):
    images = every_value(height, width)
    flips = torch.tensor([True, False, True], device=DEVICE) if flip else None
    expected = exactly(images)
    if flip:
        expected[::2] = expected[::2].flip(3)
    with ops.use_backend(backend):
        result = ops.normalize(images, flips=flips)
        assert result.shape == (3, 3, height, width) and result.dtype == torch.float32
        assert result.permute(0, 2, 3, 1).is_contiguous()  # channels_last
        if backend == "triton":
            assert torch.equal(result, expected)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)
        for dtype, step in ((torch.bfloat16, BF16_STEP), (torch.float16, 2**-10)):
            low = ops.normalize(images, flips=flips, dtype=dtype)
            assert low.dtype == dtype and low.stride() == result.stride()
            torch.testing.assert_close(low.float(), expected, rtol=step, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_of_no_images(backend):
    with ops.use_backend(backend):
        assert ops.normalize(torch.empty(0, 4, 5, 3, dtype=torch.uint8, device=DEVICE)).shape == (0, 3, 4, 5)


def test_mistakes_are_named():
    images = torch.zeros(2, 4, 5, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"images must have shape \[N, H, W, 3\], got \[2, 3, 4, 5\]"):
        ops.normalize(images.permute(0, 3, 1, 2))
    with pytest.raises(ValueError, match="images must be uint8, got float32"):
        ops.normalize(images.float())
    with pytest.raises(ValueError, match=r"flips must have shape \[2\], got \[3\]"):
        ops.normalize(images, flips=torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"dtype must be .*, got torch\.int32"):
        ops.normalize(images, dtype=torch.int32)
