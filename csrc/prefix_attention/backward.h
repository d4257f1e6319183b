// The backward pass. For each block of queries it visits all blocks of keys, computes their scores again, and
// normalizes them with the saved m and l of the forward pass.
//
// Each block of queries owns its dq. dK and dV are summed over the blocks of queries and the query heads of a group.
// The work is ordered by key/value head, row, query head and block of queries, and divided into consecutive slots. So
// most sums of dK and dV are completed in one slot's scratch memory. Groups that the end of a slot cuts have several
// sums, which are added afterwards in the order of the slots.
#pragma once

#include <array>
#include <numeric>

#include "few.h"
#include "sums.h"
#include "tiles.h"

namespace fastprefix {

// The outputs of the kernel: gradients that are written to their final tensors, and sums that the caller reduces to the
// shapes of the results.
struct AttentionGradients {
  const AttentionResults& results;
  // [B, Hq, N, P] for a gate per query; else float64 [Hkv, B, P], or [Hkv, B, G, P] for a gate per query head
  Tensor prefix_gate;
  Tensor prefix_key_bias;   // float64 [Hkv, 1 or B, P or the store's length]
  Tensor output_gate_sums;  // float64 [B, Hq, blocks], since long sums cancel
  Tensor sinks_sums;        // float64 [B, Hq, blocks]
};

// The normalizers of a block of queries: the saved reference m, and 1 / l.
template <class A>
struct Normalizers {
  A *m, *inverse;  // [kQueries]
  bool large = false;  // a query has a large m (see kLarge)

  void take(Arena& arena) {
    m = arena.take<A>(kQueries);
    inverse = arena.take<A>(kQueries);
  }

  // Read the saved numbers. Queries past `count` see nothing.
  void read(const A* saved_m, const A* saved_l, int64_t count) {
    large = false;
    for (int64_t i = 0; i < kQueries; ++i) set(i, i < count ? saved_m[i] : A(0), i < count ? saved_l[i] : A(0));
    for (int64_t i = 0; i < count; ++i) large |= any<A>(is_large<A>(splat(saved_m[i])));
  }

  // Set the numbers of a query. One that sees nothing (l is 0) gets probabilities of 0.
  void set(int64_t i, A reference, A l) {
    m[i] = l != 0 ? reference : std::numeric_limits<A>::infinity();  // exp(score - inf) is 0 for every score
    inverse[i] = l != 0 ? A(1) / l : A(0);
  }
  Vec<A> probability(Vec<A> s, int64_t c) const { return exp(s - load(m + c)) * load(inverse + c); }
};

// The most bytes of memory for the sums of prefix gradients. If a long prefix or many threads need more, the prefix is
// processed in consecutive ranges of keys, and only the sums of one range are in memory.
constexpr int64_t kPrefixSumsBytes = int64_t{64} << 20;

// kBatch blocks of queries visit one tile of prefix keys before the next tile. The tile's keys, values and gradients
// take about kTileBytes, so they stay in the second-level cache.
constexpr int64_t kBatch = 16, kTileBytes = int64_t{1} << 20;

// The prefix keys [begin, end) of the store, or prefix, that queries visit. The first range also covers the tokens and
// the frozen keys. The last range completes dq.
struct PrefixRange {
  int64_t begin, end;
  bool first, last;

  bool whole() const { return first && last; }
};

// Up to this many keys, queries or columns, deltas are computed from the probabilities (see find_deltas). An additional
// pass over the scores is cheap there, and rounding errors average out least.
constexpr int64_t kFewKeys = 16, kFewQueries = 4, kFewColumns = 8;

template <class Manner, class T>
class AttentionBackward {
  using A = typename Manner::Accumulator;
  using Operand = typename Manner::Operand;

 public:
  AttentionBackward(
      const AttentionProblem<T, A>& p,
      const AttentionNeeds& needs,
      AttentionGradients& gradients,
      const Tensor& grad_output,
      const Tensor& output,
      const Tensor& normalizers)
      : p_(p),
        needs_(needs),
        gradients_(gradients),
        band_(p),
        do_(grad_output),
        o_(output),
        normalizers_(normalizers.data<const A>()),
        slots_(p.G, token_costs(p), group_costs(p)),
        token_shape_{p.M, width(needs.key, p.D), width(needs.value, p.Dv)},
        prefix_shape_{p.prefix_keys - p.frozen, width(needs.prefix_key, p.D), width(needs.prefix_value, p.Dv)} {}

  void run() {
    if (slots_.items == 0) return;
    divide_prefix();
    prefix_sums_ = empty<A>({slots_.count + prefix_groups() - 1, prefix_shape_.size()});
    cut_sums_ = empty<A>({slots_.count > 1 ? 2 * slots_.count : 0, token_shape_.size()});
    if (several_ranges()) kept_ = empty<A>({slots_.items, kept_size()});
    allocate_sums();
    Arena counting(nullptr);
    BackwardWorker(*this, counting);
    do {
      slots_.run(counting.used(), [&](int64_t slot, char* memory) {
        [[maybe_unused]] typename Manner::Unit unit;
        Arena arena(memory);
        BackwardWorker(*this, arena).work(slot);
      });
      write_prefix_sums();
    } while (next_range());
    write_cut_groups();
    if (gate_sums_.rows.defined()) gradients_.prefix_gate = gate_sums_.total(slots_);
    if (bias_sums_.rows.defined()) gradients_.prefix_key_bias = bias_sums_.total(slots_);
  }

 private:
  static int64_t width(bool needed, int64_t size) { return needed ? round_up(size, kLanes<A>) : 0; }

  // ---- ranges of prefix keys, in tiles --------------------------------------------------------------------------

  // Choose the length of the ranges, so that the sums of one range fit in kPrefixSumsBytes. Only trained keys have
  // sums.
  void divide_prefix() {
    int64_t row = (slots_.count + prefix_groups() - 1) * (prefix_shape_.D + prefix_shape_.Dv) * sizeof(A);
    int64_t most = row == 0 ? prefix_shape_.keys : std::max(kKeys, kPrefixSumsBytes / row / kKeys * kKeys);
    prefix_shape_.keys = std::min(prefix_shape_.keys, most);
    begin_ = p_.frozen;
    end_ = begin_ + prefix_shape_.keys;
  }
  bool next_range() {
    begin_ = end_;
    end_ = std::min(begin_ + prefix_shape_.keys, p_.prefix_keys);
    return begin_ < end_;
  }
  bool first_range() const { return begin_ == p_.frozen; }
  bool last_range() const { return end_ == p_.prefix_keys; }
  bool several_ranges() const { return !(first_range() && last_range()); }

  // Return the tile of the current range that starts at `begin`.
  PrefixRange tile(int64_t begin) const {
    int64_t bytes = 2 * (p_.D + p_.Dv) * sizeof(A), keys = std::max(kKeys, kTileBytes / bytes / kKeys * kKeys);
    int64_t end = std::min(begin + keys, end_);
    return {begin, end, begin == p_.frozen, end == p_.prefix_keys};
  }

  bool several_tiles() const { return !several_ranges() && !tile(begin_).whole(); }

  // The number of elements that a block of queries keeps between tiles: kKept arrays of one number per query, and dq.
  static constexpr int64_t kKept = 6;
  int64_t kept_size() const { return (kKept + (needs_.query ? p_.D : 0)) * kQueries; }

  void allocate_sums() {
    if (needs_.prefix_gate && p_.gate_differs_by_query) {
      gradients_.prefix_gate = empty<A>({p_.B, p_.Hq, p_.N, p_.P});
      if (p_.from_store) gradients_.prefix_gate.zero();  // for columns past the end of a row's span
    } else if (needs_.prefix_gate) {
      gate_sums_ = ColumnSums(slots_, p_.gate_per_query ? p_.B * p_.Hq : groups(), p_.P);
    }
    if (needs_.prefix_key_bias)
      bias_sums_ = ColumnSums(slots_, p_.shared_key_bias ? p_.Hkv : groups(), p_.key_bias_columns());
  }

  // ---- order of work: groups (hkv, b) of G * blocks items -------------------------------------------------------

  // Return the cost of the prefix, for each group.
  static std::vector<int64_t> group_costs(const AttentionProblem<T, A>& p) {
    std::vector<int64_t> costs, of_rows = prefix_costs(p);
    for (int64_t hkv = 0; hkv < p.Hkv; ++hkv) costs.insert(costs.end(), of_rows.begin(), of_rows.end());
    return costs;
  }

  int64_t group_items() const { return p_.G * p_.query_blocks(); }
  int64_t groups() const { return p_.Hkv * p_.B; }
  int64_t prefix_groups() const { return p_.shared_prefix ? p_.Hkv : groups(); }
  int64_t prefix_group(int64_t group) const { return p_.shared_prefix ? group / p_.B : group; }

  QueryBlock block(int64_t item) const {
    int64_t group = item / group_items(), index = item % p_.query_blocks();
    int64_t hkv = group / p_.B, h = hkv * p_.G + item % group_items() / p_.query_blocks();
    int64_t first = index * kQueries;
    return {group % p_.B, h, hkv, first, std::min(kQueries, p_.N - first), index};
  }

  // The sums of a slot for a prefix group. From one pair to the next, neither number decreases and at least one
  // increases, so `slot + group` numbers the pairs.
  A* prefix_row(int64_t slot, int64_t group) const {
    return prefix_sums_.data<A>() + (slot + group) * prefix_shape_.size();
  }
  // The sums of a slot for an incomplete group. A slot has at most two: one begun by an earlier slot, and one that a
  // later slot completes.
  A* cut_row(int64_t slot, bool begun_earlier) const {
    return cut_sums_.data<A>() + (2 * slot + (begun_earlier ? 0 : 1)) * token_shape_.size();
  }

  // ---- writing the sums -----------------------------------------------------------------------------------------

  // Add `count` sums that are `step` apart, and write keys [begin, end) of the total to dk and dv, `offset` keys later.
  template <class Row>
  void write_key_sums(
      const KeySumsShape& shape,
      const A* first,
      int64_t count,
      int64_t step,
      const Tensor& dk,
      const Tensor& dv,
      Row b,
      Row hkv,
      int64_t begin,
      int64_t end,
      int64_t offset = 0) const {
    KeySums<A> sums = shape.at(const_cast<A*>(first));
    auto write = [&](const A* from, int64_t ld, const Tensor& to) {
      if (ld == 0) return;
      T* rows = to.data<T>() + b * to.stride(0) + hkv * to.stride(1) + (begin + offset) * to.stride(2);
      write_sum(from + begin * ld, count, step, end - begin, ld, to.size(3), rows, to.stride(2));
    };
    write(sums.dk, shape.D, dk);
    write(sums.dv, shape.Dv, dv);
  }

  // Add the sums of groups that several slots share, and write them.
  void write_cut_groups() const {
    if (token_shape_.size() == 0) return;
    for (int64_t slot = 0; slot + 1 < slots_.count; ++slot) {
      int64_t group = (slots_.first(slot + 1) - 1) / group_items(), end = (group + 1) * group_items();
      bool begins_here = group * group_items() >= slots_.first(slot), cut = end > slots_.first(slot + 1);
      if (!begins_here || !cut) continue;
      int64_t pieces = slots_.of(end - 1) - slot + 1;
      // The pieces are cut_row(slot, false), cut_row(slot + 1, true), cut_row(slot + 2, true), ...
      parallel_for(0, p_.M, 64, [&](int64_t from, int64_t to) {
        add_rows(cut_row(slot, false), pieces - 1, cut_row(slot + 1, true), from, to);
        write_key_sums(
            token_shape_, cut_row(slot, false), 1, 0, gradients_.results.key, gradients_.results.value, group % p_.B,
            group / p_.B, from, to);
      });
    }
  }

  // Add `count` pieces to `total`, for the keys [from, to).
  void add_rows(A* total, int64_t count, const A* pieces, int64_t from, int64_t to) const {
    auto add = [&](A* at, const A* piece, int64_t ld) {
      for (int64_t i = from * ld; i < to * ld; ++i) at[i] += piece[i];
    };
    for (int64_t index = 0; index < count; ++index) {
      const A* piece = pieces + index * 2 * token_shape_.size();
      add(total, piece, token_shape_.D);
      add(total + p_.M * token_shape_.D, piece + p_.M * token_shape_.D, token_shape_.Dv);
    }
  }

  void write_prefix_sums() const {
    if (prefix_shape_.size() == 0) return;
    int64_t items = slots_.items / prefix_groups(), keys = end_ - begin_;
    parallel_for(0, prefix_groups() * keys, 64, [&](int64_t begin, int64_t end) {
      for (int64_t group = begin / keys; group * keys < end; ++group) {
        int64_t from = std::max<int64_t>(begin - group * keys, 0), to = std::min(end - group * keys, keys);
        int64_t first = slots_.of(group * items), last = slots_.of((group + 1) * items - 1);
        int64_t b = p_.shared_prefix ? 0 : group % p_.B, hkv = p_.shared_prefix ? group : group / p_.B;
        write_key_sums(
            prefix_shape_, prefix_row(first, group), last - first + 1, prefix_shape_.size(),
            gradients_.results.prefix_key, gradients_.results.prefix_value, b, hkv, from, to, begin_);
      }
    });
  }

  // ---- one slot's work ------------------------------------------------------------------------------------------

  // The scratch memory of one slot, and the work on its blocks of queries.
  struct BackwardWorker {
    const AttentionBackward& f;
    const AttentionProblem<T, A>& p;
    const AttentionNeeds& needs;
    Operand *q, *dout;            // Q^T [D][kQueries], dO^T [Dv][kQueries]
    Operand *q_rows, *do_rows;    // Q [kQueries][D], dO [kQueries][Dv], for dK and dV
    A *few_q, *few_do;            // Q [count][D], dO [count][Dv], instead of the above for up to kFew queries
    KeyBlocks<Manner, T> keys, values;
    Normalizers<A> tokens_by, prefix_by;  // prefix_by only if the prefix has its own softmax
    A *delta, *prefix_delta, *masses, *prefix_masses;  // [kQueries]
    A* dq;                      // dQ^T [D][kQueries]
    A *gates, *keeps, *slopes;  // see Gate; dropout's factors and the soft cap's derivatives, [kKeys][kQueries]
    A* products;  // [kKeys][kQueries]: <q, k>, then the gradients of the gate
    A* uncapped;  // [kKeys][kQueries]: the gradients of scores after the soft cap, which are those of the key bias
    Tile<Manner> s;   // scores, then weighted probabilities, which multiply do in dV
    Tile<Manner> ds;  // <do, v>, then gradients of scores, which multiply q in dK and k in dq
    A *token_sums, *local_kept;
    double *gate_sums = nullptr, *bias_sums = nullptr;
    std::vector<Strip> strips;
    Seen seen[kKeys];

    BackwardWorker(const AttentionBackward& backward, Arena& arena) : f(backward), p(f.p_), needs(f.needs_) {
      constexpr int64_t pair = Manner::pair;
      q = arena.take<Operand>(round_up(p.D, pair) * kQueries);
      dout = arena.take<Operand>(round_up(p.Dv, pair) * kQueries);
      q_rows = arena.take<Operand>(round_up(p.D, kLanes<A>) * kQueries);
      do_rows = arena.take<Operand>(round_up(p.Dv, kLanes<A>) * kQueries);
      few_q = arena.take<A>(kFew * round_up(p.D, kLanes<A>));
      few_do = arena.take<A>(kFew * round_up(p.Dv, kLanes<A>));
      keys.take(arena, p, p.D, true, needs.query);
      values.take(arena, p, p.Dv, true, false);
      tokens_by.take(arena);
      prefix_by.take(arena);
      delta = arena.take<A>(kQueries);
      prefix_delta = arena.take<A>(kQueries);
      masses = arena.take<A>(kQueries);
      prefix_masses = arena.take<A>(kQueries);
      dq = arena.take<A>(p.D * kQueries);
      gates = p.gate ? arena.take<A>(kKeys * (p.gate_per_query ? kQueries : 1)) : nullptr;
      keeps = p.drops ? arena.take<A>(kKeys * kQueries) : nullptr;
      products = needs.prefix_gate ? arena.take<A>(kKeys * kQueries) : nullptr;
      uncapped = needs.prefix_key_bias ? arena.take<A>(kKeys * kQueries) : nullptr;
      slopes = p.softcap != 0 ? arena.take<A>(kKeys * kQueries) : nullptr;
      s.take(arena, true, false);
      ds.take(arena, true, true);
      token_sums = arena.take<A>(f.token_shape_.size());
      local_kept = arena.take<A>(f.several_tiles() ? kBatch * f.kept_size() : 0);
    }

    // Differentiate the slot's items, group by group. Write dK and dV of the groups that the slot has as a whole.
    void work(int64_t slot) {
      int64_t begin = f.slots_.first(slot), end = f.slots_.first(slot + 1), of_group = f.group_items();
      int64_t last_prefix = -1;
      for (int64_t group = begin / of_group; group * of_group < end; ++group) {
        int64_t from = std::max(begin, group * of_group), to = std::min(end, (group + 1) * of_group);
        bool begun_earlier = from != group * of_group, whole = to - from == of_group;
        A* tokens = whole ? token_sums : f.cut_row(slot, begun_earlier);
        if (f.first_range()) std::fill_n(tokens, f.token_shape_.size(), A(0));
        int64_t prefix = f.prefix_group(group);
        A* prefix_row = f.prefix_row(slot, prefix);
        if (prefix != last_prefix) std::fill_n(prefix_row, f.prefix_shape_.size(), A(0));
        last_prefix = prefix;
        for (int64_t first = from; first < to; first += kBatch) {
          PrefixRange range = f.tile(f.begin_);
          for (;; range = f.tile(range.end)) {
            for (int64_t item = first; item < std::min(first + kBatch, to); ++item) {
              A* kept = f.several_ranges() ? f.kept(item) : local_kept + (item - first) * f.kept_size();
              differentiate(slot, item, range, kept, f.token_shape_.at(tokens), f.prefix_shape_.at(prefix_row));
            }
            if (range.end == f.end_) break;
          }
        }
        if (whole && f.first_range())
          f.write_key_sums(
              f.token_shape_, tokens, 1, 0, f.gradients_.results.key, f.gradients_.results.value, group % p.B,
              group / p.B, 0, p.M);
      }
    }

    // Differentiate one block of queries with respect to one range of prefix keys. The first range also does everything
    // else: deltas, tokens, frozen prefix keys, sinks and output gate.
    void differentiate(
        int64_t slot,
        int64_t item,
        const PrefixRange& range,
        A* kept,
        const KeySums<A>& tokens,
        const KeySums<A>& prefix) {
      QueryBlock queries = f.block(item);
      if (!range.first && !range.last && !sees(queries, range)) return;
      gate_sums = f.gate_sums_.rows.defined() ? f.gate_sums_.row(slot, item) : nullptr;
      bias_sums = f.bias_sums_.rows.defined() ? f.bias_sums_.row(slot, item) : nullptr;
      prepare(queries);
      if (range.first) {
        if (gathers()) find_references(queries);
        if (gathers() || (needs.scores() && needs_deltas(queries))) find_deltas(queries);
        if (needs.output_gate) *block_sum(f.gradients_.output_gate_sums, queries) = total(prefix_delta, queries);
        if (needs.sinks) differentiate_sink(queries);
        if (needs.query) std::fill_n(dq, p.D * kQueries, A(0));
        if (!range.last) keep(kept);
      } else {
        recall(kept);
        if (needs.query) std::copy_n(kept + kKept * kQueries, p.D * kQueries, dq);
      }
      if (range.first && needs.whole_prefix()) add_prefix(queries, 0, p.frozen, prefix);
      if (needs.prefix()) add_prefix(queries, range.begin, range.end, prefix);
      if (range.first && needs.tokens())
        for_tokens(queries, [&](auto block) { add_block(queries, block, tokens, needs.key, needs.value); });
      if (needs.query && range.last) write_dq(queries);
      if (needs.query && !range.last) std::copy_n(dq, p.D * kQueries, kept + kKept * kQueries);
    }

    // Return true if delta must be computed from the probabilities (see find_deltas).
    bool needs_deltas(const QueryBlock& queries) const {
      int64_t keys = p.spans[queries.b].length + p.M;
      return p.separate() || keys <= kFewKeys || p.N <= kFewQueries || p.D <= kFewColumns;
    }

    // Return true if the forward pass may have computed the prefix's scores by other products (see find_crowds). Their
    // rounding differs, so the saved m and l are not those of this pass's scores.
    bool gathers() const { return p.N <= kFew && p.shared_prefix; }

    // Compute the references from this pass's scores, instead of the saved ones. find_deltas then computes l.
    void find_references(const QueryBlock& queries) {
      constexpr A kNone = -std::numeric_limits<A>::infinity();
      std::fill_n(tokens_by.m, kQueries, p.sinks ? static_cast<A>(*p.sinks.at(queries.h)) : kNone);
      std::fill_n(prefix_by.m, kQueries, kNone);
      Normalizers<A>& of_prefix_by = p.separate() ? prefix_by : tokens_by;
      for_prefix(queries, 0, p.P, [&](auto block) { raise(queries, block, of_prefix_by); });
      for_tokens(queries, [&](auto block) { raise(queries, block, tokens_by); });
      for (Normalizers<A>* by : {&tokens_by, &prefix_by})
        for (int64_t i = 0; i < kQueries; ++i)
          by->set(i, by->m[i], i < queries.count && by->m[i] != kNone ? A(1) : A(0));
    }

    // Raise the references to the largest scores of a block.
    void raise(const QueryBlock& queries, const Columns& columns, Normalizers<A>& by) {
      score_block(queries, columns, false);
      for (const Strip& strip : strips)
        for (int64_t c = strip.column; c < strip.column + strip.columns; c += kLanes<A>)
          store(by.m + c, maximum<A>(load(by.m + c), largest_score(strip, s.values, p.scale, c)));
    }

    std::array<A*, kKept> list_kept() const {
      return {delta, prefix_delta, tokens_by.m, tokens_by.inverse, prefix_by.m, prefix_by.inverse};
    }
    void keep(A* kept) const {
      for (const A* numbers : list_kept()) kept = std::copy_n(numbers, kQueries, kept);
    }
    void recall(const A* kept) {
      for (A* numbers : list_kept()) std::copy_n(kept, kQueries, numbers), kept += kQueries;
    }

    // Add the gradients of the prefix keys [from, to) of the store, limited to the span of the queries' row.
    void add_prefix(const QueryBlock& queries, int64_t from, int64_t to, const KeySums<A>& prefix) {
      bool trained = from >= p.frozen;
      int64_t start = p.spans[queries.b].start;
      for_prefix(queries, from - start, to - start, [&](auto block) {
        add_block(queries, block, prefix, trained && needs.prefix_key, trained && needs.prefix_value);
      });
    }
    bool sees(const QueryBlock& queries, const PrefixRange& range) const {
      const Span& span = p.spans[queries.b];
      return span.start < range.end && range.begin < span.start + span.length;
    }

    // Call use(columns) for the blocks of prefix keys [from, to), which count from the start of the row's span.
    template <class F>
    void for_prefix(const QueryBlock& queries, int64_t from, int64_t to, F use) {
      for_blocks(Half::prefix, std::max<int64_t>(from, 0), std::min(to, p.spans[queries.b].length), use);
    }
    template <class F>
    void for_tokens(const QueryBlock& queries, F use) {
      for_token_blocks(p, f.band_, queries, use);
    }

    // Pack the operands of a block of queries, read its normalizers, and compute delta = <do, o>.
    void prepare(const QueryBlock& queries) {
      const T* q_at = p.q.at(queries.b, queries.h, queries.first);
      const T* do_at = f.do_.at(queries.b, queries.h, queries.first);
      int64_t q_stride = p.q.strides[2], do_stride = f.do_.strides[2];
      if (queries.count <= kFew) {
        pack_few(q_at, q_stride, queries.count, p.D, few_q);
        pack_few(do_at, do_stride, queries.count, p.Dv, few_do);
      } else {
        pack_transposed<Manner>(q_at, q_stride, queries.count, p.D, q, kQueries);
        pack_transposed<Manner>(do_at, do_stride, queries.count, p.Dv, dout, kQueries);
        if (needs.key || needs.prefix_key) pack_vectors<Manner>(q_at, q_stride, queries.count, p.D, q_rows);
        if (needs.value || needs.prefix_value) pack_vectors<Manner>(do_at, do_stride, queries.count, p.Dv, do_rows);
      }
      const T* o_at = f.o_.at(queries.b, queries.h, queries.first);
      for (int64_t i = 0; i < kQueries; ++i)
        delta[i] = i < queries.count ? inner(do_at + i * do_stride, o_at + i * f.o_.strides[2]) : A(0);
      read_normalizers(queries, 0, tokens_by);
      if (p.separate()) read_normalizers(queries, 1, prefix_by);
    }

    void read_normalizers(const QueryBlock& queries, int64_t softmax, Normalizers<A>& to) {
      const A* saved = f.normalizers_;
      to.read(saved + p.normalizer(queries, softmax, 0), saved + p.normalizer(queries, softmax, 1), queries.count);
    }

    A inner(const T* x, const T* y) const {
      Vec<A> sums{};
      for (int64_t d = 0; d < p.Dv; d += kLanes<A>) sums += load_first(x + d, p.Dv - d) * load_first(y + d, p.Dv - d);
      return sum<A>(sums);
    }

    // Compute delta from the probabilities instead of the output. The output is not accurate enough if it is the sum of
    // two softmaxes, since its rounding hides the smaller one. It is not accurate enough for few keys either, since
    // <do, v> - delta cancels until mostly rounding errors are left. Deltas and probabilities are divided by the actual
    // sum of the probabilities. Otherwise a row with only one key would have nonzero gradients.
    void find_deltas(const QueryBlock& queries) {
      bool separate = p.separate();
      A *of_prefix = separate ? prefix_delta : delta, *prefix_mass = separate ? prefix_masses : masses;
      const Normalizers<A>& of_prefix_by = separate ? prefix_by : tokens_by;
      for (A* sums : {delta, prefix_delta, masses, prefix_masses}) std::fill_n(sums, kQueries, A(0));
      if (p.sinks)
        for (int64_t i = 0; i < queries.count; ++i) masses[i] = sink_probability(queries, i);
      for_prefix(queries, 0, p.P, [&](auto block) { add_delta(queries, block, of_prefix_by, of_prefix, prefix_mass); });
      if (!separate || needs.tokens() || needs.sinks)
        for_tokens(queries, [&](auto block) { add_delta(queries, block, tokens_by, delta, masses); });
      for (int64_t i = 0; i < queries.count; ++i) {
        if (masses[i] != 0) delta[i] /= masses[i], tokens_by.inverse[i] /= masses[i];
        if (prefix_masses[i] != 0) prefix_delta[i] /= prefix_masses[i], prefix_by.inverse[i] /= prefix_masses[i];
      }
    }

    // Add a block's probabilities to `mass`, and their products with g <do, v> to `sums`.
    void add_delta(const QueryBlock& queries, const Columns& columns, const Normalizers<A>& by, A* sums, A* mass) {
      Gate<A> gate = score_block(queries, columns, true);
      for (const Strip& strip : strips) {
        A scale = scale_of(p, strip);
        for (int64_t c = strip.column; c < strip.column + strip.columns; c += kLanes<A>) {
          Vec<A> probabilities = sum_rows<A>(strip, [&](int64_t r) {
            Vec<A> probability = by.probability(load(s.values + r * kQueries + c) * scale, c);
            store(s.values + r * kQueries + c, probability);
            return probability;
          });
          Vec<A> sum = sum_rows<A>(strip, [&](int64_t r) {
            Vec<A> dov = load(ds.values + r * kQueries + c);
            if (keeps) dov *= load(keeps + r * kQueries + c);
            // Multiply in the order of differentiate_scores, where delta is subtracted, for the same rounding.
            return load(s.values + r * kQueries + c) * (gate.at(r, c) * dov);
          });
          store(sums + c, load(sums + c) + sum);
          store(mass + c, load(mass + c) + probabilities);
        }
      }
    }

    A sink_probability(const QueryBlock& queries, int64_t i) const {
      return exp(splat(static_cast<A>(*p.sinks.at(queries.h)) - tokens_by.m[i]))[0] * tokens_by.inverse[i];
    }

    double total(const A* values, const QueryBlock& queries) const {
      return std::accumulate(values, values + queries.count, 0.0);
    }

    double* block_sum(const Tensor& sums, const QueryBlock& queries) const {
      return sums.data<double>() + (queries.b * p.Hq + queries.h) * p.query_blocks() + queries.index;
    }

    void differentiate_sink(const QueryBlock& queries) {
      double sum = 0;
      for (int64_t i = 0; i < queries.count; ++i) sum -= sink_probability(queries, i) * delta[i];
      *block_sum(f.gradients_.sinks_sums, queries) = sum;
    }

    // Find the visible strips of a block of keys. Compute their scores in s and, if requested, <do, v> in ds.
    Gate<A> score_block(
        const QueryBlock& queries, const Columns& columns, bool need_dov, KeyBlock<Manner>* found = nullptr) {
      bool of_prefix = columns.half == Half::prefix;
      find_strips(p, f.band_, queries, columns, seen, strips);
      if (strips.empty()) return {};
      multiply(queries, columns, need_dov, found);
      Gate<A> gate = read_gate(p, queries, columns, gates);
      if (p.drops) keep_factors(p, queries, columns.first, columns.rows, !of_prefix, keeps);
      for (Strip& strip : strips) {
        if (products && of_prefix)
          for_vectors<A>(strip, [&](int64_t r, int64_t c) {
            store(products + r * kQueries + c, load(s.values + r * kQueries + c) * p.scale);
          });
        make_scores(p, f.band_, queries, columns, strip, gate, seen, s.values, slopes);
      }
      if (of_softmax(queries, columns).by.large) apply_scale(p, strips, s.values);
      return gate;
    }

    // Compute <q, k> in s and, if requested, <do, v> in ds, for the strips. `found` receives the block of keys.
    void multiply(const QueryBlock& queries, const Columns& columns, bool need_dov, KeyBlock<Manner>* found) {
      bool of_prefix = columns.half == Half::prefix;
      if (queries.count <= kFew) {
        const View<const T>&k = of_prefix ? p.pk : p.k, &v = of_prefix ? p.pv : p.v;
        const T* k_at = k.at(queries.b, queries.hkv, place(p, queries, columns));
        const T* v_at = v.at(queries.b, queries.hkv, place(p, queries, columns));
        score_few(k_at, k.strides[2], columns.rows, p.D, few_q, queries.count, s.values);
        if (need_dov) score_few(v_at, v.strides[2], columns.rows, p.Dv, few_do, queries.count, ds.values);
        return;
      }
      KeyBlock<Manner> kb = keys.find(p, p.pk, p.k, queries, columns);
      for (const Strip& strip : strips) multiply_strip(kb.along(p.D, q, s.values), strip);
      if (found) *found = kb;
      if (!need_dov) return;
      KeyBlock<Manner> vb = values.find(p, p.pv, p.v, queries, columns);
      for (const Strip& strip : strips) multiply_strip(vb.along(p.Dv, dout, ds.values), strip);
    }

    static void multiply_strip(Product<Manner> product, const Strip& strip) {
      product.a += strip.row * product.rs;
      product.b += strip.column * Manner::pair;
      product.c += strip.row * kQueries + strip.column;
      product.run(strip.rows, strip.columns);
    }

    // Add the gradients of one block of keys to dK, dV, dQ, and the gradients of gate and key bias.
    void add_block(
        const QueryBlock& queries, const Columns& columns, const KeySums<A>& sums, bool need_dk, bool need_dv) {
      bool of_prefix = columns.half == Half::prefix;
      bool need_ds = need_dk || (of_prefix ? needs.whole_prefix() : needs.query);
      KeyBlock<Manner> kb;
      Gate<A> gate = score_block(queries, columns, need_ds, &kb);
      int64_t row = place(p, queries, columns) - (of_prefix ? f.begin_ : 0);  // within the sums
      A* dk = need_dk ? sums.dk + row * f.width(true, p.D) : nullptr;
      A* dv = need_dv ? sums.dv + row * f.width(true, p.Dv) : nullptr;
      for (const Strip& strip : strips) {
        if (need_ds) {
          differentiate_scores(queries, columns, strip, gate);
        } else {
          weigh(queries, columns, strip, gate);
        }
        if (queries.count <= kFew) {
          add_few(queries, columns, strip, dk, dv);
          continue;
        }
        if (dv) s.round_natural(strip);
        if (dv) add_to_rows(s, do_rows, p.Dv, dv, strip);
        if (dk) ds.round_natural(strip);
        if (dk) add_to_rows(ds, q_rows, p.D, dk, strip);
        if (needs.query) ds.round_pairs(strip);
        if (needs.query)
          kb.across(strip.row, strip.rows, ds.pairs + strip.column * Manner::pair, dq + strip.column)
              .run(p.D, strip.columns);
      }
      if (of_prefix && needs.prefix_gate) add_gate_gradient(queries, columns);
      if (of_prefix && needs.prefix_key_bias)
        add_columns(
            uncapped, queries, columns, bias_sums + (p.from_store ? place(p, queries, columns) : columns.first));
    }

    // dV += P^T dO, dK += dS^T Q, dQ += dS K for a few queries.
    void add_few(const QueryBlock& queries, const Columns& columns, const Strip& strip, A* dk, A* dv) const {
      const View<const T>& k = columns.half == Half::prefix ? p.pk : p.k;
      const T* k_at = k.at(queries.b, queries.hkv, place(p, queries, columns) + strip.row);
      const A *probabilities = s.values + strip.row * kQueries, *gradients = ds.values + strip.row * kQueries;
      if (dv)
        add_outer_few(probabilities, strip.rows, queries.count, few_do, p.Dv, dv + strip.row * f.width(true, p.Dv));
      if (dk) add_outer_few(gradients, strip.rows, queries.count, few_q, p.D, dk + strip.row * f.width(true, p.D));
      if (needs.query) add_values_few(k_at, k.strides[2], strip.rows, p.D, gradients, queries.count, dq);
    }

    // The softmax that a block of keys belongs to.
    struct OfSoftmax {
      const Normalizers<A>& by;
      const A* delta;
      A output_gate;
    };
    OfSoftmax of_softmax(const QueryBlock& queries, const Columns& columns) const {
      if (p.separate() && columns.half == Half::prefix)
        return {prefix_by, prefix_delta, p.output_gate_of(queries.b, queries.h)};
      return {tokens_by, delta, A(1)};
    }

    // In s, turn scores into the weighted probabilities P g keep, where keep is dropout's factor.
    void weigh(const QueryBlock& queries, const Columns& columns, const Strip& strip, const Gate<A>& gate) {
      OfSoftmax softmax = of_softmax(queries, columns);
      A scale = scale_of(p, strip);
      for_vectors<A>(strip, [&](int64_t r, int64_t c) {
        int64_t at = r * kQueries + c;
        Vec<A> kept = softmax.by.probability(load(s.values + at) * scale, c) * softmax.output_gate;
        if (keeps) kept *= load(keeps + at);
        store(s.values + at, kept * gate.at(r, c));
      });
    }

    // Differentiate the scores of a strip:
    // - s: from scores to P g keep.
    // - ds: from <do, v> to c g dS.
    // - products: from c <q, k> to the gate's gradients per query.
    // - uncapped: dS before it is multiplied by the derivative of the soft cap.
    void differentiate_scores(
        const QueryBlock& queries, const Columns& columns, const Strip& strip, const Gate<A>& gate) {
      OfSoftmax softmax = of_softmax(queries, columns);
      bool with_dg = columns.half == Half::prefix && needs.prefix_gate;
      bool with_bias = columns.half == Half::prefix && needs.prefix_key_bias;
      A scale = scale_of(p, strip);
      for_vectors<A>(strip, [&](int64_t r, int64_t c) {
        int64_t at = r * kQueries + c;
        Vec<A> probability = softmax.by.probability(load(s.values + at) * scale, c) * softmax.output_gate;
        Vec<A> g = gate.at(r, c), dov = load(ds.values + at), kept = probability;
        if (keeps) kept *= load(keeps + at), dov *= load(keeps + at);
        Vec<A> d = probability * (g * dov - load(softmax.delta + c));
        if (with_bias) store(uncapped + at, d);
        if (slopes) d *= load(slopes + at);
        if (with_dg) store(products + at, d * load(products + at) + probability * dov);
        store(s.values + at, kept * g);
        store(ds.values + at, d * g * p.scale);
      });
    }

    // sums [keys][width] += tile [keys][queries] * rows [queries][width], for the keys and queries of a strip.
    void add_to_rows(const Tile<Manner>& tile, const Operand* rows, int64_t width, A* sums, const Strip& strip) const {
      int64_t ld = round_up(width, kLanes<A>);
      Product<Manner> product{
          tile.natural + strip.row * kQueries + strip.column,
          kQueries,
          Manner::pair,
          rows + strip.column * ld,
          ld * Manner::pair,
          sums + strip.row * ld,
          ld,
          strip.columns / Manner::pair,
          true};
      product.run(strip.rows, ld);
    }

    // Add the gate's gradients, summed over the block's queries, or write them per query for a gate per query.
    void add_gate_gradient(const QueryBlock& queries, const Columns& columns) {
      if (gate_sums) return add_columns(products, queries, columns, gate_sums + columns.first);
      const Tensor& gradient = f.gradients_.prefix_gate;
      A* to = gradient.data<A>() + queries.b * gradient.stride(0) + queries.h * gradient.stride(1) +
              queries.first * gradient.stride(2) + columns.first;
      for (int64_t r = 0; r < columns.rows; ++r)
        for (int64_t i = 0; i < queries.count; ++i) to[i * gradient.stride(2) + r] = products[r * kQueries + i];
    }

    // Add the sum over a block's queries, per key.
    void add_columns(const A* values, const QueryBlock& queries, const Columns& columns, double* to) const {
      for (int64_t r = 0; r < columns.rows; ++r, values += kQueries) {
        Vec<A> sums{};
        for (int64_t c = 0; c < round_up(queries.count, kLanes<A>); c += kLanes<A>) sums += load(values + c);
        to[r] += sum<A>(sums);
      }
    }

    void write_dq(const QueryBlock& queries) {
      const Tensor& to = f.gradients_.results.query;
      T* rows = to.data<T>() + queries.b * to.stride(0) + queries.h * to.stride(1) + queries.first * to.stride(2);
      unpack_transposed(dq, kQueries, queries.count, p.D, rows, to.stride(2));
    }
  };

  A* kept(int64_t item) const { return kept_.data<A>() + item * kept_size(); }

  const AttentionProblem<T, A>& p_;
  const AttentionNeeds needs_;
  AttentionGradients& gradients_;
  Band band_;
  View<const T> do_, o_;
  const A* normalizers_;
  Slots slots_;
  KeySumsShape token_shape_, prefix_shape_;
  int64_t begin_ = 0, end_ = 0;  // the current range of prefix keys
  Tensor prefix_sums_, cut_sums_;
  Tensor kept_;  // state between ranges, [items, kept_size()]
  ColumnSums gate_sums_, bias_sums_;
};

}  // namespace fastprefix
