"""The batches of the tools after training: in order, with the same bits whatever the number of threads."""

import pytest
import torch

from mopro_fast.downstream.row_map import in_order
from mopro_fast.models.resnet import ResNet

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_bits_do_not_depend_on_the_number_of_threads():
    torch.manual_seed(0)
    encoder = ResNet("resnet18", 10, 64, width=0.25, stem="small").eval().to(memory_format=torch.channels_last)
    batches = [(torch.randn(n, 3, 32, 32),) for n in (32, 32, 32, 32, 7)]

    @torch.inference_mode()
    def features(images):
        return torch.cat([encoder.features(images), *encoder(images)], 1)

    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(list(in_order(features, batches, CPU)))
        assert torch.get_num_threads() == count
    assert [len(x) for x in found[0]] == [32, 32, 32, 32, 7]
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


def test_batches_are_drawn_as_they_are_needed_and_errors_arrive():
    torch.set_num_threads(2)
    drawn = []

    def batches():
        for i in range(100):
            drawn.append(i)
            yield (i,)

    results = in_order(lambda i: 1 // (i - 5), batches(), CPU)
    assert [next(results) for _ in range(5)] == [1 // (i - 5) for i in range(5)]
    assert len(drawn) <= 5 + 2 + 1
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert torch.get_num_threads() == 2
