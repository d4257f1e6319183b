// The operators' arguments in the form that the kernels read: sizes, pointers and strides. No tensor is owned or
// copied.
//
// B: batch size. N: queries per row. M: token keys per row. P: prefix keys. Hq, Hkv: query and key/value heads.
// D, Dv: head dimensions of keys and of values.
#pragma once

#include <algorithm>
#include <array>
#include <vector>

#include "../common/philox.h"
#include "arguments.h"

namespace fastprefix {

// A pointer and up to four strides. Dimensions of size 1 broadcast, so their stride is 0.
template <class T>
struct View {
  T* data = nullptr;
  std::array<int64_t, 4> strides{};

  View() = default;
  explicit View(const Tensor& tensor) : data(tensor.data<T>()) {
    for (int64_t d = 0; d < tensor.dim(); ++d) strides[d] = tensor.size(d) == 1 ? 0 : tensor.stride(d);
  }
  explicit View(const OptionalTensor& tensor) : View(tensor ? View(*tensor) : View()) {}

  explicit operator bool() const { return data != nullptr; }
  T* at(int64_t i0, int64_t i1 = 0, int64_t i2 = 0, int64_t i3 = 0) const {
    return data + i0 * strides[0] + i1 * strides[1] + i2 * strides[2] + i3 * strides[3];
  }
};

constexpr int64_t kQueries = 64;  // queries per block; in S^T they run along the vectors

inline int64_t query_blocks(int64_t queries) {
  return (queries + kQueries - 1) / kQueries;
}

enum class Half { prefix, tokens };  // the two sets of keys

// A block of queries: `count` of them from `first` on, in row b and head h.
struct QueryBlock {
  int64_t b, h, hkv, first, count;
  int64_t index;  // the block's number within its row and head
};

// The prefix keys that a row of the batch sees, in the store of prefixes. Without a store this is the whole prefix.
struct Span {
  int64_t start, length;
};

inline std::vector<Span> read_spans(const OptionalTensor& tensor, int64_t rows, int64_t keys) {
  if (!tensor) return std::vector<Span>(rows, Span{0, keys});
  std::vector<Span> spans;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t* span = tensor->data<const int64_t>() + 2 * row;
    if (span[0] < 0 || span[1] < 0 || span[1] > keys || span[0] > keys - span[1])
      refuse_value(
          "`prefix_spans` must hold spans within the store of ", keys, " prefix keys; row ", row, " starts at ",
          span[0], " and has length ", span[1]);
    spans.push_back({span[0], span[1]});
  }
  return spans;
}

// T is the type of the tensors. A is the type of sums and scores.
template <class T, class A>
struct AttentionProblem {
  int64_t B, Hq, Hkv, G, N, M, D, Dv;  // G: query heads per key/value head
  int64_t prefix_keys;                 // P, or the length of the store if there are spans
  std::vector<Span> spans;             // [B]
  int64_t P;                           // the largest length of a span
  int64_t frozen;                      // the first `frozen` prefix keys have no gradient
  View<const T> q, k, v, pk, pv;
  View<const T> gate, output_gate, bias_mask, prefix_bias, key_bias, sinks;
  View<const bool> bool_mask;
  View<const int64_t> query_segments, key_segments;
  // These follow from sizes. A stride of 0 does not tell a broadcast tensor from an expanded one, whose gradient is
  // full.
  bool gate_per_query, gate_differs_by_query, shared_key_bias, shared_prefix;
  bool from_store, causal;
  std::optional<int64_t> window;
  A scale;
  A softcap = 0;  // 0 is no soft cap
  bool drops = false;
  DropRule dropping;

  explicit AttentionProblem(const AttentionArguments& a)
      : B(a.query.size(0)),
        Hq(a.query.size(1)),
        Hkv(a.key.size(1)),
        G(Hq / Hkv),
        N(a.query.size(2)),
        M(a.key.size(2)),
        D(a.query.size(3)),
        Dv(a.value.size(3)),
        prefix_keys(a.prefix_key.size(2)),
        spans(read_spans(a.prefix_spans, B, prefix_keys)),
        P(0),
        frozen(a.frozen_prefix),
        q(a.query),
        k(a.key),
        v(a.value),
        pk(a.prefix_key),
        pv(a.prefix_value),
        gate(a.prefix_gate),
        output_gate(a.output_gate),
        prefix_bias(a.prefix_bias),
        key_bias(a.prefix_key_bias),
        sinks(a.sinks),
        query_segments(a.query_segments),
        key_segments(a.key_segments),
        gate_per_query(a.prefix_gate && a.prefix_gate->dim() == 4),
        gate_differs_by_query(gate_per_query && a.prefix_gate->size(2) != 1),
        shared_key_bias(!a.prefix_key_bias || a.prefix_key_bias->size(0) == 1),
        shared_prefix(a.prefix_key.size(0) == 1),
        from_store(a.prefix_spans.has_value()),
        causal(a.is_causal),
        window(a.window_size),
        scale(static_cast<A>(a.scale)) {
    for (const Span& span : spans) P = std::max(P, span.length);
    check_columns("prefix_gate", a.prefix_gate);
    check_columns("prefix_bias", a.prefix_bias);
    if (a.attn_mask && a.attn_mask->holds<bool>()) bool_mask = View<const bool>(*a.attn_mask);
    else bias_mask = View<const T>(a.attn_mask);
    if (a.softcap) softcap = static_cast<A>(*a.softcap);
    if (a.dropout_seed) {
      drops = true;
      dropping = DropRule(*a.dropout_seed->data<const int64_t>(), a.dropout_p);
    }
  }

  bool masked() const { return bool_mask || query_segments; }
  // Prefix and tokens have two softmaxes if there is an output gate.
  bool separate() const { return bool(output_gate); }
  A output_gate_of(int64_t b, int64_t h) const { return separate() ? static_cast<A>(*output_gate.at(b, h)) : A(1); }
  int64_t query_blocks() const { return fastprefix::query_blocks(N); }
  bool shared_gate() const { return !gate || (!gate_per_query && gate.strides[0] == 0); }
  int64_t key_bias_columns() const { return from_store ? prefix_keys : P; }
  // The offset of a block of queries in the normalizers [softmaxes][m, l][B, Hq, N].
  int64_t normalizer(const QueryBlock& queries, int64_t softmax, int64_t part) const {
    return (((softmax * 2 + part) * B + queries.b) * Hq + queries.h) * N + queries.first;
  }

 private:
  void check_columns(const char* name, const OptionalTensor& tensor) const {
    if (tensor && tensor->size(-1) != 1 && tensor->size(-1) < P)
      refuse_value(
          "`", name, "` must have a column for each key of the longest span in `prefix_spans` (", P, "), got ",
          tensor->size(-1));
  }
};

}  // namespace fastprefix
