// Counter-based random numbers: Philox4x32-10 (Salmon et al., SC 2011). Every backend generates the same numbers.
#pragma once

#include <cmath>
#include <cstdint>

namespace fastprefix {

// Dropout with a probability p. Philox's key is the seed.
struct DropRule {
  uint32_t key_low = 0, key_high = 0;
  uint32_t drop_below = 0;  // an element is dropped if its random word is below this
  double keep = 1.0;        // the factor of all other elements

  DropRule() = default;
  DropRule(int64_t seed, double p)
      : key_low(static_cast<uint32_t>(seed)), key_high(static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32)) {
    double below = std::nearbyint(p * 0x1p32);
    bool none_kept = below == 0x1p32;  // does not fit into a word, so a factor of 0 drops everything
    drop_below = none_kept ? 0 : static_cast<uint32_t>(below);
    keep = none_kept ? 0.0 : 1.0 / (1.0 - p);
  }
};

// Multiply the low 32 bits of x, or of each lane of x, by a factor.
template <class W>
inline W multiply_low(W x, uint32_t factor) {
  return (x & 0xFFFFFFFFu) * uint64_t{factor};
}

// Apply the ten rounds to the counter c, in place, with the key (k0, k1). W is uint64_t, or a vector of uint64_t with
// one counter per lane. The 32-bit words of the counter are in the low halves. The high halves are ignored.
template <class W>
inline void philox(uint32_t k0, uint32_t k1, W (&c)[4]) {
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    W first = multiply_low(c[0], 0xD2511F53u), second = multiply_low(c[2], 0xCD9E8D57u);
    c[0] = (second >> 32) ^ c[1] ^ static_cast<uint64_t>(k0);
    c[1] = second;
    c[2] = (first >> 32) ^ c[3] ^ static_cast<uint64_t>(k1);
    c[3] = first;
  }
}

}  // namespace fastprefix
