// The operators' arguments as the kernels read them: sizes, pointers and strides, nothing owned or copied.
//
// B batch, N queries, M keys, P prefix keys, Hq/Hkv query and key-value heads, D/Dv head sizes, as in the formulas.
#pragma once

#include <array>

#include "arguments.h"

namespace fastprefix {

// Up to four dimensions of a tensor; those of size 1 broadcast (their stride is 0).
template <class T>
struct View {
  T* data = nullptr;
  std::array<int64_t, 4> strides{};

  View() = default;
  explicit View(const Tensor& tensor) : data(static_cast<T*>(tensor.data_ptr())) {
    for (int64_t d = 0; d < tensor.dim(); ++d) strides[d] = tensor.size(d) == 1 ? 0 : tensor.stride(d);
  }
  explicit View(const OptionalTensor& tensor) : View(tensor ? View(*tensor) : View()) {}

  explicit operator bool() const { return data != nullptr; }
  T* at(int64_t i0, int64_t i1 = 0, int64_t i2 = 0, int64_t i3 = 0) const {
    return data + i0 * strides[0] + i1 * strides[1] + i2 * strides[2] + i3 * strides[3];
  }
};

constexpr int64_t kQueries = 64;  // queries in a block: the vector side of S^T

inline int64_t query_blocks(int64_t queries) {
  return (queries + kQueries - 1) / kQueries;
}

enum class Half { prefix, tokens };

// The queries that are worked on together: `count` of them from `first` on, of row b and head h.
struct QueryBlock {
  int64_t b, h, hkv, first, count;
  int64_t index;  // of the block within its row and head
};

// T: the tensors' type; A: that of sums and scores.
template <class T, class A>
struct AttentionProblem {
  int64_t B, Hq, Hkv, G, N, M, P, D, Dv;  // G: query heads for each key/value head
  View<const T> q, k, v, pk, pv;
  View<const T> gate, output_gate, bias_mask, prefix_bias, sinks;
  View<const bool> bool_mask;
  View<const int64_t> query_segments, key_segments;
  bool gate_per_query, shared_prefix, causal;
  std::optional<int64_t> window;
  A scale;
  A softcap = 0;  // 0: none
  bool drops = false;
  uint32_t seed_low = 0, seed_high = 0;
  uint32_t drop_below = 0;  // an element is dropped where its random word lies below this
  A keep = 1;               // what a kept one is multiplied by

  explicit AttentionProblem(const AttentionArguments& a)
      : B(a.query.size(0)),
        Hq(a.query.size(1)),
        Hkv(a.key.size(1)),
        G(Hq / Hkv),
        N(a.query.size(2)),
        M(a.key.size(2)),
        P(a.prefix_key.size(2)),
        D(a.query.size(3)),
        Dv(a.value.size(3)),
        q(a.query),
        k(a.key),
        v(a.value),
        pk(a.prefix_key),
        pv(a.prefix_value),
        gate(a.prefix_gate),
        output_gate(a.output_gate),
        prefix_bias(a.prefix_bias),
        sinks(a.sinks),
        query_segments(a.query_segments),
        key_segments(a.key_segments),
        gate_per_query(a.prefix_gate && a.prefix_gate->dim() == 4),
        shared_prefix(a.prefix_key.size(0) == 1),
        causal(a.is_causal),
        window(a.window_size),
        scale(static_cast<A>(a.scale)) {
    if (a.attn_mask && a.attn_mask->scalar_type() == at::kBool) bool_mask = View<const bool>(*a.attn_mask);
    if (a.attn_mask && a.attn_mask->scalar_type() != at::kBool) bias_mask = View<const T>(*a.attn_mask);
    if (a.softcap) softcap = static_cast<A>(*a.softcap);
    if (a.dropout_seed) {
      uint64_t seed = static_cast<uint64_t>(*static_cast<const int64_t*>(a.dropout_seed->data_ptr()));
      drops = true;
      seed_low = static_cast<uint32_t>(seed);
      seed_high = static_cast<uint32_t>(seed >> 32);
      double below = std::nearbyint(a.dropout_p * 0x1p32);
      bool none_kept = below == 0x1p32;  // which is no word
      drop_below = none_kept ? 0 : static_cast<uint32_t>(below);
      keep = none_kept ? A(0) : static_cast<A>(1.0 / (1.0 - a.dropout_p));
    }
  }

  bool separate() const { return bool(output_gate); }
  A output_gate_of(int64_t b, int64_t h) const { return separate() ? static_cast<A>(*output_gate.at(b, h)) : A(1); }
  int64_t query_blocks() const { return fastprefix::query_blocks(N); }
  // Where, in normalizers [softmaxes][m, l][B, Hq, N], those of a block begin.
  int64_t normalizer(const QueryBlock& queries, int64_t softmax, int64_t part) const {
    return (((softmax * 2 + part) * B + queries.b) * Hq + queries.h) * N + queries.first;
  }
};

}  // namespace fastprefix
