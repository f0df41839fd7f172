"""The prediction of a step's peak memory: what it counts is what real tensors take, and the budget holds."""

import sys
from pathlib import Path

import pytest
import torch

from mopro_fast.config import DataConfig, ModelConfig, MoProConfig, RunConfig, TrainConfig
from mopro_fast.models.precision import low_precision
from mopro_fast.models.resnet import ResNet

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import memory


def kept_for_backward(outputs, known) -> int:
    """Bytes, read from the graph itself: every node's saved tensors but the known ones, a storage once."""
    found, nodes, seen = {}, [y.grad_fn for y in outputs], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        values = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        for x in (*values, *getattr(node, "saved_tensors", ())):
            if isinstance(x, torch.Tensor):
                found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        nodes += [following for following, _ in node.next_functions]
    known = {x.untyped_storage().data_ptr() for x in known}
    return sum(size for pointer, size in found.items() if pointer not in known)


@pytest.mark.parametrize("arch, stem, bf16", [("resnet18", "small", False), ("resnet50", "imagenet", True)])
def test_what_is_saved_is_what_the_graph_holds(arch, stem, bf16) -> None:
    encoder = ResNet(arch, 5, 8, width=0.25, stem=stem).train()
    if bf16:
        encoder = low_precision(encoder, torch.bfloat16)[0]
    known = [*encoder.parameters(), *encoder.buffers()]
    images = torch.randn(4, 3, 40, 40).to(memory_format=torch.channels_last)
    saved = memory.Saved(known)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        expected = kept_for_backward(encoder(images), known)
        with saved:
            encoder(images)
    assert saved.bytes == expected > 1e6


def test_live_bytes() -> None:
    with memory.Live() as live:
        a = torch.zeros(100)
        b = a.view(10, 10)
        c = a + 1
        assert (live.now, live.most) == (800, 800)
        del a
        assert live.now == 800  # b is the same memory
        del b, c
        d = torch.zeros(25)
        assert (live.now, live.most) == (100, 800)
    del d


@pytest.mark.medium
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_of_fake_tensors_takes_what_a_real_one_does(precision) -> None:
    config = TrainConfig(
        data=DataConfig(num_classes=7, image_size=32),
        model=ModelConfig(arch="resnet18", stem="small", width=0.25, embed_dim=8),
        mopro=MoProConfig(queue_size=32),
        run=RunConfig(precision=precision),
    )
    fake, real = (memory.step_parts(config, 8, fake) for fake in (True, False))
    assert fake.keys() == real.keys() and fake["activations kept for the backward pass"] > 5e6
    # Not to the byte: PyTorch's fake BatchNorm has its C means and deviations in the input's type.
    tolerance = 0 if precision == "fp32" else 2e-3
    for name, size in real.items():
        assert fake[name] == pytest.approx(size, rel=tolerance), name


@pytest.mark.medium
def test_a_batch_of_1024_fits_80_gb() -> None:
    case = memory.predicted(memory.Assumptions(), 1024, 5000)
    assert case["total"] <= 0.9 * 80e9
    assert case["parts"]["activations kept for the backward pass"] > 10e9  # so it has been counted
