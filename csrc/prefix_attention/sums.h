// Sums of key and value gradients: float32 (float64), one row of memory a key, kept apart for every slot that adds to
// them and then added up in the order of the slots. So they are the same from run to run for a number of threads.
#pragma once

#include "scratch.h"
#include "pack.h"

namespace fastprefix {

// dK and dV of one range of keys. Widths are padded to whole vectors.
template <class A>
struct KeySums {
  A* dk = nullptr;  // [keys][round_up(D)]
  A* dv = nullptr;  // [keys][round_up(Dv)]
};

struct KeySumsShape {
  int64_t keys, D, Dv;  // padded widths; 0 where the gradient is not asked for

  int64_t size() const { return keys * (D + Dv); }
  template <class A>
  KeySums<A> at(A* memory) const {
    return {memory, memory + keys * D};
  }
};

// Adds up `count` pieces, `step` apart, and writes them as rows of T.
template <class T, class A>
void write_sum(const A* from, int64_t count, int64_t step, int64_t rows, int64_t ld, int64_t width, T* to, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t d = 0; d < width; d += kLanes<A>) {
      Vec<A> total = load(from + r * ld + d);
      for (int64_t piece = 1; piece < count; ++piece) total += load(from + piece * step + r * ld + d);
      store_first(to + r * stride + d, total, width - d);
    }
}

}  // namespace fastprefix
