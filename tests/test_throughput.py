"""`mopro-fast bench`: its variants train the same thing, and its table says what was measured."""

import json
import re
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from mopro_fast import ops
from mopro_fast.benchmark import command, kinds, report, throughput, timing
from mopro_fast.benchmark.command import Bench
from mopro_fast.benchmark.throughput import OFFICIAL, OURS, PARTS, Case
from mopro_fast.errors import UserError
from mopro_fast.models.resnet import GroupedBatchNorm2d

ROOT = Path(__file__).parent.parent
TINY = Case(8, classes=5, image_size=16, arch="resnet18", width=0.125, stem="small", queue_size=32, device="cpu")


def test_the_official_step_computes_what_ours_does():
    ours, official = throughput.ours(TINY), throughput.official_step(TINY, fast=False)
    model, peer = ours.step.model, official.__closure__
    peer = next(cell.cell_contents for cell in peer if hasattr(cell.cell_contents, "prototypes"))
    peer.encoder_q.load_state_dict(model.encoder_q.state_dict())
    peer.encoder_k.load_state_dict(model.encoder_k.state_dict())
    peer.queue.copy_(model.queue)
    peer.prototypes.copy_(model.prototypes)
    for _ in range(3):
        torch.testing.assert_close(ours(), official(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.prototypes, peer.prototypes, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.queue, peer.queue, rtol=1e-4, atol=1e-5)


def test_peers_have_none_of_our_kernels(monkeypatch):
    """On a GPU "auto" would give their encoders ops.batch_norm_act, and --bn-group groups of rows."""
    case = replace(TINY, bn_group=4)
    monkeypatch.setattr(ops.backends, "is_fused", lambda *_: True)
    peers = [
        throughput.official_step(case, fast=False),
        throughput.official_step(case, fast=True),
        throughput.supervised_plain(case),
    ]

    def refuse(*_, **__):
        raise AssertionError("one of ours")

    for name in ("batch_norm_act", "normalize"):
        monkeypatch.setattr(ops, name, refuse)
    monkeypatch.setattr(GroupedBatchNorm2d, "_by_groups", refuse)
    for peer in peers:
        peer()
    with pytest.raises(AssertionError, match="one of ours"):
        throughput.ours(case)()


@pytest.mark.medium
def test_every_variant_trains_and_the_table_has_it():
    made = throughput.variants(TINY, None, everything=True)
    found = dict(throughput.measure(TINY, made, seconds=0.02))
    assert list(found) == list(made) and OURS in found
    for v in found.values():
        assert v["images_per_second"] == pytest.approx(8e3 / v["step_ms"]["p50"])
    parts = throughput.parts(TINY, steps=2)
    assert set(parts) == {*PARTS, "rest"} and all(parts[name] > 0 for name in PARTS)
    case = {"batch": 8, "classes": 5, "variants": found, "parts_ms": parts, "on_images": {}}
    case["on_images"] = {"images_per_second": 12.0, "data_wait": 0.05}
    text = report.table({"settings": {"device": "cpu"}, "cases": [case]})
    assert all(f"| {name} |" in text or f"| **{name}** |" in text for name in made)
    assert "head's share" in text and "| 8 | 5 | 12 | 5.0 % |" in text
    assert report.over_official(case) == pytest.approx(
        found[OURS]["images_per_second"] / found[OFFICIAL]["images_per_second"]
    )


@pytest.mark.medium
def test_the_command_and_its_mistakes(tmp_path, capsys):
    small = {"device": "cpu", "image_size": 32, "width": 0.125, "queue_size": 32, "seconds": 0.01}
    options = Bench(batch_sizes=(4, 8), classes=(3,), out=tmp_path / "a" / "out.json", **small)
    result = command.run(options)
    assert [c["batch"] for c in result["cases"]] == [4, 8] and result["not_reached"] == []
    late = command.run(Bench(batch_sizes=(4,), minutes=0, **small))
    assert late["not_reached"] == ["N=4 C=100"] and "in time (--minutes): N=4 C=100." in report.table(late)
    arguments = ["--device", "cpu", "--image-size", "32", "--width", "0.125", "--seconds", "0.01"]
    assert command.main([*arguments, "--batch-sizes", "4", "--out", str(options.out)]) == 0
    assert json.loads(options.out.read_text())["conditions"]["torch"].startswith(torch.__version__)
    assert "| **ours** |" in capsys.readouterr().out
    alone = [*arguments, "--batch-sizes", "4", "--variants", "supervised, this trainer", "ours"]
    assert command.main(alone) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[2] for line in table[2:]] == ["supervised, this trainer", "**ours**"]
    for wrong, message in [
        (Bench(batch_sizes=(1,), **small), "leaves one row per rank"),
        (Bench(batch_sizes=(6,), bn_group=4, **small), "--bn-group 4 does not divide"),
        (Bench(batch_sizes=(6,), bn_group=-4, **small), "bn-group must lie in"),
        (Bench(classes=(0,), **small), "num-classes must lie in"),
        (Bench(**small | {"width": 0}), "--width must lie in"),
        (Bench(batch_sizes=(4,), official=tmp_path, **small), "no model.py there; name a clone"),
        (Bench(variants=("ours", "our"), **small), '--variants "our": .* there are "ours", "official, float32 NCHW"'),
    ]:
        with pytest.raises(UserError, match=message):
            command.run(wrong)
    with pytest.raises(UserError, match="is a folder: name a file"):
        command.main([*arguments, "--out", str(tmp_path)])
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="PyTorch sees no GPU"):
            command.run(Bench(device="cuda"))


def breaks(after, held=None):
    """A variant that fails in its step of this number; 0: while it is built."""

    def factory(_case):
        calls = [held() if held else None]

        def call():
            calls.append(None)
            if len(calls) > after:
                raise RuntimeError("first line\nsecond | line")

        if not after:
            call()
        return call

    return factory


def works(_case):
    return lambda: torch.ones(1000).sum()


class Large:
    """Lies on a cycle of references, as a graph's memory does."""

    made: weakref.ref

    def __init__(self):
        self.itself, Large.made = self, weakref.ref(self)


FAILED = {"failed": "RuntimeError: first line second | line"}


def test_a_variant_that_fails_is_a_result(capsys):
    made = {OURS: breaks(0, Large), "first": works, "breaks later": breaks(3), "last": works}
    found = dict(throughput.measure(TINY, made, seconds=0.01))
    assert list(found) == list(made) and found[OURS] == found["breaks later"] == FAILED
    assert all(found[name]["images_per_second"] > 0 for name in ("first", "last"))
    assert Large.made() is None
    assert capsys.readouterr().err.count('RuntimeError("first line') == 2  # a traceback's line
    assert dict(throughput.measure(TINY, {OURS: breaks(1)}, seconds=9)) == {OURS: FAILED}


def test_on_a_gpu_memory_is_freed_after_a_failure(monkeypatch):
    freed = mock.Mock(side_effect=RuntimeError("CUDA refuses everything"))
    monkeypatch.setattr(torch.cuda, "empty_cache", freed)

    def alone(factory, case, _seconds):
        factory(case)
        return {"images_per_second": 9.0}

    def no_memory(_case):
        raise torch.OutOfMemoryError("of 79 GiB")

    monkeypatch.setattr(throughput, "_alone", alone)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    case = replace(TINY, device="cuda")
    found = throughput.measure(case, {"a": no_memory, "b": breaks(0, Large), "c": works}, 1)
    assert next(found) == ("a", {"skipped": "out of memory"}) and freed.call_count == 1
    assert next(found) == ("b", FAILED) and freed.call_count == 2 and Large.made() is None
    assert list(found) == [("c", {"images_per_second": 9.0})]
    for error in (KeyboardInterrupt, UserError):
        with pytest.raises(error):
            list(throughput.measure(case, {"a": mock.Mock(side_effect=error)}, 1))
    monkeypatch.setattr(torch.cuda, "synchronize", mock.Mock(side_effect=RuntimeError("illegal memory access")))
    after_it = {"skipped": "CUDA is broken in this process since 'a'"}
    assert list(throughput.measure(case, {"a": breaks(0), "b": works}, 1)) == [("a", FAILED), ("b", after_it)]


def test_a_profiler_that_fails_loses_no_time(monkeypatch):
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 3e9)
    monkeypatch.setattr(timing, "_profiled", mock.Mock(side_effect=RuntimeError("CUPTI says no")))
    found = throughput._alone(works, TINY, 0.01)
    assert found["not_counted"] == "RuntimeError: CUPTI says no" and found["images_per_second"] > 0
    result = {"settings": {"device": "cuda"}, "cases": [{"batch": 8, "classes": 5, "variants": {OURS: found}}]}
    assert report.failed(result) and "| 8 | 5 | **ours** |" in report.table(result)


def test_every_variant_is_kept_at_once(monkeypatch, capsys):
    made = {OURS: breaks(0), OFFICIAL: works, throughput.ENCODERS: works}
    monkeypatch.setattr(throughput, "variants", lambda *_, **__: made)
    kept = []
    options = Bench(device="cpu", batch_sizes=(4, 8), seconds=0.001, variants=tuple(made))
    result = command.run(options, lambda result: kept.append(json.loads(json.dumps(result))))
    variants = [[list(case["variants"]) for case in so_far["cases"]] for so_far in kept]
    names = list(made)
    assert variants[:4] == [[names[:1]], [names[:2]], [names], [names]] and variants[4] == [names, names[:1]]
    assert [so_far["not_reached"] for so_far in kept[3:5]] == [["N=8 C=100"], []] and kept[-1]["cases"] == result[
        "cases"
    ]
    err = capsys.readouterr().err
    assert re.search(r"\[1/2 \d+ s\] N=4 C=100: ours FAILED: RuntimeError: first line second / line\n", err)
    assert re.search(r"\[2/2 \d+ s\] N=8 C=100: the two encoders alone \d+\n", err)
    for case in result["cases"]:
        assert case["variants"][OURS] == FAILED and report.over_official(case) is report.overhead(case) is None
    assert report.failed(result)
    assert "| 4 | 100 | **ours** | FAILED: RuntimeError: first line second / line | – | – |" in report.table(result)


def test_parts_that_fail_are_said(monkeypatch):
    monkeypatch.setattr(throughput, "variants", lambda *_, **__: {OFFICIAL: works})
    for name in ("parts", "on_images"):
        monkeypatch.setattr(throughput, name, mock.Mock(side_effect=RuntimeError("no step")))
    result = command.run(Bench(device="cpu", batch_sizes=(4,), seconds=0.001, data="images"))
    assert report.failed(result)
    assert re.search(r"\| 4 \| 100 \| FAILED: RuntimeError: no step (\| – ){7}\|\n", report.table(result))
    assert "| 4 | 100 | FAILED: RuntimeError: no step | – |" in report.table(result)


def bench_script(name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    monkeypatch.delitem(sys.modules, name, raising=False)
    return __import__(name)


def test_a_variant_that_fails_fails_the_check(monkeypatch, tmp_path):
    bench = bench_script("throughput", monkeypatch)
    result = {"settings": {"device": "cpu", "variants": []}}
    result["cases"] = [{"batch": 4, "classes": 3, "variants": {OFFICIAL: FAILED}}]

    def run(_options, keep):
        keep(result)
        return result

    monkeypatch.setattr(command, "run", run)
    for words, status in (([], 0), (["--check"], 1)):
        monkeypatch.setattr(sys, "argv", ["throughput.py", "--results", str(tmp_path), *words])
        assert bench.main() == status
    result["cases"][0]["variants"][OFFICIAL] = {"skipped": "out of memory"}
    assert bench.main() == 0
    found = bench.requirements({"cases": [{"batch": 256, "classes": 1000, "variants": {OURS: FAILED}}]})
    assert len(found) == 6 and all(q["passed"] is None for q in found)


@pytest.mark.medium
def test_the_script_for_a_gpu_needs_neither_tyro_nor_dali(tmp_path):
    start = (
        "import sys; sys.modules['tyro'] = sys.modules['nvidia.dali'] = None; sys.path.insert(0, 'bench'); import step"
    )
    small = ["--device", "cpu", "--small", "--batch-sizes", "8", "--classes", "5", "--seconds", "0.01"]
    small += ["--results", str(tmp_path), "--name", "a", "--variants", OFFICIAL, OURS]
    command = [sys.executable, "-c", f"{start}; sys.exit(step.main(sys.argv[1:]))", *small]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"N=8 C=5: {OFFICIAL} " in done.stderr and "| 8 | 5 | **ours** |" in done.stdout
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["conditions"]["torch"] == torch.__version__ and result["settings"]["queue_size"] == 256
    assert list(result["cases"][0]["variants"]) == [OFFICIAL, OURS] and "parts_ms" not in result["cases"][0]


def test_the_script_s_status_and_mistakes(tmp_path, monkeypatch, capsys):
    step = bench_script("step", monkeypatch)
    small = ["--device", "cpu", "--small", "--batch-sizes", "8", "--seconds", "0.001", "--results", str(tmp_path)]
    with pytest.raises(SystemExit):
        step.main([*small, "--variants", "mine"])
    assert '--variants "mine": no variant on this device' in capsys.readouterr().err
    monkeypatch.setattr(throughput, "variants", lambda *_, **__: {OFFICIAL: works, OURS: breaks(0)})
    assert step.main([*small, "--variants", OFFICIAL]) == 0 and step.main([*small, "--variants", OURS]) == 1
    assert json.loads((tmp_path / "step_gpu.json").read_text())["cases"][0]["variants"] == {OURS: FAILED}


def test_where_there_is_no_repository_the_commit_is_what_it_was_told(monkeypatch, tmp_path):
    record = bench_script("record", monkeypatch)
    if (ROOT / ".git").exists():
        monkeypatch.setenv("MOPRO_FAST_COMMIT", "told")
        assert re.fullmatch(r"[0-9a-f]{7,}(-dirty)?", record.conditions()["commit"])
    monkeypatch.setenv("PATH", str(tmp_path))  # no git, no nvidia-smi
    monkeypatch.setenv("MOPRO_FAST_COMMIT", "told")
    assert record.conditions()["commit"] == "told"
    monkeypatch.delenv("MOPRO_FAST_COMMIT")
    assert record.conditions()["commit"] == "unknown" and record._clocks() == ""
    for name in ("git", "nvidia-smi"):
        (tmp_path / name).write_text("#!/bin/sh\necho not a result\nexit 9\n")
        (tmp_path / name).chmod(0o755)
    assert record.conditions()["commit"] == "unknown" and record._clocks() == ""
    late = subprocess.TimeoutExpired("nvidia-smi", 30)
    monkeypatch.setattr(subprocess, "run", mock.Mock(side_effect=late))
    assert record.conditions()["commit"] == "unknown" and record._clocks() == ""


NAMES = {
    "convolution": [
        "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x64x64_warpgroupsize1x1x1"
        "_execute_segment_k_off_kernel__5x_cudnn",
        "sm80_xmma_wgrad_implicit_gemm_indexed_tf32f32_tf32f32_f32_nhwckrsc_nhwc_tilesize128x128x16_stage4_kernel_cudnn",
        "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816dgrad_optimized_bf16_128x128_32x5_nhwc>()",
        "void cudnn::ops::nchwToNhwcKernel<float, float, float, false, true, (cudnnKernelDataType_t)2>(...)",
        "void implicit_convolve_sgemm<float, float, 1024, 5, 5, 3, 3, 3, 1, false, false, true>(...)",
    ],
    "BatchNorm": [
        "void cudnn::bn_fw_tr_1C11_kernel_NCHW<float, float, int=512, bool=1, int=1, bool=1>(...)",
        "void cudnn::bn_bw_1C11_kernel_new<float, float, float2, 512, true, 1>(...)",
        "void cudnn::batchnorm_bwtr_nhwc_semiPersist<__nv_bfloat16, ...>(...)",
        "void at::native::batch_norm_collect_statistics_channels_last_kernel<at::native::Var, ...>(...)",
        "void at::native::batch_norm_backward_elemt_channels_last_kernel<4, c10::BFloat16, float>(...)",
    ],
    "elementwise": [
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>,"
        " std::array<char*, 3ul> >(int, at::native::CUDAFunctor_add<c10::BFloat16>, std::array<char*, 3ul>)",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<TensorListMetadata<2>, ...>(...)",
        "void at::native::elementwise_kernel_with_index<int, at::native::arange_cuda_out(c10::Scalar const&)>(...)",
    ],
    "pooling": [
        "void at::native::(anonymous namespace)::max_pool_forward_nhwc<c10::BFloat16, int>(c10::BFloat16 const*, int)",
        "void at::native::(anonymous namespace)::max_pool_backward_nhwc<c10::BFloat16, float>(...)",
    ],
    "matrix product": [
        "nvjet_tst_128x64_64x8_4x1_v_bz_TNT",
        "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_32x32_128x2_nn_align8>(...)",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float>(...)",
        "sm80_xmma_gemm_f32f32_tf32f32_f32_tn_n_tilesize32x32x8_stage3_warpsize1x2x1_ffma_aligna4_kernel__5x_cublas",
    ],
    "copy": [
        "Memcpy DtoD (Device -> Device)",
        "Memset (Device)",
        "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)>()",
    ],
    "reduction": [
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps<float, float> > >(...)",
        "void (anonymous namespace)::softmax_warp_forward<float, float, float, 10, true, false>(...)",
    ],
    "sorting and indexing": [
        "void at::native::index_elementwise_kernel<128, 4, at::native::gpu_index_kernel<...> >(...)",
        "void at::native::sbtopk::gatherTopK<float, unsigned int, 2, false>(...)",
        "void at_cuda_detail::cub::DeviceRadixSortOnesweepKernel<...>(...)",
    ],
    "torch.compile": ["triton_red_fused__native_batch_norm_legit_convolution_relu_3"],
    "communication": ["ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)"],
    kinds.ELSE: ["void something_new<float>(float*)"],
}


@pytest.mark.parametrize("kind", NAMES)
def test_kernels_of_others_are_told_by_their_names(kind):
    assert {name: kinds.kind_of(name) for name in NAMES[kind]} == dict.fromkeys(NAMES[kind], kind)


def test_every_kernel_of_ours_is_in_a_kind_of_ours():
    found = []
    for file in (ROOT / "kernels").glob("*.py"):
        found += re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.M)
    for file in (ROOT / "csrc").glob("*.cu"):
        text = re.sub(r"__launch_bounds__\([^)]*\)", "", file.read_text())
        for name in re.findall(r"__global__ void\s+(\w+)\(", text):
            found.append(f"void mopro_fast::(anonymous namespace)::{name}<float, __nv_bfloat16>(float*)")
    assert len(found) > 15
    ours = dict(kinds.OURS)
    assert {name: kind for name in found if (kind := kinds.kind_of(name)) not in ours} == {}
    assert {kinds.kind_of(name) for name in found} == set(ours)


def test_device_time_by_kind(monkeypatch):
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as seen:
        torch.ones(1000).sum().item()
    events = seen.events()
    for name, e in zip(("Memset (Device)", "nvjet_a", "nvjet_b", "a user's range"), events, strict=False):
        e.name, e.device_type, e.is_user_annotation = name, torch.autograd.DeviceType.CUDA, name.startswith("a user")
        e.time_range.start, e.time_range.end = 5, 1505
    monkeypatch.setattr(timing, "_profiled", lambda _: events)
    assert timing.kernels(None) == [("Memset (Device)", 1500), ("nvjet_a", 1500), ("nvjet_b", 1500)]
    assert timing.launches(None, "cuda") == 3 and timing.launches(None, "cpu") is None
    found = kinds.by_kind(timing.kernels(None))
    assert found == {"matrix product": {"launches": 2, "ms": 3.0}, "copy": {"launches": 1, "ms": 1.5}}

    gpu = {"images_per_second": 9.0, "step_ms": dict.fromkeys(("p20", "p50", "p80"), 1.0), "memory_gb": 1.0}
    gpu |= {"launches": 3, "host_launches": {}, "synchronisations": 0}
    mine = gpu | {"kernels": {"copy": {"launches": 7, "ms": 9.0}, "pooling": {"launches": 1, "ms": 0.25}}}
    variants = {
        OURS: mine,
        OFFICIAL: gpu | {"kernels": found},
        "seen by no profiler": gpu | {"kernels": {}},
        "x": FAILED,
    }
    cases = [{"batch": n, "classes": 5, "variants": v} for n, v in ((8, variants), (9, {OURS: FAILED}))]
    text = report.table({"settings": {"device": "cuda"}, "cases": cases})
    assert text.count("Device time by kind") == 1
    assert text.partition("Device time by kind of kernel, ms (launches), N=8 C=5:\n\n")[2].splitlines() == [
        f"| kind | {OURS} | {OFFICIAL} |", "| --- | --- | --- |",
        "| copy | 9.00 (7) | 1.50 (1) |", "| matrix product | – | 3.00 (2) |", "| pooling | 0.25 (1) | – |",
        "| all | 9.25 (8) | 4.50 (3) |",
    ]  # fmt: skip


def test_requirements_of_a_gpu(monkeypatch):
    bench = bench_script("throughput", monkeypatch)

    def variant(speed, **more):
        return {"images_per_second": speed, "step_ms": {"p50": 1 / speed}} | more

    counted = {"synchronisations": 0, "host_launches": {"graphs": 1}}
    rows = {OURS: variant(5000, **counted), OFFICIAL: variant(800), throughput.ENCODERS: variant(5100)}
    cases = [{"batch": n, "classes": 1000, "variants": rows} for n in (32, 256)]
    found = bench.requirements({"cases": cases})
    assert len(found) == 6 and all(q["passed"] for q in found)
    rows[OURS] |= {"images_per_second": 3000, "step_ms": {"p50": 1 / 3000}, "synchronisations": 2}
    assert [q["passed"] for q in bench.requirements({"cases": cases})] == [False] * 5 + [True]
    assert all(q["passed"] is None for q in bench.requirements({"cases": []}))
