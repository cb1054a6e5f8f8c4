// Arithmetic on single numbers that loops of every instruction set take in, so that it runs in that one's vectors.
#pragma once
#include <cstdint>
#include <cstring>

#define INLINE static inline __attribute__((always_inline))

INLINE float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// e to the power of x, for x <= 0, to about 1e-7 of it; 0 below -87. The polynomial is Cephes' expf.
INLINE float exponential(float x) {
  const float rounder = 12582912.0f;  // 1.5 * 2^23: adding it leaves whole numbers
  const float bounded = x < -87.0f ? -87.0f : x;
  const float shifted = bounded * 1.44269504088896341f + rounder;
  const float n = shifted - rounder;
  const float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const float power = as_float(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
  return x < -87.0f ? 0.0f : p * power;
}

// x / (1 + e to the power of -x)
INLINE float silu(float x) {
  const float small = exponential(x < 0 ? x : -x);
  return x * (x < 0 ? small : 1.0f) / (1.0f + small);
}

// x * (1 + erf(x / sqrt(2))) / 2. erf is Abramowitz and Stegun's 7.1.26, within 1.5e-7.
INLINE float gelu(float x) {
  const float z = (x < 0 ? -x : x) * 0.70710678118654752f;
  const float t = 1.0f / (1.0f + 0.3275911f * z);
  float p = 1.061405429f;
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const float tail = 0.5f * p * t * exponential(-z * z);  // what |x| leaves of its half
  return x * (x < 0 ? tail : 1.0f - tail);
}
