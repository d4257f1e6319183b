// Sums of key and value gradients: float32 (float64), one row of memory a key, kept apart for every slot that adds to
// them and then added up in the order of the slots. So they are the same from run to run for a number of threads.
#pragma once

#include "../common/scratch.h"
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
void write_sum(
    const A* from, int64_t count, int64_t step, int64_t rows, int64_t ld, int64_t width, T* to, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t d = 0; d < width; d += kLanes<A>) {
      Vec<A> total = load(from + r * ld + d);
      for (int64_t piece = 1; piece < count; ++piece) total += load(from + piece * step + r * ld + d);
      store_first(to + r * stride + d, total, width - d);
    }
}

// Sums of one number a column, for groups of items that follow one another: a row for each slot and group that meet.
// A slot and a group name one row: both only ever grow, and one of them with every row.
struct ColumnSums {
  int64_t items = 1, columns = 0;  // of a group
  Tensor rows;                     // float64: long sums of numbers that cancel

  ColumnSums() = default;
  ColumnSums(const Slots& slots, int64_t groups, int64_t columns)
      : items(slots.items / groups), columns(columns), rows(empty<double>({slots.count + groups - 1, columns})) {
    rows.zero();
  }

  double* row(int64_t slot, int64_t item) const { return rows.data<double>() + (slot + item / items) * columns; }

  // [groups, columns], each the sum of its rows in the order of the slots.
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
