// Sums of gradients over broadcast dimensions.
#pragma once

#include <vector>

#include "../common/tensor.h"

namespace fastprefix {

// Sum `sums` (of type S), in float64, over the dimensions in which `gradient` (of type T) has size 1.
template <class T, class S>
void sum_into_typed(const Tensor& gradient, const Tensor& sums) {
  int64_t last = sums.dim() - 1, columns = sums.size(last), outputs = 1, terms = 1;
  auto kept = [&](int64_t d) { return gradient.size(d) == sums.size(d); };
  for (int64_t d = 0; d < last; ++d) (kept(d) ? outputs : terms) *= sums.size(d);
  // The offset in x of the index-th element of the kept dimensions, or of the summed dimensions.
  auto place = [&](int64_t index, bool of_kept, const Tensor& x) {
    int64_t at = 0;
    for (int64_t d = last - 1; d >= 0; --d) {
      if (kept(d) != of_kept) continue;
      at += index % sums.size(d) * x.stride(d);
      index /= sums.size(d);
    }
    return at;
  };
  const S* from = sums.data<const S>();
  T* to = gradient.data<T>();
  parallel_for(0, outputs, 1 + 4096 / (1 + terms * columns), [&](int64_t begin, int64_t end) {
    std::vector<double> row(columns);
    for (int64_t output = begin; output < end; ++output) {
      std::fill(row.begin(), row.end(), 0.0);
      const S* first = from + place(output, true, sums);
      for (int64_t term = 0; term < terms; ++term) {
        const S* at = first + place(term, false, sums);
        for (int64_t c = 0; c < columns; ++c) row[c] += at[c * sums.stride(last)];
      }
      T* at = to + place(output, true, gradient);
      if (kept(last))
        for (int64_t c = 0; c < columns; ++c) at[c * gradient.stride(last)] = static_cast<T>(row[c]);
      else *at = static_cast<T>(std::accumulate(row.begin(), row.end(), 0.0));
    }
  });
}

inline void sum_into(const Tensor& gradient, const Tensor& sums) {
  dispatch("prefix_attention", gradient, [&](auto type) {
    using T = decltype(type);
    if (sums.holds<double>()) sum_into_typed<T, double>(gradient, sums);
    else sum_into_typed<T, float>(gradient, sums);
  });
}

// Do the same for sums with one column per prefix key. If the gradient has more columns, no row sees the additional
// keys, so their gradient is 0.
inline void sum_columns_into(const Tensor& gradient, const Tensor& sums) {
  int64_t columns = sums.size(-1), all = gradient.size(-1);
  if (all <= std::max<int64_t>(columns, 1)) return sum_into(gradient, sums);
  gradient.narrow(-1, columns, all - columns).zero();
  sum_into(gradient.narrow(-1, 0, columns), sums);
}

}  // namespace fastprefix
