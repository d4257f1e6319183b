// Blocks of keys (or of values) as operands of products.
#pragma once

#include "few.h"
#include "scores.h"

namespace fastprefix {

// One block of keys (or values) as the broadcast side of a product, summed over its width (`along`) or over its rows
// (`across`). Operands are read where they lie if their form allows it, else from a packed block.
template <class Manner>
struct KeyBlock {
  using Operand = typename Manner::Operand;
  const Operand* rows = nullptr;
  int64_t stride = 0;
  const Operand* pairs = nullptr;
  int64_t pair_stride = 0;

  // C (rows of the block x lanes) = block B, B [width][kQueries].
  Product<Manner> along(int64_t width, const Operand* b, typename Manner::Accumulator* c) const {
    int64_t steps = (width + Manner::pair - 1) / Manner::pair;
    return {rows, stride, Manner::pair, b, kQueries * Manner::pair, c, kQueries, steps, false};
  }

  // C (width x lanes) += block^T B, B [rows][kQueries], from `first` on.
  Product<Manner> across(int64_t first, int64_t count, const Operand* b, typename Manner::Accumulator* c) const {
    int64_t steps = (count + Manner::pair - 1) / Manner::pair;
    b += first * kQueries;
    if constexpr (Manner::pair == 1) return {rows + first * stride, 1, stride, b, kQueries, c, kQueries, steps, true};
    if constexpr (Manner::tiled) return {pairs + first, kKeys, 2, b, 2 * kQueries, c, kQueries, steps, true};
    return {pairs + first * pair_stride, 2, 2 * pair_stride, b, 2 * kQueries, c, kQueries, steps, true};
  }
};

// Packs the blocks that do not lie as the product wants them. Those of a row and head are kept, if they take no more
// than kKeptBytes, for the blocks of queries and the heads of the group that follow.
template <class Manner, class T>
class KeyBlocks {
  using Operand = typename Manner::Operand;
  using A = typename Manner::Accumulator;
  static constexpr bool kAsTheyLie = std::is_same_v<T, Operand>;
  static constexpr int64_t kKeptBytes = int64_t{1} << 20;

 public:
  // Of keys with `width` elements; what they are used for.
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
    memory_ = arena.take<Operand>((static_cast<int64_t>(ready_.size()) + 1) * size_);  // one for a block not kept
  }

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
      // All rows: later queries may see more of them.
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
  std::vector<char> ready_;  // which blocks are packed, of row b_ and head hkv_; empty: none is kept
};

}  // namespace fastprefix
