// Attention over keys and values in blocks: one ragged batch of new tokens, written into the pools and attended from.
//
// q: [tokens, heads * width], heads = kv_heads * group; k, v: [tokens, kv_heads * width], all float32.
// k_pool: [blocks, kv_heads, width, block]  (keys stand in columns), v_pool: [blocks, kv_heads, block, width]; float32,
// or bfloat16 as uint16. starts: [sequences + 1], sequence s owns the tokens starts[s] to starts[s + 1];
// past: [sequences], tokens of it that the pools hold already; table: [sequences, table_width], its blocks in order.
// out: [tokens, heads * width]. window: a token sees itself and the window - 1 before it; 0 is all before it.
#pragma once
#include <cstddef>
#include <cstdint>

#include "isa.h"

namespace attention {

constexpr int kBlock = 32;      // tokens in a block
constexpr int kMaxWidth = 256;  // of a head
constexpr int kTile = 16;       // new tokens of one sequence that are attended from together

struct Batch {
  const float *q, *k, *v;
  void *k_pool, *v_pool;
  bool bfloat16;
  const int32_t *starts, *past, *table;
  int sequences, table_width, kv_heads, group, width, window;
  float scale;
  float* out;
};

// Tiles of all sequences; each is work for every one of kv_heads.
int tiles(const Batch& batch);
// Keys and values of tokens [first, last) into the pools. All must be there before attend().
void write(const Batch& batch, int first, int last);
// Tile `tile` of one key head.
void attend(Isa isa, const Batch& batch, int tile, int kv_head);

}  // namespace attention
