import os

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as mopro_fast/cli.py does, and for the same reason
# Threads of PyTorch, also in what tests start: with more of them than cores a step takes ten times as long. The process
# that only hands out the tests must not decide, for its environment is theirs.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // int(workers))))

import importlib.util
import re
import signal
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import interpreter
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is defined; then the triton backend takes CPU tensors
    interpreter.refuse_what_it_cannot_run_with()
    if importlib.util.find_spec("triton"):
        interpreter.round_fma_once()
        if os.environ.get("PLAIN_INTERPRETER") != "1":
            interpreter.speed_up()


for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:  # under nohup, or behind a shell's &: the tests send them
        signal.signal(number, handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    odd = [item.nodeid for item in items if not re.fullmatch(r"\w+(\[[\w.=+-]+\])?", item.name, re.ASCII)]
    if odd:
        raise pytest.UsageError(f"ids that cannot be typed, name their parameters: {odd[:9]}")
    tests_of = Counter(item.path for item in items)
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))
        if item.get_closest_marker("ranks"):
            item.add_marker(pytest.mark.xdist_group("ranks"))
    if workers:  # long groups first, for the last one to end is what all wait for
        items.sort(key=lambda item: (item.get_closest_marker("ranks") is None, -tests_of[item.path], item.path))


broken = False  # CUDA, in this process


def pytest_exception_interact():
    """After an illegal access every later test of the process would fail: a worker of xdist is replaced instead."""
    global broken
    if workers and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            broken = True


def pytest_runtest_logfinish():
    if broken:
        os._exit(1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Under `--dist loadgroup` a file's tests run in one process, in order, and those marked "ranks" in one, too."""
    if config.getvalue("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadGroupScheduling

    class ByFile(LoadGroupScheduling):
        def _split_scope(self, nodeid):
            return super()._split_scope(nodeid).partition("::")[0]

    config.option.loadscopereorder = False  # as sorted above
    return ByFile(config, log)


def pytest_make_parametrize_id(val, argname):
    """Ids that can be typed: a value's words, joined by what no shell reads. None: the argument's name and a number."""
    if isinstance(val, str):
        return re.sub(r"[^\w.=+-]+", "-", val, flags=re.ASCII).strip("-")[:60] or f"no-{argname}"
    if isinstance(val, torch.dtype):
        return str(val).removeprefix("torch.")
    if isinstance(val, Path):
        return val.name
    if isinstance(val, Mapping):
        words = {key: pytest_make_parametrize_id(value, argname) for key, value in val.items()}
        return "_".join(key if word is None else f"{key}={word}" for key, word in words.items()) or f"no-{argname}"
    if isinstance(val, tuple | list | range):
        words = [pytest_make_parametrize_id(value, argname) for value in val]
        return None if None in words else "_".join(words) or f"no-{argname}"
    if val is None or isinstance(val, bool | int | float):
        return str(val)
    return re.sub(r"\W", "", getattr(val, "__name__", "")) or None  # <lambda> among them


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_logreport(report):
    report.nodeid = report.nodeid.removesuffix("@ranks")  # xdist's own mark: what is printed can be typed


@pytest.fixture(scope="session")
def compiled(pytestconfig) -> Path:
    """The folder for compilers' outputs (tests/compiled.py): it outlives the run, and all processes share it."""
    return pytestconfig.cache.mkdir("compiled")


@pytest.fixture
def nan_filled_memory():
    """Memory that an op forgets to write must not look like a result."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def host_cuda(compiled):
    """csrc/ built for the CPU: the functions of mopro_fast._C on pointers to CPU memory."""
    import host_cuda

    if host_cuda.COMPILER is None:
        pytest.skip("no C++ compiler: set CXX")
    return host_cuda.load(host_cuda.build(compiled))


@dataclass
class Kernels:
    module: object
    """mopro_fast._C, or what host_cuda.load returns."""
    device: str
    stream: int


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernels(request, capfd):
    """The functions of csrc/: executed on the host, and on a GPU if there is one."""
    if request.param == "cuda":
        from mopro_fast import _C

        yield Kernels(_C, "cuda", torch.cuda.current_stream().cuda_stream)
        return
    module = request.getfixturevalue("host_cuda")
    yield Kernels(module, "cpu", 0)
    module.order(0)
    assert "runtime error" not in capfd.readouterr().err  # the sanitizer of tests/host_cuda.py


@pytest.fixture
def cuda_on_host(host_cuda, monkeypatch):
    """``ops.use_backend("cuda")`` takes CPU tensors: the CUDA backend as it is, its kernels executed on the host."""
    from mopro_fast.ops import backends, cuda

    unavailable = backends.unavailable

    def on_cpu(backend, device):
        return None if backend == "cuda" else unavailable(backend, device)

    monkeypatch.setattr(cuda, "_launch", lambda name, *args: getattr(host_cuda, name)(*args, 0))
    monkeypatch.setattr(backends, "unavailable", on_cpu)
    backends._implementation.cache_clear()
    yield host_cuda
    backends._implementation.cache_clear()
