// The host side of every kernel: raw device pointers and a stream in, launches out. The caller has made the
// device current, checked shapes, and keeps the memory alive until the stream has passed the launch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

namespace mopro_fast {

enum class Dtype { none, float32, bfloat16, float16 };

struct EmaTensor {
  float* target;
  const void* source;
  void* shadow;
  int64_t numel;
};

// Throws std::runtime_error when a launch is refused.
void ema_update(const std::vector<EmaTensor>& tensors, Dtype source, Dtype shadow, float momentum,
                cudaStream_t stream);

}  // namespace mopro_fast
