"""Compiles every Triton kernel for GPUs that are not here, with the arguments its own launcher gives it.

python tests/compile_kernels.py FOLDER ARCH...    one JSON object per line: {"op", "launches"} for every call, and
                                                  what `report` finds for every variant of a kernel

The launches are intercepted: types, alignment and constants come from the tensors and tilings of real calls. FOLDER
keeps the reports (tests/compiled.py).
"""

import json
import math
import multiprocessing
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import in_flight
import torch
import triton
from compiled import CORES, kept
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from mopro_fast import kernels

TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.int64: "*i64", torch.int32: "*i32", torch.bool: "*i1", torch.uint8: "*u8",
}  # fmt: skip
WARPS, STAGES = 4, 3  # Triton's defaults
TASKS: list[tuple[JITFunction, dict, dict, int, int]] = []  # what `variants` finds, architecture: for forks to find
OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")


def launches(call) -> list[tuple[JITFunction, dict, dict, int]]:
    """What `call` launches, without running any of it: (kernel, its arguments, its options, programs)."""
    seen = []

    def record(kernel, *args, grid, warmup, **kwargs):  # noqa: ARG001, Triton passes these two by name
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        seen.append((kernel, arguments, options, math.prod(grid)))

    run, JITFunction.run = JITFunction.run, record
    try:
        call()
    finally:
        JITFunction.run = run
    return seen


def source(kernel: JITFunction, arguments: dict) -> ASTSource:
    """Specialised as a launch would: 1 is a constant, multiples of 16 are known as such."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or (type(value) is int and value == 1):
            signature[parameter.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], attributes[(i,)] = TYPES[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def resources(cubin: bytes, shared: int, warps: int, arch: int) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        (code,) = in_flight.machine_code(Path(file.name)).values()
    registers, stack = (int(n) for n in re.search(r"REG:(\d+) STACK:(\d+)", text).groups())
    programs, loads = in_flight.blocks_per_sm(registers, shared, warps, arch), in_flight.loads(code)
    return {
        "registers": registers, "stack": stack, "shared": shared, "warps": warps, "programs_per_sm": programs,
        "wgmma": any(i.name.startswith("HGMMA") for i in code),
        "loads": loads._asdict(), "in_flight": loads.in_flight * 32 * warps * programs,
    }  # fmt: skip


def calls():
    """Every op over embedding sizes and types; the most classes, sizes that divide nothing, the widest embedding."""
    f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
    cases = [(dim, t, t, 256, 1000) for dim in (32, 128, 256, 512) for t in (f32, bf16)]
    cases += [(128, f16, f16, 256, 1000), (128, bf16, f32, 256, 21841), (65, bf16, bf16, 33, 257)]
    cases += [(768, bf16, bf16, 64, 64), (1, f32, f32, 1, 1)]
    for dim, q_type, bank_type, n, classes in cases:
        q, bank = torch.empty(n, dim, dtype=q_type), torch.empty(classes, dim, dtype=bank_type)
        logits, labels = torch.empty(n, classes, dtype=q_type), torch.empty(n, dtype=torch.int64)
        kept = torch.empty(n, dtype=torch.bool)
        yield kernels.info_nce, (q, q, bank, 0.1)
        yield kernels.correct_labels, (logits, q, bank, labels, 0.5, 0.8, 0.1)
        yield kernels.correct_labels, (logits, q, bank, labels, 0.5, 0.8, 0.1, kept, True)
        yield kernels.prototype_contrast, (q, bank, labels, None, 0.1)
        yield kernels.prototype_contrast, (q, bank, labels, kept, 0.1)
        for contrast in (True, False):
            yield kernels.mopro_loss, (logits, q, q, bank, bank, labels, kept, 0.1, 1.0, 1.0, contrast)
        if q_type == f32:  # as under autocast
            half = logits.bfloat16()
            yield kernels.mopro_loss, (half, q, q, bank, bank, labels, None, 0.1, 1.0, 1.0, True)
        wide = q.float()
        yield kernels.mopro_loss_backward, (
            wide[0, 0], logits, labels, kept, wide, wide, wide[:, 0].contiguous(), wide[0, :1], 1.0, 1.0, q_type
        )  # fmt: skip
    for size, operations, views in [(224, 4, 2), (112, 4, 2), (32, 4, 2), (7, 4, 2), (32, 1, 2), (1, 0, 1)]:
        images, boxes = torch.empty(8, 3, dtype=torch.int64), torch.empty(8, views, 4, dtype=torch.int64)
        flips, gray = torch.empty(8, views, dtype=torch.bool), torch.empty(8, dtype=torch.bool)
        factors, order = torch.empty(8, 4), torch.empty(8, operations, dtype=torch.int64)
        pixels = torch.empty(1 << 20, dtype=torch.uint8)
        yield kernels.two_views, (pixels, images, boxes, flips, gray, factors, order, size)
        for out_type in (f32, bf16, f16):
            view = torch.empty(8, size, size, 3, dtype=torch.uint8)
            yield kernels.normalize, (view, None, out_type)
            yield kernels.normalize, (view, gray, out_type)
            yield kernels.normalize, (view, None, out_type, torch.empty(8, 3))
            yield kernels.normalize, (view, None, out_type, None, 4)
            yield kernels.normalize, (view, gray, out_type, torch.empty(8, 3), 4)
    for channels, side, group, types in [
        (64, 112, 0, (f32, bf16, f16)),
        (2048, 7, 32, (f32, bf16)),
        (3, 5, 4, (bf16,)),
    ]:
        stats, channel = torch.empty(2 if group else 1, channels), torch.empty(channels)
        for dtype in types:
            x = torch.empty(2 * (group or 4), channels, side, side, dtype=dtype).to(memory_format=torch.channels_last)
            signs = torch.empty(len(x), side, side, channels // 8, dtype=torch.uint8)
            for one_launch in (False, True):
                yield kernels.batch_norm_stats_, (x, channel, channel, 0.1, 1e-5, group, one_launch)
                yield kernels.batch_norm_act_backward, (
                    x, x, x, x, stats, stats, channel, channel, True, one_launch
                )  # fmt: skip
            if channels % 8 == 0:
                yield kernels.batch_norm_act, (x, stats, stats, channel, channel, x, True, True)
                yield kernels.batch_norm_act_backward, (x, x, x, signs, stats, stats, channel, channel, True)
            for relu, residual in [(True, x), (True, None), (False, x), (False, None)]:
                yield kernels.batch_norm_act, (x, stats, stats, channel, channel, residual, relu)
                y = x if relu and residual is not None else None
                yield kernels.batch_norm_act_backward, (x, None, x, y, stats, stats, channel, channel, relu)
    for channels, side, group, types in [
        (64, 112, 0, (f32, bf16, f16)),
        (128, 17, 32, (f32, bf16)),
        (3, 5, 4, (bf16,)),
    ]:
        stats, channel = torch.empty(2 if group else 1, channels), torch.empty(channels)
        for dtype in types:
            n, pooled = 2 * (group or 128), (side + 1) // 2
            x = torch.empty(n, side, side, channels, dtype=dtype).permute(0, 3, 1, 2)
            y = torch.empty(n, pooled, pooled, channels, dtype=dtype).permute(0, 3, 1, 2)
            for keep in (True, False):
                yield kernels.batch_norm_relu_pool, (x, stats, stats, channel, channel, keep)
            for dy2 in (y, None):
                yield kernels.batch_norm_relu_pool_backward, (
                    y, dy2, x, y, y.to(torch.uint8), stats, stats, channel, channel
                )  # fmt: skip
    for in_channels, channels, side, group in [
        (64, 64, 56, 0), (64, 256, 56, 32), (256, 64, 56, 32), (256, 128, 56, 0), (512, 128, 28, 32),
        (128, 512, 28, 32), (512, 2048, 7, 32), (65, 130, 3, 0), (3, 5, 3, 0),
    ]:  # fmt: skip
        of_x = [torch.empty(2 if group else 1, in_channels)] * 2 + [torch.empty(in_channels)] * 2
        for dtype in (f32, bf16, f16) if group else (f32, bf16):
            x = torch.empty(2 * (group or 4), in_channels, side, side, dtype=dtype)
            x = x.to(memory_format=torch.channels_last)
            weight, running = torch.empty(channels, in_channels, 1, 1), torch.empty(channels)
            for norm in (of_x, []):
                yield kernels.conv1x1_stats_, (x, weight, running, running, norm, 0.1, 1e-5, group)


def variants() -> list[tuple[JITFunction, dict, dict, int]]:
    """Every kernel with all that it is specialised for, once, and how many programs are launched of it at most. On the
    way, what each call launches is printed."""
    found = {}
    for function, arguments in calls():
        seen = launches(lambda f=function, a=arguments: f(*a))
        flags = [a for a in arguments if isinstance(a, bool)]
        print(json.dumps({"op": function.__name__, "flags": flags, "launches": len(seen)}))
        for kernel, values, options, programs in seen:
            options = {"num_warps": WARPS, "num_stages": STAGES, **options}
            key = source(kernel, values).hash(), *options.values()
            found[key] = kernel, values, options, max(programs, found[key][-1] if key in found else 0)
    return list(found.values())


def report(task: int) -> str:
    """One variant for one architecture, compiled unless FOLDER has it; -> JSON.

    sixteens: arguments that 16 divides. programs: launched, for the twelve SMs that kernels/similarity.py sees here.
    programs_per_sm: that one holds. wgmma: whether it multiplies with that. loads: of a thread (tests/in_flight.py).
    in_flight: bytes, of an SM that is full.
    """
    kernel, values, options, programs, arch = TASKS[task]
    compiled_from, target = source(kernel, values), GPUTarget("cuda", arch, 32)

    def make(path: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:  # Triton's own cache would keep 0.3 MB of each in the home
            triton.knobs.cache.dir = folder
            compiled = triton.compile(compiled_from, target=target, options=options)
        given = ((p, values[p.name]) for p in kernel.params)
        shown = {p.name: v for p, v in given if p.is_constexpr or (type(v) is int and v == 1)}
        types = [str(v.dtype) for v in values.values() if isinstance(v, torch.Tensor)][:2]
        sixteens = [name for name, v in values.items() if type(v) is int and v % 16 == 0]
        out = {"kernel": kernel.__name__, "arch": arch, "types": types, "constants": shown, "sixteens": sixteens}
        out |= resources(compiled.asm["cubin"], compiled.metadata.shared, options["num_warps"], arch)
        path.write_text(json.dumps(out))

    backend = triton.compiler.make_backend(target).hash()  # Triton's version and ptxas'
    decides = [triton.__version__, backend, compiled_from.hash(), json.dumps(options)]
    ours = [Path(__file__), Path(in_flight.__file__)]
    found = json.loads(kept(Path(sys.argv[1]), f"{kernel.__name__}.json", ours + decides, make).read_text())
    return json.dumps(found | {"programs": programs})


def main() -> int:
    torch.set_num_threads(1)  # a fork has no other thread than the one that forks
    TASKS.extend((*variant, int(arch)) for variant in variants() for arch in sys.argv[2:])
    with ProcessPoolExecutor(CORES, multiprocessing.get_context("fork")) as pool:
        for line in pool.map(report, range(len(TASKS))):
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
