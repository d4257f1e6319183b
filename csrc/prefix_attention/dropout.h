// Dropout from counter-based random numbers, the same on every backend: Philox4x32-10 (Salmon et al., SC 2011), the
// key is the seed, the counter (column, query, row and head, 0), the first word decides.
#pragma once

#include <cstdint>

#include "pack.h"
#include "problem.h"

namespace fastprefix {

// The first words for one column and kQueries consecutive queries.
inline void philox_row(uint32_t k0, uint32_t k1, uint32_t column, uint32_t first_query, uint32_t plane, uint32_t* word) {
  uint32_t c1[kQueries], c2[kQueries], c3[kQueries];
  for (int64_t i = 0; i < kQueries; ++i) {
    word[i] = column;
    c1[i] = first_query + static_cast<uint32_t>(i);
    c2[i] = plane;
    c3[i] = 0;
  }
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u)
    for (int64_t i = 0; i < kQueries; ++i) {
      uint64_t first = uint64_t{word[i]} * 0xD2511F53u, second = uint64_t{c2[i]} * 0xCD9E8D57u;
      word[i] = static_cast<uint32_t>(second >> 32) ^ c1[i] ^ k0;
      c1[i] = static_cast<uint32_t>(second);
      c2[i] = static_cast<uint32_t>(first >> 32) ^ c3[i] ^ k1;
      c3[i] = static_cast<uint32_t>(first);
    }
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
