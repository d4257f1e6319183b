// Counter-based random numbers, the same on every backend: Philox4x32-10 (Salmon et al., SC 2011).
#pragma once

#include <cstdint>

namespace fastprefix {

// The product of the low half of x, or of each lane of x, with a factor.
template <class W>
inline W multiply_low(W x, uint32_t factor) {
  return (x & 0xFFFFFFFFu) * uint64_t{factor};
}

// The ten rounds of a counter c by the key (k0, k1). W is uint64_t, or a vector of them: one counter a lane. Its words
// stand in the low halves; what is in the high halves does not matter.
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
