"""What nvcc says about csrc/: no warning and no spill, on the oldest and the newest architecture; finding compilers."""

import re
import runpy
import shutil
import subprocess
from pathlib import Path

import in_flight
import pytest
from compiled import kept

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


@pytest.mark.medium
@pytest.mark.skipif(NVCC is None, reason="nvcc is neither on PATH nor in /usr/local/cuda/bin")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("source", sorted(CSRC.glob("*.cu")))
def test_no_warning_no_spill(source, arch, tmp_path, compiled):
    command = [NVCC, "-std=c++17", "-O3", f"-arch={arch}", "-Werror", "all-warnings"]
    command += ["-Xcompiler=-Wall,-Wextra", "-Xptxas=-v", "-c", str(source)]

    def compile_it(said: Path) -> None:
        result = subprocess.run([*command, "-o", tmp_path / "out.o"], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        said.write_text(result.stderr)

    versions = [subprocess.run([x, "--version"], capture_output=True, check=True).stdout for x in (NVCC, "g++")]
    headers = [path for path in sorted(CSRC.iterdir()) if path.suffix in (".h", ".cuh")]
    said = kept(compiled, f"{source.stem}.txt", [*versions, *command, source, *headers], compile_it).read_text()
    kernels = re.findall(r"Compiling entry function '(\w+)'", said)
    sizes = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    frames = re.findall(sizes, said)
    assert len(frames) == len(kernels) > 0, said
    for kernel, frame in zip(kernels, frames, strict=True):
        assert frame == ("0", "0", "0"), f"{kernel}: {frame} bytes of stack, spill stores, spill loads"


@pytest.mark.medium
@pytest.mark.skipif(NVCC is None, reason="nvcc is neither on PATH nor in /usr/local/cuda/bin")
@pytest.mark.parametrize("op", ["ema_update", "sgd_ema_update"])
def test_optimizer_kernels_have_enough_bytes_in_flight(op, tmp_path):
    """As tests/test_kernels.py has it of the others that only move memory: 32 KiB of an SM."""
    cubin, threads = tmp_path / "out.cubin", 256
    command = [NVCC, "-std=c++17", "-O3", "-arch=sm_90", "-cubin", "-Xptxas=-v", CSRC / f"{op}.cu", "-o", cubin]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    used = re.findall(r"Compiling entry function '(\w+)'.*?Used (\d+) registers", said, re.DOTALL)
    registers = {kernel: int(number) for kernel, number in used}
    code = in_flight.machine_code(cubin)
    shadows = 3 if op == "ema_update" else 5  # none, or a type for each of a parameter's and its target's
    assert set(code) == set(registers) and len(code) == 3 * shadows  # types of gradients or sources
    for kernel, instructions in code.items():
        loads = in_flight.loads(instructions)
        blocks = in_flight.blocks_per_sm(registers[kernel], 0, threads // 32)
        assert loads.in_flight * blocks * threads >= 32 * 1024, f"{kernel}: {loads}, {blocks} blocks of an SM"


def test_a_compiler_given_with_arguments_is_found(tmp_path, monkeypatch):
    setuptools = pytest.importorskip("setuptools")
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setattr(setuptools, "__version__", "77.0")  # a new environment may have an older one
    find_cxx = runpy.run_path(str(ROOT / "setup.py"))["find_cxx"]
    (tmp_path / "my++").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for given, found in (("my++ -m64", "my++"), ("my++", "my++"), ("other++ my++", None), ("", None)):
        monkeypatch.setenv("CXX", given)
        assert find_cxx() == (found and str(tmp_path / found)), given


def test_an_old_setuptools_is_told_so(monkeypatch):
    setuptools = pytest.importorskip("setuptools")
    monkeypatch.setattr(setuptools, "__version__", "68.1.2")
    with pytest.raises(SystemExit, match=r"setuptools 77 or newer .* has 68\.1\.2: pip install --upgrade setuptools"):
        runpy.run_path(str(ROOT / "setup.py"))
