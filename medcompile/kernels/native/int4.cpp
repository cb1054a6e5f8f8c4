#include "int4.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "floats.h"

#if defined(__x86_64__) || defined(_M_X64)
#define MEDCOMPILE_X86 1
#include <immintrin.h>
#define TARGET_AVX2 __attribute__((target("avx2,fma")))
#define TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")))
#endif

namespace int4 {
namespace {

constexpr int kAhead = 4096;  // bytes of weights asked for before they are needed: a page, where hardware stops

int32_t four(const int8_t* at) {
  int32_t word;
  std::memcpy(&word, at, 4);
  return word;
}

// Where the four of row `row` (of a panel that begins at `first` and has `rows`) from k on are.
int8_t* place(int8_t* a, int first, int rows, int row, int k, int width) {
  return a + static_cast<size_t>(first) * width + (static_cast<size_t>(k / 4) * rows + row) * 4;
}

// gate = silu(gate) * up, a row of a tile.
INLINE void pass_gate(float* gate, const float* up) {
  for (int c = 0; c < kColumns; c++) gate[c] = silu(gate[c]) * up[c];
}

// ---- any processor

void round_group(const float* x, int count, int8_t* to, int stride, float* step, int32_t* offset) {
  float largest = 0;
  bool number = true;
  for (int i = 0; i < count; i++) {
    largest = std::max(largest, std::fabs(x[i]));
    number = number && !std::isnan(x[i]);
  }
  const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
  int32_t sum = 0;
  for (int i = 0; i < count; i++) {
    const auto rounded = static_cast<int8_t>(std::clamp(std::nearbyint(x[i] * inverse), -127.0f, 127.0f));
    to[static_cast<size_t>(i / 4) * stride + i % 4] = rounded;
    sum += rounded;
  }
  *step = number ? largest / 127.0f : NAN;  // what rounding would hide
  *offset = -8 * sum;
}

template <int R>
void tile_generic(const int8_t* a, const float* step, const int32_t* offset, const Shape& s, const uint8_t* w,
                  float (*out)[kColumns]) {
  const int groups = s.groups();
  for (int r = 0; r < R; r++) std::fill(out[r], out[r] + kColumns, 0.0f);
  for (int g = 0; g < groups; g++) {
    float scales[kColumns];
    std::memcpy(scales, w, sizeof scales);
    w += sizeof scales;
    int32_t sums[R][kColumns];
    for (int r = 0; r < R; r++) std::fill(sums[r], sums[r] + kColumns, offset[r * groups + g]);
    for (int k = 0; k < s.group; k += 8, w += 128, a += 8 * R) {
      for (int r = 0; r < R; r++) {
        const int8_t *low = a + 4 * r, *high = a + 4 * (R + r);
        for (int c = 0; c < kColumns; c++) {
          int32_t sum = 0;
          for (int i = 0; i < 4; i++) sum += (w[4 * c + i] & 15) * low[i] + (w[4 * c + i] >> 4) * high[i];
          sums[r][c] += sum;
        }
      }
    }
    for (int r = 0; r < R; r++) {
      for (int c = 0; c < kColumns; c++) {
        out[r][c] += static_cast<float>(sums[r][c]) * (step[r * groups + g] * scales[c]);
      }
    }
  }
}

void pass_gate_generic(float* gate, const float* up) { pass_gate(gate, up); }

#if MEDCOMPILE_X86

// ---- AVX2: products of 4-bit and 8-bit numbers, added in pairs, fit 16 bits

template <int R>
TARGET_AVX2 void tile_avx2(const int8_t* a, const float* step, const int32_t* offset, const Shape& s, const uint8_t* w,
                           float (*out)[kColumns]) {
  const int groups = s.groups();
  const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  for (int r = 0; r < R; r++) std::fill(out[r], out[r] + kColumns, 0.0f);
  for (int g = 0; g < groups; g++) {
    const float* scales = reinterpret_cast<const float*>(w);
    w += kColumns * sizeof(float);
    __m256i sums[R][4];
    for (int r = 0; r < R; r++) {
      for (int c = 0; c < 4; c++) sums[r][c] = _mm256_set1_epi32(offset[r * groups + g]);
    }
    for (int k = 0; k < s.group; k += 8, w += 128, a += 8 * R) {
      for (int c = 0; c < 4; c++) {
        const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w) + c);
        const __m256i low = _mm256_and_si256(both, nibble);
        const __m256i high = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
        for (int r = 0; r < R; r++) {
          const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(low, _mm256_set1_epi32(four(a + 4 * r))),
                                                 _mm256_maddubs_epi16(high, _mm256_set1_epi32(four(a + 4 * (R + r)))));
          sums[r][c] = _mm256_add_epi32(sums[r][c], _mm256_madd_epi16(pairs, ones));
        }
      }
    }
    for (int r = 0; r < R; r++) {
      const __m256 t = _mm256_set1_ps(step[r * groups + g]);
      for (int c = 0; c < 4; c++) {
        const __m256 scale = _mm256_mul_ps(t, _mm256_loadu_ps(scales + 8 * c));
        const __m256 sum = _mm256_loadu_ps(out[r] + 8 * c);
        _mm256_storeu_ps(out[r] + 8 * c, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[r][c]), scale, sum));
      }
    }
  }
}

TARGET_AVX2 void pass_gate_avx2(float* gate, const float* up) { pass_gate(gate, up); }

// ---- AVX-512 with VNNI

TARGET_AVX512 void pass_gate_avx512(float* gate, const float* up) { pass_gate(gate, up); }

TARGET_AVX512 void round_group_avx512(const float* x, int count, int8_t* to, int stride, float* step,
                                      int32_t* offset) {
  __m512 largest = _mm512_setzero_ps();
  __mmask16 missing = 0;
  for (int i = 0; i < count; i += 16) {
    const __m512 values = _mm512_loadu_ps(x + i);
    largest = _mm512_max_ps(largest, _mm512_abs_ps(values));
    missing |= _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  }
  const float most = _mm512_reduce_max_ps(largest);
  const __m512 inverse = _mm512_set1_ps(most > 0 ? 127.0f / most : 0.0f);
  __m512i sum = _mm512_setzero_si512();
  for (int i = 0; i < count; i += 16) {
    const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), inverse));
    sum = _mm512_add_epi32(sum, rounded);
    alignas(16) int32_t words[4];
    _mm_store_si128(reinterpret_cast<__m128i*>(words), _mm512_cvtsepi32_epi8(rounded));
    for (int j = 0; j < 4; j++) std::memcpy(to + static_cast<size_t>(i / 4 + j) * stride, &words[j], 4);
  }
  *step = missing ? NAN : most / 127.0f;
  *offset = -8 * _mm512_reduce_add_epi32(sum);
}

template <int R>
TARGET_AVX512 void tile_avx512(const int8_t* a, const float* step, const int32_t* offset, const Shape& s,
                               const uint8_t* w, float (*out)[kColumns]) {
  const int groups = s.groups();
  const __m512i nibble = _mm512_set1_epi8(15);
  __m512 y[R][2];
  for (int r = 0; r < R; r++) y[r][0] = y[r][1] = _mm512_setzero_ps();
  for (int g = 0; g < groups; g++) {
    const float* scales = reinterpret_cast<const float*>(w);
    w += kColumns * sizeof(float);
    __m512i sums[R][2];
    for (int r = 0; r < R; r++) sums[r][0] = sums[r][1] = _mm512_set1_epi32(offset[r * groups + g]);
    for (int k = 0; k < s.group; k += 8, w += 128, a += 8 * R) {
      _mm_prefetch(reinterpret_cast<const char*>(w) + kAhead, _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(w) + kAhead + 64, _MM_HINT_T0);
      const __m512i both0 = _mm512_loadu_si512(w), both1 = _mm512_loadu_si512(w + 64);
      const __m512i low0 = _mm512_and_si512(both0, nibble), low1 = _mm512_and_si512(both1, nibble);
      const __m512i high0 = _mm512_and_si512(_mm512_srli_epi16(both0, 4), nibble);
      const __m512i high1 = _mm512_and_si512(_mm512_srli_epi16(both1, 4), nibble);
      for (int r = 0; r < R; r++) {
        const __m512i first = _mm512_set1_epi32(four(a + 4 * r));
        sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], low0, first);
        sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], low1, first);
        const __m512i second = _mm512_set1_epi32(four(a + 4 * (R + r)));
        sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], high0, second);
        sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], high1, second);
      }
    }
    const __m512 scale0 = _mm512_loadu_ps(scales), scale1 = _mm512_loadu_ps(scales + 16);
    for (int r = 0; r < R; r++) {
      const __m512 t = _mm512_set1_ps(step[r * groups + g]);
      y[r][0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[r][0]), _mm512_mul_ps(t, scale0), y[r][0]);
      y[r][1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[r][1]), _mm512_mul_ps(t, scale1), y[r][1]);
    }
  }
  for (int r = 0; r < R; r++) {
    _mm512_storeu_ps(out[r], y[r][0]);
    _mm512_storeu_ps(out[r] + 16, y[r][1]);
  }
}

#endif

template <int R>
void tile(Isa isa, const int8_t* a, const float* step, const int32_t* offset, const Shape& s, const uint8_t* w,
          float (*out)[kColumns]) {
#if MEDCOMPILE_X86
  if (isa == kAvx512Vnni) return tile_avx512<R>(a, step, offset, s, w, out);
  if (isa == kAvx2) return tile_avx2<R>(a, step, offset, s, w, out);
#endif
  static_cast<void>(isa);
  tile_generic<R>(a, step, offset, s, w, out);
}

using Tile = void (*)(Isa, const int8_t*, const float*, const int32_t*, const Shape&, const uint8_t*,
                      float (*)[kColumns]);
constexpr Tile kTiles[kRows + 1] = {nullptr, tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>, tile<7>, tile<8>};

void gate_row(Isa isa, float* gate, const float* up) {
#if MEDCOMPILE_X86
  if (isa == kAvx512Vnni) return pass_gate_avx512(gate, up);
  if (isa == kAvx2) return pass_gate_avx2(gate, up);
#endif
  static_cast<void>(isa);
  pass_gate_generic(gate, up);
}

}  // namespace

Isa best_isa() {
#if MEDCOMPILE_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return kAvx512Vnni;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
  return kGeneric;
}

void round_rows(Isa isa, const float* x, int m, int first, int last, const Shape& s, const Rounded& out) {
  const int groups = s.groups();
  for (int row = first; row < last; row++) {
    const int panel = row / kRows * kRows, rows = std::min(kRows, m - panel);
    for (int g = 0; g < groups; g++) {
      const float* from = x + static_cast<size_t>(row) * s.k + g * s.group;
      int8_t* to = place(out.a, panel, rows, row - panel, g * s.group, s.k);
      const size_t at = static_cast<size_t>(row) * groups + g;
#if MEDCOMPILE_X86
      if (isa == kAvx512Vnni) {
        round_group_avx512(from, s.group, to, 4 * rows, out.step + at, out.offset + at);
        continue;
      }
#endif
      round_group(from, s.group, to, 4 * rows, out.step + at, out.offset + at);
    }
  }
}

void multiply(Isa isa, const Rounded& rounded, int m, const Shape& s, const uint8_t* weights, const uint8_t* up,
              int first, int last, float* y) {
  const int groups = s.groups();
  for (int t = first; t < last; t++) {
    const size_t at = t * s.tile_bytes();
    const int column = t * kColumns, columns = std::min(kColumns, s.n - column);
    for (int row = 0; row < m; row += kRows) {
      const int rows = std::min(kRows, m - row);
      const int8_t* a = rounded.a + static_cast<size_t>(row) * s.k;
      const float* step = rounded.step + static_cast<size_t>(row) * groups;
      const int32_t* offset = rounded.offset + static_cast<size_t>(row) * groups;
      alignas(64) float out[kRows][kColumns], other[kRows][kColumns];
      kTiles[rows](isa, a, step, offset, s, weights + at, out);
      if (up != nullptr) {
        kTiles[rows](isa, a, step, offset, s, up + at, other);
        for (int r = 0; r < rows; r++) gate_row(isa, out[r], other[r]);
      }
      for (int r = 0; r < rows; r++) {
        std::memcpy(y + static_cast<size_t>(row + r) * s.n + column, out[r], columns * sizeof(float));
      }
    }
  }
}

}  // namespace int4
