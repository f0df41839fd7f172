"""Each of models/speedups.py: the whole step with it on is the plain, loop-written step of reference_step.py."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from reference_step import PlainMoPro
from small_step import SGD, small_method, train_step
from test_ops import DEVICE, rms_error
from test_step import as_floats

from mopro_fast import ops
from mopro_fast.config import MoProConfig
from mopro_fast.data.pipeline import Batch
from mopro_fast.distributed import shuffle_order
from mopro_fast.errors import UserError
from mopro_fast.models import resnet
from mopro_fast.models.mopro import MoPro
from mopro_fast.models.resnet import Bottleneck, GroupedBatchNorm2d, ResNet
from mopro_fast.models.speedups import SPEEDUPS, turn_on
from mopro_fast.training.step import Shuffle

ROWS, CLASSES, SIZE = 16, 5, 32
CONFIG = MoProConfig(queue_size=20, key_momentum=0.9, proto_momentum=0.9, threshold=0.4, start_clean=2)
TOLERANCE = 1e-4
# A value that rounding moves across the kink of a ReLU changes the gradient by 4e-3, a term left out by more than 0.1.
KINK = 0.01


def encoder(bn_group: int) -> ResNet:
    """A stem as for ImageNet, two blocks in layer1 and one in each other: all that joins and all that does not."""
    torch.manual_seed(5)
    return ResNet("resnet17", CLASSES, 8, width=0.125, stem="imagenet", bn_group=bn_group)


@pytest.mark.medium
@pytest.mark.parametrize("epoch", [0, 2])
@pytest.mark.parametrize("name, bn_group", [*((name, 8) for name in SPEEDUPS), ("all", 8), ("all", 0)])
def test_the_step_is_the_plain_one(name: str, bn_group: int, epoch: int, monkeypatch) -> None:
    monkeypatch.setitem(resnet.LAYERS, "resnet17", (Bottleneck, (2, 1, 1, 1)))
    g = torch.Generator().manual_seed(epoch)
    view_q, view_k = torch.randint(256, (2, ROWS, SIZE, SIZE, 3), dtype=torch.uint8, generator=g)
    labels = torch.randint(CLASSES, (ROWS,), generator=g)
    prototypes = F.normalize(torch.randn(CLASSES, 8, generator=g), dim=1)

    plain_encoder = encoder(bn_group)
    for m in plain_encoder.modules():
        if isinstance(m, GroupedBatchNorm2d):
            m.fused = "off"
    model = MoPro(encoder(bn_group), encoder(bn_group), CONFIG).train()
    plain = PlainMoPro(plain_encoder, model.queue, CONFIG, 1)
    for one in (model, plain):
        one.prototypes.copy_(prototypes)
    optimizer = torch.optim.SGD(plain.encoder_q[0].parameters(), **SGD)
    order = shuffle_order(0, 0, ROWS)
    ((want,), gradients) = plain.step(as_floats(view_q)[None], as_floats(view_k)[None], labels[None], epoch, order)
    optimizer.step()
    plain.update_key_encoder()

    turn_on(model.to(DEVICE, memory_format=torch.channels_last), *(SPEEDUPS if name == "all" else [name]))
    step = train_step(model, ROWS, device=DEVICE, precision="fp32", cuda_graph=False)
    batch = Batch(*(x.to(DEVICE) for x in (view_q, view_k, labels, torch.arange(ROWS))))
    ((batch, place),) = Shuffle(0, ROWS)([batch], 0)
    with ops.use_backend("triton"), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        out = step(batch, place, epoch, 0, SGD["lr"])

    for metric in ("loss", "loss_cls", "loss_proto", "loss_inst"):
        assert out.metrics[metric].item() == pytest.approx(want[metric], rel=TOLERANCE)
    assert torch.equal(out.labels.cpu(), want["labels"]) and torch.equal(out.kept.cpu(), want["kept"])
    ours = torch.cat([p.grad.flatten() for p in model.encoder_q.parameters()])
    assert rms_error(ours, torch.cat([g.flatten() for g in gradients.values()])) < KINK
    assert rms_error(model.queue, plain.queue) < TOLERANCE and rms_error(model.prototypes, plain.prototypes) < TOLERANCE
    for mine, theirs in ((model.encoder_q, plain.encoder_q[0]), (model.encoder_k, plain.encoder_k[0])):
        for (entry, a), b in zip(mine.state_dict().items(), theirs.state_dict().values(), strict=True):
            moved = entry.endswith(("weight", "bias"))  # by a gradient
            assert a.shape == b.shape and rms_error(a.float(), b.float()) < (KINK if moved else TOLERANCE), entry


def test_key_convolutions_are_those_of_layer1_and_layer2(monkeypatch) -> None:
    monkeypatch.setitem(resnet.LAYERS, "resnet17", (Bottleneck, (2, 1, 1, 1)))
    model = turn_on(MoPro(encoder(0), encoder(0), CONFIG).train(), "key-convolutions")
    fused = {name for name, m in model.named_modules() if getattr(m, "fused_conv", False)}
    assert fused == {"encoder_k.layer1.0", "encoder_k.layer1.1", "encoder_k.layer2.0"}
    with mock.patch.object(ops, "conv1x1_stats_", side_effect=ops.conv1x1_stats_) as calls:
        for names in ([], ["half-keys"]):
            turn_on(model, *names)
            with torch.autocast("cpu", torch.bfloat16), model.in_key_dtype(torch.device("cpu")):
                model.key(torch.randn(4, 3, SIZE, SIZE))
    types = [call.args[0].dtype for call in calls.call_args_list]
    assert types == [torch.bfloat16] * 2 * len(fused) + [torch.float16] * 2 * len(fused)


@pytest.mark.medium
def test_all_in_16_bits_are_as_near_to_float32_as_none(monkeypatch) -> None:
    """As they run on a GPU: a query in bfloat16, keys in float16. The interpreter cuts bfloat16 off, a GPU rounds."""
    monkeypatch.setitem(resnet.LAYERS, "resnet17", (Bottleneck, (2, 1, 1, 1)))
    g = torch.Generator().manual_seed(0)
    view_q, view_k = torch.randint(256, (2, ROWS, SIZE, SIZE, 3), dtype=torch.uint8, generator=g).to(DEVICE)
    ids, found = torch.arange(ROWS, device=DEVICE), []
    for precision, names in (("fp32", ()), ("bf16", ()), ("bf16", tuple(SPEEDUPS))):
        model = MoPro(encoder(8), encoder(8), CONFIG).train().to(DEVICE, memory_format=torch.channels_last)
        step = train_step(turn_on(model, *names), ROWS, device=DEVICE, precision=precision, cuda_graph=False)
        with ops.use_backend("triton" if names else "reference"):
            out = step(Batch(view_q, view_k, ids % CLASSES, ids), ids, 0, 0, SGD["lr"])
        grads = [step.query.state_dict(keep_vars=True)[name].grad for name, _ in model.encoder_q.named_parameters()]
        found.append((out.loss, model.queue[:ROWS], torch.cat([grad.flatten().float() for grad in grads])))
    for exact, none, all_on in zip(*found, strict=True):
        assert rms_error(all_on, exact) < 2.5 * rms_error(none, exact)


@pytest.mark.parametrize("shape", [(2, 5, SIZE, SIZE), (2, SIZE, SIZE, 3)])
def test_images_of_other_channels_are_refused(shape) -> None:
    with pytest.raises(RuntimeError, match="channels"):
        ResNet("resnet18", CLASSES, 8, width=0.125)(torch.zeros(shape))


SWITCHES = {
    "residual-joins": lambda m: {block.fork for block in m.encoder_q.blocks()[:-1]} == {m.encoder_q.fork} == {"on"},
    "sign-bits": lambda m: {block.fork for block in m.encoder_q.blocks()[:-1]} == {m.encoder_q.fork} == {"signs"},
    "one-launch-norms": lambda m: all(x.one_launch for x in m.modules() if isinstance(x, GroupedBatchNorm2d)),
    "key-convolutions": lambda m: m.encoder_k.layer2[0].fused_conv and not m.encoder_q.layer2[0].fused_conv,
    "key-stream": lambda m: m.key_stream,
    "stem": lambda m: m.encoder_q.fused_stem and m.encoder_k.fused_stem,
    "padded-input": lambda m: m.image_channels == 4,
    "half-keys": lambda m: m.key_dtype == torch.float16,
}


@pytest.mark.parametrize("name", SPEEDUPS)
def test_what_each_turns_on(name: str, monkeypatch) -> None:
    """Some show nothing on a CPU, or in float32, where the step above runs."""
    monkeypatch.setitem(resnet.LAYERS, "resnet17", (Bottleneck, (2, 1, 1, 1)))
    model = MoPro(encoder(0), encoder(0), CONFIG)
    assert not SWITCHES[name](model)
    assert SWITCHES[name](turn_on(model, name))


def test_a_name_that_is_none() -> None:
    with pytest.raises(UserError, match=r"^no speed-up has the name 'stm'; there are residual-joins, sign-bits, "):
        turn_on(small_method("mopro"), "stm")


def test_a_method_without_a_key_encoder_takes_them_all() -> None:
    method = small_method("ce")
    assert turn_on(method, *SPEEDUPS) is method and method.encoder_q.blocks()[0].fork == "signs"


@pytest.mark.parametrize("name", ["residual-joins", "sign-bits"])
def test_joins_with_activations_computed_twice(name: str, monkeypatch) -> None:
    monkeypatch.setitem(resnet.LAYERS, "resnet17", (Bottleneck, (2, 1, 1, 1)))
    found = []
    for recompute in (False, True):
        model = turn_on(MoPro(encoder(0), encoder(0), CONFIG).train(), name)
        for m in model.encoder_q.modules():
            if isinstance(m, GroupedBatchNorm2d):
                m.fused = "on"
        model.encoder_q.recompute = recompute
        x = torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
        model.encoder_q(x)[0].square().sum().backward()
        found.append(
            [*(p.grad for p in model.encoder_q.parameters() if p.grad is not None), *model.encoder_q.buffers()]
        )
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
