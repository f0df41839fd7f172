#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace mopro_fast {

inline void check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // forget it: it is reported here, not by whoever asks next
  throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(error));
}

// Four elements that move in one access: 16 bytes of float32, 8 of bfloat16 or float16.
template <typename T>
struct alignas(4 * sizeof(T)) Vec4 {
  T x[4];
};

template <typename T>
__device__ bool holds_vec4(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % sizeof(Vec4<T>) == 0;
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

// Round to nearest even.
__device__ inline void store(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }
__device__ inline void store(__half& to, float x) { to = __float2half_rn(x); }

}  // namespace mopro_fast
