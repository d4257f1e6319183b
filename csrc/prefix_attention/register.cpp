// The operators `fastprefix::prefix_attention.cpu` and `fastprefix::prefix_attention_backward.cpu`.
//
// Schemas, fakes and autograd are the Python package's (fastprefix/ops/prefix_attention/registration.py).
#include <ATen/ExpandUtils.h>
#include <torch/library.h>

#include "kernels.h"

namespace fastprefix {
namespace {

// Kernels read rows whose elements are neighbours. A tensor that is laid out otherwise (a stride over the head size)
// is copied; no layout that attention modules produce is.
Tensor with_dense_rows(const Tensor& x) {
  return x.size(-1) == 1 || x.stride(-1) == 1 ? x : x.contiguous();
}

OptionalTensor wide(const OptionalTensor& segments) {
  return segments ? OptionalTensor(segments->to(at::kLong)) : OptionalTensor();
}

// The layouts of fastprefix/ops/prefix_attention/layout.py: heads and length as in `like`.
Tensor empty_heads(const Tensor& like, int64_t size) {
  int64_t B = like.size(0), H = like.size(1), N = like.size(2);
  if (like.stride(1) < like.stride(2)) return at::empty({B, N, H, size}, like.options()).transpose(1, 2);
  return at::empty({B, H, N, size}, like.options());
}

Tensor empty_gradient(const Tensor& like) {
  return like.dim() == 4 ? empty_heads(like, like.size(3)) : at::empty(like.sizes(), like.options());
}

at::ScalarType accumulator(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

template <class Call>
void dispatch(at::ScalarType type, Call call) {
  switch (type) {
    case at::kFloat: return call(float{});
    case at::kDouble: return call(double{});
    case at::kBFloat16: return call(at::BFloat16{});
    case at::kHalf: return call(at::Half{});
    default: TORCH_CHECK_TYPE(false, "prefix_attention on the CPU takes float32, float64, bfloat16 or float16, got ", type);
  }
}

std::tuple<Tensor, Tensor> run_forward(Arguments a) {
  Tensor output = empty_heads(a.query, a.value.size(3));
  Tensor normalizers = at::empty(
      {a.output_gate ? 2 : 1, 2, a.query.size(0), a.query.size(1), a.query.size(2)},
      a.query.options().dtype(accumulator(a.query)));
  dispatch(a.query.scalar_type(), [&](auto type) { forward_kernel<decltype(type)>(a, output, normalizers); });
  return {output, normalizers};
}

// Sums for each block of queries [B, Hq, blocks, *] to the gradient of what was broadcast over them.
void sum_into(const Tensor& gradient, const Tensor& sums) {
  gradient.copy_(at::sum_to(sums, gradient.sizes()));
}

std::vector<Tensor> run_backward(
    const Arguments& original, Arguments a, const Tensor& grad_output, const Tensor& output, const Tensor& normalizers,
    c10::List<bool> asked) {
  TORCH_CHECK(
      !asked[7] && !asked[8], "attn_mask and prefix_bias have gradients from the eager backend alone");
  Needs needs{asked[0], asked[1], asked[2], asked[3], asked[4], asked[5], asked[6], asked[9]};
  const OptionalTensor tensors[10] = {
      original.query, original.key, original.value, original.prefix_key, original.prefix_value,
      original.prefix_gate, original.output_gate, {}, {}, original.sinks};
  Tensor results[10];
  for (int i = 0; i < 10; ++i)
    if (asked[i]) results[i] = empty_gradient(*tensors[i]);

  int64_t B = a.query.size(0), Hq = a.query.size(1), Hkv = a.key.size(1), N = a.query.size(2), P = a.prefix_key.size(2);
  int64_t blocks = query_blocks(N);
  bool each_query = a.prefix_gate && a.prefix_gate->dim() == 4 && a.prefix_gate->size(2) == N;
  auto sums = a.query.options().dtype(accumulator(a.query));
  Gradients gradients{results[0], results[1], results[2], results[3], results[4], {}, {}, {}};
  if (needs.prefix_gate) gradients.prefix_gate = at::empty({B, Hq, each_query ? N : blocks, P}, sums);
  if (needs.output_gate) gradients.output_gate = at::empty({B, Hq, blocks}, sums.dtype(at::kDouble));
  if (needs.sinks) gradients.sinks = at::empty({B, Hq, blocks}, sums.dtype(at::kDouble));

  if (B * N == 0) {
    for (const Tensor& result : results)
      if (result.defined()) result.zero_();
  } else {
    dispatch(a.query.scalar_type(), [&](auto type) {
      backward_kernel<decltype(type)>(a, needs, gradients, grad_output, output, normalizers);
    });
    if (needs.prefix_gate) {
      Tensor dg = gradients.prefix_gate;
      if (!each_query) dg = dg.sum(2, a.prefix_gate->dim() == 4);
      if (a.prefix_gate->dim() == 3) dg = dg.view({B, Hkv, Hq / Hkv, P}).sum(2);
      sum_into(results[5], dg);
    }
    if (needs.output_gate) sum_into(results[6], gradients.output_gate.sum(2));
    if (needs.sinks) sum_into(results[9], gradients.sinks.sum(at::IntArrayRef{0, 2}));
  }
  std::vector<Tensor> given;
  for (const Tensor& result : results)
    if (result.defined()) given.push_back(result);
  return given;
}

#define FASTPREFIX_ARGUMENTS                                                                                        \
  const Tensor &query, const Tensor &key, const Tensor &value, const Tensor &prefix_key, const Tensor &prefix_value, \
      const OptionalTensor &prefix_gate, const OptionalTensor &output_gate, const OptionalTensor &attn_mask,        \
      const OptionalTensor &prefix_bias, const OptionalTensor &sinks, const OptionalTensor &query_segments,         \
      const OptionalTensor &key_segments, const OptionalTensor &dropout_seed, bool is_causal,                       \
      std::optional<int64_t> window_size, std::optional<double> softcap, double scale, double dropout_p

#define FASTPREFIX_COLLECT(dense)                                                                                  \
  Arguments {                                                                                                      \
    dense(query), dense(key), dense(value), dense(prefix_key), dense(prefix_value), prefix_gate, output_gate,      \
        attn_mask, prefix_bias, sinks, wide(query_segments), wide(key_segments), dropout_seed, is_causal,          \
        window_size, softcap, scale, dropout_p                                                                     \
  }

std::tuple<Tensor, Tensor> forward(FASTPREFIX_ARGUMENTS) {
  return run_forward(FASTPREFIX_COLLECT(with_dense_rows));
}

std::vector<Tensor> backward(
    const Tensor& grad_output, const Tensor& output, const Tensor& normalizers, c10::List<bool> needs_grad,
    FASTPREFIX_ARGUMENTS) {
  return run_backward(
      FASTPREFIX_COLLECT(), FASTPREFIX_COLLECT(with_dense_rows), with_dense_rows(grad_output), output,
      normalizers.contiguous(), needs_grad);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastprefix, CPU, library) {
  library.impl("prefix_attention.cpu", forward);
  library.impl("prefix_attention_backward.cpu", backward);
}

}  // namespace fastprefix
