// The backward pass: gradients of the table, the prompt and the offsets.
//
// Only the ids were saved, so the table's rows are gathered again. Distinct tokens (ADePT) or positions (DePT, dense
// offsets) are processed in tiles of p.tile() rows. Each slot sums the gradients of shared parameters in its own
// memory. These sums are then added in the order of the slots, so the results are the same in every run with equally
// many threads.
#pragma once

#include "network.h"

namespace fastprefix::prompt_embedding {

template <class T>
struct EmbeddingBackward {
  using A = typename EmbeddingProblem<T>::A;

  const EmbeddingProblem<T>& p;
  const EmbeddingGradients& gradients;
  const T* grad;  // [B, S + N, d], upstream gradient; the last dimension has stride 1
  int64_t batch_stride, row_stride;
  bool need_dh;  // the gradient of the network's hidden units

  EmbeddingBackward(const EmbeddingProblem<T>& p, const EmbeddingGradients& gradients, const Tensor& grad_output)
      : p(p),
        gradients(gradients),
        grad(grad_output.data<const T>()),
        batch_stride(grad_output.stride(0)),
        row_stride(grad_output.stride(1)),
        need_dh(gradients.w1.defined() || gradients.b1.defined() || gradients.weight.defined()) {}

  void run() const {
    if (gradients.prompt.defined()) {
      if (p.spans) store_gradient();
      else prompt_gradient();
    }
    if (p.banked) gradients.zero_banks();  // for entries that no row uses
    if (p.tokens() == 0) return;
    if (p.kind == OffsetKind::ffn) {
      Groups groups = p.groups();
      Tensor dh = gradients.weight.defined() ? empty<A>({groups.count(), p.rp}) : Tensor();
      if (gradients.of_ffn() || gradients.weight.defined()) ffn_gradients(groups, dh);
      if (gradients.weight.defined()) weight_gradient(groups, dh);
      return;
    }
    if (p.kind == OffsetKind::low_rank && (gradients.low_rank_a.defined() || gradients.low_rank_b.defined()))
      low_rank_gradients();
    if (p.kind == OffsetKind::dense && gradients.position_offset.defined()) dense_gradient();
    if (gradients.weight.defined()) weight_gradient(Groups::distinct(p.ids, p.tokens()), {});
  }

 private:
  // The upstream gradient of a token.
  const T* dy(int64_t token) const { return grad + token / p.N * batch_stride + (p.S + token % p.N) * row_stride; }

  // to [d] = the sum of dy over the occurrences of group u.
  void sum_occurrences(const Groups& groups, int64_t u, A* to) const {
    constexpr int64_t kAhead = 6;
    for (int64_t i = groups.start[u] + kAhead; i < std::min(groups.start[u + 1] + kAhead, p.tokens()); ++i)
      prefetch_row(dy(groups.place[i]), p.d);
    const int64_t* place = groups.place.data() + groups.start[u];
    sum_rows(groups.start[u + 1] - groups.start[u], [&](int64_t i) { return dy(place[i]); }, p.d, to);
  }

  // The gradient of a prompt token is the sum over all rows of the batch.
  void prompt_gradient() const {
    T* to = gradients.prompt.template data<T>();
    parallel_for(0, p.S, 1, [&](int64_t begin, int64_t end) {
      std::vector<A> sum(p.width);
      for (int64_t s = begin; s < end; ++s) {
        sum_rows(p.B, [&](int64_t b) { return grad + b * batch_stride + s * row_stride; }, p.d, sum.data());
        write_row(sum.data(), p.d, to + s * p.d);
      }
    });
  }

  // The gradient of a token of the store is the sum over the rows of the batch whose span contains it.
  void store_gradient() const {
    T* to = gradients.prompt.template data<T>();
    parallel_for(0, p.P, 1, [&](int64_t begin, int64_t end) {
      std::vector<A> sum(p.width);
      std::vector<const T*> seen;
      for (int64_t i = begin; i < end; ++i) {
        seen.clear();
        for (int64_t b = 0; b < p.B; ++b) {
          int64_t place = i - p.spans[2 * b], length = p.spans[2 * b + 1];
          if (place >= 0 && place < length)
            seen.push_back(grad + b * batch_stride + (p.S - length + place) * row_stride);
        }
        sum_rows(static_cast<int64_t>(seen.size()), [&](int64_t j) { return seen[j]; }, p.d, sum.data());
        write_row(sum.data(), p.d, to + i * p.d);
      }
    });
  }

  // The gradients that one slot sums for one offset. Matrices are [r, d], with rows `ld` apart.
  struct Sums {
    A *w1, *w2, *b1, *b2;  // dw1^T, dw2 (or DePT's db), db1 [r], db2 [d]
    Sums(Arena& arena, const EmbeddingProblem<T>& p)
        : w1(arena.take<A>(p.r * p.ld)),
          w2(arena.take<A>(p.r * p.ld)),
          b1(arena.take<A>(p.rp)),
          b2(arena.take<A>(p.width)) {}
    static int64_t bytes(const EmbeddingProblem<T>& p) {
      Arena count(nullptr);
      Sums(count, p);
      return count.used();
    }
  };
  // One tile. The matrices have 4 extra rows, since `dots` rounds the number of rows up.
  struct BackwardTile {
    A *e, *g;             // [rows][ld]: the table's rows; dy times the scale
    A *h, *dh, *factors;  // [rows][rp]: hidden units, their gradients, dropout's factors
    A* sum;               // one row
    BackwardTile(Arena& arena, const EmbeddingProblem<T>& p)
        : e(arena.take<A>((p.tile() + 4) * p.ld)),
          g(arena.take<A>((p.tile() + 4) * p.ld)),
          h(arena.take<A>((p.tile() + 4) * p.rp)),
          dh(arena.take<A>((p.tile() + 4) * p.rp)),
          factors(arena.take<A>((p.tile() + 4) * p.rp)),
          sum(arena.take<A>(std::max(p.width, p.rp))) {}
    static int64_t bytes(const EmbeddingProblem<T>& p) {
      Arena count(nullptr);
      BackwardTile(count, p);
      return count.used();
    }
  };

  // Run body(slot, tile, sums) for every slot, where sums(user) returns the slot's sums for a user, which start at
  // zero. Then add the sums of each user in the order of the slots, and write them to the gradients.
  template <class Body>
  void summed(const Slots& slots, Body body) const {
    // Work is ordered by user. From one pair (slot, user) to the next, neither number decreases and at least one
    // increases, so `slot + user` numbers the pairs.
    int64_t bytes = Sums::bytes(p), parts = slots.count + static_cast<int64_t>(p.offsets.size()) - 1;
    std::vector<int64_t> user_of(parts, -1);
    Tensor memory = Arena::allocate(parts * bytes);
    memory.zero();
    char* aligned = Arena::align(memory);
    auto sums_of = [&](int64_t part) {
      Arena arena(aligned + part * bytes);
      return Sums(arena, p);
    };
    slots.run(BackwardTile::bytes(p), [&](int64_t slot, char* scratch) {
      Arena arena(scratch);
      body(slot, BackwardTile(arena, p), [&](int64_t user) {
        user_of[slot + user] = user;
        return sums_of(slot + user);
      });
    });
    std::vector<std::vector<Sums>> all(p.offsets.size());
    for (int64_t part = 0; part < parts; ++part)
      if (user_of[part] >= 0) all[user_of[part]].push_back(sums_of(part));
    for (size_t user = 0; user < all.size(); ++user) {
      add_up(all[user], &Sums::w1, p.r, p.ld);
      add_up(all[user], &Sums::w2, p.r, p.ld);
      add_up(all[user], &Sums::b1, 1, p.rp);
      add_up(all[user], &Sums::b2, 1, p.width);
      finish(all[user][0], p.offsets[user].entry);
    }
  }

  // Add one matrix of all slots to the first slot's.
  void add_up(const std::vector<Sums>& all, A* Sums::* part, int64_t rows, int64_t width) const {
    if (all.size() == 1) return;
    parallel_for(0, rows, 8, [&](int64_t begin, int64_t end) {
      for (size_t slot = 1; slot < all.size(); ++slot)
        for (int64_t i = begin * width; i < end * width; i += kLanes<A>)
          store(all[0].*part + i, load(all[0].*part + i) + load(all[slot].*part + i));
    });
  }

  // Write the total sums to one entry of the gradients.
  void finish(const Sums& sums, int64_t entry) const {
    auto write = [&](const Tensor& to, A* from, int64_t rows, int64_t width, int64_t ld, int64_t entry) {
      if (!to.defined()) return;
      T* data = to.template data<T>() + entry * rows * width;
      for (int64_t i = 0; i < rows; ++i) write_row(from + i * ld, width, data + i * width);
    };
    if (gradients.w1.defined())
      unpack_transposed(sums.w1, p.ld, p.d, p.r, gradients.w1.template data<T>() + entry * p.d * p.r, p.r);
    write(gradients.w2, sums.w2, p.r, p.d, p.ld, entry);
    write(gradients.low_rank_b, sums.w2, p.r, p.d, p.ld, entry);
    write(gradients.b1, sums.b1, 1, p.r, p.rp, entry);
    write(gradients.b2, sums.b2, 1, p.d, p.width, entry);
  }

  // ADePT: the gradients of the network. Keep the gradients of the hidden units in all_dh [groups, rp] if it is
  // defined, for the gradient of the table.
  void ffn_gradients(const Groups& groups, const Tensor& all_dh) const {
    Slots slots(p.tokens());
    A* kept = all_dh.defined() ? all_dh.template data<A>() : nullptr;
    summed(slots, [&](int64_t slot, const BackwardTile& tile, auto sums) {
      int64_t last = groups.cut(slot + 1, slots.count, 3 * p.cost_of_group());
      for (int64_t u = groups.cut(slot, slots.count, 3 * p.cost_of_group()), rows; u < last; u += rows) {
        int64_t user = groups.user_of(u);
        if (!p.has_offset(user)) break;  // this user is always the last
        rows = std::min(p.tile(), groups.run(u, last) - u);
        ffn_tile(p.offsets[user], groups, u, rows, tile, sums(user));
        if (kept) std::memcpy(static_cast<void*>(kept + u * p.rp), tile.dh, rows * p.rp * sizeof(A));
      }
    });
  }

  // Differentiate the network for `rows` groups: with g = scale * (dy summed over a group's occurrences), db2 += g,
  // dh = (g w2^T) where h > 0, db1 += dh, dw1^T += dh^T e, dw2 += relu(h)^T g. The factors of dropout apply to h and
  // dh.
  void ffn_tile(
      const Offset<T>& offset,
      const Groups& groups,
      int64_t first,
      int64_t rows,
      const BackwardTile& tile,
      const Sums& sums) const {
    p.gather(groups, first, rows, tile.e);
    for (int64_t t = 0; t < rows; ++t) {
      A* g = tile.g + t * p.ld;
      sum_occurrences(groups, first + t, g);
      for (int64_t k = 0; k < p.width; k += kLanes<A>) store(g + k, load(g + k) * p.scale);
    }
    if (gradients.b2.defined()) add_tile(tile.g, rows, p.ld, p.width, tile.sum, sums.b2);
    p.hidden(offset, tile.e, rows, tile.h);
    std::fill(tile.factors, tile.factors + rows * p.rp, A(1));
    if (p.dropout.active)
      for (int64_t t = 0; t < rows; ++t) {
        int64_t token = groups.place[groups.start[first + t]];
        p.dropout.apply(token % p.N, token / p.N, p.r, tile.h + t * p.rp, tile.factors + t * p.rp);
      }
    if (need_dh) {
      dots(tile.g, rows, offset.w2, p.r, p.width, p.ld, tile.dh, p.rp);
      for (int64_t t = 0; t < rows; ++t)
        for (int64_t i = t * p.rp; i < t * p.rp + p.r; ++i)
          tile.dh[i] *= (tile.h[i] > 0 ? A(1) : A(0)) * tile.factors[i];
    }
    if (gradients.b1.defined()) add_tile(tile.dh, rows, p.rp, p.rp, tile.sum, sums.b1);
    if (gradients.w1.defined())
      Product<Plain<A>>{tile.dh, 1, p.rp, tile.e, p.ld, sums.w1, p.ld, rows, true}.run(p.r, p.width);
    if (gradients.w2.defined()) {
      for (int64_t t = 0; t < rows; ++t)
        for (int64_t i = t * p.rp; i < t * p.rp + p.r; ++i) tile.h[i] = tile.h[i] < 0 ? A(0) : tile.h[i];
      Product<Plain<A>>{tile.h, 1, p.rp, tile.g, p.ld, sums.w2, p.ld, rows, true}.run(p.r, p.width);
    }
  }

  // to += the sum of the rows of x
  void add_tile(const A* x, int64_t rows, int64_t ld, int64_t width, A* sum, A* to) const {
    sum_rows(rows, [&](int64_t t) { return x + t * ld; }, width, sum);
    add_row(sum, width, to);
  }

  // The gradient of the table. Each distinct token gets the sum of dy over its occurrences, plus dh w1^T if the offset
  // is a network. dh is first summed over the occurrences that share an offset.
  void weight_gradient(const Groups& groups, const Tensor& all_dh) const {
    gradients.weight.zero();
    // An id has several groups with dropout, because each occurrence is its own group, and with a bank of offsets.
    bool several = p.kind == OffsetKind::ffn && (p.banked || p.dropout.active);
    Groups of_ids = several ? Groups::distinct(groups.token.data(), groups.count())
                            : Groups::singles(groups.token.data(), groups.count());
    Groups flat;
    if (several) flat = of_ids.flatten(groups);
    const Groups& occurrences = several ? flat : groups;
    const A* dh = all_dh.defined() ? all_dh.template data<const A>() : nullptr;
    T* to = gradients.weight.template data<T>();
    parallel_for(0, of_ids.count(), 16, [&](int64_t begin, int64_t end) {
      std::vector<A> sum(p.width), offset(p.width), dh_sum(p.rp);
      for (int64_t u = begin; u < end; ++u) {
        sum_occurrences(occurrences, u, sum.data());
        for (int64_t i = of_ids.start[u]; dh && i < of_ids.start[u + 1];) {
          int64_t user = groups.user_of(of_ids.place[i]);
          if (!p.has_offset(user)) break;  // this user is always the last
          std::fill(dh_sum.begin(), dh_sum.end(), A(0));
          for (; i < of_ids.start[u + 1] && groups.user_of(of_ids.place[i]) == user; ++i)
            for (int64_t j = 0; j < p.r; ++j) dh_sum[j] += dh[of_ids.place[i] * p.rp + j];
          const A* w1 = p.offsets[user].w1;
          Product<Plain<A>>{dh_sum.data(), p.rp, 1, w1, p.ld, offset.data(), p.ld, p.r, false}.run(1, p.width);
          add_row(offset.data(), p.width, sum.data());
        }
        write_row(sum.data(), p.d, to + of_ids.token[u] * p.d);
      }
    });
  }

  // to [d] = scale * dy at a position, summed over the rows of the batch that use this user's offset.
  void sum_position(int64_t user, int64_t position, A* to) const {
    const int64_t* rows = p.users.place.data() + p.users.start[user];
    sum_rows(p.users.size(user), [&](int64_t i) { return dy(rows[i] * p.N + position); }, p.d, to);
    for (int64_t k = 0; k < p.width; k += kLanes<A>) store(to + k, load(to + k) * p.scale);
  }

  // The gradient of one position, in a tensor [T, width] or [K, T, width].
  T* position_row(const Tensor& to, int64_t user, int64_t position, int64_t width) const {
    return to.template data<T>() + (p.offsets[user].entry * to.size(-2) + position) * width;
  }

  void dense_gradient() const {
    gradients.position_offset.zero();  // for positions from N on
    int64_t items = static_cast<int64_t>(p.offsets.size()) * p.N;
    parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
      std::vector<A> sum(p.width);
      for (int64_t i = begin; i < end; ++i) {
        sum_position(i / p.N, i % p.N, sum.data());
        write_row(sum.data(), p.d, position_row(gradients.position_offset, i / p.N, i % p.N, p.d));
      }
    });
  }

  // DePT: da = g b^T and db = a^T g, where g is the result of sum_position.
  void low_rank_gradients() const {
    if (gradients.low_rank_a.defined()) gradients.low_rank_a.zero();  // for positions from N on
    Slots slots(static_cast<int64_t>(p.offsets.size()) * p.N);
    summed(slots, [&](int64_t slot, const BackwardTile& tile, auto sums) {
      for (int64_t i = slots.first(slot), rows; i < slots.first(slot + 1); i += rows) {
        int64_t user = i / p.N, position = i % p.N;
        rows = std::min({p.tile(), slots.first(slot + 1) - i, p.N - position});
        low_rank_tile(user, position, rows, tile, sums(user));
      }
    });
  }

  void low_rank_tile(int64_t user, int64_t first, int64_t rows, const BackwardTile& tile, const Sums& sums) const {
    const Offset<T>& offset = p.offsets[user];
    for (int64_t t = 0; t < rows; ++t) sum_position(user, first + t, tile.g + t * p.ld);
    if (gradients.low_rank_a.defined()) {
      dots(tile.g, rows, offset.w2, p.r, p.width, p.ld, tile.dh, p.rp);
      for (int64_t t = 0; t < rows; ++t)
        write_row(tile.dh + t * p.rp, p.r, position_row(gradients.low_rank_a, user, first + t, p.r));
    }
    if (gradients.low_rank_b.defined()) {
      for (int64_t t = 0; t < rows; ++t) offset.positions.widen(first + t, tile.h + t * p.rp);
      Product<Plain<A>>{tile.h, 1, p.rp, tile.g, p.ld, sums.w2, p.ld, rows, true}.run(p.r, p.width);
    }
  }
};

}  // namespace fastprefix::prompt_embedding
