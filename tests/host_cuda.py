"""Builds csrc/ for the CPU with the headers of tests/cuda_on_host: kernels run where there is no GPU."""

import ctypes
import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from compiled import CORES, kept

ROOT = Path(__file__).parent.parent
HEADERS = ROOT / "tests" / "cuda_on_host"
COMPILER = shutil.which(shlex.split(os.environ.get("CXX", "g++"))[0])
# No contraction: kernels say fma where they mean it, which leaves nvcc nothing to fuse.
# _FORTIFY_SOURCE, a default of some compilers, forbids the longjmp between stacks that fibers live on. Kernels
# move floats in whole words, which only nvcc allows.
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
FLAGS += ["-U_FORTIFY_SOURCE", "-fno-strict-aliasing"]
# For kernels only: in the bindings it doubles the compile time. x86 forgives misaligned accesses, a GPU does
# not; this prints "runtime error: load of misaligned address" and goes on.
SANITIZE = "-fsanitize=undefined"
# For bindings only: thread-local storage stands for shared memory here, and pybind11 would put its own there.
NO_THREAD_LOCAL = "-Dthread_local="


def build(cache: Path) -> Path:
    """The path of the module, compiled (about 10 s) unless `cache` has one of the same sources."""
    import pybind11

    sources = sorted([*(ROOT / "csrc").iterdir(), *HEADERS.iterdir()])
    include = [f"-I{path}" for path in (HEADERS, pybind11.get_include(), sysconfig.get_path("include"))]
    version = subprocess.run([COMPILER, "--version"], check=True, capture_output=True).stdout

    def make(output: Path) -> None:
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            compiles, objects = [], []
            for source in sources:
                if source.suffix in (".cu", ".cpp"):
                    objects.append(f"{folder}/{source.stem}.o")
                    flags = [*FLAGS, SANITIZE if source.suffix == ".cu" else NO_THREAD_LOCAL, *include]
                    compiles.append([COMPILER, *flags, "-x", "c++", "-c", str(source), "-o", objects[-1]])
            with ThreadPoolExecutor(CORES) as pool:
                list(pool.map(lambda command: subprocess.run(command, check=True), compiles))
            subprocess.run([COMPILER, "-shared", SANITIZE, *objects, "-o", output], check=True)

    return kept(cache, "_C.so", [Path(__file__), COMPILER, version, pybind11.__version__, *include, *sources], make)


def load(path: Path):
    """The extension module; `launches()` on it counts the kernels launched so far.

    `order(n)` sets the order of blocks and threads: as numbered (0), backwards (1) or shuffled with seed n. With -1
    launches are counted and nothing runs.
    """
    spec = importlib.util.spec_from_file_location("host_cuda._C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    library = ctypes.CDLL(str(path))
    counter = ctypes.c_int.in_dll(library, "host_cuda_launches")
    order = ctypes.c_int.in_dll(library, "host_cuda_order")
    module.launches = lambda: counter.value
    module.order = lambda value: setattr(order, "value", value)
    return module
