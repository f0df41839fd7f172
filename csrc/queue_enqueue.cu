// The ring buffer of past keys (MoCo, arXiv 1911.05722, section 3.2): the new ones go over the oldest.
//
//   queue[(cursor + i) mod Q] <- round(key i)      and the same for an optional low-precision shadow
//   cursor <- (cursor + M) mod Q
//
// One launch, no block may move the cursor before all have read it: each reads it by adding 2^40, so that the
// bits above count the readers, and whoever finds all others counted writes the new one. Hence
// -2^39 <= cursor < 2^39; any other value also stays within the queue.
//
// Traffic per element: the key in, the queue and its shadow out. N=256, D=128, all float32: 0.26 MB, 0.06 µs
// at 4.3 TB/s: a launch is all it costs. The kernel's own time is not measured yet.
#include "common.cuh"

namespace mopro_fast {
namespace {

constexpr int WARPS = 8;  // rows per block at a time
// As many as 132 SMs hold at once, and far below the 2^24 that can be counted.
constexpr int64_t BLOCKS = 132 * 8;

// The 1 gives ptxas leave to use the registers it needs; left to itself it spills one to fit another block.
template <typename Key, typename Queue, typename Shadow>
__global__ void __launch_bounds__(WARPS * 32, 1)
    queue_enqueue_kernel(Queue* queue, Shadow* shadow, int64_t* cursor, const Key* keys, int64_t slots,
                         int64_t rows, int64_t dim) {
  // 1. Where the first key goes.
  __shared__ int64_t start;
  if (threadIdx.x == 0) {
    using Count = unsigned long long;
    const Count seen = atomicAdd(reinterpret_cast<Count*>(cursor), Count{1} << 40);
    const int64_t position = static_cast<int64_t>(seen << 24) >> 24;  // the low 40 bits, with their sign
    const uint64_t remainder = static_cast<uint64_t>(position < 0 ? ~position : position) % slots;
    const int64_t slot = position < 0 ? slots - 1 - remainder : remainder;
    start = slot;
    const Count readers = (seen - static_cast<Count>(position)) >> 40;
    if (readers == gridDim.x - 1) *cursor = slot + rows < slots ? slot + rows : slot + rows - slots;
  }
  __syncthreads();

  // 2. One row per warp.
  const bool vec4 = dim % 4 == 0 && holds_vec4(keys) && holds_vec4(queue) && holds_vec4(shadow);
  const int64_t step = int64_t{gridDim.x} * WARPS;
  for (int64_t row = int64_t{blockIdx.x} * WARPS + threadIdx.x / 32; row < rows; row += step) {
    const int64_t slot = start + row < slots ? start + row : start + row - slots;
    for (int64_t column = threadIdx.x % 32 * 4; column < dim; column += 32 * 4) {
      const Vec<Key, 4> x = unpack(load4(keys + row * dim, column, dim, vec4));
      store4(queue + slot * dim, column, dim, vec4, x);
      if constexpr (!std::is_same_v<Shadow, NoShadow>) store4(shadow + slot * dim, column, dim, vec4, x);
    }
  }
}

}  // namespace

void queue_enqueue(void* queue, Dtype queue_dtype, void* shadow, Dtype shadow_dtype, int64_t* cursor,
                   const void* keys, Dtype key_dtype, int64_t slots, int64_t rows, int64_t dim,
                   cudaStream_t stream) {
  if (rows == 0) return;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(std::min((rows + WARPS - 1) / WARPS, BLOCKS)));
  config.blockDim = dim3(WARPS * 32);
  config.stream = stream;
  with_float(key_dtype, "queue_enqueue: keys", [&](auto k) {
    with_float(queue_dtype, "queue_enqueue: queue", [&](auto q) {
      with_shadow(shadow_dtype, "queue_enqueue: shadow", [&](auto s) {
        using Key = decltype(k);
        using Queue = decltype(q);
        using Shadow = decltype(s);
        check(cudaLaunchKernelEx(&config, queue_enqueue_kernel<Key, Queue, Shadow>,
                                 static_cast<Queue*>(queue), static_cast<Shadow*>(shadow), cursor,
                                 static_cast<const Key*>(keys), slots, rows, dim),
              "queue_enqueue");
      });
    });
  });
}

}  // namespace mopro_fast
