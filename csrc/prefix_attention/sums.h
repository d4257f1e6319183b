// Sums of gradients over blocks of queries, in float32 or float64. Each slot has its own sums. They are added in the
// order of the slots, so results are the same in every run with the same number of threads.
#pragma once

#include "../common/scratch.h"
#include "pack.h"

namespace fastprefix {

// Sums of dK and dV for a range of keys. Widths are padded to whole vectors.
template <class A>
struct KeySums {
  A* dk = nullptr;  // [keys][round_up(D)]
  A* dv = nullptr;  // [keys][round_up(Dv)]
};

struct KeySumsShape {
  int64_t keys, D, Dv;  // D and Dv are padded widths, or 0 if the gradient is not requested

  int64_t size() const { return keys * (D + Dv); }
  template <class A>
  KeySums<A> at(A* memory) const {
    return {memory, memory + keys * D};
  }
};

// Add `count` pieces [rows][ld] that are `step` apart, and write the sum as rows of T.
template <class T, class A>
void write_sum(
    const A* from, int64_t count, int64_t step, int64_t rows, int64_t ld, int64_t width, T* to, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t d = 0; d < width; d += kLanes<A>) {
      Vec<A> total = load(from + r * ld + d);
      for (int64_t piece = 1; piece < count; ++piece) total += load(from + piece * step + r * ld + d);
      store_first(to + r * stride + d, total, width - d);
    }
}

// Sums of one number per column, for consecutive groups of items. Each pair of a slot and a group with common items has
// a row. From one pair to the next, neither number decreases and at least one increases, so `slot + group` numbers the
// rows.
struct ColumnSums {
  int64_t items = 1, columns = 0;  // per group
  Tensor rows;                     // [slots + groups - 1, columns] in float64, since long sums cancel

  ColumnSums() = default;
  ColumnSums(const Slots& slots, int64_t groups, int64_t columns)
      : items(slots.items / groups), columns(columns), rows(empty<double>({slots.count + groups - 1, columns})) {
    rows.zero();
  }

  double* row(int64_t slot, int64_t item) const { return rows.data<double>() + (slot + item / items) * columns; }

  // Return [groups, columns], where each group is the sum of its rows in the order of the slots.
  Tensor total(const Slots& slots) const {
    int64_t groups = slots.items / items;
    Tensor totals = empty<double>({groups, columns});
    parallel_for(0, groups, 8, [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; ++group) {
        int64_t from = slots.of(group * items), to = slots.of((group + 1) * items - 1);
        double* total = totals.data<double>() + group * columns;
        std::copy_n(row(from, group * items), columns, total);
        for (int64_t slot = from + 1; slot <= to; ++slot)
          for (int64_t c = 0; c < columns; ++c) total[c] += row(slot, group * items)[c];
      }
    });
    return totals;
  }
};

}  // namespace fastprefix
