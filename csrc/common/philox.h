// Counter-based random numbers: Philox4x32-10 (Salmon et al., SC 2011). Every backend generates the same numbers.
#pragma once

#include <cstdint>

namespace fastprefix {

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
