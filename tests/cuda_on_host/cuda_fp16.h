#pragma once

#include <cmath>
#include <cstdint>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  float value = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(mantissa | 1024, exponent - 25);
  if (exponent == 31) value = mantissa ? NAN : INFINITY;
  return x.bits >> 15 ? -value : value;
}

inline __half __float2half_rn(float x) {
  if (std::isnan(x)) return {0x7fff};
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float magnitude = std::fabs(x);
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  int exponent = -14;  // of the smallest normal number; subnormal ones share its spacing
  if (magnitude >= 0x1p-14f) exponent = std::ilogb(magnitude);
  // nearbyint rounds to nearest even; a mantissa that rounds up to 2048 carries into the exponent by itself.
  const int mantissa = std::nearbyint(std::ldexp(magnitude, 10 - exponent));
  return {static_cast<uint16_t>(sign | (((exponent + 14) << 10) + mantissa))};
}
