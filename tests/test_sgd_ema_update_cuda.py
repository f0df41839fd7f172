"""csrc/sgd_ema_update.cu against float64: on the CPU through tests/host_cuda.py, and on a GPU if there is one."""

import pytest
import torch
from guarded import Guarded, bits, name

from mopro_fast import ops

CHUNK, TENSORS = 8192, 512  # of csrc/multi_tensor.cuh and csrc/sgd_ema_update.cu: where its paths change
SIZES = [0, 1, 3, 4, 5, 127, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 2]
FEW = [5, 1030]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
U = 2.0**-24  # half of float32's last place
ROLES = ("param", "grad", "buffer", "target", "param_shadow", "target_shadow")
USUAL = {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.05, "nesterov": False, "ema_momentum": 0.75}


class Tensors:
    """One Guarded per role and size; every number large enough to matter beside the others."""

    def __init__(self, device, sizes, grad=F32, shadows=(None, None), offsets=(0,) * 6):
        generator = torch.Generator().manual_seed(0)
        dtypes = (F32, grad, F32, F32, *(shadow or BF16 for shadow in shadows))
        self.roles = {
            role: [Guarded(torch.randn(n, generator=generator).to(dtype), device, offset) for n in sizes]
            for role, dtype, offset in zip(ROLES, dtypes, offsets, strict=True)
        }
        self.grad, self.shadows = grad, shadows

    def __getitem__(self, role):
        return [guarded.tensor for guarded in self.roles[role]]

    def run(self, kernels, lr, momentum, weight_decay, nesterov, ema_momentum):
        pointers = {role: [guarded.pointer() for guarded in tensors] for role, tensors in self.roles.items()}
        rate = torch.tensor([lr], device=kernels.device)
        kernels.module.sgd_ema_update(
            pointers["param"], pointers["grad"], pointers["buffer"] if momentum else [], pointers["target"],
            *(pointers[role] if shadow else [] for role, shadow in zip(ROLES[4:], self.shadows, strict=True)),
            [t.numel() for t in self["param"]], name(self.grad), *map(name, self.shadows), rate.data_ptr(),
            momentum, weight_decay, nesterov, ema_momentum, kernels.stream,
        )  # fmt: skip


def close(actual, expected, error):
    """Within what the roundings add up to (and a little, for products of roundings), and subnormals."""
    assert torch.all((actual.double().cpu() - expected).abs() <= 1.001 * error + 1e-44)


def check(kernels, sizes, grad=F32, shadows=(None, None), offsets=(0,) * 6, **changed):
    settings = {**USUAL, **changed}
    tensors = Tensors(kernels.device, sizes, grad, shadows, offsets)
    before = {role: [t.double().cpu() for t in tensors[role]] for role in ROLES}
    tensors.run(kernels, **settings)

    # What the kernel is given: float32.
    lr, mu, wd, m = (float(torch.tensor(settings[key])) for key in ("lr", "momentum", "weight_decay", "ema_momentum"))
    for i in range(len(sizes)):
        p, g, b, t = (before[role][i] for role in ("param", "grad", "buffer", "target"))
        g = g + wd * p
        g_error = U * g.abs()
        b = mu * b + g
        b_error = U * b.abs() + g_error
        d, d_error = b, b_error
        if settings["nesterov"]:
            d = g + mu * b
            d_error = U * d.abs() + g_error + mu * b_error
        p = p - lr * d
        p_error = U * p.abs() + lr * d_error
        moved = m * t + (1 - m) * p
        error = U * moved.abs() + (1 - m) * (U * p.abs() + p_error)
        close(tensors["param"][i], p, p_error)
        close(tensors["target"][i], moved, error)
        if mu:
            close(tensors["buffer"][i], b, b_error)
        for role, shadow in zip(("param", "target"), shadows, strict=True):
            if shadow:
                assert torch.equal(bits(tensors[f"{role}_shadow"][i]), bits(tensors[role][i].to(shadow)))
    written = {"grad": False, "buffer": mu != 0, "param_shadow": bool(shadows[0]), "target_shadow": bool(shadows[1])}
    for role, all_guarded in tensors.roles.items():
        for guarded in all_guarded:
            guarded.check(written.get(role, True))
    return tensors


@pytest.mark.parametrize("momentum, nesterov", [(0.9, False), (0.9, True), (0.0, False)])
@pytest.mark.parametrize("shadows", [(None, None), (BF16, BF16), (F16, F16), (BF16, F16), (F16, BF16)])
@pytest.mark.parametrize("grad", [F32, BF16, F16])
def test_against_float64(kernels, grad, shadows, momentum, nesterov):
    check(kernels, SIZES, grad, shadows, momentum=momentum, nesterov=nesterov)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(
    "changed",
    [{"lr": 0.0}, {"lr": 2.0}, {"weight_decay": 0.0}, {"weight_decay": 1e-4}, {"momentum": 1.0}, {"momentum": 0.1},
     {"ema_momentum": 0.0}, {"ema_momentum": 1.0}, {"ema_momentum": 0.999}],

)  # fmt: skip
def test_settings(kernels, changed, nesterov):
    tensors = check(kernels, FEW, shadows=(BF16, F16), nesterov=nesterov, **changed)
    if changed == {"ema_momentum": 0.0}:
        assert all(torch.equal(t, p) for t, p in zip(tensors["target"], tensors["param"], strict=True))


OFFSETS = [tuple(int(i == j) for i in range(6)) for j in range(6)] + [(1,) * 6, (2,) * 6, (0, 0, 0, 0, 2, 2)]


@pytest.mark.parametrize("offsets", OFFSETS)
@pytest.mark.parametrize("grad", [F32, BF16])
def test_misaligned(kernels, grad, offsets):
    check(kernels, FEW, grad, (BF16, BF16), offsets)
    check(kernels, FEW, grad, (None, None), offsets, momentum=0.0)


@pytest.mark.medium
@pytest.mark.parametrize("count", [1, 2, TENSORS - 1, TENSORS, TENSORS + 1, 2 * TENSORS + 90])
def test_many_tensors(kernels, count):
    check(kernels, [i % 23 for i in range(count)], F32, (BF16, BF16))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_order_of_blocks_and_threads_does_not_matter(host_cuda, kernels, order):
    if kernels.device == "cuda":
        pytest.skip("a GPU has an order of its own")
    host_cuda.order(order)
    check(kernels, SIZES, BF16, (BF16, F16), nesterov=True)


@pytest.mark.medium
def test_launches(host_cuda, kernels):
    def launches(sizes):
        before = host_cuda.launches()
        check(kernels, sizes, momentum=0.0)
        return host_cuda.launches() - before

    host_cuda.sgd_ema_update([], [], [], [], [], [], [], "float32", None, None, 0, 0.9, 0.0, False, 0.9, 0)
    if kernels.device == "cpu":
        assert launches([0, 0]) == 0
        assert launches([64] * 165) == 1  # ResNet-50 with its projection head
        assert launches([1, 0] * TENSORS) == 1
        assert launches([1] * (TENSORS + 1)) == 2


def test_same_bits_twice(kernels):
    results = []
    for _ in range(2):
        tensors = Tensors(kernels.device, SIZES, BF16, (F16, BF16))
        for _ in range(3):
            tensors.run(kernels, **USUAL)
        results.append(torch.cat([bits(t) for role in ROLES for t in tensors[role]]))
    assert torch.equal(*results)


def test_wrong_calls(host_cuda):
    def call(n=(1, 1, 1, 1, 0, 0), numels=(1,), grad="float32", shadow=None, target_shadow=0, momentum=0.9):
        lists = [[16] * count for count in n]
        host_cuda.sgd_ema_update(
            *lists,
            list(numels),
            grad,
            *([shadow] * 2 if target_shadow == 0 else [shadow, target_shadow]),
            16,
            momentum,
            0.0,
            False,
            0.9,
            0,
        )

    wrong = [
        {"n": (2, 1, 1, 1, 0, 0)}, {"n": (1, 0, 1, 1, 0, 0)}, {"n": (1, 1, 0, 1, 0, 0)}, {"n": (1, 1, 1, 0, 0, 0)},
        {"n": (1, 1, 1, 1, 1, 1)}, {"n": (1, 1, 1, 1, 1, 0), "shadow": "bfloat16"},
        {"n": (1, 1, 1, 1, 0, 1), "shadow": "bfloat16"}, {"momentum": 0.0}, {"numels": (1, 1)}, {"numels": (-1,)},
    ]  # fmt: skip
    for arguments in wrong:
        with pytest.raises(ValueError, match=r"sgd_ema_update: . params, . grads, .* do not go together"):
            call(**arguments)
    with pytest.raises(ValueError, match="not float64"):
        call(grad="float64")
    with pytest.raises(ValueError, match="shadows must be"):
        call(n=(1,) * 6, shadow="float32")
    for other in ({"n": (1, 1, 1, 1, 1, 0), "shadow": "float16", "target_shadow": None},
                  {"n": (1, 1, 1, 1, 0, 1), "target_shadow": "float16"}):  # fmt: skip
        with pytest.raises(ValueError, match="param_shadows and target_shadows go together"):
            call(**other)


def arguments(shadow=None, target_shadow=None):
    g = torch.Generator().manual_seed(1)
    shapes = [(), (7,), (0, 3), (6, 3, 5, 5), (4, 6), (3, 4, 2)]
    params, grads, buffers, targets = ([torch.randn(s, generator=g) for s in shapes] for _ in range(4))
    params[3] = params[3].to(memory_format=torch.channels_last)
    targets[3] = targets[3].to(memory_format=torch.channels_last)
    params[4] = torch.randn(6, 4, generator=g).T
    targets[5] = torch.randn(3, 4, 6, generator=g)[:, :, ::3]  # with gaps
    grads[1] = grads[1].bfloat16()
    both = zip((params, targets), (shadow, target_shadow or shadow), strict=True)
    low = [[torch.zeros_like(t, dtype=dtype) for t in tensors] for tensors, dtype in both]
    return params, grads, buffers, targets, dict(zip(("param_shadows", "target_shadows"), low, strict=True))


@pytest.mark.usefixtures("cuda_on_host")
@pytest.mark.parametrize("missing", [(), (0, 3), (1,), range(6)])
@pytest.mark.parametrize("shadow, of_target", [(None, None), (BF16, BF16), (BF16, F16)])
def test_through_the_op(shadow, of_target, missing):
    """Layouts that differ, gaps, mixed gradient types, tensors without a gradient: as the reference."""
    results = []
    for backend in ("cuda", "reference"):
        params, grads, buffers, targets, shadows = arguments(shadow or BF16, of_target)
        for i in missing:
            grads[i] = buffers[i] = None
        with ops.use_backend(backend):
            for lr in (torch.tensor([0.3]), 0.1):
                ops.sgd_ema_update_(
                    params, grads, buffers, targets, lr=lr, momentum=0.9, weight_decay=0.05, nesterov=True,
                    ema_momentum=0.75, **(shadows if shadow else {}),
                )  # fmt: skip
        results.append([*params, *targets, *(b for b in buffers if b is not None)])
        untouched = arguments()[0]
        for i in range(6):
            assert torch.equal(params[i], untouched[i]) == (i in missing or params[i].numel() == 0)
            if shadow:
                assert torch.equal(shadows["target_shadows"][i], targets[i].to(of_target))
                assert i in missing or torch.equal(shadows["param_shadows"][i], params[i].to(shadow))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


MISTAKES = {
    "momentum must lie in [0, 1], got 2.0": {"momentum": 2.0},
    "ema_momentum must lie in [0, 1], got -1.0": {"ema_momentum": -1.0},
    "weight_decay must be a finite number of at least 0, got -0.1": {"weight_decay": -0.1},
    "nesterov needs a momentum above 0, got 0": {"momentum": 0, "nesterov": True},
    "grads must hold 6 tensors, one per param, got 0": {"grads": []},
    "buffers must hold 6 tensors, one per param, got 0": {"buffers": []},
    "targets must hold 6 tensors, one per param, got 1": {"targets": [torch.zeros(())]},
    "target_shadows must hold 6 tensors, one per param, got 0": {"param_shadows": arguments(BF16)[4]["param_shadows"]},
    "buffers[1] must be a tensor, got NoneType": {"buffers": [torch.zeros(()), None, *arguments()[2][2:]]},
    "params[0] must be float32, got float16": {"params": [torch.zeros((), dtype=F16), *arguments()[0][1:]]},
    "lr must have shape [1], got [2]": {"lr": torch.zeros(2)},
    "lr must be float32, got float64": {"lr": torch.zeros(1, dtype=torch.float64)},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_named(message):
    params, grads, buffers, targets, _ = arguments()
    given = {"params": params, "grads": grads, "buffers": buffers, "targets": targets, **USUAL, **MISTAKES[message]}
    with pytest.raises(ValueError) as caught:
        ops.sgd_ema_update_(**given)
    assert str(caught.value) == message
    assert torch.equal(targets[4], arguments()[3][4])


@pytest.mark.gpu
def test_captured_in_a_graph_the_learning_rate_is_read_on_the_device():
    params, grads, buffers, targets, _ = ([t.cuda() for t in x] if isinstance(x, list) else x for x in arguments())
    lr = torch.tensor([0.1], device="cuda")
    expected = [t.clone() for t in params], [t.clone() for t in buffers], [t.clone() for t in targets]
    settings = {**USUAL, "lr": lr}
    graph = torch.cuda.CUDAGraph()
    with ops.use_backend("cuda"):
        ops.sgd_ema_update_(params, grads, buffers, targets, **settings)
        with torch.cuda.graph(graph):
            ops.sgd_ema_update_(params, grads, buffers, targets, **settings)
        for rate in (0.5, 0.25):
            lr.fill_(rate)
            graph.replay()
        for rate in (0.1, 0.5, 0.25):
            lr.fill_(rate)
            ops.sgd_ema_update_(expected[0], grads, expected[1], expected[2], **settings)
    for a, b in zip((params, buffers, targets), expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
