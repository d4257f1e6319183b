// Products for one or two queries (decoding). A block of 64 queries would be mostly empty, so vectors run along the
// head dimension instead. Keys and values are read once, directly from the tensors, and are not packed.
#pragma once

#include "pack.h"

namespace fastprefix {

constexpr int64_t kFew = 2;  // the most queries for which these products are used

// Copy the rows of a few queries to [count][width padded with zeros to whole vectors].
template <class A, class T>
void pack_few(const T* from, int64_t stride, int64_t count, int64_t width, A* to) {
  pack_rows(from, stride, count, width, to, round_up(width, kLanes<A>));
}

// S^T [rows][kQueries] = K Q^T. The rest of the first vector of each row is 0. A vector of products per key is
// transposed and summed, so that kLanes keys are reduced together.
template <class T>
void score_few(
    const T* k,
    int64_t stride,
    int64_t rows,
    int64_t D,
    const AccumulatorOf<T>* q,
    int64_t count,
    AccumulatorOf<T>* s) {
  using A = AccumulatorOf<T>;
  constexpr int n = kLanes<A>;
  for (int64_t r = 0; r < rows; ++r) store(s + r * kQueries, Vec<A>{});
  for (int64_t i = 0; i < count; ++i, q += round_up(D, n))
    for (int64_t r0 = 0; r0 < rows; r0 += n) {
      Vec<A> sums[n] = {};
      int64_t keys = std::min<int64_t>(n, rows - r0);
      for (int64_t j = 0; j < keys; ++j) {
        const T* key = k + (r0 + j) * stride;
        for (int64_t d = 0; d < D; d += n) sums[j] += load_first(key + d, D - d) * load(q + d);
      }
      transpose<A>(sums);
      for (int d = 1; d < n; ++d) sums[0] += sums[d];
      for (int64_t j = 0; j < keys; ++j) s[(r0 + j) * kQueries + i] = sums[0][j];
    }
}

// O^T [Dv][kQueries] += V^T P^T, for the first `count` columns
template <class T>
void add_values_few(
    const T* v,
    int64_t stride,
    int64_t rows,
    int64_t Dv,
    const AccumulatorOf<T>* p,
    int64_t count,
    AccumulatorOf<T>* o) {
  using A = AccumulatorOf<T>;
  constexpr int n = kLanes<A>, width = 4;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t d0 = 0; d0 < Dv; d0 += width * n) {
      Vec<A> sums[width] = {};
      for (int64_t r = 0; r < rows; ++r)
        for (int w = 0; w < width; ++w) {
          int64_t d = d0 + w * n;
          if (d < Dv) sums[w] += load_first(v + r * stride + d, Dv - d) * p[r * kQueries + i];
        }
      for (int64_t d = d0; d < std::min(Dv, d0 + width * n); ++d)
        o[d * kQueries + i] += sums[(d - d0) / n][(d - d0) % n];
    }
}

// dV [rows][width padded] += P^T dO
template <class A>
void add_outer_few(const A* p, int64_t rows, int64_t count, const A* dout, int64_t width, A* sums) {
  int64_t ld = round_up(width, kLanes<A>);
  for (int64_t r = 0; r < rows; ++r, sums += ld)
    for (int64_t i = 0; i < count; ++i)
      for (int64_t d = 0; d < ld; d += kLanes<A>)
        store(sums + d, load(sums + d) + load(dout + i * ld + d) * p[r * kQueries + i]);
}

}  // namespace fastprefix
