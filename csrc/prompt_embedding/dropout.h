// Dropout of hidden units. Philox's key is the seed, and its counter is (hidden unit, position, batch row, 0). The
// first word decides: the unit is dropped if the word is below p * 2^32.
#pragma once

#include <cmath>

#include "../common/philox.h"

namespace fastprefix::prompt_embedding {

struct Dropout {
  bool active = false;
  uint32_t key_low = 0, key_high = 0;
  uint64_t drop_below = 0;  // 2^32 drops everything
  double keep = 1.0;

  Dropout() = default;
  Dropout(int64_t seed, double p)
      : active(true),
        key_low(static_cast<uint32_t>(seed)),
        key_high(static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32)),
        drop_below(static_cast<uint64_t>(std::nearbyint(p * 4294967296.0))),
        keep(p == 1.0 ? 0.0 : 1.0 / (1.0 - p)) {}

  // h[j] *= factors[j] for the hidden units of one token. The factors are an output.
  template <class A>
  void apply(int64_t position, int64_t row, int64_t r, A* h, A* factors) const {
    for (int64_t j = 0; j < r; ++j) {
      factors[j] =
          word(static_cast<uint32_t>(j), static_cast<uint32_t>(position), static_cast<uint32_t>(row)) >= drop_below
              ? static_cast<A>(keep)
              : A(0);
      h[j] *= factors[j];
    }
  }

 private:
  uint32_t word(uint32_t unit, uint32_t position, uint32_t row) const {
    uint64_t c[4] = {unit, position, row, 0};
    philox(key_low, key_high, c);
    return static_cast<uint32_t>(c[0]);
  }
};

}  // namespace fastprefix::prompt_embedding
