// Counter-based random numbers, the same on every backend: Philox4x32-10 (Salmon et al., SC 2011).
#pragma once

#include <cstdint>

namespace fastprefix {

// The ten rounds of n counters (c0, c1, c2, c3) side by side, by the key (k0, k1); c0 becomes their first words.
template <int64_t n>
inline void philox(
    uint32_t k0, uint32_t k1, uint32_t (&c0)[n], uint32_t (&c1)[n], uint32_t (&c2)[n], uint32_t (&c3)[n]) {
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u)
    for (int64_t i = 0; i < n; ++i) {
      uint64_t first = uint64_t{c0[i]} * 0xD2511F53u, second = uint64_t{c2[i]} * 0xCD9E8D57u;
      c0[i] = static_cast<uint32_t>(second >> 32) ^ c1[i] ^ k0;
      c1[i] = static_cast<uint32_t>(second);
      c2[i] = static_cast<uint32_t>(first >> 32) ^ c3[i] ^ k1;
      c3[i] = static_cast<uint32_t>(first);
    }
}

}  // namespace fastprefix
