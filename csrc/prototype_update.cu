// The momentum prototypes (MoPro, arXiv 2009.07995, eq. 8), exactly as the loop over the gathered rows.
//
//   for each kept row i in order, y = label i:   c_y <- m·c_y + (1-m)·q_i
//   then every prototype                         c <- c / max(|c|, 1e-12)
//
// In float32 as fma(m, c, (1-m)·q), 1-m from the rounded m. One warp per class walks its rows in order: no
// atomics, the same bits every time. A row that is not kept, or whose label is no class, is never read.
//
// Traffic: 4·C·D (prototypes in) + the kept rows + the prototypes that change, once each; each block of 8
// classes also reads all 9·M bytes of labels and kept flags, from L2. C=1000, M=2048, D=128, float32: 2 MB
// and 2 MB of L2, 0.5 µs at 4.3 TB/s, less than a launch. The kernel's own time is not measured yet.
#include "common.cuh"

namespace mopro_fast {
namespace {

// Classes per block, one warp each: C=1000 makes 125 blocks for 132 SMs. Derived, not measured.
constexpr int WARPS = 8;
// Tells ptxas not to spill for a fifth, which it does left to itself; 1,000 classes do not even make two.
constexpr int BLOCKS_PER_SM = 2;
// Rows found before any is applied: a class with many rows pays one memory latency per four. Not measured.
constexpr int AHEAD = 4;
// Columns in flight per warp, four per lane: the method's D.
constexpr int COLUMNS = 128;
// 32 labels are a window. 256 windows, 8,192 rows, are staged at a time: 1,024 rows of each of 8 ranks.
constexpr int WINDOWS = 256;
constexpr int64_t STAGE = WINDOWS * 32;
// Windows whose labels a warp loads before it looks at any: 2,048 rows in one go. Not measured.
constexpr int BATCH = 8;
// Squared norms this near 1 are left alone: at D=2048 rounding still moves that of a unit row by less.
constexpr float UNIT = 1e-6f;

template <typename Feature>
__global__ void __launch_bounds__(WARPS * 32, BLOCKS_PER_SM)
    prototype_update_kernel(float* prototypes, const Feature* features, const int64_t* labels,
                            const uint8_t* kept, int64_t classes, int64_t rows, int64_t dim, float momentum) {
  // Bit r of [k][w]: row 32·w + r of the stage is a kept one of the block's class k. The odd pitch spreads
  // the classes over the banks.
  __shared__ unsigned of_class[WARPS][WINDOWS + 1];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first = int64_t{blockIdx.x} * WARPS, last = min(first + WARPS, classes);
  const int64_t width = first + warp < last ? dim : 0;  // no columns, so no access, for a class beyond C
  float* prototype = prototypes + (first + warp) * dim;
  const bool vec4 = dim % 4 == 0 && holds_vec4(prototypes) && holds_vec4(features);
  const float rest = 1.0f - momentum;
  Vec<float, 4> c{};
  float squares = 0;
  bool changed = false;

  for (int64_t begin = 0; begin < dim; begin += COLUMNS) {
    const int64_t column = begin + lane * 4;
    c = unpack(load4(prototype, column, width, vec4));
    for (int64_t stage = 0; stage < rows; stage += STAGE) {
      const int windows = static_cast<int>(min((rows - stage + 31) / 32, int64_t{WINDOWS}));

      // 1. Which rows are whose. Most windows hold no row of these eight classes.
      if (begin == 0 || rows > STAGE) {
        __syncthreads();  // everyone has done with the last stage
        for (int window = warp; window < windows; window += WARPS * BATCH) {
          int64_t label[BATCH];
          for (int i = 0; i < BATCH; ++i) {
            const int64_t row = stage + (window + i * WARPS) * 32 + lane;
            label[i] = row < rows ? labels[row] : -1;
            if (row < rows && kept && !kept[row]) label[i] = -1;
          }
          for (int i = 0; i < BATCH && window + i * WARPS < windows; ++i) {
            const int64_t k = label[i] >= first && label[i] < last ? label[i] - first : -1;
            unsigned bits = 0;
            if (__any_sync(ALL_LANES, k >= 0)) {
#pragma unroll 1  // for a quarter of the code
              for (int j = 0; j < WARPS; ++j) {
                const unsigned votes = __ballot_sync(ALL_LANES, k == j);
                if (lane == j) bits = votes;
              }
            }
            if (lane < WARPS) of_class[lane][window + i * WARPS] = bits;
          }
        }
        __syncthreads();
      }

      // 2. This class's rows in order. Each lane holds a window: the lowest bit of the first set one is next.
      for (int group = 0; group < windows; group += 32) {
        unsigned bits = group + lane < windows ? of_class[warp][group + lane] : 0;
        int row[AHEAD];  // of the stage; -1: no more
        do {
          Packed4<Feature> q[AHEAD];
          for (int i = 0; i < AHEAD; ++i) {
            row[i] = -1;
            if (const unsigned lanes = __ballot_sync(ALL_LANES, bits != 0)) {
              const int from = __ffs(lanes) - 1;
              row[i] = (group + from) * 32 + __ffs(__shfl_sync(ALL_LANES, bits, from)) - 1;
              if (lane == from) bits &= bits - 1;
              q[i] = load4(features + (stage + row[i]) * dim, column, width, vec4);
            }
          }
          for (int i = 0; i < AHEAD; ++i) {
            if (row[i] < 0) break;
            const Vec<Feature, 4> x = unpack(q[i]);
            for (int j = 0; j < 4; ++j) c.x[j] = fmaf(momentum, c.x[j], rest * to_float(x.x[j]));
            changed = true;
          }
        } while (row[AHEAD - 1] >= 0);
      }
    }
    for (int j = 0; j < 4; ++j) squares = fmaf(c.x[j], c.x[j], squares);
    if (dim > COLUMNS && changed) store4(prototype, column, width, vec4, c);
  }

  // 3. Unit length. A class without a row that has it already is only read.
  for (int flip = 16; flip > 0; flip /= 2) squares += __shfl_xor_sync(ALL_LANES, squares, flip);
  if (!changed && fabsf(squares - 1.0f) <= UNIT) return;
  const float norm = sqrtf(squares), length = norm < 1e-12f ? 1e-12f : norm;
  for (int64_t column = lane * 4; column < width; column += COLUMNS) {
    if (dim > COLUMNS) c = unpack(load4(prototype, column, width, vec4));
    for (int j = 0; j < 4; ++j) c.x[j] /= length;
    store4(prototype, column, width, vec4, c);
  }
}

}  // namespace

void prototype_update(float* prototypes, const void* features, Dtype dtype, const int64_t* labels,
                      const uint8_t* kept, int64_t classes, int64_t rows, int64_t dim, float momentum,
                      cudaStream_t stream) {
  if (classes == 0 || dim == 0) return;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>((classes + WARPS - 1) / WARPS));
  config.blockDim = dim3(WARPS * 32);
  config.stream = stream;
  with_float(dtype, "prototype_update: features", [&](auto f) {
    using Feature = decltype(f);
    check(
        cudaLaunchKernelEx(&config, prototype_update_kernel<Feature>, prototypes,
                           static_cast<const Feature*>(features), labels, kept, classes, rows, dim, momentum),
        "prototype_update");
  });
}

}  // namespace mopro_fast
