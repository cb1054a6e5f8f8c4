// Attention of whole sequences to themselves, as encoders have it.
//
// qkv: [batch, tokens, 3, heads, width] float32. mask: [batch, tokens], added to the scores of each key, or null.
// out: [batch, tokens, heads, width]. bfloat16: whether queries, keys, values and weights may be rounded to it, which
// they are where the processor has products of it.
#pragma once
#include "isa.h"

namespace self_attention {

constexpr int kMaxWidth = 256;  // of a head

struct Batch {
  const float *qkv, *mask;
  int tokens, heads, width;
  float scale;
  bool bfloat16;
  float* out;
};

// One head of one sequence.
void attend(Isa isa, const Batch& batch, int sequence, int head);

}  // namespace self_attention
