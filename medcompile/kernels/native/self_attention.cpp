#include "self_attention.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "floats.h"

#if MEDCOMPILE_X86
#include <immintrin.h>
#endif

// As in attention.cpp, plain loops become each instruction set's vectors. bfloat16 has instructions of its own.

namespace self_attention {
namespace {

constexpr int kKeys = 32;  // keys, and columns of values, that are multiplied at once
constexpr int kLanes = 16;
constexpr float kNone = -std::numeric_limits<float>::infinity();

int padded(int count) { return (count + kKeys - 1) / kKeys * kKeys; }

// One head of one sequence: where its rows are, and its mask, padded with -inf.
struct Head {
  const float *q, *k, *v;
  float* out;
  size_t stride, out_stride;  // between tokens
  std::vector<float>& mask;
};

INLINE Head find(const Batch& b, int sequence, int head) {
  thread_local std::vector<float> mask;
  const size_t all = static_cast<size_t>(b.heads) * b.width, first = static_cast<size_t>(sequence) * b.tokens;
  const float* q = b.qkv + first * 3 * all + static_cast<size_t>(head) * b.width;
  mask.assign(padded(b.tokens), kNone);
  for (int j = 0; j < b.tokens; j++) mask[j] = b.mask != nullptr ? b.mask[first + j] : 0.0f;
  return {q, q + all, q + 2 * all, b.out + first * all + static_cast<size_t>(head) * b.width, 3 * all, all, mask};
}

// scores = e to the power of (scores - their maximum); returns the sum. count is divisible by kLanes.
INLINE float exponentials(float* scores, int count) {
  float lanes[kLanes];
  for (int l = 0; l < kLanes; l++) lanes[l] = scores[l];
  for (int j = kLanes; j < count; j += kLanes) {
    for (int l = 0; l < kLanes; l++) lanes[l] = scores[j + l] > lanes[l] ? scores[j + l] : lanes[l];
  }
  float most = lanes[0];
  for (int l = 1; l < kLanes; l++) most = lanes[l] > most ? lanes[l] : most;
  if (most == kNone) most = 0;
  for (int l = 0; l < kLanes; l++) lanes[l] = 0;
  for (int j = 0; j < count; j += kLanes) {
    for (int l = 0; l < kLanes; l++) {
      scores[j + l] = exponential(scores[j + l] - most);
      lanes[l] += scores[j + l];
    }
  }
  float total = 0;
  for (int l = 0; l < kLanes; l++) total += lanes[l];
  return total;
}

// ---- float32

constexpr int kRows = 4;

// sums[r] = factors[r] . columns [from, from + kKeys) of matrix: [count][stride]
INLINE void rows_times(const float* const* factors, int factor_stride, const float* matrix, size_t stride, int count,
                       int columns, float (*sums)[kKeys]) {
  for (int r = 0; r < kRows; r++) {
    for (int j = 0; j < kKeys; j++) sums[r][j] = 0;
  }
  for (int i = 0; i < count; i++) {
    const float* row = matrix + static_cast<size_t>(i) * stride;
    if (columns == kKeys) {
      for (int r = 0; r < kRows; r++) {
        const float factor = factors[r][i * factor_stride];
        for (int j = 0; j < kKeys; j++) sums[r][j] += factor * row[j];
      }
    } else {
      for (int r = 0; r < kRows; r++) {
        for (int j = 0; j < columns; j++) sums[r][j] += factors[r][i * factor_stride] * row[j];
      }
    }
  }
}

INLINE void attend_floats(const Batch& b, int sequence, int head) {
  const Head h = find(b, sequence, head);
  const int keys = padded(b.tokens);
  thread_local std::vector<float> turned, scores;  // keys in columns; a few rows of scores
  turned.assign(static_cast<size_t>(b.width) * keys, 0.0f);
  scores.resize(static_cast<size_t>(kRows) * keys);
  for (int j = 0; j < b.tokens; j++) {
    for (int d = 0; d < b.width; d++) turned[static_cast<size_t>(d) * keys + j] = h.k[j * h.stride + d];
  }
  for (int i = 0; i < b.tokens; i += kRows) {
    const int rows = std::min(kRows, b.tokens - i);
    const float *q[kRows], *weights[kRows];
    float totals[kRows], sums[kRows][kKeys];
    for (int r = 0; r < kRows; r++) {
      q[r] = h.q + (i + std::min(r, rows - 1)) * h.stride;
      weights[r] = scores.data() + static_cast<size_t>(r) * keys;
    }
    for (int j = 0; j < keys; j += kKeys) {
      rows_times(q, 1, turned.data() + j, keys, b.width, kKeys, sums);
      for (int r = 0; r < kRows; r++) {
        float* to = scores.data() + static_cast<size_t>(r) * keys + j;
        for (int c = 0; c < kKeys; c++) to[c] = sums[r][c] * b.scale + h.mask[j + c];
      }
    }
    for (int r = 0; r < rows; r++) totals[r] = exponentials(scores.data() + static_cast<size_t>(r) * keys, keys);
    for (int d = 0; d < b.width; d += kKeys) {
      const int columns = std::min(kKeys, b.width - d);
      rows_times(weights, 1, h.v + d, h.stride, b.tokens, columns, sums);
      for (int r = 0; r < rows; r++) {
        for (int c = 0; c < columns; c++) h.out[(i + r) * h.out_stride + d + c] = sums[r][c] / totals[r];
      }
    }
  }
}

void attend_generic(const Batch& b, int sequence, int head) { attend_floats(b, sequence, head); }

#if MEDCOMPILE_X86
TARGET_AVX2 void attend_avx2(const Batch& b, int sequence, int head) { attend_floats(b, sequence, head); }
TARGET_AVX512 void attend_avx512(const Batch& b, int sequence, int head) { attend_floats(b, sequence, head); }

// ---- bfloat16, two at a time: pairs of a query's numbers meet pairs of a key's; pairs of weights, of values

constexpr int kWide = 8;  // rows at once

// sums[r] += pairs[r] . columns of matrix: [count][stride] pairs
TARGET_BF16 INLINE void pairs_times(const uint32_t* pairs, size_t row, const uint32_t* matrix, size_t stride, int count,
                                    __m512 (*sums)[2]) {
  for (int r = 0; r < kWide; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
  for (int i = 0; i < count; i++) {
    const __m512bh low = (__m512bh)_mm512_loadu_si512(matrix + i * stride);
    const __m512bh high = (__m512bh)_mm512_loadu_si512(matrix + i * stride + kLanes);
    for (int r = 0; r < kWide; r++) {
      const __m512bh pair = (__m512bh)_mm512_set1_epi32(static_cast<int>(pairs[r * row + i]));
      sums[r][0] = _mm512_dpbf16_ps(sums[r][0], low, pair);
      sums[r][1] = _mm512_dpbf16_ps(sums[r][1], high, pair);
    }
  }
}

// kLanes numbers of which the first `count` are there.
TARGET_BF16 INLINE __m512 some(const float* from, int count) {
  const __mmask16 there = count >= kLanes ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
  return _mm512_maskz_loadu_ps(there, from);
}

// A row of `width` numbers times scale, in pairs, filled up with zeros to `all` numbers.
TARGET_BF16 INLINE void narrow(const float* from, int width, int all, float scale, uint32_t* to) {
  const __m512 factor = _mm512_set1_ps(scale);
  for (int d = 0; d < all; d += 2 * kLanes) {
    const __m512 low = _mm512_mul_ps(some(from + d, width - d), factor);
    const __m512 high = _mm512_mul_ps(some(from + d + kLanes, width - d - kLanes), factor);
    _mm512_storeu_si512(to + d / 2, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
}

// 16 x 16 of 32 bits, turned. from, to: rows of so many numbers.
TARGET_BF16 INLINE void turn(const uint32_t* from, size_t from_stride, uint32_t* to, size_t to_stride) {
  __m512i rows[16], half[16];
  for (int i = 0; i < 16; i++) rows[i] = _mm512_loadu_si512(from + i * from_stride);
  for (int i = 0; i < 16; i += 2) {
    half[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    half[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    rows[i] = _mm512_unpacklo_epi64(half[i], half[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(half[i], half[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(half[i + 1], half[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(half[i + 1], half[i + 3]);
  }
  for (int i = 0; i < 4; i++) {  // quarters of rows that lie 4 apart
    const __m512i a = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88), b = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
    _mm512_storeu_si512(to + i * to_stride, _mm512_shuffle_i32x4(a, c, 0x88));
    _mm512_storeu_si512(to + (i + 8) * to_stride, _mm512_shuffle_i32x4(a, c, 0xdd));
    _mm512_storeu_si512(to + (i + 4) * to_stride, _mm512_shuffle_i32x4(b, d, 0x88));
    _mm512_storeu_si512(to + (i + 12) * to_stride, _mm512_shuffle_i32x4(b, d, 0xdd));
  }
}

TARGET_BF16 void attend_bf16(const Batch& b, int sequence, int head) {
  const Head h = find(b, sequence, head);
  const int keys = padded(b.tokens), width = padded(b.width);
  thread_local std::vector<uint32_t> rows, turned, values, pairs;
  thread_local std::vector<float> scores;
  rows.assign(static_cast<size_t>(keys) * width / 2, 0);
  turned.resize(rows.size());                                // [width / 2][keys]
  values.resize(static_cast<size_t>(keys) / 2 * width);      // [keys / 2][width]
  pairs.resize(static_cast<size_t>(kWide) * std::max(keys, width) / 2);
  scores.resize(static_cast<size_t>(kWide) * keys);
  for (int j = 0; j < b.tokens; j++) narrow(h.k + j * h.stride, b.width, width, 1.0f, rows.data() + static_cast<size_t>(j) * width / 2);
  for (int j = 0; j < keys; j += 16) {
    for (int d = 0; d < width / 2; d += 16) {
      turn(rows.data() + static_cast<size_t>(j) * width / 2 + d, width / 2, turned.data() + static_cast<size_t>(d) * keys + j, keys);
    }
  }
  for (int j = 0; j < keys; j += 2) {
    for (int d = 0; d < width; d += kLanes) {
      const __m512 first = some(h.v + j * h.stride + d, j < b.tokens ? b.width - d : 0);
      const __m512 second = some(h.v + (j + 1) * h.stride + d, j + 1 < b.tokens ? b.width - d : 0);
      const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(first));
      const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(second));
      _mm512_storeu_si512(values.data() + static_cast<size_t>(j / 2) * width + d, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }
  for (int i = 0; i < b.tokens; i += kWide) {
    const int count = std::min(kWide, b.tokens - i);
    __m512 sums[kWide][2];
    for (int r = 0; r < kWide; r++) {
      narrow(h.q + (i + std::min(r, count - 1)) * h.stride, b.width, width, b.scale, pairs.data() + static_cast<size_t>(r) * width / 2);
    }
    for (int j = 0; j < keys; j += kKeys) {
      pairs_times(pairs.data(), width / 2, turned.data() + j, keys, width / 2, sums);
      const __m512 low = _mm512_loadu_ps(h.mask.data() + j), high = _mm512_loadu_ps(h.mask.data() + j + kLanes);
      for (int r = 0; r < kWide; r++) {
        _mm512_storeu_ps(scores.data() + static_cast<size_t>(r) * keys + j, _mm512_add_ps(sums[r][0], low));
        _mm512_storeu_ps(scores.data() + static_cast<size_t>(r) * keys + j + kLanes, _mm512_add_ps(sums[r][1], high));
      }
    }
    float totals[kWide];
    for (int r = 0; r < kWide; r++) {
      float* row = scores.data() + static_cast<size_t>(r) * keys;
      totals[r] = exponentials(row, keys);
      narrow(row, keys, keys, 1.0f, pairs.data() + static_cast<size_t>(r) * keys / 2);
    }
    for (int d = 0; d < width; d += kKeys) {
      pairs_times(pairs.data(), keys / 2, values.data() + d, width, keys / 2, sums);
      for (int r = 0; r < count; r++) {
        const __m512 share = _mm512_set1_ps(1.0f / totals[r]);
        float* to = h.out + (i + r) * h.out_stride + d;
        const int left = b.width - d;
        const __mmask16 first = left >= kLanes ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
        const __mmask16 second = left >= 2 * kLanes ? 0xffff : left <= kLanes ? 0 : static_cast<__mmask16>((1u << (left - kLanes)) - 1);
        _mm512_mask_storeu_ps(to, first, _mm512_mul_ps(sums[r][0], share));
        _mm512_mask_storeu_ps(to + kLanes, second, _mm512_mul_ps(sums[r][1], share));
      }
    }
  }
}
#endif

}  // namespace

void attend(Isa isa, const Batch& b, int sequence, int head) {
#if MEDCOMPILE_X86
  if (isa == kAvx512Bf16 && b.bfloat16) return attend_bf16(b, sequence, head);
  if (isa >= kAvx512Vnni) return attend_avx512(b, sequence, head);
  if (isa == kAvx2) return attend_avx2(b, sequence, head);
#endif
  static_cast<void>(isa);
  attend_generic(b, sequence, head);
}

}  // namespace self_attention
