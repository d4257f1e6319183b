// Which part of a block of scores can be seen, in rectangles: of the band that causality and a window leave, and of
// what masks and segments leave of it.
#pragma once

#include <algorithm>
#include <bit>
#include <limits>
#include <vector>

#include "pack.h"
#include "problem.h"

namespace fastprefix {

// Rows (keys) and columns (queries, whole vectors) of a block of S^T. `partial`: some of it is hidden.
struct Strip {
  int64_t row, rows, column, columns;
  bool partial;
  bool unscaled = false;  // its scores are products, still without the scale
};

constexpr int64_t kFar = std::numeric_limits<int64_t>::max() / 4;

// The queries that see a key, and the keys that a query sees: ranges whose ends never decrease.
struct Band {
  int64_t offset;        // M - N: positions are aligned to the end
  int64_t behind = kFar; // how far a key may lie behind its query
  int64_t ahead = kFar;  // and ahead of it

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

// What the work of each row's queries costs: the keys that they may see, and a block for what does not depend on keys.
template <class T, class A>
std::vector<int64_t> row_costs(const AttentionProblem<T, A>& p) {
  std::vector<int64_t> costs;
  for (const Span& span : p.spans) costs.push_back(p.M + span.length + kKeys);
  return costs;
}

// Which queries of a block see a key, a bit each.
using Seen = uint64_t;
static_assert(kQueries == 64);

// Bits from `from` up to `to`.
inline Seen bit_range(int64_t from, int64_t to) {
  if (from >= to) return 0;
  return (~Seen{0} >> (kQueries - (to - from))) << from;
}

// The queries that see a key of the band.
inline Seen see_band(const Band& band, const QueryBlock& queries, int64_t key) {
  return bit_range(
      std::clamp<int64_t>(band.first_query(key) - queries.first, 0, queries.count),
      std::clamp<int64_t>(band.last_query(key) + 1 - queries.first, 0, queries.count));
}

// Appends a strip, or makes the last one longer by it.
inline void add_strip(std::vector<Strip>& strips, const Strip& strip) {
  Strip* last = strips.empty() ? nullptr : &strips.back();
  if (last && last->row + last->rows == strip.row && last->column == strip.column && last->columns == strip.columns &&
      last->partial == strip.partial) {
    last->rows += strip.rows;
  } else {
    strips.push_back(strip);
  }
}

// The strips of a block of keys of which `seen` tells who sees them; `lanes`: a vector's length.
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

// The visible strips of keys [first, first + rows) for a block of queries; `lanes`: a vector's length.
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

// The prefix: everything is seen.
inline void all_visible(const QueryBlock& queries, int64_t rows, int64_t lanes, std::vector<Strip>& strips) {
  strips.assign(1, {0, rows, 0, round_up(queries.count, lanes), false});
}

}  // namespace fastprefix
