// The Python module mopro_fast._C. Device pointers and streams come as integers, dtypes as PyTorch names
// them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "ops.h"

namespace py = pybind11;
using mopro_fast::Dtype;

namespace {

using Pointers = std::vector<uintptr_t>;
using DtypeName = std::optional<std::string>;

Dtype parse_dtype(const DtypeName& name) {
  if (!name) return Dtype::none;
  if (*name == "float32") return Dtype::float32;
  if (*name == "bfloat16") return Dtype::bfloat16;
  if (*name == "float16") return Dtype::float16;
  throw std::invalid_argument("dtype must be float32, bfloat16 or float16, not " + *name);
}

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

struct List {
  const char* name;
  const Pointers& pointers;
  bool given = true;  // otherwise it must be empty
};

// One list of pointers per role -> the pointers of each tensor.
template <size_t N>
std::vector<mopro_fast::TensorPointers<N>> zip(const char* op, const List (&lists)[N],
                                               const std::vector<int64_t>& numels) {
  const size_t n = numels.size();
  bool fits = true;
  std::string counts;
  for (const List& list : lists) {
    fits = fits && list.pointers.size() == (list.given ? n : 0);
    counts += std::to_string(list.pointers.size()) + " " + list.name + ", ";
  }
  for (int64_t numel : numels) fits = fits && numel >= 0;
  if (!fits) {
    throw std::invalid_argument(std::string(op) + ": " + counts + std::to_string(n) +
                                " numels do not go together");
  }
  std::vector<mopro_fast::TensorPointers<N>> tensors(n);
  for (size_t i = 0; i < n; ++i) {
    for (size_t j = 0; j < N; ++j) {
      tensors[i].pointer[j] = lists[j].given ? pointer<void>(lists[j].pointers[i]) : nullptr;
    }
    tensors[i].numel = numels[i];
  }
  return tensors;
}

void ema_update(const Pointers& targets, const Pointers& sources, const Pointers& shadows,
                const std::vector<int64_t>& numels, const std::string& source_dtype,
                const DtypeName& shadow_dtype, double momentum, uintptr_t stream) {
  const auto tensors = zip<3>(
      "ema_update",
      {{"targets", targets}, {"sources", sources}, {"shadows", shadows, shadow_dtype.has_value()}}, numels);
  mopro_fast::ema_update(tensors, parse_dtype(source_dtype), parse_dtype(shadow_dtype),
                         static_cast<float>(momentum), pointer<CUstream_st>(stream));
}

void sgd_ema_update(const Pointers& params, const Pointers& grads, const Pointers& buffers,
                    const Pointers& targets, const Pointers& param_shadows, const Pointers& target_shadows,
                    const std::vector<int64_t>& numels, const std::string& grad_dtype,
                    const DtypeName& param_shadow_dtype, const DtypeName& target_shadow_dtype, uintptr_t lr,
                    double momentum, double weight_decay, bool nesterov, double ema_momentum,
                    uintptr_t stream) {
  const auto tensors = zip<6>("sgd_ema_update",
                              {{"params", params},
                               {"grads", grads},
                               {"buffers", buffers, momentum != 0},
                               {"targets", targets},
                               {"param_shadows", param_shadows, param_shadow_dtype.has_value()},
                               {"target_shadows", target_shadows, target_shadow_dtype.has_value()}},
                              numels);
  const mopro_fast::SgdEma coefficients = {pointer<const float>(lr), static_cast<float>(momentum),
                                           static_cast<float>(weight_decay), static_cast<float>(ema_momentum),
                                           nesterov};
  mopro_fast::sgd_ema_update(tensors, parse_dtype(grad_dtype), parse_dtype(param_shadow_dtype),
                             parse_dtype(target_shadow_dtype), coefficients, pointer<CUstream_st>(stream));
}

void prototype_update(uintptr_t prototypes, uintptr_t features, const std::string& feature_dtype,
                      uintptr_t labels, uintptr_t kept, int64_t classes, int64_t rows, int64_t dim,
                      double momentum, uintptr_t stream) {
  if (classes < 0 || rows < 0 || dim < 0) {
    throw std::invalid_argument("prototype_update: negative sizes");
  }
  mopro_fast::prototype_update(pointer<float>(prototypes), pointer<const void>(features),
                               parse_dtype(feature_dtype), pointer<const int64_t>(labels),
                               pointer<const uint8_t>(kept), classes, rows, dim, static_cast<float>(momentum),
                               pointer<CUstream_st>(stream));
}

void queue_enqueue(uintptr_t queue, const std::string& queue_dtype, uintptr_t shadow,
                   const DtypeName& shadow_dtype, uintptr_t cursor, uintptr_t keys,
                   const std::string& key_dtype, int64_t slots, int64_t rows, int64_t dim, uintptr_t stream) {
  if (rows < 0 || dim < 0 || rows > slots) {
    throw std::invalid_argument("queue_enqueue: " + std::to_string(rows) + " keys of " + std::to_string(dim) +
                                " do not fit in " + std::to_string(slots) + " slots");
  }
  if ((shadow != 0) != shadow_dtype.has_value()) {
    throw std::invalid_argument("queue_enqueue: shadow and shadow_dtype go together");
  }
  mopro_fast::queue_enqueue(pointer<void>(queue), parse_dtype(queue_dtype), pointer<void>(shadow),
                            parse_dtype(shadow_dtype), pointer<int64_t>(cursor), pointer<const void>(keys),
                            parse_dtype(key_dtype), slots, rows, dim, pointer<CUstream_st>(stream));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  const py::call_guard<py::gil_scoped_release> no_gil;
  m.def("ema_update", &ema_update, py::arg("targets"), py::arg("sources"), py::arg("shadows"),
        py::arg("numels"), py::arg("source_dtype"), py::arg("shadow_dtype"), py::arg("momentum"),
        py::arg("stream"), no_gil);
  m.def("sgd_ema_update", &sgd_ema_update, py::arg("params"), py::arg("grads"), py::arg("buffers"),
        py::arg("targets"), py::arg("param_shadows"), py::arg("target_shadows"), py::arg("numels"),
        py::arg("grad_dtype"), py::arg("param_shadow_dtype"), py::arg("target_shadow_dtype"), py::arg("lr"),
        py::arg("momentum"), py::arg("weight_decay"), py::arg("nesterov"), py::arg("ema_momentum"),
        py::arg("stream"), no_gil);
  m.def("prototype_update", &prototype_update, py::arg("prototypes"), py::arg("features"),
        py::arg("feature_dtype"), py::arg("labels"), py::arg("kept"), py::arg("classes"), py::arg("rows"),
        py::arg("dim"), py::arg("momentum"), py::arg("stream"), no_gil);
  m.def("queue_enqueue", &queue_enqueue, py::arg("queue"), py::arg("queue_dtype"), py::arg("shadow"),
        py::arg("shadow_dtype"), py::arg("cursor"), py::arg("keys"), py::arg("key_dtype"), py::arg("slots"),
        py::arg("rows"), py::arg("dim"), py::arg("stream"), no_gil);
}
