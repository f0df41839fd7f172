"""ops.normalize on both backends."""

import numpy as np
import pytest
import torch

from mopro_fast import ops
from mopro_fast.models.baseline import CrossEntropy
from mopro_fast.models.resnet import ResNet
from mopro_fast.ops.colour import IMAGENET_MEAN, IMAGENET_STD, principal_shifts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16_STEP = 2**-8 if DEVICE == "cuda" else 2**-7  # Triton's interpreter cuts off where a GPU rounds


pytestmark = pytest.mark.usefixtures("nan_filled_memory")


def every_value(height, width):
    """uint8 [3, height, width, 3]: all 256 values in every channel of every image."""
    assert height * width >= 256
    values = torch.arange(height * width, device=DEVICE) % 256
    return torch.stack([(values[:, None] + torch.arange(3, device=DEVICE) * k).byte() for k in range(3)]).view(
        3, height, width, 3
    )


def exactly(images, shifts=None):
    """Of the float32 constants, rounded once: what PyTorch's addcmul gives where the processor fuses it. With shifts
    the constant that is added is rounded once before."""
    mean, std = np.array(IMAGENET_MEAN), np.array(IMAGENET_STD)
    shift, scale, rstd = (
        torch.tensor(x, dtype=torch.float32, device=DEVICE).double() for x in (-mean / std, 1 / (255 * std), 1 / std)
    )
    if shifts is not None:
        shift = (shifts[:, None, None].double() * rstd + shift).float().double()
    return (images.double() * scale + shift).float().permute(0, 3, 1, 2)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("height, width", [(16, 16), (1, 700), (67, 19), (301, 1)])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("channels", [3, 4])
def test_normalize(height, width, channels, shift, flip, backend):
    images = every_value(height, width)
    flips = torch.tensor([True, False, True], device=DEVICE) if flip else None
    shifts = torch.tensor([[0.02, -0.1, 0.3], [-0.003, 0.0, 1.5], [1e-8, -0.7, 0.1]], device=DEVICE) if shift else None
    expected = exactly(images, shifts)
    if flip:
        expected[::2] = expected[::2].flip(3)
    if channels == 4:
        expected = torch.cat([expected, torch.zeros_like(expected[:, :1])], 1)
    with ops.use_backend(backend):
        result = ops.normalize(images, flips=flips, shifts=shifts, channels=channels)
        assert result.shape == (3, channels, height, width) and result.dtype == torch.float32
        assert result.permute(0, 2, 3, 1).is_contiguous()  # channels_last
        if backend == "triton":
            assert torch.equal(result, expected)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)
        for dtype, step in ((torch.bfloat16, BF16_STEP), (torch.float16, 2**-10)):
            low = ops.normalize(images, flips=flips, dtype=dtype, shifts=shifts, channels=channels)
            assert low.dtype == dtype and low.stride() == result.stride()
            torch.testing.assert_close(low.float(), expected, rtol=step, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_of_no_images(backend):
    with ops.use_backend(backend):
        none = torch.empty(0, 4, 5, 3, dtype=torch.uint8, device=DEVICE)
        for shifts in (None, torch.empty(0, 3, device=DEVICE)):
            for channels in (3, 4):
                assert ops.normalize(none, shifts=shifts, channels=channels).shape == (0, channels, 4, 5)


@pytest.mark.parametrize("stem", ["imagenet", "small"])
def test_the_encoder_takes_the_fourth_channel_as_if_it_were_not_there(stem):
    torch.manual_seed(0)
    encoder = ResNet("resnet18", 5, 8, width=0.125, stem=stem).to(DEVICE, memory_format=torch.channels_last)
    model, found = CrossEntropy(encoder), []
    images = torch.randint(256, (4, 20, 17, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(
        DEVICE
    )
    shifts = torch.linspace(-0.5, 0.5, 12, device=DEVICE).view(4, 3)
    for model.image_channels in (3, 4):
        x = model.normalize(images, shifts)
        assert x.shape == (4, model.image_channels, 20, 17)
        assert torch.equal(x[:, :3], ops.normalize(images, shifts=shifts)) and not x[:, 3:].any()
        encoder.zero_grad()
        features = encoder.double().features(x.double())
        features.square().sum().backward()
        assert encoder.conv1.weight.grad.shape == encoder.conv1.weight.shape
        found.append((features.detach(), encoder.conv1.weight.grad.clone()))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_shifts_are_added_in_units_of_full_brightness():
    images = every_value(16, 16)
    shifts = torch.tensor([[3, 0, -200], [255, 17, 1], [0, 0, 0]], device=DEVICE)
    moved = images.int() + shifts[:, None, None]  # beyond 0 and 255: nothing is clamped
    mean, std = (torch.tensor(x, device=DEVICE) for x in (IMAGENET_MEAN, IMAGENET_STD))
    expected = ((moved / 255 - mean) / std).permute(0, 3, 1, 2)
    torch.testing.assert_close(ops.normalize(images, shifts=shifts / 255), expected, rtol=0, atol=3e-6)


def test_principal_shifts_are_the_sum_over_three_colours():
    draws = np.array([[0.1, -0.2, 0.3], [0, 0, 0], [1, 0, 0], [0, 0, -1]])
    sizes = (0.2175, 0.0188, 0.0045)
    colours = ((-0.5675, -0.5808, -0.5836), (0.7192, -0.0045, -0.6948), (0.4009, -0.8140, 0.4203))
    expected = [
        [sum(e[j] * sizes[j] * colours[j][channel] for j in range(3)) for channel in range(3)] for e in draws.tolist()
    ]
    found = principal_shifts(draws)
    assert found.dtype == np.float32 and found.shape == (4, 3)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=0)
    np.testing.assert_allclose(found[3], -0.0045 * np.array([0.4009, -0.8140, 0.4203]), rtol=1e-6)
    assert principal_shifts(np.empty((0, 3))).shape == (0, 3)


def test_mistakes_are_named():
    images = torch.zeros(2, 4, 5, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"images must have shape \[N, H, W, 3\], got \[2, 3, 4, 5\]"):
        ops.normalize(images.permute(0, 3, 1, 2))
    with pytest.raises(ValueError, match="images must be uint8, got float32"):
        ops.normalize(images.float())
    with pytest.raises(ValueError, match=r"flips must have shape \[2\], got \[3\]"):
        ops.normalize(images, flips=torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"shifts must have shape \[2, 3\], got \[2\]"):
        ops.normalize(images, shifts=torch.zeros(2))
    with pytest.raises(ValueError, match="shifts must be float32, got float64"):
        ops.normalize(images, shifts=torch.zeros(2, 3).double())
    with pytest.raises(ValueError, match="channels must be 3 or 4, got 5"):
        ops.normalize(images, channels=5)
    with pytest.raises(ValueError, match=r"dtype must be .*, got torch\.int32"):
        ops.normalize(images, dtype=torch.int32)
