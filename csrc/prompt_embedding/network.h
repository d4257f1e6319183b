// ADePT's network, or DePT's factor, as the kernels want it: in the sums' type, rows of d, padded with zeros.
#pragma once

#include "../prefix_attention/gemm.h"
#include "../prefix_attention/scratch.h"
#include "arguments.h"
#include "dots.h"
#include "dropout.h"
#include "groups.h"
#include "rows.h"

namespace fastprefix::prompt_embedding {

template <class T>
struct EmbeddingProblem {
  using A = AccumulatorOf<T>;

  int64_t B, N, S, V, d, r;
  int64_t ld, width, rp;  // leading dimension and used part of a padded row of d; r padded
  A scale;
  Rows<T> weight;
  Tensor ids_tensor;
  const int64_t* ids;  // [B * N]
  Tensor memory;
  A *w1 = nullptr, *w2 = nullptr, *b1 = nullptr, *b2 = nullptr;  // [r, d] (w1 transposed; w2, or DePT's b), [r], [d]
  Rows<T> low_rank_a;
  Dropout dropout;

  explicit EmbeddingProblem(const EmbeddingArguments& a)
      : B(a.B()), N(a.N()), S(a.S()), V(a.V()), d(a.d()), r(a.r()),
        ld(leading<A>(d)), width(round_up(d, kLanes<A>)), rp(round_up(r, kLanes<A>)),
        scale(static_cast<A>(a.offset_scale)), weight(a.weight),
        ids_tensor(a.input_ids.to(at::kLong).contiguous()), ids(ids_tensor.const_data_ptr<int64_t>()) {
    check_ids();
    if (B * N == 0 || r == 0) return;
    Arena count(nullptr);
    lay_out(count, a.w1.has_value());
    memory = at::empty({count.used() + Arena::kLine}, at::kByte);
    auto address = reinterpret_cast<uintptr_t>(memory.data_ptr());
    Arena arena(reinterpret_cast<char*>((address + Arena::kLine - 1) / Arena::kLine * Arena::kLine));
    lay_out(arena, a.w1.has_value());
    if (a.w1) {
      pack_matrix<T>(a.w1->t().contiguous(), rp, ld, w1);
      pack_matrix<T>(*a.w2, rp, ld, w2);
      std::fill(b1, b1 + rp, A(0));
      pack_vector<T>(*a.b1, b1);
      pack_vector<T>(*a.b2, b2);
    } else {
      pack_matrix<T>(*a.low_rank_b, rp, ld, w2);
      std::fill(b2, b2 + width, A(0));
      low_rank_a = Rows<T>(*a.low_rank_a);
    }
    if (a.dropout_seed) dropout = Dropout(a.dropout_seed->item<int64_t>(), a.dropout_p);
  }

  int64_t tokens() const { return B * N; }
  int64_t place_in_output(int64_t token) const { return token / N * (S + N) + S + token % N; }  // its row
  Groups groups() const {
    return dropout.active ? Groups::singles(ids, tokens()) : Groups::distinct(ids, tokens());
  }

  // Tokens in a tile: their rows stay in the second-level cache, and products are worth their while.
  int64_t tile() const {
    int64_t rows = int64_t{256} * 1024 / (ld * static_cast<int64_t>(sizeof(A)));
    return std::clamp<int64_t>(rows / 12 * 12, 24, 96);
  }

  // What a group costs beyond its occurrences, in copies of a row.
  int64_t cost_of_group() const { return 1 + r / 8; }

  // The table's rows of groups first, first + 1, ... to a tile.
  void gather(const Groups& groups, int64_t first, int64_t rows, A* e) const {
    constexpr int64_t kAhead = 4;
    for (int64_t t = 0; t < rows; ++t) {
      if (t + kAhead < rows) prefetch_row(weight.row(groups.token[first + t + kAhead]), d);
      weight.widen(groups.token[first + t], e + t * ld);
    }
  }

  // h [rows, r] (`rp` apart) from the rows e: before dropout and ReLU.
  void hidden(const A* e, int64_t rows, A* h) const {
    dots(e, rows, w1, r, width, ld, h, rp);
    for (int64_t t = 0; t < rows; ++t)
      for (int64_t j = 0; j < r; ++j) h[t * rp + j] += b1[j];
  }

 private:
  void lay_out(Arena& arena, bool ffn) {
    if (ffn) w1 = arena.take<A>(rp * ld);
    w2 = arena.take<A>(rp * ld);
    if (ffn) b1 = arena.take<A>(rp + kLanes<A>);
    b2 = arena.take<A>(width);
  }

  void check_ids() const {
    if (tokens() == 0) return;
    auto [low, high] = std::minmax_element(ids, ids + tokens());
    TORCH_CHECK_VALUE(
        *low >= 0 && *high < V, "input_ids takes ids from 0 to V - 1 = ", V - 1, ", got ", *low < 0 ? *low : *high);
  }
};

}  // namespace fastprefix::prompt_embedding
