"""A stand-in on the CPU for what is used of NVIDIA's apex: its signatures, what it refuses, and its reading of memory.

Signatures as in github.com/NVIDIA/apex at 6424da3 (8 July 2026); none of its code. There as here kernels see a tensor's
memory in order, never its strides. A fourth list for multi_tensor_sgd (float16 copies) and amp are left out.
"""

import operator
import sys

import torch
import torch.nn.functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.optimizer import Optimizer, required

MODULES = {
    "amp_C": "from fake_apex import multi_tensor_axpby, multi_tensor_sgd",
    "bnp": "",
    "apex": "from . import optimizers, normalization",
    "apex.optimizers": "from fake_apex import FusedSGD",
    "apex.normalization": "",
    "apex.multi_tensor_apply": "",
    "apex.contrib": "",
    "apex.contrib.groupbn": "import bnp\nfrom fake_apex import BatchNorm2d_NHWC",
}


def install(folder, monkeypatch, without=(), broken=()):
    """Write the modules where Python finds them and hide those left out; ``broken``: built for another PyTorch."""
    for name, text in MODULES.items():
        monkeypatch.setitem(sys.modules, name, None)  # None hides a real one, and what is imported instead is undone
        if name not in without:
            del sys.modules[name]
            path = folder / name.replace(".", "/") / "__init__.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("raise ImportError('undefined symbol')" if name in broken else text)
    monkeypatch.syspath_prepend(folder)


def multi_tensor_sgd(
    chunk_size, noop_flag, tensor_lists, wd, momentum, dampening, lr, nesterov, first_run, wd_after_momentum, scale, /
):
    types = [tensors[0].dtype for tensors in tensor_lists]
    if types not in ([torch.float16] * 3, [torch.float32] * 3):
        raise RuntimeError(f"no kernel for {types}")
    lists = _checked(chunk_size, noop_flag, tensor_lists)
    wd, momentum, dampening, lr, scale = map(float, (wd, momentum, dampening, lr, scale))  # a tensor's value, too
    if noop_flag.item():
        return
    for grad, p, buffer in zip(*lists, strict=True):
        change = scale * grad.float() + (0 if wd_after_momentum else wd) * p
        if momentum:
            buffer.copy_(change if first_run else momentum * buffer + (1 - dampening) * change)
            change = change + momentum * buffer if nesterov else buffer
        p.sub_(lr * (change + (wd if wd_after_momentum else 0) * p))


def multi_tensor_axpby(chunk_size, noop_flag, tensor_lists, a, b, arg_to_check, /):
    if len(tensor_lists) != 3:
        raise RuntimeError("needs x, y and out")
    lists = _checked(chunk_size, noop_flag, tensor_lists)
    a, b, checked = float(a), float(b), {-1: (0, 1), 0: (0,), 1: (1,)}.get(operator.index(arg_to_check), ())
    if not all(t.isfinite().all() for i in checked for t in lists[i]):
        noop_flag.fill_(1)
    for x, y, out in zip(*lists, strict=True):
        out.copy_(a * x.float() + b * y.float())


def _checked(chunk_size, noop_flag, tensor_lists):
    """The lists, each tensor as its memory."""
    operator.index(chunk_size)
    if noop_flag.dtype != torch.int32:
        raise RuntimeError("noop_flag must be int32")
    formats = torch.contiguous_format, torch.channels_last, torch.channels_last_3d
    for tensors in tensor_lists:
        assert len({t.dtype for t in tensors}) == 1, "apex looks at the first one's type and would misread the others"
        if tensors[0].dtype not in (torch.float16, torch.float32) or len(tensors) != len(tensor_lists[0]):
            raise RuntimeError("float16 or float32, as many in every list")
        for t, first in zip(tensors, tensor_lists[0], strict=True):
            dense = any(t.is_contiguous(memory_format=f) for f in formats)
            if not dense or t.numel() != first.numel() or t.device != noop_flag.device:
                raise RuntimeError("without gaps, of one size and on one device")
    return [[_memory(t.data) for t in tensors] for tensors in tensor_lists]


def _memory(t):
    return t.as_strided((t.numel(),), (1,))


class FusedSGD(Optimizer):
    def __init__(
        self,
        params,
        lr=required,
        momentum=0,
        dampening=0,
        weight_decay=0,
        nesterov=False,
        wd_after_momentum=False,
        materialize_master_grads=True,
        set_grad_none=False,
    ):
        if (lr is not required and lr < 0) or momentum < 0 or weight_decay < 0:
            raise ValueError("lr, momentum and weight_decay must not be negative")
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("nesterov needs momentum and no dampening")
        names = {"lr": lr, "momentum": momentum, "dampening": dampening}
        super().__init__(params, names | {"weight_decay": weight_decay, "nesterov": nesterov})
        self.wd_after_momentum, self.set_grad_none = wd_after_momentum, set_grad_none
        self.materialize_master_grads = materialize_master_grads
        try:
            from amp_C import multi_tensor_sgd
        except ImportError:  # there, too, its reason is lost
            raise RuntimeError("FusedSGD needs the CUDA extensions") from None
        self.multi_tensor_sgd = multi_tensor_sgd
        self._flag = torch.zeros(1, dtype=torch.int32, device=self.param_groups[0]["params"][0].device)

    def __setstate__(self, state):
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("nesterov", False)

    def zero_grad(self):
        super().zero_grad()

    def get_momentums(self, params):
        """-> (buffers, whether the last parameter had none yet)"""
        first_run = True
        for p in params:
            first_run = "momentum_buffer" not in self.state[p]
            if first_run:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p.data)
        return [self.state[p]["momentum_buffer"] for p in params], first_run

    def step(self, closure=None):
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for dtype in (torch.float16, torch.float32):  # parameters of other types are left as they are
                params = [p for p in group["params"] if p.dtype == dtype and p.grad is not None]
                buffers, first_run = self.get_momentums(params)
                if params:
                    self.multi_tensor_sgd(
                        65536, self._flag, [[p.grad for p in params], params, buffers],
                        group["weight_decay"], group["momentum"], group["dampening"], group["lr"], group["nesterov"],
                        first_run, self.wd_after_momentum, 1.0,
                    )  # fmt: skip
        return loss


class BatchNorm2d_NHWC(_BatchNorm):
    def __init__(
        self, num_features, fuse_relu=False, bn_group=1, max_cta_per_sm=2, cta_launch_margin=12, multi_stream=False
    ):
        super().__init__(num_features)
        assert max_cta_per_sm > 0
        if bn_group > 1:
            assert torch.distributed.get_world_size() % bn_group == 0
        self.fuse_relu, self.bn_group, self.multi_stream = fuse_relu, bn_group, multi_stream
        self.max_cta_per_sm, self.cta_launch_margin = max_cta_per_sm, cta_launch_margin

    def forward(self, x, z=None):
        """[N, H, W, C]"""
        assert z is None or self.fuse_relu
        statistics = self.running_mean, self.running_var
        if {t.dtype for t in (*statistics, self.weight, self.bias)} != {torch.float32}:
            raise RuntimeError("parameters and statistics must be float32")
        rows = _rows(x).float().permute(0, 3, 1, 2)
        y = F.batch_norm(rows, *statistics, self.weight, self.bias, self.training, self.momentum, self.eps)
        y = y.permute(0, 2, 3, 1) if z is None else y.permute(0, 2, 3, 1) + _rows(z)
        y = (F.relu(y) if self.fuse_relu else y).half().contiguous()
        if y.requires_grad:
            y.register_hook(_rows)
        return y


def _rows(t):
    if t.dtype != torch.float16:
        raise RuntimeError("must be float16")
    return _memory(t).view(t.shape)
