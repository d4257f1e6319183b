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

// The arguments as the kernels read them: rows are dense, segments have 64 bits.
AttentionArguments with_dense_rows(AttentionArguments a) {
  for (Tensor* x : {&a.query, &a.key, &a.value, &a.prefix_key, &a.prefix_value}) *x = with_dense_rows(*x);
  for (OptionalTensor* x : {&a.query_segments, &a.key_segments})
    if (*x) *x = (*x)->to(at::kLong);
  if (a.prefix_spans) a.prefix_spans = a.prefix_spans->to(at::kLong).contiguous();
  return a;
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

Tensor empty_gradient(const OptionalTensor& like) {
  return empty_gradient(*like);
}

AttentionNeeds read_needs(const c10::List<bool>& asked) {
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

// Those that are there, in the order of the schema.
std::vector<Tensor> list_results(const AttentionResults& results) {
  std::vector<Tensor> given;
#define FASTPREFIX_LIST(type, name) \
  if (results.name.defined()) given.push_back(results.name);
  FASTPREFIX_ATTENTION_DIFFERENTIABLE(FASTPREFIX_LIST, FASTPREFIX_NOTHING)
#undef FASTPREFIX_LIST
  return given;
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
    default:
      TORCH_CHECK_TYPE(false, "prefix_attention on the CPU takes float32, float64, bfloat16 or float16, got ", type);
  }
}

std::tuple<Tensor, Tensor> run_forward(const AttentionArguments& a) {
  Tensor output = empty_heads(a.query, a.value.size(3));
  Tensor normalizers = at::empty(
      {a.output_gate ? 2 : 1, 2, a.query.size(0), a.query.size(1), a.query.size(2)},
      a.query.options().dtype(accumulator(a.query)));
  dispatch(a.query.scalar_type(), [&](auto type) { forward_kernel<decltype(type)>(a, output, normalizers); });
  return {output, normalizers};
}

// Sums to the gradient of what was broadcast over them.
void sum_into(const Tensor& gradient, const Tensor& sums) {
  gradient.copy_(at::sum_to(sums, gradient.sizes()));
}

// The same for sums with a column for each prefix key; where the gradient has more columns, no row sees their keys.
void sum_columns_into(const Tensor& gradient, const Tensor& sums) {
  int64_t columns = sums.size(-1);
  if (gradient.size(-1) <= std::max<int64_t>(columns, 1)) return sum_into(gradient, sums);
  gradient.narrow(-1, columns, gradient.size(-1) - columns).zero_();
  sum_into(gradient.narrow(-1, 0, columns), sums);
}

std::vector<Tensor> run_backward(
    const AttentionArguments& original,
    const Tensor& grad_output,
    const Tensor& output,
    const Tensor& normalizers,
    const AttentionNeeds& needs) {
  TORCH_CHECK(
      !needs.attn_mask && !needs.prefix_bias, "attn_mask and prefix_bias have gradients from the eager backend alone");
  AttentionResults results = allocate_results(needs, original);
  std::vector<Tensor> given = list_results(results);
  AttentionArguments a = with_dense_rows(original);

  int64_t B = a.query.size(0), Hq = a.query.size(1), Hkv = a.key.size(1), N = a.query.size(2);
  if (B * N == 0) {
    for (const Tensor& result : given) result.zero_();
    return given;
  }
  for (const Tensor& result : {results.prefix_key, results.prefix_value})
    if (result.defined() && a.frozen_prefix > 0) result.narrow(2, 0, a.frozen_prefix).zero_();
  int64_t blocks = query_blocks(N);
  auto sums = a.query.options().dtype(at::kDouble);
  AttentionGradients gradients{results, {}, {}, {}, {}};
  if (needs.output_gate) gradients.output_gate_sums = at::empty({B, Hq, blocks}, sums);
  if (needs.sinks) gradients.sinks_sums = at::empty({B, Hq, blocks}, sums);

  dispatch(a.query.scalar_type(), [&](auto type) {
    backward_kernel<decltype(type)>(a, needs, gradients, grad_output, output, normalizers);
  });
  if (needs.prefix_gate) {
    Tensor dg = gradients.prefix_gate;
    int64_t P = dg.size(-1);
    if (a.prefix_gate->dim() == 3) dg = dg.view({Hkv, B, P}).transpose(0, 1);
    else if (a.prefix_gate->size(2) == 1) dg = dg.view({Hkv, B, Hq / Hkv, P}).transpose(0, 1).reshape({B, Hq, 1, P});
    sum_columns_into(results.prefix_gate, dg);
  }
  if (needs.prefix_key_bias) {
    Tensor db = gradients.prefix_key_bias;
    sum_columns_into(results.prefix_key_bias, db.view({Hkv, db.size(0) / Hkv, db.size(1)}).transpose(0, 1));
  }
  if (needs.output_gate) sum_into(results.output_gate, gradients.output_gate_sums.sum(2));
  if (needs.sinks) sum_into(results.sinks, gradients.sinks_sums.sum(at::IntArrayRef{0, 2}));
  return given;
}

#define FASTPREFIX_PARAMETERS FASTPREFIX_ATTENTION_ARGUMENTS(FASTPREFIX_PARAMETER, FASTPREFIX_COMMA)
#define FASTPREFIX_COLLECTED                                          \
  AttentionArguments {                                                \
    FASTPREFIX_ATTENTION_ARGUMENTS(FASTPREFIX_NAME, FASTPREFIX_COMMA) \
  }

std::tuple<Tensor, Tensor> forward(FASTPREFIX_PARAMETERS) {
  return run_forward(with_dense_rows(FASTPREFIX_COLLECTED));
}

std::vector<Tensor> backward(
    const Tensor& grad_output,
    const Tensor& output,
    const Tensor& normalizers,
    c10::List<bool> needs_grad,
    FASTPREFIX_PARAMETERS) {
  return run_backward(
      FASTPREFIX_COLLECTED, with_dense_rows(grad_output), output, normalizers.contiguous(), read_needs(needs_grad));
}

}  // namespace

TORCH_LIBRARY_IMPL(fastprefix, CPU, library) {
  library.impl("prefix_attention.cpu", forward);
  library.impl("prefix_attention_backward.cpu", backward);
}

}  // namespace fastprefix
