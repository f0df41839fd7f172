#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "ops.h"

namespace mopro_fast {

inline void check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // forget it: it is reported here, not by whoever asks next
  throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(error));
}

struct NoShadow {};

// Calls body with a value of the C++ type that the dtype stands for.
template <typename Body>
void with_float(Dtype dtype, const char* what, Body body) {
  switch (dtype) {
    case Dtype::float32: return body(float{});
    case Dtype::bfloat16: return body(__nv_bfloat16{});
    case Dtype::float16: return body(__half{});
    default: throw std::invalid_argument(std::string(what) + " must be float32, bfloat16 or float16");
  }
}

template <typename Body>
void with_shadow(Dtype dtype, const char* what, Body body) {
  switch (dtype) {
    case Dtype::none: return body(NoShadow{});
    case Dtype::bfloat16: return body(__nv_bfloat16{});
    case Dtype::float16: return body(__half{});
    default: throw std::invalid_argument(std::string(what) + " must be bfloat16 or float16");
  }
}

constexpr unsigned ALL_LANES = 0xffffffff;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

// Round to nearest even.
__device__ inline void store(float& to, float x) { to = x; }
__device__ inline void store(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }
__device__ inline void store(__half& to, float x) { to = __float2half_rn(x); }

// V elements that move in one access; four are 16 bytes of float32, 8 of bfloat16 or float16.
template <typename T, int V>
struct alignas(V * sizeof(T)) Vec {
  T x[V];
};

template <typename T>
__device__ bool holds_vec4(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % sizeof(Vec<T, 4>) == 0;
}

// Four elements in whole words. Taken apart only where they are used: otherwise the next load waits for this
// one.
template <typename T>
struct alignas(4 * sizeof(T)) Packed4 {
  uint64_t words[sizeof(T) / 2];
};

template <typename T>
__device__ Vec<T, 4> unpack(const Packed4<T>& packed) {
  Vec<T, 4> x;
  memcpy(&x, &packed, sizeof(x));
  return x;
}

// Columns column to column + 3 of a row, zero from `width` on. In one access if `vec4`: the row holds it and
// width is a multiple of four.
template <typename T>
__device__ Packed4<T> load4(const T* row, int64_t column, int64_t width, bool vec4) {
  Packed4<T> packed{};
  if (vec4) {
    if (column < width) packed = *reinterpret_cast<const Packed4<T>*>(row + column);
  } else {
    Vec<T, 4> x{};
    for (int i = 0; i < 4; ++i) {
      if (column + i < width) x.x[i] = row[column + i];
    }
    memcpy(&packed, &x, sizeof(x));
  }
  return packed;
}

template <typename To, typename From>
__device__ void store4(To* row, int64_t column, int64_t width, bool vec4, const Vec<From, 4>& x) {
  if (vec4) {
    Vec<To, 4> to;
    for (int i = 0; i < 4; ++i) store(to.x[i], to_float(x.x[i]));
    if (column < width) *reinterpret_cast<Vec<To, 4>*>(row + column) = to;
  } else {
    for (int i = 0; i < 4; ++i) {
      if (column + i < width) store(row[column + i], to_float(x.x[i]));
    }
  }
}

}  // namespace mopro_fast
