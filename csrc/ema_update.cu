// Momentum update of the key encoder: every parameter tensor in one launch (MoCo, arXiv 1911.05722, eq. 2).
//
//   t <- m·t + (1-m)·s          t float32 master, s float32, bfloat16 or float16
//   w <- round(t)               w optional low-precision shadow of t, bfloat16 or float16
//
// In float32 as fma(m, t, (1-m)·s): two roundings. m is rounded to float32 first and 1-m computed from that,
// so that the two weights add up to one.
//
// Traffic per element: 8 bytes (t in and out) + 4 or 2 (s) + 2 (w). ResNet-50 with its projection head, 28 M
// parameters, float32 and no shadow: 336 MB, 78 µs at 4.3 TB/s. The kernel's own time is not measured yet.
#include <type_traits>

#include "common.cuh"
#include "ops.h"

namespace mopro_fast {
namespace {

constexpr int THREADS = 256;
// Elements per block: 8 vectors per thread pay for the block's search in the table, and ResNet-50 still makes
// 3,500 blocks, several waves on 132 SMs, so the last wave costs little. Derived, not measured.
constexpr int CHUNK = 8192;
// Tensors per launch: ResNet-50 has 161 parameters, ResNet-152 467.
constexpr int TENSORS = 512;

// Travels in the kernel's parameters: nothing to copy to the device or to cache, and a CUDA graph captures it
// by value. They may take 32,764 bytes from CUDA 12.1 on sm_70.
struct Table {
  float* target[TENSORS];
  const void* source[TENSORS];
  void* shadow[TENSORS];
  int64_t numel[TENSORS];
  int first_chunk[TENSORS + 1];  // tensor i owns blocks first_chunk[i] to first_chunk[i + 1]
  int tensors;
};
static_assert(sizeof(Table) + sizeof(float) <= 32764);

struct NoShadow {};

template <typename Source, typename Shadow>
__global__ void __launch_bounds__(THREADS)
    ema_update_kernel(const __grid_constant__ Table table, float momentum) {
  constexpr bool HAS_SHADOW = !std::is_same_v<Shadow, NoShadow>;

  // 1. This block's tensor: first_chunk[tensor] <= block < first_chunk[end] holds throughout.
  const int block = blockIdx.x;
  int tensor = 0, end = table.tensors;
  while (end - tensor > 1) {
    const int middle = (tensor + end) / 2;
    if (table.first_chunk[middle] <= block) {
      tensor = middle;
    } else {
      end = middle;
    }
  }

  // 2. Its chunk of that tensor.
  const int64_t begin = static_cast<int64_t>(block - table.first_chunk[tensor]) * CHUNK;
  const int count = static_cast<int>(min(table.numel[tensor] - begin, int64_t{CHUNK}));
  float* target = table.target[tensor] + begin;
  const Source* source = static_cast<const Source*>(table.source[tensor]) + begin;
  Shadow* shadow = nullptr;
  if constexpr (HAS_SHADOW) shadow = static_cast<Shadow*>(table.shadow[tensor]) + begin;
  const float rest = 1.0f - momentum;

  // 3. Four elements per access where every pointer allows it. All chunks of a tensor agree: CHUNK is a
  //    multiple of four.
  int done = 0;
  if (holds_vec4(target) && holds_vec4(source) && holds_vec4(shadow)) {
    for (int i = threadIdx.x; i < count / 4; i += THREADS) {
      Vec4<float> t = reinterpret_cast<Vec4<float>*>(target)[i];
      const Vec4<Source> s = reinterpret_cast<const Vec4<Source>*>(source)[i];
      for (int j = 0; j < 4; ++j) t.x[j] = fmaf(momentum, t.x[j], rest * to_float(s.x[j]));
      reinterpret_cast<Vec4<float>*>(target)[i] = t;
      if constexpr (HAS_SHADOW) {
        Vec4<Shadow> w;
        for (int j = 0; j < 4; ++j) store(w.x[j], t.x[j]);
        reinterpret_cast<Vec4<Shadow>*>(shadow)[i] = w;
      }
    }
    done = count / 4 * 4;
  }

  // 4. The rest, or all of a tensor that is not aligned.
  for (int i = done + threadIdx.x; i < count; i += THREADS) {
    const float t = fmaf(momentum, target[i], rest * to_float(source[i]));
    target[i] = t;
    if constexpr (HAS_SHADOW) store(shadow[i], t);
  }
}

template <typename Source, typename Shadow>
void launch(const std::vector<EmaTensor>& tensors, float momentum, cudaStream_t stream) {
  Table table;
  table.tensors = 0;
  table.first_chunk[0] = 0;
  auto flush = [&] {
    if (table.tensors == 0) return;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(table.first_chunk[table.tensors]);
    config.blockDim = dim3(THREADS);
    config.stream = stream;
    check(cudaLaunchKernelEx(&config, ema_update_kernel<Source, Shadow>, table, momentum), "ema_update");
    table.tensors = 0;
  };
  for (const EmaTensor& tensor : tensors) {
    if (tensor.numel == 0) continue;
    const int i = table.tensors++;
    table.target[i] = tensor.target;
    table.source[i] = tensor.source;
    table.shadow[i] = tensor.shadow;
    table.numel[i] = tensor.numel;
    // An int: 2^31 chunks would be 70 TB of float32.
    table.first_chunk[i + 1] = table.first_chunk[i] + static_cast<int>((tensor.numel + CHUNK - 1) / CHUNK);
    if (table.tensors == TENSORS) flush();
  }
  flush();
}

template <typename Source>
void launch(const std::vector<EmaTensor>& tensors, Dtype shadow, float momentum, cudaStream_t stream) {
  switch (shadow) {
    case Dtype::none: return launch<Source, NoShadow>(tensors, momentum, stream);
    case Dtype::bfloat16: return launch<Source, __nv_bfloat16>(tensors, momentum, stream);
    case Dtype::float16: return launch<Source, __half>(tensors, momentum, stream);
    default: throw std::invalid_argument("ema_update: shadows must be bfloat16 or float16");
  }
}

}  // namespace

void ema_update(const std::vector<EmaTensor>& tensors, Dtype source, Dtype shadow, float momentum,
                cudaStream_t stream) {
  switch (source) {
    case Dtype::float32: return launch<float>(tensors, shadow, momentum, stream);
    case Dtype::bfloat16: return launch<__nv_bfloat16>(tensors, shadow, momentum, stream);
    case Dtype::float16: return launch<__half>(tensors, shadow, momentum, stream);
    default: throw std::invalid_argument("ema_update: sources must be float32, bfloat16 or float16");
  }
}

}  // namespace mopro_fast
