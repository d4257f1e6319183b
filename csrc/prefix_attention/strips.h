// Which part of a block of scores can be seen: the band that causality and a window leave, in rectangles.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "pack.h"
#include "problem.h"

namespace fastprefix {

// Rows (keys) and columns (queries, whole vectors) of a block of S^T. `partial`: some of it is hidden.
struct Strip {
  int64_t row, rows, column, columns;
  bool partial;
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

// The visible strips of keys [first, first + rows) for a block of queries; `lanes`: a vector's length.
inline void visible_strips(
    const Band& band, const QueryBlock& queries, int64_t first, int64_t rows, int64_t lanes, std::vector<Strip>& strips) {
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
    Strip* last = strips.empty() ? nullptr : &strips.back();
    if (last && last->row + last->rows == row && last->column == strip.column && last->columns == strip.columns &&
        last->partial == strip.partial) {
      last->rows += count;
    } else {
      strips.push_back(strip);
    }
  }
}

// The prefix: everything is seen.
inline void all_visible(const QueryBlock& queries, int64_t rows, int64_t lanes, std::vector<Strip>& strips) {
  strips.assign(1, {0, rows, 0, round_up(queries.count, lanes), false});
}

}  // namespace fastprefix
