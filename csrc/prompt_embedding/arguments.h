// The operators' arguments, in the order of the schema (fastprefix/ops/prompt_embedding/arguments.py).
//
// B: batch size. N: tokens per row. S: length of the prompt in front of the tokens. V: vocabulary size. d: model width.
// r: bottleneck or rank. P: length of the prompt, or of the packed store of prompts. With `entries`, the tensors of an
// offset have a leading dimension K, and row b of the batch uses entry entries[b].
#pragma once

#include "../common/declare.h"
#include "../common/tensor.h"

namespace fastprefix::prompt_embedding {

// clang-format off
#define FASTPREFIX_EMBEDDING_DIFFERENTIABLE(X, SEPARATOR) \
  X(Tensor, weight) SEPARATOR()                           \
  X(OptionalTensor, prompt) SEPARATOR()                   \
  X(OptionalTensor, w1) SEPARATOR()                       \
  X(OptionalTensor, b1) SEPARATOR()                       \
  X(OptionalTensor, w2) SEPARATOR()                       \
  X(OptionalTensor, b2) SEPARATOR()                       \
  X(OptionalTensor, low_rank_a) SEPARATOR()               \
  X(OptionalTensor, low_rank_b) SEPARATOR()               \
  X(OptionalTensor, position_offset)

#define FASTPREFIX_EMBEDDING_ARGUMENTS(X, SEPARATOR)            \
  X(Tensor, input_ids) SEPARATOR()                              \
  FASTPREFIX_EMBEDDING_DIFFERENTIABLE(X, SEPARATOR) SEPARATOR() \
  X(OptionalTensor, prompt_spans) SEPARATOR()                   \
  X(OptionalTensor, entries) SEPARATOR()                        \
  X(OptionalTensor, dropout_seed) SEPARATOR()                   \
  X(double, offset_scale) SEPARATOR()                           \
  X(double, dropout_p) SEPARATOR()                              \
  X(int64_t, prompt_length)
// clang-format on

// Positions in the list of gradients.
enum class EmbeddingGradient : int64_t { FASTPREFIX_EMBEDDING_DIFFERENTIABLE(FASTPREFIX_NAME, FASTPREFIX_COMMA) };

struct EmbeddingArguments {
  FASTPREFIX_EMBEDDING_ARGUMENTS(FASTPREFIX_FIELD, FASTPREFIX_NOTHING)

  int64_t B() const { return input_ids.size(0); }
  int64_t N() const { return input_ids.size(1); }
  int64_t S() const { return prompt_length; }
  int64_t P() const { return prompt ? prompt->size(0) : 0; }
  int64_t V() const { return weight.size(0); }
  int64_t d() const { return weight.size(1); }
  int64_t r() const { return w1 ? w1->size(-1) : low_rank_a ? low_rank_a->size(-1) : 0; }
  const OptionalTensor& offset() const { return w1 ? w1 : low_rank_a ? low_rank_a : position_offset; }
};

// The requested gradients, not yet computed. All other gradients are undefined.
struct EmbeddingGradients {
  FASTPREFIX_EMBEDDING_DIFFERENTIABLE(FASTPREFIX_RESULT, FASTPREFIX_NOTHING)

  void zero_banks() const {
    for (const Tensor& bank : {w1, b1, w2, b2, low_rank_a, low_rank_b, position_offset})
      if (bank.defined()) bank.zero();
  }
  bool of_ffn() const { return w1.defined() || b1.defined() || w2.defined() || b2.defined(); }
};

}  // namespace fastprefix::prompt_embedding
