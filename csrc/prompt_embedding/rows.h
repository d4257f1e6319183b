// Copies and sums of rows. Rows of tensors have type T and any stride. Rows of scratch memory have the accumulator type
// A and are padded with zeros to whole vectors.
#pragma once

#include "../common/round_up.h"
#include "../common/tensor.h"
#include "../common/transposed.h"

namespace fastprefix::prompt_embedding {

// Copy memory past the caches, for outputs that do not fit into them. Streaming stores do not read memory first.
inline void stream(void* to, const void* from, int64_t bytes) {
#if defined(__AVX2__)
  char* target = static_cast<char*>(to);
  const char* source = static_cast<const char*>(from);
  int64_t head = std::min<int64_t>(-reinterpret_cast<intptr_t>(target) & (kVectorBytes - 1), bytes);
  std::memcpy(target, source, head);
  int64_t k = head;
  for (; k + kVectorBytes <= bytes; k += kVectorBytes) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(target + k), _mm512_loadu_si512(source + k));
#else
    __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + k));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(target + k), x);
#endif
  }
  std::memcpy(target + k, source + k, bytes - k);
#else
  std::memcpy(to, from, bytes);
#endif
}

// Make the streamed data visible to other threads. Each thread calls this after its last stream().
inline void finish_streams() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// Prefetch a row that will be read soon. The hardware cannot predict the rows' addresses.
template <class T>
inline void prefetch_row(const T* row, int64_t d) {
  for (int64_t k = 0; k < d; k += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + k);
}

// A matrix [rows, d] with any strides.
template <class T>
struct Rows {
  const T* data = nullptr;
  int64_t stride = 0, step = 1, d = 0;  // distance between rows, distance between elements, elements per row

  Rows() = default;
  explicit Rows(const Tensor& x)
      : data(x.data<const T>()), stride(x.stride(0)), step(x.size(1) == 1 ? 1 : x.stride(1)), d(x.size(1)) {}

  const T* row(int64_t i) const { return data + i * stride; }

  // Copy row i.
  void copy(int64_t i, T* to, bool streaming) const {
    const T* from = row(i);
    if (step == 1 && streaming) stream(to, from, d * sizeof(T));
    else if (step == 1) std::memcpy(static_cast<void*>(to), from, d * sizeof(T));
    else
      for (int64_t k = 0; k < d; ++k) to[k] = from[k * step];
  }

  // Copy row i, convert it to A, and pad it with zeros to whole vectors.
  template <class A>
  void widen(int64_t i, A* to) const {
    const T* from = row(i);
    constexpr int64_t n = kLanes<A>;
    if (step == 1) {
      int64_t k = 0;
      for (; k + n <= d; k += n) store(to + k, load_as(from + k));
      if (k < d) store(to + k, load_first(from + k, d - k));
      return;
    }
    for (int64_t k = 0; k < d; ++k) to[k] = static_cast<A>(from[k * step]);
    for (int64_t k = d; k < round_up(d, n); ++k) to[k] = 0;
  }
};

// to += from
template <class A, class T>
inline void add_row(const T* from, int64_t d, A* to) {
  constexpr int64_t n = kLanes<A>;
  int64_t k = 0;
  for (; k + n <= d; k += n) store(to + k, load(to + k) + load_as(from + k));
  if (k < d) store(to + k, load(to + k) + load_first(from + k, d - k));
}

// to += the sum of eight rows, added as a tree. The chain of additions is shorter, so it is more accurate and faster.
template <class A, class T>
inline void add_eight_rows(const T* const (&from)[8], int64_t d, A* to) {
  constexpr int64_t n = kLanes<A>;
  auto sum = [&](auto get) {
    return ((get(0) + get(1)) + (get(2) + get(3))) + ((get(4) + get(5)) + (get(6) + get(7)));
  };
  int64_t k = 0;
  for (; k + n <= d; k += n) store(to + k, load(to + k) + sum([&](int i) { return load_as(from[i] + k); }));
  if (k < d) store(to + k, load(to + k) + sum([&](int i) { return load_first(from[i] + k, d - k); }));
}

// to = the sum of `count` rows, where row(i) is the i-th row.
template <class A, class Row>
inline void sum_rows(int64_t count, Row row, int64_t d, A* to) {
  std::fill(to, to + round_up(d, kLanes<A>), A(0));
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    decltype(row(i)) rows[8];
    for (int j = 0; j < 8; ++j) rows[j] = row(i + j);
    add_eight_rows(rows, d, to);
  }
  for (; i < count; ++i) add_row(row(i), d, to);
}

// to = from, rounded to T
template <class A, class T>
inline void write_row(const A* from, int64_t d, T* to) {
  constexpr int64_t n = kLanes<A>;
  int64_t k = 0;
  for (; k + n <= d; k += n) store_as(to + k, load(from + k));
  if (k < d) store_first(to + k, load(from + k), d - k);
}

// to = e + scale * (x + bias), rounded to T
template <class A, class T>
inline void write_offset_row(const A* e, const A* x, const A* bias, A scale, int64_t d, T* to) {
  constexpr int64_t n = kLanes<A>;
  auto value = [&](int64_t k) { return load(e + k) + scale * (load(x + k) + load(bias + k)); };
  int64_t k = 0;
  for (; k + n <= d; k += n) store_as(to + k, value(k));
  if (k < d) store_first(to + k, value(k), d - k);
}

// to = from + offset, where `from` is a row of a tensor
template <class A, class T>
inline void write_sum_row(const T* from, const A* offset, int64_t d, T* to) {
  constexpr int64_t n = kLanes<A>;
  int64_t k = 0;
  for (; k + n <= d; k += n) store_as(to + k, load_as(from + k) + load(offset + k));
  if (k < d) store_first(to + k, load_first(from + k, d - k) + load(offset + k), d - k);
}

// Return the distance between rows of d in scratch matrices. It is a number of whole vectors, but not a multiple of 1
// KiB, which would map a column to few sets of the cache.
template <class A>
int64_t leading(int64_t d) {
  int64_t ld = round_up(d, kLanes<A>);
  return ld % (1024 / static_cast<int64_t>(sizeof(A))) == 0 ? ld + kLanes<A> : ld;
}

// Copy the matrix x, converted to A, to rows that are `ld` apart. Rows from x.size(0) up to `rows` are zero.
template <class T, class A>
void pack_matrix(const Tensor& x, int64_t rows, int64_t ld, A* to) {
  Rows<T> from(x);
  int64_t width = round_up(from.d, kLanes<A>);
  for (int64_t i = 0; i < rows; ++i) {
    if (i < x.size(0)) from.widen(i, to + i * ld);
    else std::fill(to + i * ld, to + i * ld + width, A(0));
  }
}

// Copy the columns of x to rows in the same way.
template <class T, class A>
void pack_columns(const Tensor& x, int64_t columns, int64_t ld, A* to) {
  Rows<T> from(x);
  if (from.step != 1) return pack_matrix<T>(x.transpose(0, 1), columns, ld, to);
  pack_transposed<Plain<A>>(from.data, from.stride, x.size(0), from.d, to, ld);
  std::fill(to + from.d * ld, to + columns * ld, A(0));
}

template <class T, class A>
void pack_vector(const Tensor& x, A* to) {
  pack_matrix<T>(x.unsqueeze(0), 1, 0, to);
}

}  // namespace fastprefix::prompt_embedding
