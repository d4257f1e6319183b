// The operators `fastprefix::prompt_embedding.cpu` and `fastprefix::prompt_embedding_backward.cpu`.
//
// Schemas, fakes and autograd are the Python package's (fastprefix/ops/prompt_embedding/registration.py).
#include <torch/library.h>

#include "backward.h"
#include "forward.h"

namespace fastprefix::prompt_embedding {
namespace {

template <class Call>
void dispatch(at::ScalarType type, Call call) {
  switch (type) {
    case at::kFloat: return call(float{});
    case at::kDouble: return call(double{});
    case at::kBFloat16: return call(at::BFloat16{});
    case at::kHalf: return call(at::Half{});
    default: TORCH_CHECK_TYPE(false, "prompt_embedding on the CPU takes float32, float64, bfloat16 or float16, got ", type);
  }
}

Tensor run_forward(const Arguments& a) {
  Tensor output;
  dispatch(a.weight.scalar_type(), [&](auto type) {
    Problem<decltype(type)> problem(a);  // checks the ids
    output = at::empty({a.B(), a.S() + a.N(), a.d()}, a.weight.options());
    if (output.numel() > 0) Forward<decltype(type)>(problem, a.prompt, output).run();
  });
  return output;
}

std::vector<Tensor> run_backward(const Tensor& grad_output, const c10::List<bool>& asked, const Arguments& a) {
  const OptionalTensor tensors[8] = {a.weight, a.prompt, a.w1, a.b1, a.w2, a.b2, a.low_rank_a, a.low_rank_b};
  Tensor results[8];
  std::vector<Tensor> given;
  for (int i = 0; i < 8; ++i)
    if (asked[i]) given.push_back(results[i] = at::empty(tensors[i]->sizes(), tensors[i]->options()));
  Gradients gradients{results[0], results[1], results[2], results[3], results[4], results[5], results[6], results[7]};
  if (grad_output.numel() == 0) {
    for (const Tensor& result : given) result.zero_();
    return given;
  }
  Tensor dy = grad_output.size(2) == 1 || grad_output.stride(2) == 1 ? grad_output : grad_output.contiguous();
  dispatch(a.weight.scalar_type(), [&](auto type) {
    Problem<decltype(type)> problem(a);
    if (a.N() == 0)
      for (const Tensor& result : given) result.zero_();  // all but the prompt's
    Backward<decltype(type)>(problem, gradients, dy).run();
  });
  return given;
}

#define FASTPREFIX_ARGUMENTS                                                                                     \
  const Tensor &input_ids, const Tensor &weight, const OptionalTensor &prompt, const OptionalTensor &w1,         \
      const OptionalTensor &b1, const OptionalTensor &w2, const OptionalTensor &b2,                              \
      const OptionalTensor &low_rank_a, const OptionalTensor &low_rank_b, const OptionalTensor &dropout_seed,    \
      double offset_scale, double dropout_p

#define FASTPREFIX_COLLECT \
  Arguments { input_ids, weight, prompt, w1, b1, w2, b2, low_rank_a, low_rank_b, dropout_seed, offset_scale, dropout_p }

Tensor forward(FASTPREFIX_ARGUMENTS) {
  return run_forward(FASTPREFIX_COLLECT);
}

std::vector<Tensor> backward(const Tensor& grad_output, c10::List<bool> needs_grad, FASTPREFIX_ARGUMENTS) {
  return run_backward(grad_output, needs_grad, FASTPREFIX_COLLECT);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastprefix, CPU, library) {
  library.impl("prompt_embedding.cpu", forward);
  library.impl("prompt_embedding_backward.cpu", backward);
}

}  // namespace fastprefix::prompt_embedding
