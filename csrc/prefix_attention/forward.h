// The forward pass: one pass over prefix and tokens with an online softmax, for one block of kQueries queries at a
// time. The keys are processed in blocks of kKeys, first the prefix, then the tokens.
//
// Scores are computed transposed, S^T [keys][queries] = K Q^T. Keys are broadcast directly from the tensor, and the
// queries, which are transposed once per block, run along the vectors. So maxima and sums over keys need no shuffles,
// and P^T is an operand of O^T [Dv][queries] += V^T P^T without another transposition.
//
// In decoding, one row and head has too few queries to fill a vector, and each row and head would read the whole prefix
// from memory. So rows with the same prefix keys (a crowd) process them together first, in parts of kPartKeys keys,
// with the queries of all heads that share the keys (`gather`). Each row and head then starts from its own gathered
// sums.
#pragma once

#include "../common/scratch.h"
#include "few.h"
#include "tiles.h"

namespace fastprefix {

// The running state of a softmax, per query. Scores are exponentiated relative to the reference m, which is at most
// kSlack below the largest score so far.
template <class A>
struct Softmax {
  A* m;  // [kQueries]: the reference
  A* l;  // [kQueries]: the sum of e^(s - m)
  A* o;  // O^T [Dv][kQueries]: the sum of e^(s - m) v

  void take(Arena& arena, int64_t Dv) {
    m = arena.take<A>(kQueries);
    l = arena.take<A>(kQueries);
    o = arena.take<A>(Dv * kQueries);
  }

  // Initialize `columns` columns to an empty softmax. A sink is one score without a value.
  void start(int64_t Dv, int64_t columns, A sink = -std::numeric_limits<A>::infinity()) {
    std::fill_n(m, columns, sink);
    std::fill_n(l, columns, sink == -std::numeric_limits<A>::infinity() ? A(0) : A(1));
    for (int64_t d = 0; d < Dv; ++d) std::fill_n(o + d * kQueries, columns, A(0));
  }

  // Return the reference, with 0 in place of -inf (nothing seen yet), since -inf - (-inf) is NaN.
  static Vec<A> shift(Vec<A> m) { return m == -std::numeric_limits<A>::infinity() ? Vec<A>{} : m; }

  // Raise the reference to the largest of the strips' scores, and rescale the sums. This waits until a score exceeds
  // the reference by more than kSlack, since rescaling costs a pass over o, and e^kSlack overflows only sums of values
  // above 1e31. Return true if a largest score is large (see kLarge).
  bool raise(const std::vector<Strip>& strips, const A* s, A scale, int64_t columns, int64_t Dv) {
    constexpr A kSlack = 8;
    bool large = false;
    for (int64_t c = 0; c < columns; c += kLanes<A>) {
      Vec<A> old = load(m + c), highest = old;
      for (const Strip& strip : strips)
        if (strip.column <= c && c < strip.column + strip.columns) {
          highest = maximum<A>(highest, largest_score(strip, s, scale, c));
        }
      large |= any<A>(is_large<A>(highest));
      if (!any<A>(highest > old + kSlack)) continue;
      Vec<A> factor = exp(old - shift(highest));
      store(m + c, highest);
      store(l + c, load(l + c) * factor);
      for (int64_t d = 0; d < Dv; ++d) store(o + d * kQueries + c, load(o + d * kQueries + c) * factor);
    }
    return large;
  }
};

template <class Manner, class T>
class AttentionForward {
  using A = typename Manner::Accumulator;
  using Operand = typename Manner::Operand;

 public:
  AttentionForward(const AttentionProblem<T, A>& p, Tensor& output, Tensor& normalizers)
      : p_(p), band_(p), output_(output), normalizers_(normalizers.data<A>()) {}

  void run() {
    find_crowds();
    work(Slots(static_cast<int64_t>(parts_.size())), [&](ForwardWorker& worker, int64_t i) {
      worker.gather(parts_[i]);
    });
    work(Slots(p_.Hq, token_costs(p_), prefix_costs(p_)), [&](ForwardWorker& worker, int64_t item) {
      worker.attend(block(item));
    });
  }

 private:
  struct ForwardWorker;

  // Rows that see the same prefix keys. Each query has sums (m, l, O [Dv]) for every part of the keys. They are stored
  // as [Hkv][rows, G, N][parts][2 + Dv], from offset `sums` on.
  struct Crowd {
    Span span;
    std::vector<int64_t> rows;
    int64_t queries = 0;  // of one key/value head: rows x G x N
    int64_t sums = 0;

    int64_t parts() const { return (span.length + kPartKeys - 1) / kPartKeys; }
  };
  static constexpr int64_t kPartKeys = 8 * kKeys;

  // A block of a crowd's queries and a part of its keys.
  struct Part {
    int64_t crowd, hkv, first_query, index;
  };

  // Find the crowds. Nothing that multiplies a prefix score or is added to it may depend on the row.
  void find_crowds() {
    crowd_of_.assign(p_.B, {-1, 0});
    if (p_.N > kFew || !p_.shared_prefix || p_.prefix_bias || p_.drops) return;
    if (!p_.shared_gate() || !p_.shared_key_bias) return;
    std::vector<Crowd> all;
    for (int64_t b = 0; b < p_.B; ++b) {
      const Span& span = p_.spans[b];
      auto same = [&](const Crowd& crowd) {
        return crowd.span.start == span.start && crowd.span.length == span.length;
      };
      auto found = std::find_if(all.begin(), all.end(), same);
      if (found == all.end()) found = all.insert(found, Crowd{span, {}});
      found->rows.push_back(b);
    }
    int64_t sums = 0;
    for (Crowd& crowd : all) {
      crowd.queries = static_cast<int64_t>(crowd.rows.size()) * p_.G * p_.N;
      if (crowd.queries < kLanes<A> / 2 || crowd.span.length < kKeys) continue;
      crowd.sums = sums;
      sums += p_.Hkv * crowd.queries * crowd.parts() * (2 + p_.Dv);
      int64_t number = static_cast<int64_t>(crowds_.size());
      for (int64_t i = 0; i < static_cast<int64_t>(crowd.rows.size()); ++i) crowd_of_[crowd.rows[i]] = {number, i};
      for (int64_t hkv = 0; hkv < p_.Hkv; ++hkv)
        for (int64_t first = 0; first < crowd.queries; first += kQueries)
          for (int64_t part = 0; part < crowd.parts(); ++part) parts_.push_back({number, hkv, first, part});
      crowds_.push_back(std::move(crowd));
    }
    if (sums > 0) sums_ = empty<A>({sums});
  }

  // The sums of a crowd's query for the first part of the keys.
  A* sums_of(const Crowd& crowd, int64_t hkv, int64_t query) const {
    return sums_->data<A>() + crowd.sums + (hkv * crowd.queries + query) * crowd.parts() * (2 + p_.Dv);
  }

  // Call one(worker, item) for all items, with one worker per slot.
  template <class Do>
  void work(const Slots& slots, Do one) {
    if (slots.items == 0) return;
    Arena counting(nullptr);
    ForwardWorker(*this, counting);
    slots.run(counting.used(), [&](int64_t slot, char* memory) {
      [[maybe_unused]] typename Manner::Unit unit;
      Arena arena(memory);
      ForwardWorker worker(*this, arena);
      for (int64_t item = slots.first(slot); item < slots.first(slot + 1); ++item) one(worker, item);
    });
  }

  QueryBlock block(int64_t item) const {
    int64_t blocks = p_.query_blocks(), index = item % blocks, h = item / blocks % p_.Hq;
    return {item / blocks / p_.Hq, h, h / p_.G, index * kQueries, std::min(kQueries, p_.N - index * kQueries), index};
  }

  // The scratch memory of one slot, and the work on one block of queries.
  struct ForwardWorker {
    const AttentionForward& f;
    const AttentionProblem<T, A>& p;
    Operand* q;  // Q^T [D][kQueries]
    A* few_q;  // Q [count][D], instead of Q^T for up to kFew queries
    T* rows;  // gathered queries [kQueries][D]
    KeyBlocks<Manner, T> keys, values;
    A* gates;  // see Gate
    A* keeps;  // dropout's factors [kKeys][kQueries]
    Tile<Manner> s;  // scores, then weighted probabilities
    Softmax<A> tokens, prefix;
    std::vector<Strip> strips;
    Seen seen[kKeys];

    ForwardWorker(const AttentionForward& forward, Arena& arena) : f(forward), p(forward.p_) {
      q = arena.take<Operand>(round_up(p.D, Manner::pair) * kQueries);
      few_q = arena.take<A>(kFew * round_up(p.D, kLanes<A>));
      rows = f.parts_.empty() ? nullptr : arena.take<T>(kQueries * p.D);
      keys.take(arena, p, p.D, true, false);
      values.take(arena, p, p.Dv, false, true);
      gates = p.gate ? arena.take<A>(kKeys * (p.gate_per_query ? kQueries : 1)) : nullptr;
      keeps = p.drops ? arena.take<A>(kKeys * kQueries) : nullptr;
      s.take(arena, false, true);
      tokens.take(arena, p.Dv);
      if (p.separate()) prefix.take(arena, p.Dv);
    }

    void pack_queries(const T* from, int64_t stride, int64_t count) {
      if (count <= kFew) {
        pack_few(from, stride, count, p.D, few_q);
      } else {
        pack_transposed<Manner>(from, stride, count, p.D, q, kQueries);
      }
    }

    // Attend to one part of a crowd's keys with one block of its queries, and store the sums.
    void gather(const Part& part) {
      const Crowd& crowd = f.crowds_[part.crowd];
      int64_t count = std::min(kQueries, crowd.queries - part.first_query), size = 2 + p.Dv;
      for (int64_t i = 0; i < count; ++i) {
        int64_t query = part.first_query + i, h = part.hkv * p.G + query / p.N % p.G;
        std::copy_n(p.q.at(crowd.rows[query / p.N / p.G], h, query % p.N), p.D, rows + i * p.D);
      }
      pack_queries(rows, p.D, count);
      tokens.start(p.Dv, round_up(count, kLanes<A>));
      QueryBlock queries{crowd.rows[0], part.hkv * p.G, part.hkv, 0, count, 0};
      int64_t begin = part.index * kPartKeys, end = std::min(crowd.span.length, begin + kPartKeys);
      for_blocks(Half::prefix, begin, end, [&](const Columns& columns) { add_block(queries, columns, tokens); });
      for (int64_t i = 0; i < count; ++i) {
        A* to = f.sums_of(crowd, part.hkv, part.first_query + i) + part.index * size;
        to[0] = tokens.m[i];
        to[1] = tokens.l[i];
        for (int64_t d = 0; d < p.Dv; ++d) to[2 + d] = tokens.o[d * kQueries + i];
      }
    }

    // Add the gathered sums of a row and head to a softmax that has seen no values yet.
    void add_gathered(const QueryBlock& queries, const Crowd& crowd, int64_t row, Softmax<A>& softmax) const {
      int64_t size = 2 + p.Dv, parts = crowd.parts();
      auto power = [](A x) { return exp(splat(x))[0]; };
      for (int64_t i = 0; i < queries.count; ++i) {
        const A* sums = f.sums_of(crowd, queries.hkv, (row * p.G + queries.h % p.G) * p.N + queries.first + i);
        A m = softmax.m[i];
        for (int64_t part = 0; part < parts; ++part) m = std::max(m, sums[part * size]);
        A reference = Softmax<A>::shift(splat(m))[0];  // also if all scores are NaN, which leave m at -inf
        softmax.l[i] *= power(softmax.m[i] - reference);
        softmax.m[i] = m;
        for (int64_t part = 0; part < parts; ++part, sums += size) {
          A factor = power(sums[0] - reference);
          softmax.l[i] += factor * sums[1];
          for (int64_t d = 0; d < p.Dv; ++d) softmax.o[d * kQueries + i] += factor * sums[2 + d];
        }
      }
    }

    // Compute the output of one block of queries.
    void attend(const QueryBlock& queries) {
      pack_queries(p.q.at(queries.b, queries.h, queries.first), p.q.strides[2], queries.count);
      int64_t columns = round_up(queries.count, kLanes<A>);
      tokens.start(
          p.Dv, columns, p.sinks ? static_cast<A>(*p.sinks.at(queries.h)) : -std::numeric_limits<A>::infinity());
      if (p.separate()) prefix.start(p.Dv, columns);
      Softmax<A>& of_prefix = p.separate() ? prefix : tokens;
      auto [crowd, row] = f.crowd_of_[queries.b];
      if (crowd >= 0) {
        add_gathered(queries, f.crowds_[crowd], row, of_prefix);
      } else {
        for_blocks(Half::prefix, 0, p.spans[queries.b].length, [&](const Columns& columns) {
          add_block(queries, columns, of_prefix);
        });
      }
      for_token_blocks(p, f.band_, queries, [&](const Columns& columns) { add_block(queries, columns, tokens); });
      finish(queries);
    }

    // Add one block of keys to a softmax.
    void add_block(const QueryBlock& queries, const Columns& columns, Softmax<A>& softmax) {
      bool of_prefix = columns.half == Half::prefix;
      find_strips(p, f.band_, queries, columns, seen, strips);
      if (strips.empty()) return;
      Gate<A> gate = read_gate(p, queries, columns, gates);
      if (p.drops) keep_factors(p, queries, columns.first, columns.rows, !of_prefix, keeps);
      score(queries, columns);
      for (Strip& strip : strips) make_scores(p, f.band_, queries, columns, strip, gate, seen, s.values);
      if (softmax.raise(strips, s.values, p.scale, round_up(queries.count, kLanes<A>), p.Dv))
        apply_scale(p, strips, s.values);
      bool as_pairs = Manner::pair == 2 && queries.count > kFew;
      for (const Strip& strip : strips)
        if (as_pairs) exponentiate_pairs(strip, gate, softmax);
        else exponentiate(strip, gate, softmax);
      add_values(queries, columns, softmax.o);
    }

    // S^T = K Q^T
    void score(const QueryBlock& queries, const Columns& columns) {
      if (queries.count <= kFew) {
        const View<const T>& k = columns.half == Half::prefix ? p.pk : p.k;
        const T* k_at = k.at(queries.b, queries.hkv, place(p, queries, columns));
        return score_few(k_at, k.strides[2], columns.rows, p.D, few_q, queries.count, s.values);
      }
      KeyBlock<Manner> block = keys.find(p, p.pk, p.k, queries, columns);
      for (const Strip& strip : strips) {
        A* scores = s.values + strip.row * kQueries + strip.column;
        Product<Manner> product = block.along(p.D, q + strip.column * Manner::pair, scores);
        product.a += strip.row * product.rs;
        product.run(strip.rows, strip.columns);
      }
    }

    // O^T += V^T P^T
    void add_values(const QueryBlock& queries, const Columns& columns, A* o) {
      if (queries.count <= kFew) {
        const View<const T>& v = columns.half == Half::prefix ? p.pv : p.v;
        const T* v_at = v.at(queries.b, queries.hkv, place(p, queries, columns));
        int64_t stride = v.strides[2];
        for (const Strip& strip : strips)
          add_values_few(
              v_at + strip.row * stride, stride, strip.rows, p.Dv, s.values + strip.row * kQueries, queries.count, o);
        return;
      }
      KeyBlock<Manner> block = values.find(p, p.pv, p.v, queries, columns);
      for (const Strip& strip : strips)
        block.across(strip.row, strip.rows, s.pairs + strip.column * Manner::pair, o + strip.column)
            .run(p.Dv, strip.columns);
    }

    // Turn the scores of a strip into weighted probabilities, in place, and add the probabilities to l.
    void exponentiate(const Strip& strip, const Gate<A>& gate, Softmax<A>& softmax) const {
      A scale = scale_of(p, strip);
      for (int64_t c = strip.column; c < strip.column + strip.columns; c += kLanes<A>) {
        Vec<A> reference = Softmax<A>::shift(load(softmax.m + c));
        Vec<A> sum = sum_rows<A>(strip, [&](int64_t r) {
          A* at = s.values + r * kQueries + c;
          Vec<A> probability = exp(load(at) * scale - reference);
          store(at, weigh(probability, gate, r, c));
          return probability;
        });
        store(softmax.l + c, load(softmax.l + c) + sum);
      }
    }

    // Do the same, and round the weighted probabilities to pairs of bfloat16. Strips begin at even rows. An odd last
    // row is paired with zeros.
    void exponentiate_pairs(const Strip& strip, const Gate<A>& gate, Softmax<A>& softmax) const {
      if constexpr (Manner::pair == 2) {
        float scale = scale_of(p, strip);
        for (int64_t c = strip.column; c < strip.column + strip.columns; c += kLanes<A>) {
          Vec<A> reference = Softmax<A>::shift(load(softmax.m + c));
          Vec<A> sum = sum_row_pairs<A>(strip, [&](int64_t r, bool both, Vec<A>& sum) {
            const A* at = s.values + r * kQueries + c;
            Vec<A> even = exp_rounded(load(at) * scale - reference), odd{};
            sum += even;
            even = weigh(even, gate, r, c);
            if (both) {
              odd = exp_rounded(load(at + kQueries) * scale - reference);
              sum += odd;
              odd = weigh(odd, gate, r + 1, c);
            }
            store(reinterpret_cast<float*>(s.pairs + r * kQueries + 2 * c), pair_up(even, odd));
          });
          store(softmax.l + c, load(softmax.l + c) + sum);
        }
      }
    }

    // Multiply a probability by its gate and dropout factor. l sums the probabilities without them.
    Vec<A> weigh(Vec<A> probability, const Gate<A>& gate, int64_t r, int64_t c) const {
      if (gate) probability *= gate.at(r, c);
      if (keeps) probability *= load(keeps + r * kQueries + c);
      return probability;
    }

    // Write o = O / l, plus output gate * O / l of the prefix if it has its own softmax, and the normalizers m and l.
    void finish(const QueryBlock& queries) {
      int64_t columns = round_up(queries.count, kLanes<A>);
      for (int64_t c = 0; c < columns; c += kLanes<A>) {
        Vec<A> factor = inverse(load(tokens.l + c)), prefix_factor{};
        if (p.separate()) prefix_factor = inverse(load(prefix.l + c)) * p.output_gate_of(queries.b, queries.h);
        for (int64_t d = 0; d < p.Dv; ++d) {
          A* at = tokens.o + d * kQueries + c;
          Vec<A> o = load(at) * factor;
          if (p.separate()) o += load(prefix.o + d * kQueries + c) * prefix_factor;
          store(at, o);
        }
      }
      const Tensor& output = f.output_;
      T* to = output.data<T>() + queries.b * output.stride(0) + queries.h * output.stride(1) +
              queries.first * output.stride(2);
      unpack_transposed(tokens.o, kQueries, queries.count, p.Dv, to, output.stride(2));
      write_normalizers(queries, tokens, 0);
      if (p.separate()) write_normalizers(queries, prefix, 1);
    }

    static Vec<A> inverse(Vec<A> l) { return l == 0 ? Vec<A>{} : A(1) / l; }

    void write_normalizers(const QueryBlock& queries, const Softmax<A>& softmax, int64_t which) {
      std::copy_n(softmax.m, queries.count, f.normalizers_ + p.normalizer(queries, which, 0));
      std::copy_n(softmax.l, queries.count, f.normalizers_ + p.normalizer(queries, which, 1));
    }
  };

  const AttentionProblem<T, A>& p_;
  Band band_;
  Tensor output_;
  A* normalizers_;
  std::vector<Crowd> crowds_;
  std::vector<Part> parts_;
  std::vector<std::pair<int64_t, int64_t>> crowd_of_;  // [B]: the row's crowd, or -1, and its index within the crowd
  OptionalTensor sums_;
};

}  // namespace fastprefix
