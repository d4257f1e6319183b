// The forward pass: output [B, S + N, d] = the prompt, then the table's rows of the tokens plus their scaled offsets.
//
// Without an offset, rows are copied. ADePT's network runs once per distinct token, in tiles of p.tile() tokens. The
// offsets of DePT and dense offsets are computed once per position, in tiles of p.tile() positions. Each slot also
// writes its share of the prompt.
#pragma once

#include "network.h"

namespace fastprefix::prompt_embedding {

// Larger outputs, in bytes, bypass the caches. They would not fit and would evict everything else.
constexpr int64_t kStreamFrom = int64_t{8} << 20;

template <class T>
struct EmbeddingForward {
  using A = typename EmbeddingProblem<T>::A;

  const EmbeddingProblem<T>& p;
  Rows<T> prompt;
  T* output;  // [B, S + N, d]
  bool streaming;

  EmbeddingForward(const EmbeddingProblem<T>& p, const OptionalTensor& prompt, Tensor& output)
      : p(p),
        prompt(prompt ? Rows<T>(*prompt) : Rows<T>()),
        output(output.data<T>()),
        streaming(output.numel() * static_cast<int64_t>(sizeof(T)) > kStreamFrom) {}

  void run() const {
    switch (p.kind) {
      case OffsetKind::none: return lookup();
      case OffsetKind::ffn: return ffn();
      case OffsetKind::low_rank:
      case OffsetKind::dense: return positional();
    }
  }

 private:
  T* row(int64_t i) const { return output + i * p.d; }

  // Write prompt token s of row b.
  void write_prompt_row(int64_t b, int64_t s) const {
    T* to = row(b * (p.S + p.N) + s);
    if (!p.spans) return prompt.copy(s, to, streaming);
    int64_t place = s - (p.S - p.spans[2 * b + 1]);  // a shorter prompt is right before the tokens, after zeros
    if (place < 0) std::fill(to, to + p.d, T(0));
    else prompt.copy(p.spans[2 * b] + place, to, streaming);
  }

  // Prompt tuning: copy the rows of the prompt and of the table.
  void lookup() const {
    parallel_for(0, p.B * (p.S + p.N), 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        int64_t b = i / (p.S + p.N), s = i % (p.S + p.N);
        if (s < p.S) write_prompt_row(b, s);
        else p.weight.copy(p.ids[b * p.N + s - p.S], row(i), streaming);
      }
      finish_streams();
    });
  }

  void write(const T* from, T* to) const {
    if (streaming) stream(to, from, p.d * sizeof(T));
    else std::memcpy(static_cast<void*>(to), from, p.d * sizeof(T));
  }

  // Write this slot's share of the prompts.
  void write_prompt(int64_t slot, int64_t slots) const {
    int64_t rows = p.B * p.S;
    for (int64_t i = slot * rows / slots; i < (slot + 1) * rows / slots; ++i) write_prompt_row(i / p.S, i % p.S);
  }

  static constexpr int64_t kPiece = 1024;  // elements
  // One tile. `e` and `h` have 4 extra rows, since `dots` rounds the number of rows up.
  struct ForwardTile {
    A *e, *h, *y;  // the table's rows [rows][ld], hidden units [rows][rp], offsets [rows][ld]
    A* factors;    // [rp], dropout's factors of one token
    T *out, *piece;  // one output row, a piece of one
    ForwardTile(Arena& arena, const EmbeddingProblem<T>& p)
        : e(arena.take<A>((p.tile() + 4) * p.ld)),
          h(arena.take<A>((p.tile() + 4) * p.rp)),
          y(arena.take<A>(p.tile() * p.ld)),
          factors(arena.take<A>(p.rp)),
          out(arena.take<T>(p.width)),
          piece(arena.take<T>(kPiece)) {}
    static int64_t bytes(const EmbeddingProblem<T>& p) {
      Arena count(nullptr);
      ForwardTile(count, p);
      return count.used();
    }
  };

  // ADePT: compute the row of each distinct token once, and copy it to all occurrences of the token.
  void ffn() const {
    Groups groups = p.groups();
    Slots slots(p.tokens());
    slots.run(ForwardTile::bytes(p), [&](int64_t slot, char* scratch) {
      write_prompt(slot, slots.count);
      Arena arena(scratch);
      ForwardTile tile(arena, p);
      int64_t last = groups.cut(slot + 1, slots.count, p.cost_of_group());
      for (int64_t u = groups.cut(slot, slots.count, p.cost_of_group()), rows; u < last; u += rows) {
        rows = std::min(p.tile(), groups.run(u, last) - u);
        if (p.has_offset(groups.user_of(u))) ffn_tile(groups, u, rows, tile);
        else copy_groups(groups, u, rows);
      }
      finish_streams();
    });
  }

  // Copy the table's rows of groups without an offset.
  void copy_groups(const Groups& groups, int64_t first, int64_t rows) const {
    for (int64_t u = first; u < first + rows; ++u)
      for (int64_t i = groups.start[u]; i < groups.start[u + 1]; ++i)
        p.weight.copy(groups.token[u], row(p.place_in_output(groups.place[i])), streaming);
  }

  // Compute e + scale * (relu(dropout(e w1 + b1)) w2 + b2) for `rows` groups that share an offset.
  void ffn_tile(const Groups& groups, int64_t first, int64_t rows, const ForwardTile& tile) const {
    const Offset<T>& offset = p.offsets[groups.user_of(first)];
    p.gather(groups, first, rows, tile.e);
    p.hidden(offset, tile.e, rows, tile.h);
    for (int64_t t = 0; t < rows; ++t) {
      A* h = tile.h + t * p.rp;
      int64_t token = groups.place[groups.start[first + t]];
      if (p.dropout.active) p.dropout.apply(token % p.N, token / p.N, p.r, h, tile.factors);
      for (int64_t j = 0; j < p.r; ++j) h[j] = h[j] < 0 ? A(0) : h[j];
    }
    Product<Plain<A>>{tile.h, p.rp, 1, offset.w2, p.ld, tile.y, p.ld, p.r, false}.run(rows, p.width);
    for (int64_t t = 0; t < rows; ++t) {
      int64_t begin = groups.start[first + t], end = groups.start[first + t + 1];
      write_offset_row(tile.e + t * p.ld, tile.y + t * p.ld, offset.b2, p.scale, p.d, tile.out);
      for (int64_t i = begin; i < end; ++i) write(tile.out, row(p.place_in_output(groups.place[i])));
    }
  }

  // Rows of the batch with the same offset: p.users.place[first] to p.users.place[last - 1].
  struct Share {
    int64_t user, first, last;
  };

  // Divide the rows of the batch into about `parts` shares, each with one offset.
  std::vector<Share> share_rows(int64_t parts) const {
    int64_t most = (p.B + parts - 1) / parts;
    std::vector<Share> shares;
    for (int64_t user = 0; user < p.users.count(); ++user) {
      int64_t rows = p.users.size(user), pieces = (rows + most - 1) / most, start = p.users.start[user];
      for (int64_t i = 0; i < pieces; ++i)
        shares.push_back({user, start + i * rows / pieces, start + (i + 1) * rows / pieces});
    }
    return shares;
  }

  // DePT and dense offsets: compute the offsets of a block of positions once for all rows of a share.
  void positional() const {
    int64_t blocks = (p.N + p.tile() - 1) / p.tile();
    // With fewer blocks of positions than threads, several threads share a block, each with its own rows of the batch.
    std::vector<Share> shares =
        share_rows(std::clamp<int64_t>((int64_t{get_num_threads()} + blocks - 1) / blocks, 1, p.B));
    int64_t parts = static_cast<int64_t>(shares.size());
    Slots slots(blocks * parts);
    slots.run(ForwardTile::bytes(p), [&](int64_t slot, char* scratch) {
      write_prompt(slot, slots.count);
      Arena arena(scratch);
      ForwardTile tile(arena, p);
      for (int64_t item = slots.first(slot); item < slots.first(slot + 1); ++item)
        positional_tile(item / parts * p.tile(), shares[item % parts], tile);
      finish_streams();
    });
  }

  // to = the table's row + offset, in pieces that stay in the first-level cache until they are streamed.
  void add_offset(int64_t id, const A* offset, const ForwardTile& tile, T* to) const {
    if (p.weight.step != 1) p.weight.copy(id, tile.out, false);
    const T* from = p.weight.step == 1 ? p.weight.row(id) : tile.out;
    for (int64_t k = 0; k < p.d; k += kPiece) {
      int64_t width = std::min(kPiece, p.d - k);
      write_sum_row(from + k, offset + k, width, streaming ? tile.piece : to + k);
      if (streaming) stream(to + k, tile.piece, width * sizeof(T));
    }
  }

  // Write one block of positions for the rows of one share.
  void positional_tile(int64_t first, const Share& share, const ForwardTile& tile) const {
    int64_t rows = std::min(p.tile(), p.N - first);
    bool offset = p.has_offset(share.user);
    if (offset) compute_offsets(p.offsets[share.user], first, rows, tile);
    for (int64_t i = share.first; i < share.last; ++i)
      for (int64_t t = 0; t < rows; ++t) {
        int64_t token = p.users.place[i] * p.N + first + t;
        T* to = row(p.place_in_output(token));
        if (offset) add_offset(p.ids[token], tile.y + t * p.ld, tile, to);
        else p.weight.copy(p.ids[token], to, streaming);
      }
  }

  // tile.y = the scaled offsets of `rows` positions from `first` on.
  void compute_offsets(const Offset<T>& offset, int64_t first, int64_t rows, const ForwardTile& tile) const {
    if (p.kind == OffsetKind::dense) {
      for (int64_t t = 0; t < rows; ++t) offset.positions.widen(first + t, tile.y + t * p.ld);
    } else {
      for (int64_t t = 0; t < rows; ++t) offset.positions.widen(first + t, tile.h + t * p.rp);
      Product<Plain<A>>{tile.h, p.rp, 1, offset.w2, p.ld, tile.y, p.ld, p.r, false}.run(rows, p.width);
    }
    for (int64_t t = 0; t < rows; ++t)
      for (A *y = tile.y + t * p.ld, *end = y + p.width; y < end; y += kLanes<A>) store(y, p.scale * load(y));
  }
};

}  // namespace fastprefix::prompt_embedding
