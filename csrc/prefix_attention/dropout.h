// Dropout of probabilities. Philox's key is the seed. Its counter is (column, query, row * Hq + head, 0 for the prefix
// or 1 for tokens), with the bit of value 8 cleared in column and query. These two bits select one of the four words.
// So the four words decide for two queries and two columns that are 8 apart.
#pragma once

#include "../common/philox.h"
#include "../common/simd.h"
#include "problem.h"

namespace fastprefix {

constexpr int64_t kApart = 8;

#if defined(__AVX512F__)  // otherwise the compiler multiplies whole lanes, which needs several instructions
template <>
inline Vec<uint64_t> multiply_low(Vec<uint64_t> x, uint32_t factor) {
  return (Vec<uint64_t>)_mm512_mul_epu32((__m512i)x, _mm512_set1_epi64(factor));
}
#elif defined(__AVX2__)
template <>
inline Vec<uint64_t> multiply_low(Vec<uint64_t> x, uint32_t factor) {
  return (Vec<uint64_t>)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(factor));
}
#endif

// A vector of type X with as many lanes as a vector of uint64_t.
template <class X>
struct AsManyOf {
  typedef X type __attribute__((vector_size(kLanes<uint64_t> * sizeof(X))));
};

// Convert random words to factors: 0 for dropped elements, the rule's factor for all others.
template <class T, class A>
inline void store_kept(const AttentionProblem<T, A>& p, Vec<uint64_t> words, A* factors) {
  using Mask = typename AsManyOf<std::conditional_t<sizeof(A) == 4, int32_t, int64_t>>::type;
  auto kept = __builtin_convertvector(words, typename AsManyOf<uint32_t>::type) >= p.dropping.drop_below;
  typename AsManyOf<A>::type none{},
      factor = __builtin_convertvector(kept, Mask) ? none + static_cast<A>(p.dropping.keep) : none;
  std::memcpy(factors, &factor, sizeof(factor));
}

// Compute dropout's factors for a block of scores, factors [columns][kQueries]. The first query is a multiple of 16.
template <class T, class A>
void keep_factors(
    const AttentionProblem<T, A>& p,
    const QueryBlock& queries,
    uint64_t first_column,
    int64_t columns,
    bool tokens,
    A* factors) {
  Vec<uint64_t> lanes;
  for (int64_t i = 0; i < kLanes<uint64_t>; ++i) lanes[i] = i;
  for (int64_t r = 0; r < columns; ++r, factors += kQueries) {
    uint64_t column = first_column + r, later = column / kApart % 2;
    if (later && r >= kApart) continue;  // computed together with the column 8 before it
    bool both = !later && r + kApart < columns;
    for (int64_t first = 0; first < kQueries; first += 2 * kApart)
      for (int64_t i = first; i < first + kApart; i += kLanes<uint64_t>) {
        Vec<uint64_t> c[4] = {
            splat(column - later * kApart), lanes + static_cast<uint64_t>(queries.first + i),
            splat(static_cast<uint64_t>(queries.b * p.Hq + queries.h)), splat(uint64_t{tokens})};
        philox(p.dropping.key_low, p.dropping.key_high, c);
        store_kept(p, c[later], factors + i);
        store_kept(p, c[2 + later], factors + i + kApart);
        if (!both) continue;
        store_kept(p, c[1], factors + kApart * kQueries + i);
        store_kept(p, c[3], factors + kApart * kQueries + i + kApart);
      }
  }
}

}  // namespace fastprefix
