#include "products.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "floats.h"

#if MEDCOMPILE_X86
#include <immintrin.h>
#endif

namespace products {
namespace {

constexpr int kAhead = 4096;  // bytes of weights asked for before they are needed: a page, where hardware stops
constexpr int kLine = 64;     // bytes that memory hands out at once

int32_t four(const int8_t* at) {
  int32_t word;
  std::memcpy(&word, at, 4);
  return word;
}

// Where the four of row `row` (of a panel that begins at `first` and has `rows`) from k on are.
int8_t* place(int8_t* a, int first, int rows, int row, int k, int width) {
  return a + static_cast<size_t>(first) * width + (static_cast<size_t>(k / 4) * rows + row) * 4;
}

// A panel's rows of a tile, finished and stored: second is that of the product with finish.up, bias that of the tile's
// columns, of which y, with `stride` numbers from row to row, has the first `columns`.
INLINE void finish_rows(const Finish& finish, float (*rows)[kColumns], const float (*second)[kColumns],
                        const float* bias, int count, int columns, float* y, size_t stride) {
  for (int r = 0; r < count; r++, y += stride) {
    float* row = rows[r];
    if (finish.up != nullptr) {
      for (int c = 0; c < kColumns; c++) row[c] = silu(row[c]) * second[r][c];
    }
    if (finish.gelu) {
      for (int c = 0; c < kColumns; c++) row[c] = gelu(row[c] + bias[c]);
    } else {
      for (int c = 0; c < kColumns; c++) row[c] += bias[c];
    }
    if (columns == kColumns) {
      for (int c = 0; c < kColumns; c++) y[c] = row[c];
    } else {
      for (int c = 0; c < columns; c++) y[c] = row[c];
    }
  }
}

// ---- any processor

void round_group(const float* x, int count, int zero, int8_t* to, int stride, float* step, int32_t* offset) {
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
  *offset = -zero * sum;
}

template <int Bits, int R>
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
    for (int k = 0; k < s.group; k += 32 / Bits, w += 128, a += 32 / Bits * R) {
      for (int r = 0; r < R; r++) {
        const int8_t *low = a + 4 * r, *high = a + 4 * (R + r);
        for (int c = 0; c < kColumns; c++) {
          int32_t sum = 0;
          for (int i = 0; i < 4; i++) {
            const int code = w[4 * c + i];
            sum += Bits == 8 ? code * low[i] : (code & 15) * low[i] + (code >> 4) * high[i];
          }
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

void finish_generic(const Finish& finish, float (*rows)[kColumns], const float (*second)[kColumns],
                    const float* bias, int count, int columns, float* y, size_t stride) {
  finish_rows(finish, rows, second, bias, count, columns, y, stride);
}

#if MEDCOMPILE_X86

// ---- AVX2: products of 4-bit and 8-bit numbers, added in pairs, fit 16 bits; those of two 8-bit numbers do not

template <int R>
TARGET_AVX2 void tile4_avx2(const int8_t* a, const float* step, const int32_t* offset, const Shape& s, const uint8_t* w,
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

// One row, and eight sums of pairs for 4 columns at a time: they meet at the end of a group.
template <int R>
TARGET_AVX2 void tile8_avx2(const int8_t* a, const float* step, const int32_t* offset, const Shape& s,
                            const uint8_t* weights, float (*out)[kColumns]) {
  const int groups = s.groups();
  const __m256i order = _mm256_setr_epi32(0, 1, 4, 5, 2, 3, 6, 7);
  for (int r = 0; r < R; r++) {
    const uint8_t* w = weights;
    const int8_t* x = a + 4 * r;
    std::fill(out[r], out[r] + kColumns, 0.0f);
    for (int g = 0; g < groups; g++) {
      const float* scales = reinterpret_cast<const float*>(w);
      w += kColumns * sizeof(float);
      __m256i sums[8];
      for (int c = 0; c < 8; c++) sums[c] = _mm256_setzero_si256();
      for (int k = 0; k < s.group; k += 4, w += 128, x += 4 * R) {
        const __m256i both = _mm256_cvtepi8_epi16(_mm_set1_epi32(four(x)));
        for (int c = 0; c < 8; c++) {
          const __m256i codes = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w) + c));
          sums[c] = _mm256_add_epi32(sums[c], _mm256_madd_epi16(codes, both));
        }
      }
      const __m256 t = _mm256_set1_ps(step[r * groups + g]);
      const __m256i zero = _mm256_set1_epi32(offset[r * groups + g]);
      for (int c = 0; c < 4; c++) {
        const __m256i met = _mm256_permutevar8x32_epi32(_mm256_hadd_epi32(sums[2 * c], sums[2 * c + 1]), order);
        const __m256 whole = _mm256_cvtepi32_ps(_mm256_add_epi32(met, zero));
        const __m256 scale = _mm256_mul_ps(t, _mm256_loadu_ps(scales + 8 * c));
        _mm256_storeu_ps(out[r] + 8 * c, _mm256_fmadd_ps(whole, scale, _mm256_loadu_ps(out[r] + 8 * c)));
      }
    }
  }
}

TARGET_AVX2 void finish_avx2(const Finish& finish, float (*rows)[kColumns], const float (*second)[kColumns],
                             const float* bias, int count, int columns, float* y, size_t stride) {
  finish_rows(finish, rows, second, bias, count, columns, y, stride);
}

// ---- AVX-512 with VNNI

TARGET_AVX512 void finish_avx512(const Finish& finish, float (*rows)[kColumns], const float (*second)[kColumns],
                                 const float* bias, int count, int columns, float* y, size_t stride) {
  finish_rows(finish, rows, second, bias, count, columns, y, stride);
}

TARGET_AVX512 void round_group_avx512(const float* x, int count, int zero, int8_t* to, int stride, float* step,
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
  *offset = -zero * _mm512_reduce_add_epi32(sum);
}

// kCold: the weights come from memory.
template <int Bits, int R, bool kCold>
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
    for (int k = 0; k < s.group; k += 32 / Bits, w += 128, a += 32 / Bits * R) {
      if (kCold) {
        _mm_prefetch(reinterpret_cast<const char*>(w) + kAhead, _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(w) + kAhead + kLine, _MM_HINT_T0);
      }
      const __m512i both0 = _mm512_loadu_si512(w), both1 = _mm512_loadu_si512(w + 64);
      const __m512i low0 = Bits == 8 ? both0 : _mm512_and_si512(both0, nibble);
      const __m512i low1 = Bits == 8 ? both1 : _mm512_and_si512(both1, nibble);
      const __m512i high0 = _mm512_and_si512(_mm512_srli_epi16(both0, 4), nibble);
      const __m512i high1 = _mm512_and_si512(_mm512_srli_epi16(both1, 4), nibble);
      for (int r = 0; r < R; r++) {
        const __m512i first = _mm512_set1_epi32(four(a + 4 * r));
        sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], low0, first);
        sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], low1, first);
        if (Bits == 8) continue;
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

template <int Bits, int R>
void tile(Isa isa, bool cold, const int8_t* a, const float* step, const int32_t* offset, const Shape& s,
          const uint8_t* w, float (*out)[kColumns]) {
#if MEDCOMPILE_X86
  if (isa >= kAvx512Vnni) {
    return (cold ? tile_avx512<Bits, R, true> : tile_avx512<Bits, R, false>)(a, step, offset, s, w, out);
  }
  if (isa == kAvx2) return (Bits == 4 ? tile4_avx2<R> : tile8_avx2<R>)(a, step, offset, s, w, out);
#endif
  static_cast<void>(isa), static_cast<void>(cold);
  tile_generic<Bits, R>(a, step, offset, s, w, out);
}

using Tile = void (*)(Isa, bool, const int8_t*, const float*, const int32_t*, const Shape&, const uint8_t*,
                      float (*)[kColumns]);
template <int Bits>
constexpr Tile kTiles[kRows + 1] = {nullptr,       tile<Bits, 1>, tile<Bits, 2>, tile<Bits, 3>, tile<Bits, 4>,
                                    tile<Bits, 5>, tile<Bits, 6>, tile<Bits, 7>, tile<Bits, 8>};

using FinishRows = void (*)(const Finish&, float (*)[kColumns], const float (*)[kColumns], const float*, int, int,
                            float*, size_t);

FinishRows finish_for(Isa isa) {
#if MEDCOMPILE_X86
  if (isa >= kAvx512Vnni) return finish_avx512;
  if (isa == kAvx2) return finish_avx2;
#endif
  static_cast<void>(isa);
  return finish_generic;
}

}  // namespace

void round_rows(Isa isa, const float* x, int m, int first, int last, const Shape& s, const Rounded& out) {
  const int groups = s.groups(), zero = 1 << (s.bits - 1);
  for (int row = first; row < last; row++) {
    const int panel = row / kRows * kRows, rows = std::min(kRows, m - panel);
    for (int g = 0; g < groups; g++) {
      const float* from = x + static_cast<size_t>(row) * s.k + g * s.group;
      int8_t* to = place(out.a, panel, rows, row - panel, g * s.group, s.k);
      const size_t at = static_cast<size_t>(row) * groups + g;
#if MEDCOMPILE_X86
      if (isa >= kAvx512Vnni) {
        round_group_avx512(from, s.group, zero, to, 4 * rows, out.step + at, out.offset + at);
        continue;
      }
#endif
      round_group(from, s.group, zero, to, 4 * rows, out.step + at, out.offset + at);
    }
  }
}

void multiply(Isa isa, const Rounded& rounded, int m, const Shape& s, const uint8_t* weights, const Finish& finish,
              int first, int last, float* y) {
  const int groups = s.groups();
  const FinishRows store = finish_for(isa);
  const int panels = (m + kRows - 1) / kRows;
  const Tile* tiles = s.bits == 4 ? kTiles<4> : kTiles<8>;
  for (int t = first; t < last; t++) {
    const size_t at = t * s.tile_bytes();
    const size_t next = t + 1 < s.tiles() ? s.tile_bytes() / panels : 0;  // bytes of it for each panel to ask for
    const int column = t * kColumns, columns = std::min(kColumns, s.n - column);
    alignas(64) float bias[kColumns] = {};
    if (finish.bias != nullptr) std::copy(finish.bias + column, finish.bias + column + columns, bias);
    for (int row = 0; row < m; row += kRows) {
      const int rows = std::min(kRows, m - row);
      const int8_t* a = rounded.a + static_cast<size_t>(row) * s.k;
      const float* step = rounded.step + static_cast<size_t>(row) * groups;
      const int32_t* offset = rounded.offset + static_cast<size_t>(row) * groups;
      float* to = y + static_cast<size_t>(row) * s.n + column;
      for (int r = 0; r < rows; r++) {  // asked for now, since stores wait for their lines one after the other
        __builtin_prefetch(to + static_cast<size_t>(r) * s.n, 1);
        __builtin_prefetch(to + static_cast<size_t>(r) * s.n + kColumns / 2, 1);
      }
      // One panel reads weights as fast as memory gives them. Of several, each brings a part of the next tile near.
      const bool cold = panels == 1 || (t == first && row == 0);
      const size_t from = at + s.tile_bytes() + row / kRows * next;
      for (size_t i = 0; panels > 1 && i < next; i += kLine) {
        __builtin_prefetch(weights + from + i, 0, 2);
        if (finish.up != nullptr) __builtin_prefetch(finish.up + from + i, 0, 2);
      }
      alignas(64) float out[kRows][kColumns], second[kRows][kColumns];
      tiles[rows](isa, cold, a, step, offset, s, weights + at, out);
      if (finish.up != nullptr) tiles[rows](isa, cold, a, step, offset, s, finish.up + at, second);
      store(finish, out, second, bias, rows, columns, to, s.n);
    }
  }
}

}  // namespace products
