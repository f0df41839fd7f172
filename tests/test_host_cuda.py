"""tests/cuda_on_host: does it behave as a GPU does where that matters, and does it catch what it is there to catch?"""

import ctypes
import shutil
import subprocess

import pytest
from host_cuda import FLAGS, HEADERS

SOURCE = r"""
#include <cuda_runtime.h>

// Each thread's neighbour, through shared memory; without the barrier it may not have written yet.
template <bool BARRIER>
__global__ void neighbours(int* out) {
  __shared__ int staged[64];
  staged[threadIdx.x] = threadIdx.x;
  if (BARRIER) __syncthreads();
  out[blockIdx.x * 64 + threadIdx.x] = staged[(threadIdx.x + 1) % 64];
}

__global__ void warp(int* out) {
  const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * 100;
  int sum = first + lane;
  for (int flip = 16; flip > 0; flip /= 2) sum += __shfl_xor_sync(0xffffffff, sum, flip);
  out[threadIdx.x] = sum;
  out[64 + threadIdx.x] = __ballot_sync(0xffffffff, lane == 1 || lane == 4 || lane == 31);
  out[128 + threadIdx.x] = __shfl_sync(0xffffffff, first + lane, lane == 0 ? 7 : lane - 1);
  out[192 + threadIdx.x] = __any_sync(0xffffffff, threadIdx.x == 40) + 2 * __ffs(12);
  if (lane < 4) out[256 + threadIdx.x] = __shfl_sync(0xf, lane, 3);
}

__global__ void not_all_reach(int*) {
  if (threadIdx.x != 5) __syncthreads();
}

__global__ void two_places(int*) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void a_lane_is_missing(int*) {
  if (threadIdx.x % 32 != 3) __ballot_sync(0xffffffff, true);
}

__global__ void appends(int* out) {
  out[1 + atomicAdd(out, 1)] = blockIdx.x * 64 + threadIdx.x;
}

extern "C" __attribute__((visibility("default"))) const char* run(int which, int blocks, int* out) {
  static std::string error;
  void (*kernels[])(int*) = {neighbours<true>, neighbours<false>, warp, not_all_reach,
                             two_places, a_lane_is_missing, appends};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(64);
  try {
    cudaLaunchKernelEx(&config, kernels[which], out);
  } catch (const std::exception& e) {
    return (error = e.what()).c_str();
  }
  return "";
}
"""
NEIGHBOURS, NO_BARRIER, WARP, NOT_ALL_REACH, TWO_PLACES, A_LANE_IS_MISSING, APPENDS = range(7)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("host_cuda")
    (folder / "kernels.cpp").write_text(SOURCE)
    command = [compiler, *FLAGS, f"-I{HEADERS}", "-shared", folder / "kernels.cpp", "-o", folder / "kernels.so"]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(folder / "kernels.so"))
    library.run.restype = ctypes.c_char_p
    return library


def run(library, which, blocks=1, order=0):
    """-> (the first 320 ints the kernel wrote, the error)."""
    ctypes.c_int.in_dll(library, "host_cuda_order").value = order
    out = (ctypes.c_int * 1000)()
    error = library.run(which, blocks, out).decode()
    return list(out)[:320], error


ORDERS = [0, 1, 2, 3]


@pytest.mark.parametrize("order", ORDERS)
def test_barriers_and_shared_memory(library, order):
    out, error = run(library, NEIGHBOURS, 3, order)
    assert out[:192] == [(i + 1) % 64 for i in range(64)] * 3 and error == ""


def test_a_missing_barrier_shows(library):
    out, _ = run(library, NO_BARRIER, 2)
    assert out[:128] == [-1] * 63 + [0] + [-1] * 63 + [0]  # garbage, in every block


@pytest.mark.parametrize("order", ORDERS)
def test_warp_collectives(library, order):
    out, error = run(library, WARP, 1, order)
    assert error == ""
    assert out[:64] == [31 * 16] * 32 + [31 * 16 + 3200] * 32
    assert out[64:128] == [(1 << 1 | 1 << 4 | 1 << 31) - 2**32] * 64
    assert out[128:192] == [7, *range(31), 107, *range(100, 131)]
    assert out[192:256] == [6] * 32 + [7] * 32
    assert [out[256 + i] for i in (0, 3, 32, 35)] == [3] * 4


@pytest.mark.parametrize("order", ORDERS)
def test_waiting_for_ever_is_an_error_and_no_later_one(library, order):
    assert run(library, NOT_ALL_REACH, 1, order)[1].endswith("a barrier waits for ever: 63 of 64 threads are there")
    assert run(library, TWO_PLACES, 1, order)[1].endswith("a barrier waits for ever: 32 of 64 threads are there")
    assert "a warp collective waits for ever" in run(library, A_LANE_IS_MISSING, 1, order)[1]
    test_barriers_and_shared_memory(library, order)


def test_orders(library):
    ordered, backwards, *shuffled = (run(library, APPENDS, 2, order)[0] for order in [*ORDERS, 3])
    assert ordered[:129] == [128, *range(128)]
    assert backwards[:129] == [128, *reversed(range(128))]
    assert all(sorted(x[1:129]) == list(range(128)) for x in shuffled)
    assert shuffled[0] != shuffled[1] == shuffled[2]
