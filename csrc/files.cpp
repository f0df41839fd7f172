// The Python module mopro_fast._files: sizes and times of many files, for threads that share an interpreter.
// A call of os.stat takes Python its lock twice and four objects; here a file costs what the kernel takes.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <sys/stat.h>

#include <cerrno>
#include <cstdint>
#include <string>

namespace py = pybind11;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

// Name i is names[offsets[i] : offsets[i + 1]]; those without a slash at their beginning start from root.
void states(const std::string& root, const Array<int64_t>& offsets, const py::buffer& names,
            Array<int64_t>& size, Array<int64_t>& mtime_ns, Array<int32_t>& error) {
  const int64_t n = offsets.size() - 1;
  const py::buffer_info bytes = names.request();
  if (n < 0 || offsets.ndim() != 1 || size.size() != n || mtime_ns.size() != n || error.size() != n) {
    throw py::value_error("offsets must be int64 [n + 1], the outputs [n]");
  }
  const int64_t *at = offsets.data(), length = bytes.size * bytes.itemsize;
  for (int64_t i = 0; i < n; ++i) {
    if (at[i] < 0 || at[i] > at[i + 1] || at[i + 1] > length)
      throw py::value_error("offsets outside of the names");
  }
  const char* first = static_cast<const char*>(bytes.ptr);
  int64_t *sizes = size.mutable_data(), *times = mtime_ns.mutable_data();
  int32_t* errors = error.mutable_data();
  py::gil_scoped_release released;
  std::string path;
  for (int64_t i = 0; i < n; ++i) {
    const char *begin = first + at[i], *end = first + at[i + 1];
    path.clear();
    if (!root.empty() && (begin == end || *begin != '/')) {
      path = root;
      if (root.back() != '/') path += '/';
    }
    path.append(begin, end);
    struct stat found, link;
    sizes[i] = times[i] = -1;
    if (stat(path.c_str(), &found) == 0) {
      sizes[i] = found.st_size;
      times[i] = int64_t(found.st_mtim.tv_sec) * 1000000000 + found.st_mtim.tv_nsec;
      errors[i] = 0;
    } else {
      errors[i] = errno;
      if (errno == ENOENT && lstat(path.c_str(), &link) == 0) errors[i] = ENOLINK;  // a link to nowhere
    }
  }
}

}  // namespace

PYBIND11_MODULE(_files, m) {
  m.doc() = "Sizes and times of many files.";
  m.def("states", &states, py::arg("root"), py::arg("offsets").noconvert(), py::arg("names"),
        py::arg("size").noconvert(), py::arg("mtime_ns").noconvert(), py::arg("error").noconvert(),
        "Of file i its size and time of change (-1, -1: none) and why there are none: an errno, of a link to "
        "nowhere ENOLINK.");
}
