#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "floats.h"


// The loops below are plain: the compiler turns them into each instruction set's vectors, one function for each.

namespace attention {
namespace {

constexpr int kPart = 64;  // columns of values that are added up at once
constexpr float kNone = -std::numeric_limits<float>::infinity();

uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 64);  // stays NaN
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

INLINE void widen(const uint16_t* from, int count, float* to) {
  for (int i = 0; i < count; i++) to[i] = as_float(static_cast<uint32_t>(from[i]) << 16);
}

// kBlock numbers in one: halves meet each other, since in the order of a loop no compiler may use vectors.
typedef float Half __attribute__((vector_size(64)));
static_assert(2 * sizeof(Half) == kBlock * sizeof(float), "two halves are a block");

struct Larger {
  static inline __attribute__((always_inline)) Half meet(const Half& a, const Half& b) { return a > b ? a : b; }
};
struct Sum {
  static inline __attribute__((always_inline)) Half meet(const Half& a, const Half& b) { return a + b; }
};

template <typename How>
INLINE float reduce(const float* values) {
  Half a, b;
  std::memcpy(&a, values, sizeof a);
  std::memcpy(&b, values + kBlock / 2, sizeof b);
  a = How::meet(a, b);
  a = How::meet(a, __builtin_shufflevector(a, a, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  a = How::meet(a, __builtin_shufflevector(a, a, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3));
  a = How::meet(a, __builtin_shufflevector(a, a, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1));
  a = How::meet(a, __builtin_shufflevector(a, a, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0));
  return a[0];
}

// scores[r][key] = q[r] . keys, keys: [width][kBlock]
template <int R>
INLINE void score(const float* const* q, const float* keys, int width, float (*scores)[kBlock]) {
  float sums[R][kBlock];
  for (int r = 0; r < R; r++) {
    for (int j = 0; j < kBlock; j++) sums[r][j] = 0;
  }
  for (int d = 0; d < width; d++) {
    const float* row = keys + static_cast<size_t>(d) * kBlock;
    for (int r = 0; r < R; r++) {
      const float factor = q[r][d];
      for (int j = 0; j < kBlock; j++) sums[r][j] += factor * row[j];
    }
  }
  for (int r = 0; r < R; r++) {
    for (int j = 0; j < kBlock; j++) scores[r][j] = sums[r][j];
  }
}

// out[r][0:64] = out[r][0:64] * shrink[r] + weights[r] . values, 64 columns of values: [count][width]
template <int R>
INLINE void mix(const float (*weights)[kBlock], const float* shrink, const float* values, int count, int width,
                float* const* out) {
  float sums[R][kPart];
  for (int r = 0; r < R; r++) {
    for (int d = 0; d < kPart; d++) sums[r][d] = out[r][d] * shrink[r];
  }
  for (int j = 0; j < count; j++) {
    const float* row = values + static_cast<size_t>(j) * width;
    for (int r = 0; r < R; r++) {
      const float factor = weights[r][j];
      for (int d = 0; d < kPart; d++) sums[r][d] += factor * row[d];
    }
  }
  for (int r = 0; r < R; r++) {
    for (int d = 0; d < kPart; d++) out[r][d] = sums[r][d];
  }
}

INLINE void mix_rest(const float* weights, float shrink, const float* values, int count, int width, int from,
                     float* out) {
  for (int d = from; d < width; d++) out[d] *= shrink;
  for (int j = 0; j < count; j++) {
    const float* row = values + static_cast<size_t>(j) * width;
    for (int d = from; d < width; d++) out[d] += weights[j] * row[d];
  }
}

struct Tile {
  int sequence, first, count;  // of the batch's tokens
};

Tile find(const Batch& b, int tile) {
  for (int s = 0; s < b.sequences; s++) {
    const int count = b.starts[s + 1] - b.starts[s], here = (count + kTile - 1) / kTile;
    if (tile < here) return {s, b.starts[s] + tile * kTile, std::min(kTile, count - tile * kTile)};
    tile -= here;
  }
  return {0, 0, 0};
}

// Rows are the tile's tokens times the heads that share kv_head: kRows of them meet a block at a time.
constexpr int kRows = 4;

struct Rows {
  const float* q[kRows];
  float* out[kRows];
  int at[kRows];  // position in the sequence
  float most[kRows], total[kRows];
  int count;
};

INLINE void attend_block(const Batch& b, Rows& rows, int first_key, int written, const float* keys,
                         const float* values) {
  float weights[kRows][kBlock], shrink[kRows];
  score<kRows>(rows.q, keys, b.width, weights);
  for (int r = 0; r < kRows; r++) {
    const int end = std::min(kBlock, rows.at[r] + 1 - first_key);
    const int from = b.window ? std::max(0, rows.at[r] - b.window + 1 - first_key) : 0;
    for (int j = 0; j < kBlock; j++) weights[r][j] *= b.scale;
    if (from > 0 || end < kBlock) {
      for (int j = 0; j < kBlock; j++) weights[r][j] = (j >= from) & (j < end) ? weights[r][j] : kNone;
    }
    const float here = reduce<Larger>(weights[r]), top = here > rows.most[r] ? here : rows.most[r];
    if (top == kNone) {  // nothing seen yet
      shrink[r] = 1;
      for (int j = 0; j < kBlock; j++) weights[r][j] = 0;
      continue;
    }
    shrink[r] = exponential(rows.most[r] - top);
    for (int j = 0; j < kBlock; j++) weights[r][j] = exponential(weights[r][j] - top);
    rows.total[r] = rows.total[r] * shrink[r] + reduce<Sum>(weights[r]);
    rows.most[r] = top;
  }
  int d = 0;
  for (; d + kPart <= b.width; d += kPart) {
    float* part[kRows];
    for (int r = 0; r < kRows; r++) part[r] = rows.out[r] + d;
    mix<kRows>(weights, shrink, values + d, written, b.width, part);
  }
  if (d < b.width) {
    for (int r = 0; r < kRows; r++) mix_rest(weights[r], shrink[r], values, written, b.width, d, rows.out[r]);
  }
}

INLINE void attend_all(const Batch& b, int tile, int kv_head) {
  const Tile t = find(b, tile);
  const int width = b.width, all = b.kv_heads * b.group * width, count = t.count * b.group;
  const int start = b.past[t.sequence] - b.starts[t.sequence];  // position of a token, less its place in the batch
  const int first = start + t.first, last = first + t.count - 1;
  float spare[kMaxWidth];  // what rows that are none write to
  thread_local std::vector<Rows> groups;
  groups.resize((count + kRows - 1) / kRows);
  for (int i = 0; i < static_cast<int>(groups.size()); i++) {
    Rows& rows = groups[i];
    rows.count = std::min(kRows, count - i * kRows);
    for (int r = 0; r < kRows; r++) {
      const int row = i * kRows + std::min(r, rows.count - 1), token = t.first + row / b.group;
      const size_t place = static_cast<size_t>(token) * all + (kv_head * b.group + row % b.group) * width;
      rows.q[r] = b.q + place;
      rows.out[r] = r < rows.count ? b.out + place : spare;
      rows.at[r] = start + token;
      rows.most[r] = kNone;
      rows.total[r] = 0;
      std::fill(rows.out[r], rows.out[r] + width, 0.0f);
    }
  }
  const int begin = b.window ? std::max(0, first - b.window + 1) / kBlock : 0;
  const size_t block = static_cast<size_t>(kBlock) * width;
  float wide_keys[kBlock * kMaxWidth], wide_values[kBlock * kMaxWidth];
  for (int i = begin; i <= last / kBlock; i++) {
    const size_t place = (static_cast<size_t>(b.table[t.sequence * b.table_width + i]) * b.kv_heads + kv_head) * block;
    const float *keys = wide_keys, *values = wide_values;
    if (b.bfloat16) {
      widen(static_cast<const uint16_t*>(b.k_pool) + place, kBlock * width, wide_keys);
      widen(static_cast<const uint16_t*>(b.v_pool) + place, kBlock * width, wide_values);
    } else {
      keys = static_cast<const float*>(b.k_pool) + place;
      values = static_cast<const float*>(b.v_pool) + place;
    }
    const int written = std::min(kBlock, last + 1 - i * kBlock);  // beyond it a pool may hold anything
    for (Rows& rows : groups) {
      if (rows.at[rows.count - 1] >= i * kBlock) attend_block(b, rows, i * kBlock, written, keys, values);
    }
  }
  for (const Rows& rows : groups) {
    for (int r = 0; r < rows.count; r++) {
      for (int d = 0; d < width; d++) rows.out[r][d] /= rows.total[r];
    }
  }
}

void attend_generic(const Batch& b, int tile, int kv_head) { attend_all(b, tile, kv_head); }

#if MEDCOMPILE_X86
TARGET_AVX2 void attend_avx2(const Batch& b, int tile, int kv_head) {
  attend_all(b, tile, kv_head);
}
TARGET_AVX512 void attend_avx512(const Batch& b, int tile, int kv_head) { attend_all(b, tile, kv_head); }
#endif

}  // namespace

int tiles(const Batch& b) {
  int count = 0;
  for (int s = 0; s < b.sequences; s++) count += (b.starts[s + 1] - b.starts[s] + kTile - 1) / kTile;
  return count;
}

void write(const Batch& b, int first, int last) {
  const int width = b.width;
  int s = 0;
  for (int token = first; token < last; token++) {
    while (token >= b.starts[s + 1]) s++;
    const int position = b.past[s] + token - b.starts[s], slot = position % kBlock;
    const int32_t block = b.table[s * b.table_width + position / kBlock];
    for (int h = 0; h < b.kv_heads; h++) {
      const size_t from = (static_cast<size_t>(token) * b.kv_heads + h) * width;
      const size_t to = (static_cast<size_t>(block) * b.kv_heads + h) * kBlock * width;
      for (int d = 0; d < width; d++) {
        const size_t k_at = to + static_cast<size_t>(d) * kBlock + slot, v_at = to + static_cast<size_t>(slot) * width + d;
        if (b.bfloat16) {
          static_cast<uint16_t*>(b.k_pool)[k_at] = to_bfloat16(b.k[from + d]);
          static_cast<uint16_t*>(b.v_pool)[v_at] = to_bfloat16(b.v[from + d]);
        } else {
          static_cast<float*>(b.k_pool)[k_at] = b.k[from + d];
          static_cast<float*>(b.v_pool)[v_at] = b.v[from + d];
        }
      }
    }
  }
}

void attend(Isa isa, const Batch& b, int tile, int kv_head) {
#if MEDCOMPILE_X86
  if (isa >= kAvx512Vnni) return attend_avx512(b, tile, kv_head);
  if (isa == kAvx2) return attend_avx2(b, tile, kv_head);
#endif
  static_cast<void>(isa);
  attend_generic(b, tile, kv_head);
}

}  // namespace attention
