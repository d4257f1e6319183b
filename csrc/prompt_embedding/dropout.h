// Dropout from counter-based random numbers, the same on every backend: Philox4x32-10 (Salmon et al., SC 2011), the
// key is the seed, the counter (hidden unit, position, batch row, 0), the first word decides.
#pragma once

#include <cmath>
#include <cstdint>

namespace fastprefix::prompt_embedding {

struct Dropout {
  bool active = false;
  uint32_t key_low = 0, key_high = 0;
  uint64_t drop_below = 0;  // 2^32: everything
  double keep = 1.0;

  Dropout() = default;
  Dropout(int64_t seed, double p)
      : active(true),
        key_low(static_cast<uint32_t>(seed)),
        key_high(static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32)),
        drop_below(static_cast<uint64_t>(std::nearbyint(p * 4294967296.0))),
        keep(p == 1.0 ? 0.0 : 1.0 / (1.0 - p)) {}

  // h[j] *= factor, for the hidden units of one token, and remembers the factors.
  template <class A>
  void apply(int64_t position, int64_t row, int64_t r, A* h, A* factors) const {
    for (int64_t j = 0; j < r; ++j) {
      factors[j] = word(static_cast<uint32_t>(j), static_cast<uint32_t>(position), static_cast<uint32_t>(row)) >=
              drop_below
          ? static_cast<A>(keep)
          : A(0);
      h[j] *= factors[j];
    }
  }

 private:
  uint32_t word(uint32_t c0, uint32_t c1, uint32_t c2) const {
    uint32_t c3 = 0, k0 = key_low, k1 = key_high;
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      uint64_t first = uint64_t{c0} * 0xD2511F53u, second = uint64_t{c2} * 0xCD9E8D57u;
      c0 = static_cast<uint32_t>(second >> 32) ^ c1 ^ k0;
      c1 = static_cast<uint32_t>(second);
      c2 = static_cast<uint32_t>(first >> 32) ^ c3 ^ k1;
      c3 = static_cast<uint32_t>(first);
    }
    return c0;
  }
};

}  // namespace fastprefix::prompt_embedding
