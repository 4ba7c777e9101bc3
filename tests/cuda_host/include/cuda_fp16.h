// IEEE binary16 for the host: conversions only, rounding to nearest even.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half value) {
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16, exponent = (value.bits >> 10) & 31u,
                 mantissa = value.bits & 0x3ffu;
  if (exponent == 0) {  // zero or subnormal
    return std::copysign(static_cast<float>(mantissa) * 0x1p-24f, std::bit_cast<float>(sign));
  }
  return std::bit_cast<float>(sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | (mantissa << 13));
}

inline __half __float2half_rn(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  const float size = std::fabs(value);
  uint32_t result;
  if (std::isnan(value)) {
    return {0x7fff};
  }
  if (size >= 65520.0f) {  // halfway to the next power of two
    result = 0x7c00;
  } else if (size < 0x1p-14f) {  // subnormal: count in units of 2^-24; a carry gives the smallest normal number
    result = static_cast<uint32_t>(std::lrint(size * 0x1p24f));
  } else {
    result = ((magnitude + 0xfff + ((magnitude >> 13) & 1)) >> 13) - (112u << 10);
  }
  return {static_cast<uint16_t>(sign | result)};
}

inline __half __float2half(float value) { return __float2half_rn(value); }
