// Copies of operands in the forms that the product reads, one block at a time, in a thread's own scratch memory.
#pragma once

#include "../common/gemm.h"
#include "../common/round_up.h"
#include "../common/transposed.h"
#include "problem.h"

namespace fastprefix {

constexpr int64_t kKeys = 96;  // keys per block

// Convert rows x width of T to operands, in rows that are `ld` apart and padded with zeros to `ld`.
template <class Op, class T>
void pack_rows(const T* from, int64_t stride, int64_t rows, int64_t width, Op* to, int64_t ld) {
  using A = AccumulatorOf<Op>;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t d = 0; d < ld; d += kLanes<A>)
      store_first(to + r * ld + d, load_first(from + r * stride + d, width - d), ld - d);
}

// Interleave pairs of rows: to[r / 2][d][r % 2]. An odd last row is paired with zeros. `ld` is a multiple of kLanes.
inline void pack_row_pairs(
    const BFloat16* from, int64_t stride, int64_t rows, int64_t width, BFloat16* to, int64_t ld) {
  for (int64_t r = 0; r < rows; r += 2, from += 2 * stride)
    for (int64_t d = 0; d < ld; d += kLanes<float>, to += 2 * kLanes<float>) {
      Bits low = reinterpret_cast<Bits>(load_first(from + d, width - d)) >> 16;
      Bits high{};
      if (r + 1 < rows) high = reinterpret_cast<Bits>(load_first(from + stride + d, width - d));
      store(reinterpret_cast<uint32_t*>(to), low | high);
    }
}

// Transpose a block of keys to to[d][row], with rows of kKeys. Elements from `rows` to the end of the last vector are
// zero.
inline void pack_row_pairs_transposed(const BFloat16* from, int64_t stride, int64_t rows, int64_t width, BFloat16* to) {
  constexpr int n = kLanes<float>;
  for (int64_t r0 = 0; r0 < round_up(rows, 2 * n); r0 += 2 * n)
    for (int64_t d0 = 0; d0 < width; d0 += n) {
      Vec<float> square[n];  // of pairs
      for (int i = 0; i < n; ++i) {
        int64_t r = r0 + 2 * i;
        const BFloat16* at = from + r * stride + d0;
        Bits low{}, high{};
        if (r < rows) low = reinterpret_cast<Bits>(load_first(at, width - d0)) >> 16;
        if (r + 1 < rows) high = reinterpret_cast<Bits>(load_first(at + stride, width - d0));
        square[i] = reinterpret_cast<Vec<float>>(low | high);
      }
      transpose<float>(square);
      for (int d = 0; d < n && d0 + d < width; ++d)
        store(reinterpret_cast<float*>(to + (d0 + d) * kKeys + r0), square[d]);
    }
}

// Convert rows to the vector operand of a product that sums over the rows: [row][width padded with zeros to whole
// vectors], or with pairs [row / 2][padded width][2]. The number of rows is rounded up to kLanes with zeros.
template <class Manner, class T>
void pack_vectors(const T* from, int64_t stride, int64_t rows, int64_t width, typename Manner::Operand* to) {
  using A = typename Manner::Accumulator;
  int64_t ld = round_up(width, kLanes<A>), padded_rows = round_up(rows, kLanes<A>);
  if constexpr (Manner::pair == 1) {
    pack_rows(from, stride, rows, width, to, ld);
  } else {
    pack_row_pairs(from, stride, rows, width, to, ld);
  }
  int64_t filled = round_up(rows, Manner::pair);
  std::memset(static_cast<void*>(to + filled * ld), 0, (padded_rows - filled) * ld * sizeof(typename Manner::Operand));
}

}  // namespace fastprefix
