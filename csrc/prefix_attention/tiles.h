// Blocks of probabilities (or score gradients) as operands of products. For bfloat16 pairs they are rounded to one or
// two copies: `natural` for sums over queries, and `pairs` of keys for sums over keys. In ordinary arithmetic all three
// are the same memory.
#pragma once

#include "key_blocks.h"

namespace fastprefix {

template <class Manner>
struct Tile {
  using Operand = typename Manner::Operand;
  using A = typename Manner::Accumulator;

  A* values = nullptr;  // [kKeys][kQueries]
  Operand* natural = nullptr;  // [kKeys][kQueries]
  Operand* pairs = nullptr;  // [kKeys / 2][kQueries][2]

  void take(Arena& arena, bool need_natural, bool need_pairs) {
    values = arena.take<A>(kKeys * kQueries);
    if constexpr (Manner::pair == 1) {
      natural = pairs = values;
    } else {
      if (need_natural) natural = arena.take<Operand>(kKeys * kQueries);
      if (need_pairs) pairs = arena.take<Operand>(kKeys * kQueries);
    }
  }

  void round_natural(const Strip& strip) const {
    if constexpr (Manner::pair == 2)
      for_vectors<A>(
          strip, [&](int64_t r, int64_t c) { store_as(natural + r * kQueries + c, load(values + r * kQueries + c)); });
  }

  // Round the strip to pairs of keys. Strips begin at even rows. An odd last row is paired with zeros.
  void round_pairs(const Strip& strip) const {
    if constexpr (Manner::pair == 2)
      for (int64_t r = strip.row; r < strip.row + strip.rows; r += 2)
        for (int64_t c = strip.column; c < strip.column + strip.columns; c += kLanes<A>) {
          const A* at = values + r * kQueries + c;
          Vec<A> odd = r + 1 < strip.row + strip.rows ? load(at + kQueries) : Vec<A>{};
          store(reinterpret_cast<float*>(pairs + r * kQueries + 2 * c), pair_up(load(at), odd));
        }
  }
};

}  // namespace fastprefix
