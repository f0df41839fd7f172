import os

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as mopro_fast/cli.py does, and for the same reason

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is defined; then the triton backend takes CPU tensors


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


@pytest.fixture(scope="session")
def host_cuda(pytestconfig):
    """csrc/ built for the CPU: the functions of mopro_fast._C on pointers to CPU memory."""
    import host_cuda

    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler: set CXX")
    return host_cuda.load(host_cuda.build(Path(pytestconfig.cache.mkdir("host_cuda")), compiler))


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
