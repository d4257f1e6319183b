// The operators `fastprefix::prefix_attention.cpu` and `fastprefix::prefix_attention_backward.cpu`.
//
// They bring the arguments to the form that the kernels read, allocate the results, choose the kernels by dtype, and
// sum gradients of broadcast arguments. Python defines the schemas, fakes and autograd
// (fastprefix/ops/prefix_attention/registration.py).
#include <torch/csrc/stable/library.h>

#include "kernels.h"
#include "reduce.h"

namespace fastprefix {
namespace {

// Return x if its last dimension has stride 1, which the kernels require, or a contiguous copy. The layouts that
// attention modules produce need no copy.
Tensor with_dense_rows(const Tensor& x) {
  return x.size(-1) == 1 || x.stride(-1) == 1 ? x : contiguous(x);
}

// Return the arguments in the form that the kernels read: rows are dense, and segments and spans are int64.
AttentionArguments with_dense_rows(AttentionArguments a) {
  for (Tensor* x : {&a.query, &a.key, &a.value, &a.prefix_key, &a.prefix_value}) *x = with_dense_rows(*x);
  for (OptionalTensor* x : {&a.query_segments, &a.key_segments})
    if (*x && !(*x)->holds<int64_t>()) *x = as_int64(**x);
  if (a.prefix_spans) a.prefix_spans = as_int64(*a.prefix_spans);
  return a;
}

// Allocate [B, H, N, size] with heads and length in the memory order of `like`, as in
// fastprefix/ops/prefix_attention/layout.py.
Tensor empty_heads(const Tensor& like, int64_t size) {
  int64_t B = like.size(0), H = like.size(1), N = like.size(2);
  if (like.stride(1) >= like.stride(2)) return empty({B, H, N, size}, like.dtype());
  const int64_t sizes[] = {B, H, N, size}, strides[] = {N * H * size, size, H * size, 1};
  return empty_strided(sizes, strides, 4, like.dtype());
}

Tensor empty_gradient(const Tensor& like) {
  return like.dim() == 4 ? empty_heads(like, like.size(3)) : empty_like(like);
}

Tensor empty_gradient(const OptionalTensor& like) {
  return empty_gradient(*like);
}

AttentionNeeds read_needs(const std::vector<bool>& asked) {
  AttentionNeeds needs;
#define FASTPREFIX_READ(type, name) needs.name = asked[static_cast<int64_t>(AttentionArgument::name)];
  FASTPREFIX_ATTENTION_DIFFERENTIABLE(FASTPREFIX_READ, FASTPREFIX_NOTHING)
#undef FASTPREFIX_READ
  return needs;
}

AttentionResults allocate_results(const AttentionNeeds& needs, const AttentionArguments& like) {
  AttentionResults results;
#define FASTPREFIX_ALLOCATE(type, name) \
  if (needs.name) results.name = empty_gradient(like.name);
  FASTPREFIX_ATTENTION_DIFFERENTIABLE(FASTPREFIX_ALLOCATE, FASTPREFIX_NOTHING)
#undef FASTPREFIX_ALLOCATE
  return results;
}

// List the requested gradients in the order of the schema.
std::vector<Tensor> list_results(const AttentionResults& results) {
  std::vector<Tensor> given;
#define FASTPREFIX_LIST(type, name) \
  if (results.name.defined()) given.push_back(results.name);
  FASTPREFIX_ATTENTION_DIFFERENTIABLE(FASTPREFIX_LIST, FASTPREFIX_NOTHING)
#undef FASTPREFIX_LIST
  return given;
}

std::tuple<Tensor, Tensor> run_forward(const AttentionArguments& original) {
  Tensor output = empty_heads(original.query, original.value.size(3));
  AttentionArguments a = with_dense_rows(original);
  Tensor normalizers = empty(
      {a.output_gate ? 2 : 1, 2, a.query.size(0), a.query.size(1), a.query.size(2)},
      a.query.holds<double>() ? dtype_of<double>() : dtype_of<float>());
  dispatch("prefix_attention", a.query, [&](auto type) { forward_kernel<decltype(type)>(a, output, normalizers); });
  return {output, normalizers};
}

std::vector<Tensor> run_backward(
    const AttentionArguments& original,
    const Tensor& grad_output,
    const Tensor& output,
    const Tensor& normalizers,
    const AttentionNeeds& needs) {
  STD_TORCH_CHECK(
      !needs.attn_mask && !needs.prefix_bias,
      "the cpu backend does not compute gradients of `attn_mask` and `prefix_bias`; use backend=\"eager\"");
  AttentionResults results = allocate_results(needs, original);
  std::vector<Tensor> given = list_results(results);
  AttentionArguments a = with_dense_rows(original);

  int64_t B = a.query.size(0), Hq = a.query.size(1), Hkv = a.key.size(1), N = a.query.size(2);
  if (B * N == 0) {
    for (const Tensor& result : given) result.zero();
    return given;
  }
  for (const Tensor& result : {results.prefix_key, results.prefix_value})
    if (result.defined() && a.frozen_prefix > 0) result.narrow(2, 0, a.frozen_prefix).zero();
  int64_t blocks = query_blocks(N);
  AttentionGradients gradients{results, {}, {}, {}, {}};
  if (needs.output_gate) gradients.output_gate_sums = empty<double>({B, Hq, blocks});
  if (needs.sinks) gradients.sinks_sums = empty<double>({B, Hq, blocks});

  dispatch("prefix_attention", a.query, [&](auto type) {
    backward_kernel<decltype(type)>(a, needs, gradients, grad_output, output, normalizers);
  });
  if (needs.prefix_gate) {
    Tensor gradient = results.prefix_gate, sums = gradients.prefix_gate;
    if (gradient.dim() == 3) {
      sums = sums.unflatten(0, {Hkv, B}).transpose(0, 1);
    } else if (gradient.size(2) == 1) {
      sums = sums.unflatten(0, {Hkv, B, Hq / Hkv}).transpose(0, 1);
      gradient = gradient.select(2, 0).unflatten(1, {Hkv, Hq / Hkv});
    }
    sum_columns_into(gradient, sums);
  }
  if (needs.prefix_key_bias) {
    Tensor sums = gradients.prefix_key_bias;
    sum_columns_into(results.prefix_key_bias, sums.unflatten(0, {Hkv, sums.size(0) / Hkv}).transpose(0, 1));
  }
  if (needs.output_gate) sum_into(results.output_gate.unsqueeze(2), gradients.output_gate_sums);
  if (needs.sinks) sum_into(results.sinks.unsqueeze(0).unsqueeze(2), gradients.sinks_sums);
  return given;
}

std::tuple<torch::stable::Tensor, torch::stable::Tensor> forward(
    FASTPREFIX_PARAMETERS(FASTPREFIX_ATTENTION_ARGUMENTS)) {
  Finally released{[&] { FASTPREFIX_RELEASE(FASTPREFIX_ATTENTION_ARGUMENTS) }};
  auto [output, normalizers] = run_forward(FASTPREFIX_COLLECTED(AttentionArguments, FASTPREFIX_ATTENTION_ARGUMENTS));
  return {output.owner(), normalizers.owner()};
}

std::vector<torch::stable::Tensor> backward(
    AtenTensorHandle grad_output,
    AtenTensorHandle output,
    AtenTensorHandle normalizers,
    std::vector<bool> needs_grad,
    FASTPREFIX_PARAMETERS(FASTPREFIX_ATTENTION_ARGUMENTS)) {
  Finally released{[&] {
    for (AtenTensorHandle handle : {grad_output, output, normalizers}) BoxedOf<Tensor>::release(handle);
    FASTPREFIX_RELEASE(FASTPREFIX_ATTENTION_ARGUMENTS)
  }};
  return boxed(run_backward(
      FASTPREFIX_COLLECTED(AttentionArguments, FASTPREFIX_ATTENTION_ARGUMENTS), with_dense_rows(Tensor(grad_output)),
      with_dense_rows(Tensor(output)), contiguous(Tensor(normalizers)), read_needs(needs_grad)));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastprefix, CPU, library) {
  library.impl("prefix_attention.cpu", TORCH_BOX(&forward));
  library.impl("prefix_attention_backward.cpu", TORCH_BOX(&backward));
}

}  // namespace fastprefix
