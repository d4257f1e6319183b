// Scores from products <q, k>, in blocks of S^T [kKeys][kQueries]. The steps are, in this order: scale and gate, soft
// cap, bias, and -inf for hidden scores.
#pragma once

#include "dropout.h"
#include "strips.h"

namespace fastprefix {

// The gate of a block of prefix keys: one factor per key, or one per key and query. Without a gate, the factor is 1.
template <class A>
struct Gate {
  const A* of_row = nullptr;    // [kKeys]
  const A* of_query = nullptr;  // [kKeys][kQueries]

  explicit operator bool() const { return of_row || of_query; }
  Vec<A> at(int64_t row, int64_t column) const {
    if (of_query) return load(of_query + row * kQueries + column);
    return splat(of_row ? of_row[row] : A(1));
  }
};

// A block of `rows` keys from `first` on. In the prefix, `first` counts from the start of the row's span.
struct Columns {
  Half half;
  int64_t first, rows;
};

// Return the index of a block's first key in the tensor of the prefix (or store) or of the tokens.
template <class T, class A>
int64_t place(const AttentionProblem<T, A>& p, const QueryBlock& queries, const Columns& columns) {
  return columns.first + (columns.half == Half::prefix ? p.spans[queries.b].start : 0);
}

// Call use(columns) for each block of the keys [begin, end).
template <class Use>
void for_blocks(Half half, int64_t begin, int64_t end, Use use) {
  for (int64_t first = begin; first < end; first += kKeys) use(Columns{half, first, std::min(kKeys, end - first)});
}

// Call use(columns) for each block of token keys that is within the queries' band.
template <class T, class A, class Use>
void for_token_blocks(const AttentionProblem<T, A>& p, const Band& band, const QueryBlock& queries, Use use) {
  int64_t end = std::min(p.M, band.last_key(queries.first + queries.count - 1) + 1);
  // Blocks begin at multiples of kKeys for all queries, so that they can share packed blocks.
  for_blocks(Half::tokens, std::max<int64_t>(0, band.first_key(queries.first)) / kKeys * kKeys, end, use);
}

// Call visit(row, column) for every vector of a strip.
template <class A, class Visit>
inline void for_vectors(const Strip& strip, Visit visit) {
  for (int64_t r = strip.row; r < strip.row + strip.rows; ++r)
    for (int64_t c = strip.column; c < strip.column + strip.columns; c += kLanes<A>) visit(r, c);
}

// Sum terms over a strip's rows, in groups of kGroup rows, since one long sum has larger rounding errors.
// terms(row, both, sum) adds the term of a row to `sum`, and the next row's term too if `both` is true.
template <class A, class Terms>
inline Vec<A> sum_row_pairs(const Strip& strip, Terms terms) {
  constexpr int64_t kGroup = 8;
  Vec<A> sum{}, rest{};
  int64_t r = strip.row, end = strip.row + strip.rows;
  for (; r + kGroup <= end; r += kGroup) {
    Vec<A> group{};
#pragma GCC unroll 4
    for (int64_t i = 0; i < kGroup; i += 2) terms(r + i, true, group);
    sum += group;
  }
  for (; r < end; r += 2) terms(r, r + 1 < end, rest);
  return sum + rest;
}

// Sum term(row) over a strip's rows, in the same groups.
template <class A, class Term>
inline Vec<A> sum_rows(const Strip& strip, Term term) {
  return sum_row_pairs<A>(strip, [&](int64_t r, bool both, Vec<A>& sum) {
    sum += term(r);
    if (both) sum += term(r + 1);
  });
}

// Read the gate of a block of prefix keys into `values`. Blocks of tokens have no gate.
template <class T, class A>
Gate<A> read_gate(const AttentionProblem<T, A>& p, const QueryBlock& queries, const Columns& columns, A* values) {
  if (!p.gate || columns.half == Half::tokens) return {};
  const auto& s = p.gate.strides;
  if (!p.gate_per_query) {
    const T* from = p.gate.at(queries.b, queries.hkv, columns.first);
    for (int64_t r = 0; r < columns.rows; ++r) values[r] = static_cast<A>(from[r * s[2]]);
    return {values, nullptr};
  }
  const T* from = p.gate.at(queries.b, queries.h, queries.first, columns.first);
  for (int64_t r = 0; r < columns.rows; ++r)
    for (int64_t i = 0; i < kQueries; ++i)
      values[r * kQueries + i] = i < queries.count ? static_cast<A>(from[i * s[2] + r * s[3]]) : A(0);
  return {nullptr, values};
}

// Add a bias [B, Hq, N, keys], whose dimensions may broadcast.
template <class T, class A>
void add_bias(const View<const T>& bias, const QueryBlock& queries, const Columns& columns, const Strip& strip, A* s) {
  constexpr int n = kLanes<A>;
  const T* from = bias.at(queries.b, queries.h, queries.first, columns.first);
  int64_t to_query = bias.strides[2], to_key = bias.strides[3], end = strip.row + strip.rows;
  if (to_query == 0)
    return for_vectors<A>(strip, [&](int64_t r, int64_t c) {
      A* at = s + r * kQueries + c;
      store(at, load(at) + splat(static_cast<A>(from[r * to_key])));
    });
  for (int64_t c = strip.column; c < strip.column + strip.columns; c += n)
    for (int64_t r0 = strip.row; r0 < end; r0 += n) {  // read squares along the keys, then transpose them
      Vec<A> square[n];
      for (int64_t i = 0; i < n; ++i) {
        square[i] = Vec<A>{};
        if (c + i >= queries.count) continue;
        const T* row = from + (c + i) * to_query + r0 * to_key;
        if (to_key == 1) square[i] = load_first(row, end - r0);
        else
          for (int64_t r = 0; r < std::min<int64_t>(n, end - r0); ++r) square[i][r] = static_cast<A>(row[r * to_key]);
      }
      transpose<A>(square);
      for (int64_t r = 0; r < std::min<int64_t>(n, end - r0); ++r) {
        A* at = s + (r0 + r) * kQueries + c;
        store(at, load(at) + square[r]);
      }
    }
}

// Add a bias per prefix key: [B, Hkv, P], or [1, Hkv, T] for a store of T keys. Its dimensions may broadcast.
template <class T, class A>
void add_key_bias(
    const AttentionProblem<T, A>& p, const QueryBlock& queries, const Columns& columns, const Strip& strip, A* s) {
  const T* from = p.key_bias.at(queries.b, queries.hkv, place(p, queries, columns));
  for_vectors<A>(strip, [&](int64_t r, int64_t c) {
    A* at = s + r * kQueries + c;
    store(at, load(at) + splat(static_cast<A>(from[r * p.key_bias.strides[2]])));
  });
}

// Find the queries that see each key of a block of tokens, from causality, window, segments and mask.
template <class T, class A>
void find_seen(
    const AttentionProblem<T, A>& p, const Band& band, const QueryBlock& queries, const Columns& columns, Seen* seen) {
  for (int64_t r = 0; r < columns.rows; ++r) seen[r] = see_band(band, queries, columns.first + r);
  if (p.query_segments) {
    const int64_t* of_query = p.query_segments.at(queries.b, queries.first);
    const int64_t* of_key = p.key_segments.at(queries.b, columns.first);
    int64_t to_query = p.query_segments.strides[1], to_key = p.key_segments.strides[1];
    Seen same = 0;
    for (int64_t r = 0; r < columns.rows; ++r) {
      int64_t segment = of_key[r * to_key];
      if (r == 0 || segment != of_key[(r - 1) * to_key]) {  // neighbors usually are in the same segment
        same = 0;
        for (int64_t i = 0; i < queries.count; ++i) same |= Seen{of_query[i * to_query] == segment} << i;
      }
      seen[r] &= same;
    }
  }
  if (p.bool_mask) {
    // A byte of a mask may be any number, since tensors of bytes can be viewed as bool.
    const bool* bytes = p.bool_mask.at(queries.b, queries.h, queries.first, columns.first);
    const auto* mask = reinterpret_cast<const uint8_t*>(bytes);
    int64_t to_query = p.bool_mask.strides[2], to_key = p.bool_mask.strides[3];
    if (to_query == 0) {
      for (int64_t r = 0; r < columns.rows; ++r) seen[r] &= mask[r * to_key] ? ~Seen{0} : Seen{0};
      return;
    }
    Seen let[kKeys] = {};
    for (int64_t i = 0; i < queries.count; ++i, mask += to_query) {
      if (to_key == 1)
        for (int64_t r = 0; r < columns.rows; ++r) let[r] |= Seen{mask[r] != 0} << i;
      else
        for (int64_t r = 0; r < columns.rows; ++r) let[r] |= Seen{mask[r * to_key] != 0} << i;
    }
    for (int64_t r = 0; r < columns.rows; ++r) seen[r] &= let[r];
  }
}

// Find the visible strips of a block. With a mask or segments, also fill `seen` with one word per key.
template <class T, class A>
void find_strips(
    const AttentionProblem<T, A>& p,
    const Band& band,
    const QueryBlock& queries,
    const Columns& columns,
    Seen* seen,
    std::vector<Strip>& strips) {
  if (columns.half == Half::prefix) return all_visible(queries, columns.rows, kLanes<A>, strips);
  if (!p.masked()) return visible_strips(band, queries, columns.first, columns.rows, kLanes<A>, strips);
  find_seen(p, band, queries, columns, seen);
  seen_strips(seen, queries, columns.rows, kLanes<A>, strips);
}

// A score is large if half a unit in its last place is 1/16 or more. The softmax's reference is the largest score after
// rounding. If the code that reads the scores multiplies them by the scale and subtracts the reference in one
// instruction, it rounds only the result, so the largest score differs from the reference by up to half a unit. This
// cancels in the normalization, but the exponentials of large scores would overflow, or be 0.
template <class A>
constexpr A kLarge = sizeof(A) == 4 ? A(0x1p20) : A(0x1p49);

template <class A>
inline auto is_large(Vec<A> score) {
  auto high = score > kLarge<A>, low = score < -kLarge<A>, finite = score >= std::numeric_limits<A>::lowest();
  return high | (low & finite);
}

// Return the factor by which the scores of a strip must still be multiplied.
template <class T, class A>
A scale_of(const AttentionProblem<T, A>& p, const Strip& strip) {
  return strip.unscaled ? p.scale : A(1);
}

// Return the largest scores of a strip in the columns from `column` on.
template <class A>
Vec<A> largest_score(const Strip& strip, const A* s, A scale, int64_t column) {
  s += strip.row * kQueries + column;
  int64_t rows = strip.rows;
  Vec<A> a = load(s), b = a, c = a, d = a;
  for (; rows >= 4; rows -= 4, s += 4 * kQueries) {
    a = maximum<A>(a, load(s));
    b = maximum<A>(b, load(s + kQueries));
    c = maximum<A>(c, load(s + 2 * kQueries));
    d = maximum<A>(d, load(s + 3 * kQueries));
  }
  for (; rows > 0; --rows, s += kQueries) a = maximum<A>(a, load(s));
  Vec<A> largest = maximum<A>(maximum<A>(a, b), maximum<A>(c, d));
  return strip.unscaled ? largest * scale : largest;
}

// Multiply the scores of unscaled strips by the scale, in place, so that they are rounded as the reference is.
template <class T, class A>
void apply_scale(const AttentionProblem<T, A>& p, std::vector<Strip>& strips, A* s) {
  for (Strip& strip : strips) {
    if (!strip.unscaled) continue;
    for_vectors<A>(
        strip, [&](int64_t r, int64_t c) { store(s + r * kQueries + c, load(s + r * kQueries + c) * p.scale); });
    strip.unscaled = false;
  }
}

// Turn the products in `s` [kKeys][kQueries] into scores, in place. `seen` is find_strips' result. If `slopes` is
// given, it receives the derivative of the soft cap. If the scale is the only change, the strip is marked as unscaled
// and the code that reads the scores applies it, which saves a pass.
template <class T, class A>
void make_scores(
    const AttentionProblem<T, A>& p,
    const Band& band,
    const QueryBlock& queries,
    const Columns& columns,
    Strip& strip,
    const Gate<A>& gate,
    const Seen* seen,
    A* s,
    A* slopes = nullptr) {
  bool biased = columns.half == Half::prefix ? p.prefix_bias || p.key_bias : bool(p.bias_mask);
  strip.unscaled = !gate && !biased && p.softcap == 0 && p.scale > 0;
  if (!strip.unscaled)
    for_vectors<A>(strip, [&](int64_t r, int64_t c) {
      A* at = s + r * kQueries + c;
      store(at, load(at) * (gate.at(r, c) * p.scale));
    });
  if (p.softcap != 0)
    for_vectors<A>(strip, [&](int64_t r, int64_t c) {
      A* at = s + r * kQueries + c;
      Tanh<A> capped = tanh(load(at) / p.softcap);
      if (slopes) store(slopes + r * kQueries + c, capped.slope);
      store(at, capped.value * p.softcap);
    });
  if (columns.half == Half::prefix) {
    if (p.prefix_bias) add_bias(p.prefix_bias, queries, columns, strip, s);
    if (p.key_bias) add_key_bias(p, queries, columns, strip, s);
    return;
  }
  if (p.bias_mask) add_bias(p.bias_mask, queries, columns, strip, s);
  if (!strip.partial) return;
  for (int64_t r = strip.row; r < strip.row + strip.rows; ++r) {
    Seen bits = p.masked() ? seen[r] : see_band(band, queries, columns.first + r);
    for (int64_t c = strip.column; c < strip.column + strip.columns; c += kLanes<A>) {
      A* at = s + r * kQueries + c;
      store(at, keep_lanes<A>(load(at), bits >> c));
    }
  }
}

}  // namespace fastprefix
