// Blocks of up to kKeys keys (or values) as operands of products. They are read directly from the tensor if its layout
// is one that the product can read, else from a packed copy.
#pragma once

#include "few.h"
#include "scores.h"

namespace fastprefix {

// One block of keys (or values) as the broadcast operand of a product that sums over the width (`along`) or over the
// keys (`across`).
template <class Manner>
struct KeyBlock {
  using Operand = typename Manner::Operand;
  const Operand* rows = nullptr;  // [keys][width], rows `stride` apart
  int64_t stride = 0;
  const Operand* pairs = nullptr;  // bfloat16 pairs: [keys / 2][pair_stride][2], or with AMX [width][kKeys]
  int64_t pair_stride = 0;

  // C [keys][kQueries] = block * B, with B [width][kQueries].
  Product<Manner> along(int64_t width, const Operand* b, typename Manner::Accumulator* c) const {
    int64_t steps = (width + Manner::pair - 1) / Manner::pair;
    return {rows, stride, Manner::pair, b, kQueries * Manner::pair, c, kQueries, steps, false};
  }

  // C [width][kQueries] += block^T * B, with B [keys][kQueries], over `count` keys from `first` on.
  Product<Manner> across(int64_t first, int64_t count, const Operand* b, typename Manner::Accumulator* c) const {
    int64_t steps = (count + Manner::pair - 1) / Manner::pair;
    b += first * kQueries;
    if constexpr (Manner::pair == 1) return {rows + first * stride, 1, stride, b, kQueries, c, kQueries, steps, true};
    if constexpr (Manner::tiled) return {pairs + first, kKeys, 2, b, 2 * kQueries, c, kQueries, steps, true};
    return {pairs + first * pair_stride, 2, 2 * pair_stride, b, 2 * kQueries, c, kQueries, steps, true};
  }
};

// Packs blocks that the product cannot read directly. If all packed blocks of a row and key/value head fit in
// kKeptBytes, they are kept for the next blocks of queries and the other query heads of the group.
template <class Manner, class T>
class KeyBlocks {
  using Operand = typename Manner::Operand;
  using A = typename Manner::Accumulator;
  static constexpr bool kAsTheyLie = std::is_same_v<T, Operand>;
  static constexpr int64_t kKeptBytes = int64_t{1} << 20;

 public:
  // Take the memory for keys (or values) of `width` elements that are used `along`, `across` or both.
  void take(Arena& arena, const AttentionProblem<T, A>& p, int64_t width, bool along, bool across) {
    width_ = width;
    packs_rows_ = (along || Manner::pair == 1) && (!kAsTheyLie || width % Manner::pair != 0);
    packs_pairs_ = across && Manner::pair == 2;
    rows_size_ = packs_rows_ ? kKeys * round_up(width, Manner::pair) : 0;
    size_ = rows_size_ + (packs_pairs_ ? kKeys * round_up(width, kLanes<A>) : 0);
    prefix_blocks_ = (p.P + kKeys - 1) / kKeys;
    int64_t blocks = prefix_blocks_ + (p.M + kKeys - 1) / kKeys, bytes = blocks * size_ * sizeof(Operand);
    bool again = p.N > kFew && p.G * p.query_blocks() > 1;
    ready_.assign(again && size_ > 0 && bytes <= kKeptBytes ? blocks : 0, false);
    memory_ = arena.take<Operand>(
        (static_cast<int64_t>(ready_.size()) + 1) * size_);  // one more for blocks that are not kept
  }

  // Return a block of keys or values of the prefix or the tokens, packed if necessary.
  KeyBlock<Manner> find(
      const AttentionProblem<T, A>& p,
      const View<const T>& prefix,
      const View<const T>& tokens,
      const QueryBlock& queries,
      const Columns& columns) {
    bool of_prefix = columns.half == Half::prefix;
    const View<const T>& view = of_prefix ? prefix : tokens;
    const T* from = view.at(queries.b, queries.hkv, place(p, queries, columns));
    int64_t stride = view.strides[2], rows = columns.rows;
    int64_t index = static_cast<int64_t>(ready_.size());
    bool ready = false;
    if (!ready_.empty() && columns.first % kKeys == 0) {
      if (b_ != queries.b || hkv_ != queries.hkv) ready_.assign(ready_.size(), false);
      b_ = queries.b;
      hkv_ = queries.hkv;
      index = columns.first / kKeys + (of_prefix ? 0 : prefix_blocks_);
      // Pack all keys of the block, since later queries may see more of them.
      rows = std::min(kKeys, (of_prefix ? p.spans[queries.b].length : p.M) - columns.first);
      ready = ready_[index];
      ready_[index] = true;
    }
    Operand* to = memory_ + index * size_;
    KeyBlock<Manner> block;
    if constexpr (kAsTheyLie) {
      block.rows = from;
      block.stride = stride;
    }
    if (packs_rows_) {
      block.stride = round_up(width_, Manner::pair);
      if (!ready) pack_rows(from, stride, rows, width_, to, block.stride);
      block.rows = to;
    }
    if constexpr (Manner::pair == 2) {
      if (packs_pairs_) {
        Operand* pairs = to + rows_size_;
        block.pair_stride = round_up(width_, kLanes<A>);
        if constexpr (Manner::tiled) {
          if (!ready) pack_row_pairs_transposed(from, stride, rows, width_, pairs);
        } else {
          if (!ready) pack_row_pairs(from, stride, rows, width_, pairs, block.pair_stride);
        }
        block.pairs = pairs;
      }
    }
    return block;
  }

 private:
  Operand* memory_ = nullptr;
  int64_t width_ = 0, rows_size_ = 0, size_ = 0, prefix_blocks_ = 0;
  bool packs_rows_ = false, packs_pairs_ = false;
  int64_t b_ = -1, hkv_ = -1;
  std::vector<char> ready_;  // flags of the packed blocks of row b_ and head hkv_; empty if blocks are not kept
};

}  // namespace fastprefix
