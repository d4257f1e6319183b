// Vectors of the instruction set that this library is compiled for: loads, stores, exp, tanh and transposition.
//
// Arithmetic uses GCC's vector extensions, so the same source compiles for AVX-512, AVX2 and any other machine.
// Intrinsics are used only for instructions that the extensions cannot express.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "types.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define FASTPREFIX_BFLOAT16_PAIRS  // an instruction multiplies pairs of bfloat16 and adds them up in float32
#endif

namespace fastprefix {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class A>
constexpr int kLanes = kVectorBytes / sizeof(A);

template <class A>
struct VectorOf {
  typedef A type __attribute__((vector_size(kVectorBytes)));
  typedef A unaligned
      __attribute__((vector_size(kVectorBytes), aligned(1), may_alias));  // may_alias: it also reads pairs of 16 bits
};
template <class A>
using Vec = typename VectorOf<A>::type;

using Bits = Vec<uint32_t>;  // the lanes of a Vec<float> as words
using Halves = uint16_t __attribute__((vector_size(kVectorBytes / 2)));

template <class A>
inline Vec<A> splat(A x) {
  return x - Vec<A>{};
}

template <class A>
inline Vec<A> load(const A* p) {
  return *reinterpret_cast<const typename VectorOf<A>::unaligned*>(p);
}

template <class A>
inline void store(A* p, std::type_identity_t<Vec<A>> x) {
  *reinterpret_cast<typename VectorOf<A>::unaligned*>(p) = x;
}

// Keep the lanes of x whose bits are set, and set the other lanes to -inf.
template <class A>
inline Vec<A> keep_lanes(Vec<A> x, uint64_t bits) {
  using Int = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  Vec<Int> lane;
  for (int i = 0; i < kLanes<A>; ++i) lane[i] = Int{1} << i;
  return (lane & splat(static_cast<Int>(bits))) != 0 ? x : splat(-std::numeric_limits<A>::infinity());
}

template <class A>
inline Vec<A> maximum(Vec<A> a, Vec<A> b) {
  return a > b ? a : b;
}

// Return true if a comparison is true in any lane.
template <class A, class Mask>
inline bool any(Mask mask) {
#if defined(__AVX512F__)
  return (sizeof(A) == 4 ? _mm512_movepi32_mask((__m512i)mask) : _mm512_movepi64_mask((__m512i)mask)) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8((__m256i)mask) != 0;
#else
  bool found = false;
  for (int i = 0; i < kLanes<A>; ++i) found |= mask[i] != 0;
  return found;
#endif
}

// ---- conversions: tensors have type T, arithmetic is in type A --------------------------------------------------

// The type of sums over elements of type T.
template <class T>
using AccumulatorOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline Halves load_halves(const void* p) {
  Halves x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

inline Bits widen(Halves x) {
  return __builtin_convertvector(x, Bits);
}

// Round to bfloat16, to nearest even, in the low half of each word.
inline Bits to_bfloat16(Vec<float> x) {
#if defined(__AVX512BF16__)
  return widen((Halves)_mm512_cvtneps_pbh((__m512)x));
#else
  Bits bits = reinterpret_cast<Bits>(x);
  Bits rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return x == x ? rounded : (bits >> 16) | 0x40u;
#endif
}

// Round two vectors to bfloat16 and interleave their elements.
inline Vec<float> pair_up(Vec<float> even, Vec<float> odd) {
#if defined(__AVX512BF16__)
  const __m512i order = _mm512_set_epi16(
      31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16,
      0);
  return (Vec<float>)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even));
#else
  return reinterpret_cast<Vec<float>>(to_bfloat16(even) | (to_bfloat16(odd) << 16));
#endif
}

// Load a vector of T and convert it to the accumulator type.
template <class T>
inline Vec<AccumulatorOf<T>> load_as(const T* p) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return reinterpret_cast<Vec<float>>(widen(load_halves(p)) << 16);
  } else if constexpr (std::is_same_v<T, Float16>) {
#if defined(__AVX512F__)
    return reinterpret_cast<Vec<float>>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
    return reinterpret_cast<Vec<float>>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
    Vec<float> x;
    for (int i = 0; i < kLanes<float>; ++i) x[i] = static_cast<float>(p[i]);
    return x;
#endif
  } else {
    return load(p);
  }
}

// Round a vector to T and store it.
template <class T>
inline void store_as(T* p, Vec<AccumulatorOf<T>> x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    Halves halves = __builtin_convertvector(to_bfloat16(x), Halves);
    std::memcpy(static_cast<void*>(p), &halves, sizeof(halves));
  } else if constexpr (std::is_same_v<T, Float16>) {
#if defined(__AVX512F__)
    __m256i halves = _mm512_cvtps_ph(reinterpret_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves);
#elif defined(__AVX2__)
    __m128i halves = _mm256_cvtps_ph(reinterpret_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), halves);
#else
    for (int i = 0; i < kLanes<float>; ++i) p[i] = static_cast<Float16>(x[i]);
#endif
  } else {
    store(p, x);
  }
}

// Load the first n elements, at most one vector. The remaining lanes are 0.
template <class T>
inline Vec<AccumulatorOf<T>> load_first(const T* p, int64_t n) {
  constexpr int lanes = kLanes<AccumulatorOf<T>>;
  if (n >= lanes) return load_as(p);
  T padded[lanes] = {};
  if (n > 0) std::memcpy(static_cast<void*>(padded), p, n * sizeof(T));
  return load_as(padded);
}

// Store the first n lanes of x, at most one vector.
template <class T>
inline void store_first(T* p, Vec<AccumulatorOf<T>> x, int64_t n) {
  constexpr int lanes = kLanes<AccumulatorOf<T>>;
  if (n >= lanes) return store_as(p, x);
  T padded[lanes];
  store_as(padded, x);
  std::memcpy(static_cast<void*>(p), padded, n * sizeof(T));
}

// ---- functions ---------------------------------------------------------------------------------------------------

// e^x, accurate to one unit in the last place. For x below -87.6, and so for -inf, the result is 0. For NaN it is NaN.
inline Vec<float> exp(Vec<float> x) {
  constexpr float kRound = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // n * kLn2High is exact
  x = x < -88.1f ? splat(-88.1f) : x;
  Vec<float> shifted = x * float(M_LOG2E) + kRound, n = shifted - kRound;
  Vec<float> r = x - n * kLn2High;
  r = r - n * kLn2Low;
  Vec<float> y = r * 1.38144672e-3f + 8.36878084e-3f;
  y = y * r + 4.16683927e-2f;
  y = y * r + 1.66665196e-1f;
  y = y * r + 4.99999940e-1f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  Bits power = (reinterpret_cast<Bits>(shifted) << 23) + 0x3F800000u;
  return y * reinterpret_cast<Vec<float>>(power);
}

// e^x for results that are then rounded to bfloat16. The relative error is at most 1e-6 for x from -8 up. The result is
// 0 for -inf and NaN for NaN.
inline Vec<float> exp_rounded(Vec<float> x) {
#if defined(__AVX512F__)
  x = (Vec<float>)_mm512_max_ps(_mm512_set1_ps(-150.0f), (__m512)x) * float(M_LOG2E);
  Vec<float> n = (Vec<float>)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  Vec<float> r = x - n;
  Vec<float> y = r * 1.30556000e-3f + 9.67814347e-3f;
  y = y * r + 5.55162280e-2f;
  y = y * r + 2.40221060e-1f;
  y = y * r + 6.93146098e-1f;
  y = y * r + 1.0f;
  return (Vec<float>)_mm512_scalef_ps((__m512)y, (__m512)n);
#else
  return exp(x);
#endif
}

// e^x in float64, with the same accuracy. For x below -708.4 the result is 0.
inline Vec<double> exp(Vec<double> x) {
  constexpr double kRound = 0x1.8p52;
  constexpr double kLn2High = 0x1.62e42fefa38p-1, kLn2Low = 0x1.ef35793c7673p-45;  // n * kLn2High is exact
  x = x < -708.9 ? splat(-708.9) : x;
  Vec<double> shifted = x * M_LOG2E + kRound, n = shifted - kRound;
  Vec<double> r = x - n * kLn2High;
  r = r - n * kLn2Low;
  // Taylor series. |r| is at most ln(2) / 2, so the terms left out are below the rounding error.
  Vec<double> y = r * (1.0 / 6227020800) + 1.0 / 479001600;
  y = y * r + 1.0 / 39916800;
  y = y * r + 1.0 / 3628800;
  y = y * r + 1.0 / 362880;
  y = y * r + 1.0 / 40320;
  y = y * r + 1.0 / 5040;
  y = y * r + 1.0 / 720;
  y = y * r + 1.0 / 120;
  y = y * r + 1.0 / 24;
  y = y * r + 1.0 / 6;
  y = y * r + 1.0 / 2;
  y = y * r + 1.0;
  y = y * r + 1.0;
  Vec<uint64_t> power = (reinterpret_cast<Vec<uint64_t>>(shifted) << 52) + 0x3FF0000000000000u;
  return y * reinterpret_cast<Vec<double>>(power);
}

// tanh and its derivative. The derivative is computed separately, since 1 - tanh^2 cancels when tanh is near 1.
template <class A>
struct Tanh {
  Vec<A> value, slope;
};

inline Tanh<float> tanh(Vec<float> x) {
  Vec<float> z = x * x;
  Vec<float> small = z * 2.21836e-3f + -8.27613e-3f;
  small = small * z + 2.174755e-2f;
  small = small * z + -5.395656e-2f;
  small = small * z + 1.3333292e-1f;
  small = small * z + -3.3333333e-1f;
  small = x + x * z * small;
  Vec<float> e = exp((x < 0 ? x : -x) * 2.0f);
  Vec<float> large = (1.0f - e) / (1.0f + e);
  large = x < 0 ? -large : large;
  return {z < 0.4225f ? small : large, 4.0f * e / ((1.0f + e) * (1.0f + e))};
}

inline Tanh<double> tanh(Vec<double> x) {
  Tanh<double> y;
  for (int i = 0; i < kLanes<double>; ++i) {
    y.value[i] = std::tanh(x[i]);
    y.slope[i] = 1.0 / (std::cosh(x[i]) * std::cosh(x[i]));
  }
  return y;
}

template <class A>
inline A sum(Vec<A> x) {
  A total = 0;
  for (int i = 0; i < kLanes<A>; ++i) total += x[i];
  return total;
}

// ---- transposition -----------------------------------------------------------------------------------------------

// Interleave the low halves of a and b.
template <class A>
inline Vec<A> zip_low(Vec<A> a, Vec<A> b) {
  std::conditional_t<sizeof(A) == 4, Vec<int32_t>, Vec<int64_t>> order;
  for (int i = 0; i < kLanes<A>; ++i) order[i] = i / 2 + (i % 2) * kLanes<A>;
  return __builtin_shuffle(a, b, order);
}

// Interleave the high halves of a and b.
template <class A>
inline Vec<A> zip_high(Vec<A> a, Vec<A> b) {
  std::conditional_t<sizeof(A) == 4, Vec<int32_t>, Vec<int64_t>> order;
  for (int i = 0; i < kLanes<A>; ++i) order[i] = (kLanes<A> + i) / 2 + (i % 2) * kLanes<A>;
  return __builtin_shuffle(a, b, order);
}

// Transpose a kLanes x kLanes square in place. Interleaving the first half of the rows with the second half rotates the
// bits of each element's index (row, column) by one, so log2(kLanes) rounds exchange row and column.
template <class A>
inline void transpose(Vec<A> (&rows)[kLanes<A>]) {
  constexpr int n = kLanes<A>;
#pragma GCC unroll 4
  for (int round = 1; round < n; round *= 2) {
    Vec<A> turned[n];
#pragma GCC unroll 16
    for (int i = 0; i < n / 2; ++i) {
      turned[2 * i] = zip_low<A>(rows[i], rows[i + n / 2]);
      turned[2 * i + 1] = zip_high<A>(rows[i], rows[i + n / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) rows[i] = turned[i];
  }
}

}  // namespace fastprefix
