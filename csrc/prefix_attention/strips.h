// The visible part of a block of scores S^T [keys][queries], as a list of rectangles (strips). Causality and a window
// leave a band of the scores, and masks and segments hide more of it. Products skip everything outside the strips.
#pragma once

#include <algorithm>
#include <bit>
#include <limits>
#include <vector>

#include "pack.h"
#include "problem.h"

namespace fastprefix {

// A rectangle of a block of S^T: rows are keys, and columns are queries in whole vectors. `partial` is true if some of
// its scores are hidden.
struct Strip {
  int64_t row, rows, column, columns;
  bool partial;
  bool unscaled = false;  // its scores are products that are not yet multiplied by the scale
};

constexpr int64_t kFar = std::numeric_limits<int64_t>::max() / 4;

// The band of scores that causality and a window leave. The queries that see a key form a range, and so do the keys
// that a query sees. The ends of these ranges never decrease.
struct Band {
  int64_t offset;        // M - N: the last query and the last key have the same position
  int64_t behind = kFar; // how many positions a key may be behind its query
  int64_t ahead = kFar;  // how many positions a key may be ahead of its query

  template <class T, class A>
  explicit Band(const AttentionProblem<T, A>& p) : offset(p.M - p.N) {
    if (p.causal) ahead = 0;
    if (p.window) behind = *p.window - 1;
    if (p.window && !p.causal) ahead = *p.window - 1;
  }
  int64_t first_query(int64_t key) const { return key - offset - ahead; }
  int64_t last_query(int64_t key) const { return key - offset + behind; }
  int64_t first_key(int64_t query) const { return query + offset - behind; }
  int64_t last_key(int64_t query) const { return query + offset + ahead; }
};

// The cost of a block of queries is the number of keys that it may see. Masks and segments are ignored. This is the
// part of the tokens, for each block of a head.
template <class T, class A>
std::vector<int64_t> token_costs(const AttentionProblem<T, A>& p) {
  Band band(p);
  std::vector<int64_t> costs;
  for (int64_t first = 0; first < p.N; first += kQueries) {
    int64_t begin = std::clamp<int64_t>(band.first_key(first), 0, p.M);
    int64_t end = std::clamp<int64_t>(band.last_key(std::min(first + kQueries, p.N) - 1) + 1, 0, p.M);
    costs.push_back(std::max<int64_t>(end - begin, 0));
  }
  return costs;
}

// This is the part of the prefix, for each row of the batch, plus kKeys for work that does not depend on keys.
template <class T, class A>
std::vector<int64_t> prefix_costs(const AttentionProblem<T, A>& p) {
  std::vector<int64_t> costs;
  for (const Span& span : p.spans) costs.push_back(span.length + kKeys);
  return costs;
}

// The queries of a block that see a key, one bit per query.
using Seen = uint64_t;
static_assert(kQueries == 64);

// Set the bits from `from` up to, but not including, `to`.
inline Seen bit_range(int64_t from, int64_t to) {
  if (from >= to) return 0;
  return (~Seen{0} >> (kQueries - (to - from))) << from;
}

// Return the queries that see a key of the band.
inline Seen see_band(const Band& band, const QueryBlock& queries, int64_t key) {
  return bit_range(
      std::clamp<int64_t>(band.first_query(key) - queries.first, 0, queries.count),
      std::clamp<int64_t>(band.last_query(key) + 1 - queries.first, 0, queries.count));
}

// Append a strip, or extend the last strip if both have the same columns and `partial`.
inline void add_strip(std::vector<Strip>& strips, const Strip& strip) {
  Strip* last = strips.empty() ? nullptr : &strips.back();
  if (last && last->row + last->rows == strip.row && last->column == strip.column && last->columns == strip.columns &&
      last->partial == strip.partial) {
    last->rows += strip.rows;
  } else {
    strips.push_back(strip);
  }
}

// Find the strips of a block from `seen`, which has one word per key. `lanes` is the length of a vector. Each group of
// `lanes` keys that some query sees becomes a strip, or extends the last one.
inline void seen_strips(
    const Seen* seen, const QueryBlock& queries, int64_t rows, int64_t lanes, std::vector<Strip>& strips) {
  strips.clear();
  for (int64_t row = 0; row < rows; row += lanes) {
    int64_t count = std::min(lanes, rows - row);
    Seen any = 0, all = ~Seen{0};
    for (int64_t r = row; r < row + count; ++r) any |= seen[r], all &= seen[r];
    any &= bit_range(0, queries.count);
    if (any == 0) continue;
    int64_t column = std::countr_zero(any) / lanes * lanes, end = round_up(kQueries - std::countl_zero(any), lanes);
    Seen needed = bit_range(column, std::min(end, queries.count));
    add_strip(strips, {row, count, column, end - column, (all & needed) != needed});
  }
}

// Find the strips of the keys [first, first + rows) for a block of queries, from the band alone.
inline void visible_strips(
    const Band& band,
    const QueryBlock& queries,
    int64_t first,
    int64_t rows,
    int64_t lanes,
    std::vector<Strip>& strips) {
  strips.clear();
  int64_t width = round_up(queries.count, lanes);
  for (int64_t row = 0; row < rows; row += lanes) {
    int64_t count = std::min(lanes, rows - row), top = first + row, bottom = top + count - 1;
    int64_t from = std::clamp<int64_t>(band.first_query(top) - queries.first, 0, queries.count);
    int64_t to = std::clamp<int64_t>(band.last_query(bottom) + 1 - queries.first, 0, queries.count);
    if (from >= to) continue;
    bool partial = band.first_query(bottom) - queries.first > from || band.last_query(top) + 1 - queries.first < to;
    Strip strip{row, count, from / lanes * lanes, 0, partial};
    strip.columns = std::min(round_up(to, lanes), width) - strip.column;
    strip.partial |= strip.column != from || (strip.column + strip.columns != to && to != queries.count);
    add_strip(strips, strip);
  }
}

// Make one strip of the whole block. Every query sees the whole prefix.
inline void all_visible(const QueryBlock& queries, int64_t rows, int64_t lanes, std::vector<Strip>& strips) {
  strips.assign(1, {0, rows, 0, round_up(queries.count, lanes), false});
}

}  // namespace fastprefix
