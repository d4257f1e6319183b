// Copies between the rows of tensors and the transposed matrices that products read and write. Squares of kLanes x
// kLanes are transposed in registers.
#pragma once

#include <algorithm>

#include "gemm.h"

namespace fastprefix {

// Transpose rows x width of T to to[d][row], where d counts words and consecutive d are `ld` words apart. A word is one
// element, or two neighboring elements if the product multiplies pairs. Words from `rows` to the end of the last vector
// are zero.
template <class Manner, class T>
void pack_transposed(
    const T* from, int64_t stride, int64_t rows, int64_t width, typename Manner::Operand* to, int64_t ld) {
  using A = typename Manner::Accumulator;
  constexpr int n = kLanes<A>;
  A* words = reinterpret_cast<A*>(to);
  int64_t steps = (width + Manner::pair - 1) / Manner::pair;
  for (int64_t r0 = 0; r0 < rows; r0 += n)
    for (int64_t d0 = 0; d0 < steps; d0 += n) {
      Vec<A> square[n];
      for (int r = 0; r < n; ++r) {
        if (r0 + r >= rows) {
          square[r] = Vec<A>{};
          continue;
        }
        const T* row = from + (r0 + r) * stride + d0 * Manner::pair;
        if constexpr (Manner::pair == 1) {
          square[r] = load_first(row, width - d0);
        } else {
          BFloat16 padded[2 * n] = {};
          int64_t left = std::min<int64_t>(width - 2 * d0, 2 * n);
          if (left < 2 * n) std::memcpy(static_cast<void*>(padded), row, left * sizeof(T));
          square[r] = load(reinterpret_cast<const A*>(left < 2 * n ? padded : row));
        }
      }
      transpose<A>(square);
      for (int d = 0; d < n && d0 + d < steps; ++d) store(words + (d0 + d) * ld + r0, square[d]);
    }
}

// Transpose from[d][row] back to rows x width of T. Consecutive d are `ld` words apart.
template <class A, class T>
void unpack_transposed(const A* from, int64_t ld, int64_t rows, int64_t width, T* to, int64_t stride) {
  constexpr int n = kLanes<A>;
  for (int64_t r0 = 0; r0 < rows; r0 += n)
    for (int64_t d0 = 0; d0 < width; d0 += n) {
      Vec<A> square[n];
      for (int d = 0; d < n; ++d) square[d] = d0 + d < width ? load(from + (d0 + d) * ld + r0) : Vec<A>{};
      transpose<A>(square);
      for (int r = 0; r < n && r0 + r < rows; ++r) store_first(to + (r0 + r) * stride + d0, square[r], width - d0);
    }
}

}  // namespace fastprefix
