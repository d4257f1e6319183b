// From products <q, k> to scores: scale and gate, soft cap, bias, what is hidden. Blocks of S^T, [key][query].
#pragma once

#include "dropout.h"
#include "strips.h"

namespace fastprefix {

// What multiplies the rows of a prefix block: a gate for each row, or for each row and query. Without one, 1.
template <class A>
struct Gate {
  const A* of_row = nullptr;
  const A* of_query = nullptr;  // [row][kQueries]

  Vec<A> at(int64_t row, int64_t column) const {
    if (of_query) return load(of_query + row * kQueries + column);
    return splat(of_row ? of_row[row] : A(1));
  }
};

// A block of keys of one half, from `first` on; in the prefix that counts from the start of the row's span.
struct Columns {
  Half half;
  int64_t first, rows;
};

// Calls visit(row, column) for every vector of a strip of a block.
template <class A, class Visit>
inline void for_vectors(const Strip& strip, Visit visit) {
  for (int64_t r = strip.row; r < strip.row + strip.rows; ++r)
    for (int64_t c = strip.column; c < strip.column + strip.columns; c += kLanes<A>) visit(r, c);
}

// The sum of term(row) over a strip's rows, made group by group: one long sum would round more.
template <class A, class Term>
inline Vec<A> sum_rows(const Strip& strip, Term term) {
  constexpr int64_t kGroup = 8;
  Vec<A> sum{}, rest{};
  int64_t r = strip.row, end = strip.row + strip.rows;
  for (; r + kGroup <= end; r += kGroup) {
    Vec<A> group{};
#pragma GCC unroll 8
    for (int64_t i = 0; i < kGroup; ++i) group += term(r + i);
    sum += group;
  }
  for (; r < end; ++r) rest += term(r);
  return sum + rest;
}

// A gate's values for a block of prefix keys, into `values`.
template <class T, class A>
Gate<A> read_gate(const AttentionProblem<T, A>& p, const QueryBlock& queries, const Columns& columns, A* values) {
  if (!p.gate || columns.half == Half::tokens) return {};
  const auto& s = p.gate.strides;
  if (!p.gate_per_query) {
    const T* from = p.gate.at(queries.b, queries.hkv, columns.first);
    for (int64_t r = 0; r < columns.rows; ++r) values[r] = static_cast<A>(from[r * s[2]]);
    return {values, nullptr};
  }
  const T* from = p.gate.at(queries.b, queries.h, queries.first, columns.first);
  for (int64_t r = 0; r < columns.rows; ++r)
    for (int64_t i = 0; i < kQueries; ++i)
      values[r * kQueries + i] = i < queries.count ? static_cast<A>(from[i * s[2] + r * s[3]]) : A(0);
  return {nullptr, values};
}

// Adds a bias [B, Hq, N, keys] that broadcasts.
template <class T, class A>
void add_bias(const View<const T>& bias, const QueryBlock& queries, const Columns& columns, const Strip& strip, A* s) {
  int64_t last = std::min(strip.column + strip.columns, queries.count), step = bias.strides[2];
  for (int64_t r = strip.row; r < strip.row + strip.rows; ++r) {
    const T* from = bias.at(queries.b, queries.h, queries.first, columns.first + r);
    for (int64_t i = strip.column; i < last; ++i) s[r * kQueries + i] += static_cast<A>(from[i * step]);
  }
}

// Adds a bias for each prefix key, [B, Hkv, P] or of the store, [1, Hkv, T], that broadcasts.
template <class T, class A>
void add_key_bias(
    const AttentionProblem<T, A>& p, const QueryBlock& queries, const Columns& columns, const Strip& strip, A* s) {
  const T* from = p.key_bias.at(queries.b, queries.hkv, p.spans[queries.b].start + columns.first);
  for_vectors<A>(strip, [&](int64_t r, int64_t c) {
    A* at = s + r * kQueries + c;
    store(at, load(at) + splat(static_cast<A>(from[r * p.key_bias.strides[2]])));
  });
}

// Hides, in a strip, the scores for which `hidden(i, j)`: query i (of the tensor), key j.
template <class A, class Hidden>
void hide_where(const QueryBlock& queries, const Columns& columns, const Strip& strip, A* s, Hidden hidden) {
  int64_t last = std::min(strip.column + strip.columns, queries.count);
  for (int64_t r = strip.row; r < strip.row + strip.rows; ++r)
    for (int64_t i = strip.column; i < last; ++i)
      if (hidden(queries.first + i, columns.first + r)) s[r * kQueries + i] = -std::numeric_limits<A>::infinity();
}

// Masks, segments, causality and windows: they speak of tokens only.
template <class T, class A>
void hide(
    const AttentionProblem<T, A>& p, const Band& band, const QueryBlock& queries, const Columns& columns,
    const Strip& strip, A* s) {
  if (strip.partial)
    hide_where(queries, columns, strip, s, [&](int64_t i, int64_t j) {
      return i < band.first_query(j) || i > band.last_query(j);
    });
  if (p.bool_mask)
    hide_where(queries, columns, strip, s, [&](int64_t i, int64_t j) {
      return !*p.bool_mask.at(queries.b, queries.h, i, j);
    });
  if (p.query_segments)
    hide_where(queries, columns, strip, s, [&](int64_t i, int64_t j) {
      return *p.query_segments.at(queries.b, i) != *p.key_segments.at(queries.b, j);
    });
}

// Products in `s` to scores, in place. `slopes`, where given, gets the soft cap's derivative.
template <class T, class A>
void make_scores(
    const AttentionProblem<T, A>& p,
    const Band& band,
    const QueryBlock& queries,
    const Columns& columns,
    const Strip& strip,
    const Gate<A>& gate,
    A* s,
    A* slopes = nullptr) {
  for_vectors<A>(strip, [&](int64_t r, int64_t c) {
    A* at = s + r * kQueries + c;
    store(at, load(at) * (gate.at(r, c) * p.scale));
  });
  if (p.softcap != 0)
    for_vectors<A>(strip, [&](int64_t r, int64_t c) {
      A* at = s + r * kQueries + c;
      Tanh<A> capped = tanh(load(at) / p.softcap);
      if (slopes) store(slopes + r * kQueries + c, capped.slope);
      store(at, capped.value * p.softcap);
    });
  if (columns.half == Half::prefix) {
    if (p.prefix_bias) add_bias(p.prefix_bias, queries, columns, strip, s);
    if (p.key_bias) add_key_bias(p, queries, columns, strip, s);
    return;
  }
  if (p.bias_mask) add_bias(p.bias_mask, queries, columns, strip, s);
  hide(p, band, queries, columns, strip, s);
}

}  // namespace fastprefix
