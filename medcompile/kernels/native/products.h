// Products with weights of 4 or 8 bits: activations are rounded to int8 row by row and group by group, and the sums of
// a group are whole numbers. A group may be all of k.
//
// y[m, n] = sum over groups g of  scale[g, n] * step[m, g] * sum over k in g of  q[k, n] * a[m, k]
// a[m, k] = round(x[m, k] / step[m, g]),  step[m, g] = max |x[m, k in g]| / 127
//
// Packed weights (pack() in native/__init__.py makes them): tiles of 32 columns, the last one filled up with zeros; in
// a tile, group by group, 32 scales (float32) and then the weights. 4 bits: 8 rows of k at a time, 128 bytes, of which
// byte 4 * column + i holds q + 8 of row i in its lower half, and of row 4 + i in its upper half. 8 bits: 4 rows of k
// at a time, 128 bytes, of which byte 4 * column + i holds q + 128 of row i.
#pragma once
#include <cstddef>
#include <cstdint>

#include "isa.h"

namespace products {

constexpr int kColumns = 32;
constexpr int kRows = 8;           // of x that are multiplied at once
constexpr int kMaxGroup = 1 << 16;  // sums of so many products fit 32 bits

struct Shape {
  int bits, k, n, group;
  int groups() const { return k / group; }
  int tiles() const { return (n + kColumns - 1) / kColumns; }
  size_t group_bytes() const { return kColumns * sizeof(float) + static_cast<size_t>(group) * kColumns * bits / 8; }
  size_t tile_bytes() const { return groups() * group_bytes(); }
};

// Rounded rows of x, as multiply() reads them: panels of kRows rows (the last one may have fewer), 4 k at a time.
struct Rounded {
  int8_t* a;        // [panels][k / 4][rows of the panel][4]
  float* step;      // [m][groups]
  int32_t* offset;  // [m][groups]: what takes back the 8 or 128 in the packed weights
};

// What is done to a product before it is stored.
struct Finish {
  const uint8_t* up = nullptr;  // weights, of the same shape, of a second product with x: silu(first) * second
  const float* bias = nullptr;  // [n], added
  bool gelu = false;            // x * (1 + erf(x / sqrt(2))) / 2, after the bias
};

// Rows [first, last) of m; first is divisible by kRows.
void round_rows(Isa isa, const float* x, int m, int first, int last, const Shape& shape, const Rounded& out);
// Columns of tiles [first, last), all m rows. y: [m, n].
void multiply(Isa isa, const Rounded& rounded, int m, const Shape& shape, const uint8_t* weights, const Finish& finish,
              int first, int last, float* y);

}  // namespace products
