// What the operators get, in the order of the schema (fastprefix/ops/prompt_embedding/arguments.py): B batch, N tokens,
// S soft-prompt length, V vocabulary, d model width, r bottleneck or rank.
#pragma once

#include <ATen/ATen.h>

#include <optional>

namespace fastprefix::prompt_embedding {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

struct Arguments {
  Tensor input_ids, weight;
  OptionalTensor prompt, w1, b1, w2, b2, low_rank_a, low_rank_b, dropout_seed;
  double offset_scale, dropout_p;

  int64_t B() const { return input_ids.size(0); }
  int64_t N() const { return input_ids.size(1); }
  int64_t S() const { return prompt ? prompt->size(0) : 0; }
  int64_t V() const { return weight.size(0); }
  int64_t d() const { return weight.size(1); }
  int64_t r() const { return w1 ? w1->size(1) : low_rank_a ? low_rank_a->size(1) : 0; }
};

// The gradients that are asked for, empty; the others are undefined.
struct Gradients {
  Tensor weight, prompt, w1, b1, w2, b2, low_rank_a, low_rank_b;
  bool of_ffn() const { return w1.defined() || b1.defined() || w2.defined() || b2.defined(); }
};

}  // namespace fastprefix::prompt_embedding
