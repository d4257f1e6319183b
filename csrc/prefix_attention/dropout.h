// Dropout: Philox's key is the seed, the counter (column, query, row and head, 0), the first word decides.
#pragma once

#include "../common/philox.h"
#include "problem.h"

namespace fastprefix {

// The first words for one column and kQueries consecutive queries.
inline void philox_row(
    uint32_t k0, uint32_t k1, uint32_t column, uint32_t first_query, uint32_t plane, uint32_t (&word)[kQueries]) {
  uint32_t c1[kQueries], c2[kQueries], c3[kQueries];
  for (int64_t i = 0; i < kQueries; ++i) {
    word[i] = column;
    c1[i] = first_query + static_cast<uint32_t>(i);
    c2[i] = plane;
    c3[i] = 0;
  }
  philox(k0, k1, word, c1, c2, c3);
}

// Dropout's factors for a block of scores: factors[row][query].
template <class T, class A>
void keep_factors(const Problem<T, A>& p, const QueryBlock& queries, int64_t first_column, int64_t rows, A* factors) {
  uint32_t words[kQueries];
  uint32_t plane = static_cast<uint32_t>(queries.b * p.Hq + queries.h);
  for (int64_t r = 0; r < rows; ++r, factors += kQueries) {
    uint32_t column = static_cast<uint32_t>(first_column + r), query = static_cast<uint32_t>(queries.first);
    philox_row(p.seed_low, p.seed_high, column, query, plane, words);
    for (int64_t i = 0; i < kQueries; ++i) factors[i] = words[i] >= p.drop_below ? p.keep : A(0);
  }
}

}  // namespace fastprefix
