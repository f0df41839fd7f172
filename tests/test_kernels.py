"""Triton's compiler about kernels/, for GPUs that are not here: no spill, shared memory that fits, launches counted."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
        ("prototype_contrast", [], 2),
        ("mopro_loss", [True, True], 6),  # contrast, correct
        ("mopro_loss", [False, False], 5),
        ("mopro_loss_backward", [], 1),
        ("two_views", [], 1),
        ("normalize", [], 1),
        ("batch_norm_stats_", [], 2),
        ("batch_norm_act", [True], 1),  # relu
        ("batch_norm_act_backward", [True], 3),
        ("conv1x1_stats_", [], 2),
    ],
)
def test_launches(op, flags, launches, reports):
    counts = {r["launches"] for r in reports if r.get("op") == op and r["flags"] == flags}
    assert counts == {launches}
