// The operators' arguments, in the order of the schema (fastprefix/ops/prefix_attention/arguments.py).
#pragma once

#include "../common/declare.h"
#include "../common/tensor.h"

namespace fastprefix {

// clang-format off
#define FASTPREFIX_ATTENTION_DIFFERENTIABLE(X, SEPARATOR) \
  X(Tensor, query) SEPARATOR()                            \
  X(Tensor, key) SEPARATOR()                              \
  X(Tensor, value) SEPARATOR()                            \
  X(Tensor, prefix_key) SEPARATOR()                       \
  X(Tensor, prefix_value) SEPARATOR()                     \
  X(OptionalTensor, prefix_gate) SEPARATOR()              \
  X(OptionalTensor, output_gate) SEPARATOR()              \
  X(OptionalTensor, attn_mask) SEPARATOR()                \
  X(OptionalTensor, prefix_bias) SEPARATOR()              \
  X(OptionalTensor, prefix_key_bias) SEPARATOR()          \
  X(OptionalTensor, sinks)

#define FASTPREFIX_ATTENTION_ARGUMENTS(X, SEPARATOR)            \
  FASTPREFIX_ATTENTION_DIFFERENTIABLE(X, SEPARATOR) SEPARATOR() \
  X(OptionalTensor, query_segments) SEPARATOR()                 \
  X(OptionalTensor, key_segments) SEPARATOR()                   \
  X(OptionalTensor, prefix_spans) SEPARATOR()                   \
  X(OptionalTensor, dropout_seed) SEPARATOR()                   \
  X(bool, is_causal) SEPARATOR()                                \
  X(std::optional<int64_t>, window_size) SEPARATOR()            \
  X(std::optional<double>, softcap) SEPARATOR()                 \
  X(double, scale) SEPARATOR()                                  \
  X(double, dropout_p) SEPARATOR()                              \
  X(int64_t, frozen_prefix)
// clang-format on

struct AttentionArguments {
  FASTPREFIX_ATTENTION_ARGUMENTS(FASTPREFIX_FIELD, FASTPREFIX_NOTHING)
};

// Positions in the schema, and in the lists of gradients.
enum class AttentionArgument : int64_t { FASTPREFIX_ATTENTION_ARGUMENTS(FASTPREFIX_NAME, FASTPREFIX_COMMA) };

// Flags of the requested gradients.
struct AttentionNeeds {
  FASTPREFIX_ATTENTION_DIFFERENTIABLE(FASTPREFIX_FLAG, FASTPREFIX_NOTHING)

  bool tokens() const { return query || key || value; }
  bool prefix() const { return whole_prefix() || prefix_key || prefix_value; }
  // Return true if the backward pass must visit frozen prefix keys too.
  bool whole_prefix() const { return query || prefix_gate || prefix_key_bias; }
  // Return true if gradients of scores are needed. Only the gradients of values do not use them.
  bool scores() const { return whole_prefix() || prefix_key || key || output_gate || sinks; }
};

// The gradients. Gradients that were not requested are undefined.
struct AttentionResults {
  FASTPREFIX_ATTENTION_DIFFERENTIABLE(FASTPREFIX_RESULT, FASTPREFIX_NOTHING)
};

}  // namespace fastprefix
