import os

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as mopro_fast/cli.py does, and for the same reason

import shutil
from pathlib import Path

import pytest
import torch


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
