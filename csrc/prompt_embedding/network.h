// The problem in the form that the kernels read: sizes, ids, and the packed parameters of the offsets.
//
// An offset is ADePT's network (ffn), DePT's pair of matrices (low_rank), or one vector per position (dense). With a
// bank of offsets, the rows of the batch are sorted by their entry. The rows of one entry are called a user.
#pragma once

#include "../common/gemm.h"
#include "../common/scratch.h"
#include "arguments.h"
#include "dots.h"
#include "dropout.h"
#include "groups.h"
#include "rows.h"

namespace fastprefix::prompt_embedding {

enum class OffsetKind { none, ffn, low_rank, dense };

// One entry of a bank, or the only offset. Matrices have the accumulator type and rows of d, padded with zeros.
template <class T>
struct Offset {
  using A = AccumulatorOf<T>;

  int64_t entry = 0;
  A *w1 = nullptr, *w2 = nullptr;  // [r, d]: w1 transposed; w2 or DePT's b
  A *b1 = nullptr, *b2 = nullptr;  // [r], [d]
  Rows<T> positions;               // DePT's a, or the dense offset
};

template <class T>
struct EmbeddingProblem {
  using A = AccumulatorOf<T>;

  int64_t B, N, S, P, V, d, r;
  int64_t ld, width, rp;  // distance and padded width of rows of d; padded r
  A scale;
  Rows<T> weight;
  Tensor ids_tensor, spans_tensor;
  const int64_t* ids;              // [B * N]
  // [B, 2], (start, length) in the store of prompts, or nullptr if each row has the whole prompt.
  const int64_t* spans = nullptr;
  OffsetKind kind = OffsetKind::none;
  bool banked;
  // Group u is the entry token[u]. Its places are the rows of the batch that use it. Rows without offset are last.
  Groups users;
  std::vector<Offset<T>> offsets;  // one per user, except the user without offset
  Tensor memory;
  Dropout dropout;

  explicit EmbeddingProblem(const EmbeddingArguments& a)
      : B(a.B()),
        N(a.N()),
        S(a.S()),
        P(a.P()),
        V(a.V()),
        d(a.d()),
        r(a.r()),
        ld(leading<A>(d)),
        width(round_up(d, kLanes<A>)),
        rp(round_up(r, kLanes<A>)),
        scale(static_cast<A>(a.offset_scale)),
        weight(a.weight),
        ids_tensor(as_int64(a.input_ids)),
        ids(ids_tensor.data<const int64_t>()),
        banked(a.entries.has_value()) {
    check_ids();
    if (a.prompt_spans) {
      spans_tensor = as_int64(*a.prompt_spans);
      spans = spans_tensor.data<const int64_t>();
      check_spans();
    }
    if (!a.offset()) return;
    find_users(a);
    if (B * N == 0 || offsets.empty()) return;
    kind = a.w1 ? OffsetKind::ffn : a.low_rank_a ? OffsetKind::low_rank : OffsetKind::dense;
    Arena count(nullptr);
    for (Offset<T>& offset : offsets) lay_out(count, offset);
    memory = Arena::allocate(count.used());
    Arena arena(Arena::align(memory));
    for (Offset<T>& offset : offsets) {
      lay_out(arena, offset);
      fill(a, offset);
    }
    if (a.dropout_seed) dropout = Dropout(*a.dropout_seed->data<const int64_t>(), a.dropout_p);
  }

  int64_t tokens() const { return B * N; }
  int64_t place_in_output(int64_t token) const { return token / N * (S + N) + S + token % N; }  // in rows of d
  bool has_offset(int64_t user) const { return user < static_cast<int64_t>(offsets.size()); }

  // Group the tokens that have the same offset, user by user. With dropout, each token is its own group.
  Groups groups() const {
    auto find = [&](const int64_t* of, int64_t count) {
      return dropout.active ? Groups::singles(of, count) : Groups::distinct(of, count);
    };
    if (!banked) return find(ids, tokens());
    Groups all;
    for (int64_t user = 0; user < users.count(); ++user) {
      const int64_t* rows = users.place.data() + users.start[user];
      std::vector<int64_t> of;
      for (int64_t i = 0; i < users.size(user); ++i) of.insert(of.end(), ids + rows[i] * N, ids + (rows[i] + 1) * N);
      auto place = [&](int64_t token) { return rows[token / N] * N + token % N; };
      all.append(find(of.data(), static_cast<int64_t>(of.size())), user, place);
    }
    return all;
  }

  // Tokens per tile: few enough that their rows stay in the second-level cache, and enough for efficient products.
  int64_t tile() const {
    int64_t rows = int64_t{256} * 1024 / (ld * static_cast<int64_t>(sizeof(A)));
    return std::clamp<int64_t>(rows / 12 * 12, 24, 96);
  }

  // Cost of computing a group's row, in units of copying a row.
  int64_t cost_of_group() const { return 1 + r / 8; }

  // Gather the table's rows of `rows` groups from `first` on into e [rows, ld].
  void gather(const Groups& groups, int64_t first, int64_t rows, A* e) const {
    constexpr int64_t kAhead = 4;
    for (int64_t t = 0; t < rows; ++t) {
      if (t + kAhead < rows) prefetch_row(weight.row(groups.token[first + t + kAhead]), d);
      weight.widen(groups.token[first + t], e + t * ld);
    }
  }

  // h = e w1 + b1, before dropout and ReLU. e is [rows, d] and h is [rows, r], with rows `ld` and `rp` apart.
  void hidden(const Offset<T>& offset, const A* e, int64_t rows, A* h) const {
    dots(e, rows, offset.w1, r, width, ld, h, rp);
    for (int64_t t = 0; t < rows; ++t)
      for (int64_t j = 0; j < r; ++j) h[t * rp + j] += offset.b1[j];
  }

 private:
  // Sort the rows of the batch by their entry.
  void find_users(const EmbeddingArguments& a) {
    users.place.resize(B);
    std::iota(users.place.begin(), users.place.end(), 0);
    if (!banked) {
      users.token = {0};
      users.start = {0, B};
    } else {
      Tensor index_tensor = as_int64(*a.entries);
      const int64_t* index = index_tensor.data<const int64_t>();
      check_index(index, a.offset()->size(0));
      // As an unsigned number, -1 (no offset) is the largest, so rows without offset come last.
      auto entry = [&](int64_t row) { return static_cast<uint64_t>(index[row]); };
      std::stable_sort(
          users.place.begin(), users.place.end(), [&](int64_t x, int64_t y) { return entry(x) < entry(y); });
      for (int64_t i = 0; i < B; ++i)
        if (i == 0 || index[users.place[i]] != users.token.back()) {
          users.token.push_back(index[users.place[i]]);
          users.start.push_back(i);
        }
      users.start.push_back(B);
    }
    for (int64_t entry : users.token)
      if (entry >= 0) offsets.emplace_back().entry = entry;
  }

  // Assign memory to the packed parameters of an offset.
  void lay_out(Arena& arena, Offset<T>& offset) const {
    if (kind == OffsetKind::dense) return;
    bool ffn = kind == OffsetKind::ffn;
    if (ffn) offset.w1 = arena.take<A>(rp * ld);
    offset.w2 = arena.take<A>(rp * ld);
    if (ffn) offset.b1 = arena.take<A>(rp + kLanes<A>);
    if (ffn) offset.b2 = arena.take<A>(width);
  }

  // Pack the parameters of an offset.
  void fill(const EmbeddingArguments& a, Offset<T>& offset) const {
    auto of = [&](const OptionalTensor& x) { return banked ? x->select(0, offset.entry) : *x; };
    if (kind == OffsetKind::ffn) {
      pack_columns<T>(of(a.w1), rp, ld, offset.w1);
      pack_matrix<T>(of(a.w2), rp, ld, offset.w2);
      std::fill(offset.b1, offset.b1 + rp, A(0));
      pack_vector<T>(of(a.b1), offset.b1);
      pack_vector<T>(of(a.b2), offset.b2);
    } else if (kind == OffsetKind::low_rank) {
      pack_matrix<T>(of(a.low_rank_b), rp, ld, offset.w2);
      offset.positions = Rows<T>(of(a.low_rank_a));
    } else {
      offset.positions = Rows<T>(of(a.position_offset));
    }
  }

  void check_ids() const {
    if (tokens() == 0) return;
    auto [low, high] = std::minmax_element(ids, ids + tokens());
    if (*low < 0 || *high >= V)
      refuse_value("`input_ids` must hold ids from 0 to V - 1 = ", V - 1, ", got ", *low < 0 ? *low : *high);
  }

  void check_index(const int64_t* index, int64_t entries) const {
    for (int64_t b = 0; b < B; ++b)
      if (index[b] < -1 || index[b] >= entries)
        refuse_value("`index` must hold values from -1 (no offset) to K - 1 = ", entries - 1, ", got ", index[b]);
  }

  void check_spans() const {
    for (int64_t b = 0; b < B; ++b) {
      int64_t start = spans[2 * b], length = spans[2 * b + 1];
      // Do not compute start + length, which may overflow.
      if (start < 0 || length < 0 || start > P || length > P - start)
        refuse_value(
            "`prompt_spans` must hold (start, length) within the prompt's ", P, " rows, got (", start, ", ", length,
            ") in row ", b);
      if (length > S)
        refuse_value(
            "`prompt_spans` must hold lengths up to prompt_length = ", S, ", got (", start, ", ", length, ") in row ",
            b);
    }
  }
};

}  // namespace fastprefix::prompt_embedding
