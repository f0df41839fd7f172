// Momentum SGD, the momentum encoder's update and low-precision copies of both in one pass, every tensor in
// one launch. As torch.optim.SGD with dampening 0, and MoCo, arXiv 1911.05722, eq. 2.
//
//   g <- g + wd·p               p float32 master, g float32, bfloat16 or float16
//   b <- μ·b + g                b float32; none if μ = 0, then d = g
//   d  = g + μ·b (Nesterov) or b
//   p <- p - lr·d
//   t <- m·t + (1-m)·p          t float32
//   v <- round(p), w <- round(t)   optional, each bfloat16 or float16
//
// In float32: each line one fma, t as fma(m, t, (1-m)·p) with 1-m from the rounded m. lr is read on the
// device, so that a captured CUDA graph sees the schedule.
//
// Traffic per element: 24 bytes (p, b, t in and out) + 4 or 2 (g) + 4 (v, w): 32 with float32 gradients. 30 M
// parameters: 960 MB, 223 µs at 4.3 TB/s. The kernel's own time is not measured yet.
#include "multi_tensor.cuh"

namespace mopro_fast {
namespace {

enum { PARAM, GRAD, BUFFER, TARGET, PARAM_SHADOW, TARGET_SHADOW, POINTERS };
// Tensors per launch: ResNet-50 with its projection head has 165 parameters, ResNet-152 471; 545 fill the
// kernel's parameters.
constexpr int TENSORS = 512;
using SgdEmaTable = Table<POINTERS, TENSORS>;

template <typename Grad, typename ParamShadow, typename TargetShadow>
struct Pointers {
  float* param;
  const Grad* grad;
  float* buffer;
  float* target;
  ParamShadow* param_shadow;
  TargetShadow* target_shadow;
};

// Elements begin to end of the chunk, V per access.
template <int V, typename Grad, typename ParamShadow, typename TargetShadow>
__device__ void update(int begin, int end, const Pointers<Grad, ParamShadow, TargetShadow>& to,
                       const SgdEma& c) {
  using Floats = Vec<float, V>;
  const float lr = *c.lr, rest = 1.0f - c.ema_momentum;
  for (int i = begin / V + threadIdx.x; i < end / V; i += CHUNK_THREADS) {
    Floats p = reinterpret_cast<Floats*>(to.param)[i], t = reinterpret_cast<Floats*>(to.target)[i], b{};
    const Vec<Grad, V> g = reinterpret_cast<const Vec<Grad, V>*>(to.grad)[i];
    if (to.buffer) b = reinterpret_cast<Floats*>(to.buffer)[i];
    for (int j = 0; j < V; ++j) {
      const float grad = fmaf(c.weight_decay, p.x[j], to_float(g.x[j]));
      b.x[j] = fmaf(c.momentum, b.x[j], grad);
      const float direction = c.nesterov ? fmaf(c.momentum, b.x[j], grad) : b.x[j];
      p.x[j] = fmaf(-lr, direction, p.x[j]);
      t.x[j] = fmaf(c.ema_momentum, t.x[j], rest * p.x[j]);
    }
    reinterpret_cast<Floats*>(to.param)[i] = p;
    if (to.buffer) reinterpret_cast<Floats*>(to.buffer)[i] = b;
    reinterpret_cast<Floats*>(to.target)[i] = t;
    if constexpr (!std::is_same_v<ParamShadow, NoShadow>) {
      Vec<ParamShadow, V> v;
      Vec<TargetShadow, V> w;
      for (int j = 0; j < V; ++j) {
        store(v.x[j], p.x[j]);
        store(w.x[j], t.x[j]);
      }
      reinterpret_cast<Vec<ParamShadow, V>*>(to.param_shadow)[i] = v;
      reinterpret_cast<Vec<TargetShadow, V>*>(to.target_shadow)[i] = w;
    }
  }
}

template <typename Grad, typename ParamShadow, typename TargetShadow>
__global__ void __launch_bounds__(CHUNK_THREADS)
    sgd_ema_update_kernel(const __grid_constant__ SgdEmaTable table, SgdEma coefficients) {
  const Chunk chunk = find_chunk(table);
  Pointers<Grad, ParamShadow, TargetShadow> to{};
  to.param = at_chunk<float>(table, chunk, PARAM);
  to.grad = at_chunk<Grad>(table, chunk, GRAD);
  if (coefficients.momentum != 0) to.buffer = at_chunk<float>(table, chunk, BUFFER);
  to.target = at_chunk<float>(table, chunk, TARGET);
  bool vec4 = holds_vec4(to.param) && holds_vec4(to.grad) && holds_vec4(to.buffer) && holds_vec4(to.target);
  if constexpr (!std::is_same_v<ParamShadow, NoShadow>) {
    to.param_shadow = at_chunk<ParamShadow>(table, chunk, PARAM_SHADOW);
    to.target_shadow = at_chunk<TargetShadow>(table, chunk, TARGET_SHADOW);
    vec4 = vec4 && holds_vec4(to.param_shadow) && holds_vec4(to.target_shadow);
  }

  // Four elements per access where every pointer allows it; then the rest, or all of a tensor not so aligned.
  const int done = vec4 ? chunk.count / 4 * 4 : 0;
  update<4>(0, done, to, coefficients);
  update<1>(done, chunk.count, to, coefficients);
}

}  // namespace

void sgd_ema_update(const std::vector<TensorPointers<6>>& tensors, Dtype grad, Dtype param_shadow,
                    Dtype target_shadow, const SgdEma& coefficients, cudaStream_t stream) {
  if ((param_shadow == Dtype::none) != (target_shadow == Dtype::none)) {
    throw std::invalid_argument("sgd_ema_update: param_shadows and target_shadows go together");
  }
  with_float(grad, "sgd_ema_update: grads", [&](auto g) {
    with_shadow(param_shadow, "sgd_ema_update: param_shadows", [&](auto v) {
      using G = decltype(g);
      using V = decltype(v);
      with_shadow(target_shadow, "sgd_ema_update: target_shadows", [&](auto w) {
        using W = decltype(w);
        if constexpr (std::is_same_v<V, NoShadow> == std::is_same_v<W, NoShadow>) {
          launch_chunks("sgd_ema_update", sgd_ema_update_kernel<G, V, W>, tensors, stream, coefficients);
        }
      });
    });
  });
}

}  // namespace mopro_fast
