// Products of two matrices that sum over the model width. Both operands are read by vectors along their rows. Tiles of
// kDotRows x kDotColumns sums are accumulated lane by lane, and the lanes are added at the end of each chunk.
#pragma once

#include <algorithm>

#include "../common/simd.h"

namespace fastprefix::prompt_embedding {

// A tile has as many sums as a vector has lanes, so that one sum_each reduces all of them.
template <class A>
constexpr int kDotRows = kLanes<A> < 4 ? kLanes<A> : 4;
template <class A>
constexpr int kDotColumns = kLanes<A> / kDotRows<A>;

// Return a vector whose lane i is the sum of the lanes of v[i]. Each round interleaves two vectors and adds the halves.
template <class A>
inline Vec<A> sum_each(Vec<A> (&v)[kLanes<A>]) {
#pragma GCC unroll 4
  for (int n = kLanes<A> / 2; n > 0; n /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) v[i] = zip_low<A>(v[i], v[i + n]) + zip_high<A>(v[i], v[i + n]);
  return v[0];
}

// h[t][j] = sum_k x[t][k] y[j][k] for k < width, a multiple of kLanes. Rows of x and y are `ld` apart, and rows of h
// are `ldh` apart. x must have memory for its rows rounded up to kDotRows, y for its rows rounded up to kDotColumns,
// and h for the resulting rows and columns.
template <class A>
void dots(const A* x, int64_t rows, const A* y, int64_t columns, int64_t width, int64_t ld, A* h, int64_t ldh) {
  constexpr int R = kDotRows<A>, C = kDotColumns<A>;
  constexpr int64_t kChunk = 4096 / sizeof(A);  // R + C chunks fit into the first-level cache
  for (int64_t k0 = 0; k0 < width; k0 += kChunk) {
    int64_t steps = std::min(kChunk, width - k0);
    for (int64_t j = 0; j < columns; j += C)
      for (int64_t t = 0; t < rows; t += R) {
        const A* xp = x + t * ld + k0;
        const A* yp = y + j * ld + k0;
        Vec<A> sums[R * C] = {};
        for (int64_t k = 0; k < steps; k += kLanes<A>) {
          Vec<A> ys[C];
#pragma GCC unroll 4
          for (int c = 0; c < C; ++c) ys[c] = load(yp + c * ld + k);
#pragma GCC unroll 4
          for (int i = 0; i < R; ++i) {
            Vec<A> xs = load(xp + i * ld + k);
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) sums[i * C + c] = xs * ys[c] + sums[i * C + c];
          }
        }
        A each[R * C];
        store(each, sum_each<A>(sums));
#pragma GCC unroll 4
        for (int i = 0; i < R; ++i) {
          A* to = h + (t + i) * ldh + j;
#pragma GCC unroll 4
          for (int c = 0; c < C; ++c) to[c] = k0 == 0 ? each[i * C + c] : to[c] + each[i * C + c];
        }
      }
  }
}

}  // namespace fastprefix::prompt_embedding
