// Executes csrc/ on the CPU for the tests: the part of the CUDA runtime that the sources use, and no more.
// Blocks and threads run one after the other in order, so nothing here can show a race.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>

#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(...)

using std::min;

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};
extern "C" {
inline __attribute__((used, visibility("default"))) int host_cuda_launches = 0;  // read by tests/host_cuda.py
}

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid configuration argument";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

// The one place that knows how a block's threads take turns: a kernel with barriers needs a fiber per thread
// here.
template <typename Body>
void run_block(const Body& body) {
  for (threadIdx.z = 0; threadIdx.z < blockDim.z; ++threadIdx.z)
    for (threadIdx.y = 0; threadIdx.y < blockDim.y; ++threadIdx.y)
      for (threadIdx.x = 0; threadIdx.x < blockDim.x; ++threadIdx.x) body();
}

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
  const auto [gx, gy, gz] = config->gridDim;
  const auto [bx, by, bz] = config->blockDim;
  if (gx * gy * gz == 0 || bx * by * bz == 0 || bx * by * bz > 1024) return cudaErrorInvalidConfiguration;
  ++host_cuda_launches;
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  for (blockIdx.z = 0; blockIdx.z < gz; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < gy; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < gx; ++blockIdx.x) run_block([&] { kernel(args...); });
  return cudaSuccess;
}
