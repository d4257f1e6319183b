// Independent multiply-adds, which peak.py compiles and times.

#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__AVX512F__)
constexpr int kBytes = 64, kSums = 12, kFactors = 4;  // of 32 registers
#elif defined(__AVX2__)
constexpr int kBytes = 32, kSums = 10, kFactors = 2;  // of 16
#else
constexpr int kBytes = 16, kSums = 10, kFactors = 2;
#endif
typedef float Vec __attribute__((vector_size(kBytes)));

static float draw(unsigned& state) {  // from 0.5 up to 1
  state = state * 1664525u + 1013904223u;
  return 0.5f + (state >> 8) * (0.5f / 16777216.0f);
}

// Each returns the operations of its rounds.
extern "C" double float32(long rounds) {
  Vec sums[kSums], x[kFactors], y[kFactors];
  unsigned state = 1;
  for (int j = 0; j < kSums; ++j)
    for (int i = 0; i < kBytes / 4; ++i) sums[j][i] = draw(state);  // all different, or they would be computed once
  for (int j = 0; j < kFactors; ++j)
    for (int i = 0; i < kBytes / 4; ++i) x[j][i] = draw(state), y[j][i] = draw(state) - 0.75f;
  for (long i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < kSums; ++j) sums[j] = sums[j] * x[j % kFactors] + y[(j + 1) % kFactors];
  }
  for (int j = 0; j < kSums; ++j) asm volatile("" ::"x"(sums[j]));
  return 2.0 * rounds * kSums * (kBytes / 4);
}

extern "C" double bfloat16(long rounds) {
#if defined(__AMX_BF16__)
  alignas(64) static const struct {
    unsigned char palette = 1, start = 0, reserved[14] = {};
    unsigned short row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    unsigned char rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } shapes;
  _tile_loadconfig(&shapes);
  alignas(64) unsigned short numbers[4][16 * 32];  // bfloat16
  unsigned state = 1;
  for (auto& tile : numbers)
    for (auto& number : tile) number = (state = state * 1664525u + 1013904223u) >> 16 & 0x80ff | 0x3f00;
  _tile_loadd(4, numbers[0], 64);
  _tile_loadd(5, numbers[1], 64);
  _tile_loadd(6, numbers[2], 64);
  _tile_loadd(7, numbers[3], 64);
  for (long i = 0; i < rounds; ++i) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  return 2.0 * rounds * 4 * 16 * 16 * 32;
#elif defined(__AVX512BF16__)
  __m512 sums[kSums], x[kFactors];
  unsigned state = 1;
  for (int j = 0; j < kSums; ++j)
    for (int i = 0; i < 16; ++i) sums[j][i] = draw(state);
  for (int j = 0; j < kFactors; ++j)
    for (int i = 0; i < 16; ++i) x[j][i] = draw(state);
  for (long i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < kSums; ++j)
      sums[j] = _mm512_dpbf16_ps(sums[j], (__m512bh)x[j % kFactors], (__m512bh)x[(j + 1) % kFactors]);
  }
  for (int j = 0; j < kSums; ++j) asm volatile("" ::"x"(sums[j]));
  return 2.0 * rounds * kSums * 32;
#else
  return float32(rounds);  // elements are widened
#endif
}
