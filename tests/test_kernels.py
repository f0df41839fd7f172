"""Triton's compiler about kernels/, for GPUs that are not here: no spill, shared memory that fits, launches counted."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import in_flight
import pytest
import torch

from mopro_fast.kernels.similarity import programs

pytestmark = pytest.mark.medium

ROOT = Path(__file__).parent.parent
SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes that a block may use (CUDA programming guide, compute capabilities)


@pytest.fixture(scope="module")
def reports(compiled):
    """What tests/compile_kernels.py says of the newest architecture."""
    return reports_of(max(SHARED), compiled)


def reports_of(arch: int, compiled: Path) -> list[dict]:
    """In a process of its own, for here the kernels may be the interpreter's."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, ROOT / "tests/compile_kernels.py", compiled, str(arch)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("arch", [90, pytest.param(80, marks=pytest.mark.slow)])
def test_no_spill_and_shared_memory_fits(arch, request, compiled):
    reports = request.getfixturevalue("reports") if arch == max(SHARED) else reports_of(arch, compiled)
    variants = [r for r in reports if "kernel" in r]
    assert len(variants) > 200 and {r["arch"] for r in variants} == {arch}
    for r in variants:
        assert r["stack"] == 0, f"spills: {r}"
        assert r["shared"] <= SHARED[r["arch"]], f"too much shared memory: {r}"


# What has nothing to do but move activations.
MEMORY_BOUND = {
    "batch_norm_stats_fwd_kernel", "batch_norm_act_fwd_kernel", "batch_norm_act_bwd_sums_kernel",
    "batch_norm_act_bwd_kernel", "batch_norm_relu_pool_fwd_kernel",
    "batch_norm_relu_pool_bwd_kernel", "normalize_fwd_kernel",
}  # fmt: skip
IN_FLIGHT = 32 * 1024  # bytes of an SM; 4.3 TB/s over 132 SMs for 0.6 to 0.8 µs are 20 to 26 KB


def test_memory_bound_kernels_have_enough_bytes_in_flight(reports):
    """Of an SM that is full, of any width and type that a ResNet has; 16 bytes a load, 8 or 4 where
    indices of a byte go with values of 2 or 4. Mirrored images and those that get a fourth channel go byte by byte,
    and so do those of 7 px, whose values 16 does not divide. Shifts are three loads of 4 bytes beside the others; in
    float32, where loads are a fifth of the traffic, less is in flight with them. Signs are a byte beside the others."""
    found = [r for r in reports if r.get("kernel") in MEMORY_BOUND]
    found = [r for r in found if {"values", "channels"} & set(r["sixteens"])]
    found = [r for r in found if not (r["constants"].get("FLIP") or r["constants"].get("SHIFT"))]
    found = [r for r in found if r["constants"].get("CHANNELS") != 4]
    bytewise = [r for r in found if r["constants"].get("SIGNS") and r["kernel"] == "batch_norm_act_bwd_sums_kernel"]
    assert {r["kernel"] for r in found} == MEMORY_BOUND and len(found) > 40
    sms = programs(torch.device("cpu"))
    for r in found:
        launched = r["in_flight"]
        if r["kernel"] != "normalize_fwd_kernel":  # as many as are launched, in a loop that is pipelined
            launched *= min(1, r["programs"] / (sms * r["programs_per_sm"]))
            assert r["loads"]["asynchronous"], r
        width = 1 if r in bytewise else 16
        if r["kernel"] == "batch_norm_relu_pool_bwd_kernel":
            width = 16 // r["warps"]
        assert launched >= IN_FLIGHT and r["loads"]["width"] == width, r


def test_programs_that_walk_tiles_run_all_at_once(reports):
    """A second wave of a few would keep the others waiting. Where there are more groups than that, each is a split."""
    found = [r for r in reports if r.get("kernel") in MEMORY_BOUND - {"normalize_fwd_kernel"}]
    sms = programs(torch.device("cpu"))
    assert max(r["programs"] for r in found) >= 5 * sms
    for r in found:
        assert r["programs"] <= r["programs_per_sm"] * sms or r["constants"].get("splits") == 1, r


def test_convolutions_of_layer1_and_layer2(reports):
    """In 16 bits: warp-group products, tiles under way, every program at once."""
    found = [r for r in reports if r.get("kernel") == "conv1x1_stats_fwd_kernel" and "float32" not in r["types"][0]]
    found = [r for r in found if r["constants"]["BLOCK_K"] >= 64]
    assert len(found) >= 15
    for r in found:
        running = min(r["programs_per_sm"], 2 if r["constants"]["CHUNKS"] == 1 else 1)
        assert r["wgmma"] and r["loads"]["asynchronous"] and r["loads"]["width"] == 16, r
        assert r["in_flight"] / r["programs_per_sm"] * running >= IN_FLIGHT, r
        assert r["programs"] <= running * programs(torch.device("cpu")) or r["constants"].get("splits") == 1, r


CODE = """
		Function : some_kernel
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   {}
        /*0030*/                   LDG.E.64 R8, desc[UR4][R2.64+0x10] ;
        /*0040*/                   FADD R0, R4, R5 ;
        /*0050*/                   FADD R0, R0, R9 ;
        /*0060*/                   EXIT ;
"""
LOOPS = """
		Function : some_kernel
        /*0000*/                   FADD R20, R20, R{} ;
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   FADD R20, R20, R4 ;
        /*0030*/                   LDG.E.128 R8, desc[UR4][R2.64+0x10] ;
        /*0040*/                   IADD3 R21, R21, 0x1, RZ ;
        /*0050*/               @P1 BRA 0x40 ;
        /*0060*/               @P2 BRA 0x0 ;
        /*0070*/                   EXIT ;
"""
ASYNCHRONOUS = """
		Function : some_kernel
        /*0000*/                   LDGSTS.E.BYPASS.128 [R3], desc[UR16][R6.64], P0 ;
        /*0010*/                   LDGDEPBAR ;
        /*0020*/                   DEPBAR.LE SB0, {} ;
        /*0030*/                   LDS.128 R20, [R2] ;
        /*0040*/                   LDGSTS.E.BYPASS.128 [R3], desc[UR16][R6.64], P0 ;
        /*0050*/                   LDGSTS.E.BYPASS.128 [R3+0x800], desc[UR16][R6.64], P0 ;
        /*0060*/                   LDGDEPBAR ;
        /*0070*/               @P1 BRA 0x20 ;
        /*0080*/                   EXIT ;
"""


@pytest.mark.parametrize(
    "code, expected",
    [
        (CODE.format("NOP ;"), (24, 1, 8, False)),  # both are under way when the first is waited for
        (CODE.format("FADD R6, R6, R7 ;"), (24, 2, 8, False)),  # one after the other
        (CODE.format("STG.E [R12.64], R5 ;"), (24, 2, 8, False)),
        (CODE.format("LDG.E R7, desc[UR4][R4.64] ;"), (28, 2, 4, False)),  # an address that was loaded
        (ASYNCHRONOUS.format("0x2"), (32, 1 / 3, 16, True)),  # a loop: two groups stay, one is waited for
        (ASYNCHRONOUS.format("0x0"), (32, 1, 16, True)),
        (
            LOOPS.format(8),
            (32, 2, 16, False),
        ),  # the outer loop, for the inner one loads nothing; waits for its last turn
        (LOOPS.format(16), (32, 1, 16, False)),
        ("\t\tFunction : some_kernel\n        /*0000*/                   EXIT ;\n", (0, 0, 0, False)),
    ],
)
def test_loads_in_flight_are_read_from_machine_code(code, expected):
    (read,) = in_flight.parsed(code).values()
    found = in_flight.loads(read)
    assert found == expected and found.in_flight == (expected[0] / expected[1] if expected[1] else 0)


def test_every_kernel_is_compiled(reports):
    source = "".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    kernels = re.findall(r"def (\w+_kernel)\(", source)
    assert len(kernels) >= 8
    assert {r["kernel"] for r in reports if "kernel" in r} == set(kernels)


@pytest.mark.parametrize(
    "op, flags, launches",
    [
        ("info_nce", [], 2),
        ("correct_labels", [], 3),
        ("correct_labels", [True], 3),  # inclusive
        ("prototype_contrast", [], 2),
        ("mopro_loss", [True], 5),  # contrast
        ("mopro_loss", [False], 5),
        ("mopro_loss_backward", [], 1),
        ("two_views", [], 1),
        ("normalize", [], 1),
        ("batch_norm_stats_", [False], 2),  # one_launch
        ("batch_norm_stats_", [True], 1),
        ("batch_norm_act", [True], 1),  # relu
        ("batch_norm_act", [True, True], 1),  # relu, signs
        ("batch_norm_act_backward", [True], 3),
        ("batch_norm_act_backward", [True, True], 2),  # relu, one_launch
        ("batch_norm_relu_pool", [True], 1),  # keep
        ("batch_norm_relu_pool", [False], 1),
        ("batch_norm_relu_pool_backward", [], 3),
        ("conv1x1_stats_", [], 2),
    ],
)
def test_launches(op, flags, launches, reports):
    counts = {r["launches"] for r in reports if r.get("op") == op and r["flags"] == flags}
    assert counts == {launches}
