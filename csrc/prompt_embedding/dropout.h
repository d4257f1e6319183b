// Dropout of hidden units. Philox's key is the seed, and its counter is (hidden unit, position, batch row, 0). The
// first word decides: the unit is dropped if the word is below p * 2^32.
#pragma once

#include "../common/philox.h"

namespace fastprefix::prompt_embedding {

struct Dropout {
  bool active = false;
  DropRule rule;

  Dropout() = default;
  Dropout(int64_t seed, double p) : active(true), rule(seed, p) {}

  // h[j] *= factors[j] for the hidden units of one token. The factors are an output.
  template <class A>
  void apply(int64_t position, int64_t row, int64_t r, A* h, A* factors) const {
    for (int64_t j = 0; j < r; ++j) {
      uint32_t drawn = word(static_cast<uint32_t>(j), static_cast<uint32_t>(position), static_cast<uint32_t>(row));
      factors[j] = drawn >= rule.drop_below ? static_cast<A>(rule.keep) : A(0);
      h[j] *= factors[j];
    }
  }

 private:
  uint32_t word(uint32_t unit, uint32_t position, uint32_t row) const {
    uint64_t c[4] = {unit, position, row, 0};
    philox(rule.key_low, rule.key_high, c);
    return static_cast<uint32_t>(c[0]);
  }
};

}  // namespace fastprefix::prompt_embedding
