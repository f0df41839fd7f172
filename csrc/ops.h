// The host side of every kernel: raw device pointers and a stream in, launches out. The caller has made the
// device current, checked shapes, and keeps the memory alive until the stream has passed the launch. All
// throw std::runtime_error when a launch is refused and std::invalid_argument for a dtype they do not take.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <cstdint>
#include <vector>

namespace mopro_fast {

enum class Dtype { none, float32, bfloat16, float16 };

// One tensor of a multi-tensor launch: its pointers, in the order that the function names, and its elements.
template <size_t POINTERS>
struct TensorPointers {
  std::array<void*, POINTERS> pointer;
  int64_t numel;
};

// target, source, shadow
void ema_update(const std::vector<TensorPointers<3>>& tensors, Dtype source, Dtype shadow, float momentum,
                cudaStream_t stream);

struct SgdEma {
  const float* lr;  // on the device
  float momentum;
  float weight_decay;
  float ema_momentum;
  bool nesterov;
};

// param, grad, buffer (unused if momentum is 0), target, param's shadow, target's shadow
void sgd_ema_update(const std::vector<TensorPointers<6>>& tensors, Dtype grad, Dtype param_shadow,
                    Dtype target_shadow, const SgdEma& coefficients, cudaStream_t stream);

// prototypes [classes, dim], features [rows, dim], labels [rows], kept [rows] or null
void prototype_update(float* prototypes, const void* features, Dtype dtype, const int64_t* labels,
                      const uint8_t* kept, int64_t classes, int64_t rows, int64_t dim, float momentum,
                      cudaStream_t stream);

// queue [slots, dim], shadow [slots, dim] or null, cursor [1], keys [rows, dim]; rows <= slots
void queue_enqueue(void* queue, Dtype queue_dtype, void* shadow, Dtype shadow_dtype, int64_t* cursor,
                   const void* keys, Dtype key_dtype, int64_t slots, int64_t rows, int64_t dim,
                   cudaStream_t stream);

}  // namespace mopro_fast
