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

Dtype parse_dtype(const std::optional<std::string>& name) {
  if (!name) return Dtype::none;
  if (*name == "float32") return Dtype::float32;
  if (*name == "bfloat16") return Dtype::bfloat16;
  if (*name == "float16") return Dtype::float16;
  throw std::invalid_argument("dtype must be float32, bfloat16 or float16, not " + *name);
}

void ema_update(const Pointers& targets, const Pointers& sources, const Pointers& shadows,
                const std::vector<int64_t>& numels, const std::string& source_dtype,
                const std::optional<std::string>& shadow_dtype, double momentum, uintptr_t stream) {
  const size_t n = targets.size();
  if (sources.size() != n || numels.size() != n || shadows.size() != (shadow_dtype ? n : 0)) {
    throw std::invalid_argument("ema_update: " + std::to_string(n) + " targets, " +
                                std::to_string(sources.size()) + " sources, " +
                                std::to_string(shadows.size()) + " shadows and " +
                                std::to_string(numels.size()) + " numels do not go together");
  }
  std::vector<mopro_fast::EmaTensor> tensors(n);
  for (size_t i = 0; i < n; ++i) {
    tensors[i] = {reinterpret_cast<float*>(targets[i]), reinterpret_cast<const void*>(sources[i]),
                  shadow_dtype ? reinterpret_cast<void*>(shadows[i]) : nullptr, numels[i]};
  }
  mopro_fast::ema_update(tensors, parse_dtype(source_dtype), parse_dtype(shadow_dtype),
                         static_cast<float>(momentum), reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("ema_update", &ema_update, py::arg("targets"), py::arg("sources"), py::arg("shadows"),
        py::arg("numels"), py::arg("source_dtype"), py::arg("shadow_dtype"), py::arg("momentum"),
        py::arg("stream"), py::call_guard<py::gil_scoped_release>());
}
