// The Python module mopro_fast._views: crops and colours of the two views on a CPU, for threads that share
// an interpreter: both functions work without its lock.
//
// crop: an antialiased bilinear resize (Pillow's filter, rounded to 8 bits once), columns first: one pass
// over the rows that an output row needs, in registers, then S sums over a line that is in the cache.
//
// color_jitter: the arithmetic of mopro_fast/ops/colour.py, operation by operation, so equal to the bit
// to it and to Pillow. Every operation ends in whole numbers of 8 bits, so that the planes between two are
// bytes.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

// A wheel runs on any x86-64; where the processor has AVX2 the loader picks that version of a function.
#if defined(__x86_64__) && defined(__GLIBC__)
#define VECTORIZED __attribute__((target_clones("avx2", "default")))
#else
#define VECTORIZED
#endif
#define INLINED inline __attribute__((always_inline))

namespace py = pybind11;

namespace {

using Bytes = py::array_t<uint8_t, py::array::c_style>;
using float4 = float __attribute__((vector_size(16)));
using int4 = int32_t __attribute__((vector_size(16)));
using byte4 = uint8_t __attribute__((vector_size(4)));

// ---- crop ----

struct Box {
  const uint8_t* pixels;  // of the box's first row
  int64_t row_bytes;
  int height, width;
  bool flip;
};

// Output i is the sum of weights[i * taps + t] * input[first[i] + t] over t < taps; some weights are 0.
struct Filter {
  int taps = 0;
  std::vector<int> first;
  std::vector<float> weights;

  Filter(int length, int size, bool flip) : first(size) {
    const double scale = double(length) / size, support = std::max(scale, 1.0);
    const auto begin = [&](int i) { return std::max(0, int((i + 0.5) * scale - support + 0.5)); };
    const auto end = [&](int i) { return std::min(length, int((i + 0.5) * scale + support + 0.5)); };
    const auto triangle = [&](int at, int i) {
      return std::max(0.0, 1 - std::abs((at + 0.5 - (i + 0.5) * scale) / support));
    };
    for (int i = 0; i < size; ++i) taps = std::max(taps, end(i) - begin(i));
    weights.resize(size_t(size) * taps);
    for (int i = 0; i < size; ++i) {
      double total = 0;
      for (int at = begin(i); at < end(i); ++at) total += triangle(at, i);
      const int to = flip ? size - 1 - i : i;
      first[to] = std::min(begin(i), length - taps);
      for (int at = begin(i); at < end(i); ++at) {
        weights[size_t(to) * taps + at - first[to]] = float(triangle(at, i) / total);
      }
    }
  }
};

// line[j] = sum over t of weights[t] * rows[t * row_bytes + j], for j < length. TAPS: known to the
// compiler, or 0.
template <int TAPS>
INLINED void add_rows(const uint8_t* __restrict rows, int64_t row_bytes, const float* weights, int taps,
                      int length, float* __restrict line) {
  if (TAPS) {
    for (int j = 0; j < length; ++j) {
      float sum = 0;
      for (int t = 0; t < TAPS; ++t) sum += weights[t] * float(rows[t * row_bytes + j]);
      line[j] = sum;
    }
  } else {
    std::fill(line, line + length, 0.0f);
    for (int t = 0; t < taps; ++t, rows += row_bytes) {
      for (int j = 0; j < length; ++j) line[j] += weights[t] * float(rows[j]);
    }
  }
}

VECTORIZED void add_rows(const uint8_t* rows, int64_t row_bytes, const float* weights, int taps, int length,
                         float* line) {
  switch (taps) {
    case 2: return add_rows<2>(rows, row_bytes, weights, taps, length, line);
    case 3: return add_rows<3>(rows, row_bytes, weights, taps, length, line);
    case 4: return add_rows<4>(rows, row_bytes, weights, taps, length, line);
    case 5: return add_rows<5>(rows, row_bytes, weights, taps, length, line);
    default: return add_rows<0>(rows, row_bytes, weights, taps, length, line);
  }
}

// out [size, 3] = the filter over line's pixels. A load takes a fourth value, that of the next pixel, and a
// store puts it where the next pixel will be: out has room for one byte more.
template <int TAPS>
INLINED void add_columns(const Filter& filter, const float* line, int size, uint8_t* out) {
  const int taps = TAPS ? TAPS : filter.taps;
  const float* weights = filter.weights.data();
  for (int x = 0; x < size; ++x, weights += taps) {
    const float* pixels = line + 3 * filter.first[x];
    float4 sum = {0.5f, 0.5f, 0.5f, 0.5f};  // to round
    for (int t = 0; t < taps; ++t) {
      float4 pixel;
      std::memcpy(&pixel, pixels + 3 * t, sizeof(pixel));
      sum += weights[t] * pixel;
    }
    const byte4 whole = __builtin_convertvector(__builtin_convertvector(sum, int4), byte4);
    std::memcpy(out + 3 * x, &whole, sizeof(whole));
  }
}

VECTORIZED void add_columns(const Filter& filter, const float* line, int size, uint8_t* out) {
  switch (filter.taps) {
    case 2: return add_columns<2>(filter, line, size, out);
    case 3: return add_columns<3>(filter, line, size, out);
    case 4: return add_columns<4>(filter, line, size, out);
    case 5: return add_columns<5>(filter, line, size, out);
    default: return add_columns<0>(filter, line, size, out);
  }
}

// out: [size, size, 3]
void crop_one(const Box& box, int size, uint8_t* out, std::vector<float>& line,
              std::vector<uint8_t>& out_line) {
  const Filter down(box.height, size, false), across(box.width, size, box.flip);
  line.resize(3 * size_t(box.width) + 1);
  out_line.resize(3 * size_t(size) + 1);
  for (int y = 0; y < size; ++y) {
    add_rows(box.pixels + down.first[y] * box.row_bytes, box.row_bytes, &down.weights[size_t(y) * down.taps],
             down.taps, 3 * box.width, line.data());
    add_columns(across, line.data(), size, out_line.data());
    std::memcpy(out + 3 * int64_t(y) * size, out_line.data(), 3 * size_t(size));
  }
}

// ---- colours ----

enum Operation { brightness, contrast, saturation, hue };

inline int luma_of(int r, int g, int b) { return (r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16; }

// By value: the compiler turns these into instructions, std::max's references into branches.
inline int largest(int a, int b) { return a > b ? a : b; }
inline int smallest(int a, int b) { return a < b ? a : b; }
inline float clamp(float x) { return x < 0 ? 0 : x > 255 ? 255 : x; }
inline uint8_t cut(float x) { return uint8_t(int(clamp(x))); }

VECTORIZED void split(const uint8_t* image, int64_t n, uint8_t* r, uint8_t* g, uint8_t* b) {
  for (int64_t i = 0; i < n; ++i) r[i] = image[3 * i], g[i] = image[3 * i + 1], b[i] = image[3 * i + 2];
}

VECTORIZED void join(const uint8_t* r, const uint8_t* g, const uint8_t* b, int64_t n, uint8_t* image) {
  for (int64_t i = 0; i < n; ++i) image[3 * i] = r[i], image[3 * i + 1] = g[i], image[3 * i + 2] = b[i];
}

VECTORIZED void luma(const uint8_t* r, const uint8_t* g, const uint8_t* b, int64_t n, uint8_t* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = uint8_t(luma_of(r[i], g[i], b[i]));
}

VECTORIZED double mean_luma(const uint8_t* r, const uint8_t* g, const uint8_t* b, int64_t n) {
  constexpr int64_t block = 1 << 16;  // its sum fits 32 bits
  int64_t total = 0;
  for (int64_t begin = 0; begin < n; begin += block) {
    int32_t sum = 0;
    for (int64_t i = begin; i < std::min(n, begin + block); ++i) sum += luma_of(r[i], g[i], b[i]);
    total += sum;
  }
  return double(total) / double(n);
}

// base + factor * (x - base), the fraction cut off; black is base 0.
VECTORIZED void blend(uint8_t* x, int64_t n, float base, float factor) {
  for (int64_t i = 0; i < n; ++i) x[i] = cut((float(x[i]) - base) * factor + base);
}

VECTORIZED void blend_with_luma(uint8_t* r, uint8_t* g, uint8_t* b, int64_t n, float factor) {
  for (int64_t i = 0; i < n; ++i) {
    const float base = float(luma_of(r[i], g[i], b[i]));
    r[i] = cut((float(r[i]) - base) * factor + base);
    g[i] = cut((float(g[i]) - base) * factor + base);
    b[i] = cut((float(b[i]) - base) * factor + base);
  }
}

// Through Pillow's 8-bit HSV, as augment._hue does it and with its reasons; turn is in the hue's 8-bit steps.
VECTORIZED void turn_hue(uint8_t* reds, uint8_t* greens, uint8_t* blues, int64_t n, int turn) {
  constexpr float to_even = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds to whole numbers
  for (int64_t i = 0; i < n; ++i) {
    // 1. RGB to HSV, whole numbers as far as they go
    const int r = reds[i], g = greens[i], b = blues[i];
    const int value = largest(largest(r, g), b), low = smallest(smallest(r, g), b), chroma = value - low;
    const int red = r == value, green = (g == value) & !red, blue = 1 - red - green;
    const int beside = red * (b - g) + green * (r - b) + blue * (g - r);
    const int side = (beside > 0) - (beside < 0);
    const float fall = float(2 * value + low - r - g - b) / float(largest(chroma, 1));
    const float sixths = (float(2 * green + 4 * blue - side) + float(side) * fall) / 6;
    const int steps = int((sixths + float(sixths < 0)) * 255) + turn;
    const float angle = float(6 * (steps & 255));
    // 2. HSV to RGB: hue in sixths and tents are scaled by 255, all products are whole and below 2^24.
    const float depth = float(int(float(255 * chroma) / float(largest(value, 1))) * value);
    const float down_r = clamp(510 - std::abs(angle - 765)) * depth / 65025 + to_even - to_even;
    const float down_g = clamp(std::abs(angle - 510) - 255) * depth / 65025 + to_even - to_even;
    const float down_b = clamp(std::abs(angle - 1020) - 255) * depth / 65025 + to_even - to_even;
    reds[i] = uint8_t(value - int(down_r));
    greens[i] = uint8_t(value - int(down_g));
    blues[i] = uint8_t(value - int(down_b));
  }
}

// image: n pixels of 3 bytes; planes: room for 3 n bytes. A grey image is one plane, and stays under
// saturation and hue.
void jitter_one(uint8_t* image, int64_t n, bool gray, const float* factors, const int64_t* order,
                int operations, uint8_t* planes) {
  if (!gray && operations == 0) return;
  uint8_t *r = planes, *g = planes + n, *b = planes + 2 * n;
  split(image, n, r, g, b);
  if (gray) {
    luma(r, g, b, n, r);
    g = b = r;
  }
  for (int i = 0; i < operations; ++i) {
    const float factor = factors[order[i]];
    switch (order[i]) {
      case brightness:
      case contrast: {
        const float base = order[i] == contrast ? float(int(mean_luma(r, g, b, n) + 0.5)) : 0.0f;
        blend(r, gray ? n : 3 * n, base, factor);
        break;
      }
      case saturation:
        if (!gray) blend_with_luma(r, g, b, n, factor);
        break;
      case hue:
        if (!gray) turn_hue(r, g, b, n, int(factor * 255));
        break;
    }
  }
  join(r, g, b, n, image);
}

// ---- Python ----

void require(bool condition, const std::string& what) {
  if (!condition) throw py::value_error(what);
}

void crop(const py::sequence& images, const py::array_t<int64_t, py::array::c_style>& boxes,
          const py::array_t<bool, py::array::c_style>& flips, Bytes& out) {
  const int64_t n = int64_t(images.size());
  require(out.ndim() == 4 && out.shape(0) == n && out.shape(1) == out.shape(2) && out.shape(3) == 3,
          "out must be uint8 [n, S, S, 3]");
  require(boxes.ndim() == 2 && boxes.shape(0) == n && boxes.shape(1) == 4, "boxes must be int64 [n, 4]");
  require(flips.ndim() == 1 && flips.shape(0) == n, "flips must be bool [n]");
  std::vector<Box> work;
  std::vector<Bytes> alive;
  for (int64_t i = 0; i < n; ++i) {
    const std::string name = "images[" + std::to_string(i) + "]";
    require(py::isinstance<Bytes>(images[i]), name + " must be uint8 [H, W, 3], contiguous");
    const Bytes image = py::cast<Bytes>(images[i]);
    require(image.ndim() == 3 && image.shape(2) == 3, name + " must be uint8 [H, W, 3], contiguous");
    const int64_t *box = boxes.data(i, 0), top = box[0], left = box[1], height = box[2], width = box[3];
    require(top >= 0 && left >= 0 && height > 0 && width > 0 && height <= image.shape(0) - top &&
                width <= image.shape(1) - left && std::max(height, width) < (1 << 24),
            "boxes[" + std::to_string(i) + "] does not lie in " + name);
    work.push_back({image.data(top, left, 0), 3 * image.shape(1), int(height), int(width), flips.at(i)});
    alive.push_back(image);
  }
  const int size = int(out.shape(1));
  uint8_t* pixels = out.mutable_data();
  py::gil_scoped_release released;
  std::vector<float> line;
  std::vector<uint8_t> out_line;
  for (int64_t i = 0; i < n; ++i) crop_one(work[i], size, pixels + 3 * i * size * size, line, out_line);
}

void color_jitter(Bytes& images, const py::array_t<bool, py::array::c_style>& gray,
                  const py::array_t<float, py::array::c_style>& factors,
                  const py::array_t<int64_t, py::array::c_style>& order) {
  require(images.ndim() == 4 && images.shape(3) == 3, "images must be uint8 [n, H, W, 3]");
  const int64_t n = images.shape(0), pixels = images.shape(1) * images.shape(2);
  require(gray.ndim() == 1 && gray.shape(0) == n, "gray must be bool [n]");
  require(factors.ndim() == 2 && factors.shape(0) == n && factors.shape(1) == 4,
          "factors must be float32 [n, 4]");
  require(order.ndim() == 2 && order.shape(0) == n, "order must be int64 [n, operations]");
  const int operations = int(order.shape(1));
  require(std::all_of(order.data(), order.data() + order.size(), [](int64_t o) { return 0 <= o && o < 4; }),
          "order must hold operations 0 to 3");
  require(std::all_of(factors.data(), factors.data() + factors.size(),
                      [](float factor) { return std::abs(factor) <= 1e6f; }),
          "factors must be numbers up to 1e6");  // beyond, and of NaN, a conversion to int is undefined
  uint8_t* image = images.mutable_data();
  py::gil_scoped_release released;
  std::vector<uint8_t> planes(3 * pixels);
  for (int64_t i = 0; i < n && pixels > 0; ++i) {
    jitter_one(image + 3 * i * pixels, pixels, gray.data()[i], factors.data() + 4 * i,
               order.data() + operations * i, operations, planes.data());
  }
}

}  // namespace

PYBIND11_MODULE(_views, m) {
  m.doc() = "Crops and colours of the two views on a CPU.";
  m.def(
      "crop", &crop, py::arg("images"), py::arg("boxes"), py::arg("flips"), py::arg("out").noconvert(),
      "out[i] = images[i]'s box (top, left, height, width), resized to out's size, mirrored where flips[i].");
  m.def("color_jitter", &color_jitter, py::arg("images").noconvert(), py::arg("gray"), py::arg("factors"),
        py::arg("order"), "augment.color_jitter in place.");
}
