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

// sums[r] = factors[r] . a tile of kKeys columns, [count][kKeys]. row: factors from one row to the next.
INLINE void rows_times(const float* factors, size_t row, const float* tile, int count, float (*sums)[kKeys]) {
  for (int r = 0; r < kRows; r++) {
    for (int j = 0; j < kKeys; j++) sums[r][j] = 0;
  }
  for (int i = 0; i < count; i++, tile += kKeys) {
    for (int r = 0; r < kRows; r++) {
      const float factor = factors[r * row + i];
      for (int j = 0; j < kKeys; j++) sums[r][j] += factor * tile[j];
    }
  }
}

INLINE void attend_floats(const Batch& b, int sequence, int head) {
  const Head h = find(b, sequence, head);
  const int keys = padded(b.tokens), width = padded(b.width);
  thread_local std::vector<float> packed_keys, packed_values, queries, scores;
  packed_keys.assign(static_cast<size_t>(keys) * b.width, 0.0f);  // [keys / kKeys][width][kKeys]
  packed_values.assign(static_cast<size_t>(b.tokens) * width, 0.0f);  // [width / kKeys][tokens][kKeys]
  queries.resize(static_cast<size_t>(kRows) * b.width);
  scores.resize(static_cast<size_t>(kRows) * keys);
  for (int j = 0; j < b.tokens; j++) {
    float* tile = packed_keys.data() + static_cast<size_t>(j / kKeys) * b.width * kKeys + j % kKeys;
    for (int d = 0; d < b.width; d++) {
      tile[static_cast<size_t>(d) * kKeys] = h.k[j * h.stride + d];
      packed_values[(static_cast<size_t>(d / kKeys) * b.tokens + j) * kKeys + d % kKeys] = h.v[j * h.stride + d];
    }
  }
  float sums[kRows][kKeys], totals[kRows];
  for (int i = 0; i < b.tokens; i += kRows) {
    const int rows = std::min(kRows, b.tokens - i);
    for (int r = 0; r < kRows; r++) {
      const float* from = h.q + (i + std::min(r, rows - 1)) * h.stride;
      for (int d = 0; d < b.width; d++) queries[r * b.width + d] = from[d] * b.scale;
    }
    for (int j = 0; j < keys; j += kKeys) {
      rows_times(queries.data(), b.width, packed_keys.data() + static_cast<size_t>(j) * b.width, b.width, sums);
      for (int r = 0; r < kRows; r++) {
        for (int c = 0; c < kKeys; c++) scores[static_cast<size_t>(r) * keys + j + c] = sums[r][c] + h.mask[j + c];
      }
    }
    for (int r = 0; r < kRows; r++) totals[r] = exponentials(scores.data() + static_cast<size_t>(r) * keys, keys);
    for (int d = 0; d < b.width; d += kKeys) {
      rows_times(scores.data(), keys, packed_values.data() + static_cast<size_t>(d) * b.tokens, b.tokens, sums);
      const int columns = std::min(kKeys, b.width - d);
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

__mmask16 first(int count) {
  return count >= kLanes ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

// kLanes numbers of which the first `count` are there.
TARGET_BF16 INLINE __m512 some(const float* from, int count) { return _mm512_maskz_loadu_ps(first(count), from); }

// sums[r] = pairs[r] . a tile of kKeys columns, [count][kKeys] pairs. row: pairs from one row to the next.
TARGET_BF16 INLINE void pairs_times(const uint32_t* pairs, size_t row, const uint32_t* tile, int count,
                                    __m512 (*sums)[2]) {
  for (int r = 0; r < kWide; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
  for (int i = 0; i < count; i++, tile += kKeys) {
    const __m512bh low = (__m512bh)_mm512_loadu_si512(tile), high = (__m512bh)_mm512_loadu_si512(tile + kLanes);
    for (int r = 0; r < kWide; r++) {
      const __m512bh pair = (__m512bh)_mm512_set1_epi32(static_cast<int>(pairs[r * row + i]));
      sums[r][0] = _mm512_dpbf16_ps(sums[r][0], low, pair);
      sums[r][1] = _mm512_dpbf16_ps(sums[r][1], high, pair);
    }
  }
}

// A row of `count` numbers times scale, in pairs, filled up with zeros to `all` numbers.
TARGET_BF16 INLINE void narrow(const float* from, int count, int all, float scale, uint32_t* to) {
  const __m512 factor = _mm512_set1_ps(scale);
  for (int d = 0; d < all; d += 2 * kLanes) {
    const __m512 low = _mm512_mul_ps(some(from + d, count - d), factor);
    const __m512 high = _mm512_mul_ps(some(from + d + kLanes, count - d - kLanes), factor);
    _mm512_storeu_si512(to + d / 2, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
}

// 16 x 16 numbers of 32 bits, turned.
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
    const __m512i a = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
    const __m512i b = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
    _mm512_storeu_si512(to + i * to_stride, _mm512_shuffle_i32x4(a, c, 0x88));
    _mm512_storeu_si512(to + (i + 4) * to_stride, _mm512_shuffle_i32x4(b, d, 0x88));
    _mm512_storeu_si512(to + (i + 8) * to_stride, _mm512_shuffle_i32x4(a, c, 0xdd));
    _mm512_storeu_si512(to + (i + 12) * to_stride, _mm512_shuffle_i32x4(b, d, 0xdd));
  }
}

// Keys in tiles of kKeys: [keys / kKeys][width / 2][kKeys] pairs of a key's numbers. width is padded.
TARGET_BF16 void pack_keys(const Batch& b, const Head& h, int width, uint32_t* to) {
  uint32_t rows[16 * kMaxWidth / 2];
  for (int j = 0; j < padded(b.tokens); j += 16) {
    for (int r = 0; r < 16; r++) {
      narrow(h.k + (j + r) * h.stride, j + r < b.tokens ? b.width : 0, width, 1.0f, rows + r * width / 2);
    }
    uint32_t* tile = to + static_cast<size_t>(j / kKeys) * width / 2 * kKeys + j % kKeys;
    for (int d = 0; d < width / 2; d += 16) turn(rows + d, width / 2, tile + static_cast<size_t>(d) * kKeys, kKeys);
  }
}

// Values in tiles of kKeys columns: [width / kKeys][keys / 2][kKeys] pairs of two values' numbers.
TARGET_BF16 void pack_values(const Batch& b, const Head& h, int width, uint32_t* to) {
  const int pairs = padded(b.tokens) / 2;
  for (int i = 0; i < pairs; i++) {
    const float* from = h.v + 2 * i * h.stride;
    for (int d = 0; d < width; d += kLanes) {
      const __m512 one = some(from + d, 2 * i < b.tokens ? b.width - d : 0);
      const __m512 two = some(from + h.stride + d, 2 * i + 1 < b.tokens ? b.width - d : 0);
      const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(one));
      const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(two)), 16);
      const size_t at = (static_cast<size_t>(d / kKeys) * pairs + i) * kKeys + d % kKeys;
      _mm512_storeu_si512(to + at, _mm512_or_si512(low, high));
    }
  }
}

// 2 to the power of x, for x <= 0, within 4e-6 of it: more than weights keep.
TARGET_BF16 INLINE __m512 power(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);  // 0 from there on; in this order NaN stays
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 rest = _mm512_sub_ps(x, whole);  // -0.5 to 0.5: a polynomial through Chebyshev's points
  __m512 p = _mm512_set1_ps(9.66637e-3f);
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(5.592198e-2f));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(2.4022349e-1f));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(6.9312105e-1f));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, whole);
}

// A row of scores, times log2(e), into weights, in pairs; their sum is returned. most: the largest of each lane.
TARGET_BF16 INLINE float weights_of(const float* scores, int count, __m512 most, uint32_t* to) {
  const float top = _mm512_reduce_max_ps(most);
  const __m512 largest = _mm512_set1_ps(top == kNone ? 0.0f : top);
  __m512 total = _mm512_setzero_ps();
  for (int j = 0; j < count; j += 2 * kLanes) {
    const __m512 low = power(_mm512_sub_ps(_mm512_loadu_ps(scores + j), largest));
    const __m512 high = power(_mm512_sub_ps(_mm512_loadu_ps(scores + j + kLanes), largest));
    total = _mm512_add_ps(total, _mm512_add_ps(low, high));
    _mm512_storeu_si512(to + j / 2, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
  return _mm512_reduce_add_ps(total);
}

TARGET_BF16 void attend_bf16(const Batch& b, int sequence, int head) {
  constexpr float kLog2e = 1.44269504088896341f;
  const Head h = find(b, sequence, head);
  const int keys = padded(b.tokens), width = padded(b.width);
  thread_local std::vector<uint32_t> packed_keys, packed_values, pairs;
  thread_local std::vector<float> scores;  // kWide rows
  packed_keys.resize(static_cast<size_t>(keys) * width / 2);
  packed_values.resize(static_cast<size_t>(keys) * width / 2);
  pairs.resize(static_cast<size_t>(kWide) * std::max(keys, width) / 2);
  scores.resize(static_cast<size_t>(kWide) * keys);
  pack_keys(b, h, width, packed_keys.data());
  pack_values(b, h, width, packed_values.data());
  for (int j = 0; j < b.tokens; j++) h.mask[j] = std::max(h.mask[j] * kLog2e, -1e38f);  // numbers, and so is the largest
  __m512 sums[kWide][2], most[kWide];
  for (int i = 0; i < b.tokens; i += kWide) {
    const int count = std::min(kWide, b.tokens - i);
    for (int r = 0; r < kWide; r++) {
      const float* from = h.q + (i + std::min(r, count - 1)) * h.stride;
      narrow(from, b.width, width, b.scale * kLog2e, pairs.data() + r * width / 2);
      most[r] = _mm512_set1_ps(kNone);
    }
    for (int j = 0; j < keys; j += kKeys) {
      pairs_times(pairs.data(), width / 2, packed_keys.data() + static_cast<size_t>(j) * width / 2, width / 2, sums);
      const __m512 low = _mm512_loadu_ps(h.mask.data() + j), high = _mm512_loadu_ps(h.mask.data() + j + kLanes);
      float* to = scores.data() + j;
      for (int r = 0; r < kWide; r++, to += keys) {
        sums[r][0] = _mm512_add_ps(sums[r][0], low);
        sums[r][1] = _mm512_add_ps(sums[r][1], high);
        most[r] = _mm512_max_ps(most[r], _mm512_max_ps(sums[r][0], sums[r][1]));
        _mm512_storeu_ps(to, sums[r][0]);
        _mm512_storeu_ps(to + kLanes, sums[r][1]);
      }
    }
    float totals[kWide];
    for (int r = 0; r < kWide; r++) {
      const float* row = scores.data() + static_cast<size_t>(r) * keys;
      totals[r] = weights_of(row, keys, most[r], pairs.data() + static_cast<size_t>(r) * keys / 2);
    }
    for (int d = 0; d < width; d += kKeys) {
      pairs_times(pairs.data(), keys / 2, packed_values.data() + static_cast<size_t>(d) * keys / 2, keys / 2, sums);
      for (int r = 0; r < count; r++) {
        const __m512 share = _mm512_set1_ps(1.0f / totals[r]);
        float* to = h.out + (i + r) * h.out_stride + d;
        _mm512_mask_storeu_ps(to, first(b.width - d), _mm512_mul_ps(sums[r][0], share));
        _mm512_mask_storeu_ps(to + kLanes, first(b.width - d - kLanes), _mm512_mul_ps(sums[r][1], share));
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
