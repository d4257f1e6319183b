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
    default:
      TORCH_CHECK_TYPE(false, "prompt_embedding on the CPU takes float32, float64, bfloat16 or float16, got ", type);
  }
}

Tensor run_forward(const EmbeddingArguments& a) {
  Tensor output;
  dispatch(a.weight.scalar_type(), [&](auto type) {
    EmbeddingProblem<decltype(type)> problem(a);  // checks the ids
    output = at::empty({a.B(), a.S() + a.N(), a.d()}, a.weight.options());
    if (output.numel() > 0) EmbeddingForward<decltype(type)>(problem, a.prompt, output).run();
  });
  return output;
}

Tensor empty_gradient(const Tensor& x) {
  return at::empty(x.sizes(), x.options());
}

Tensor empty_gradient(const OptionalTensor& x) {
  return empty_gradient(*x);
}

std::vector<Tensor> run_backward(const Tensor& grad_output, const c10::List<bool>& asked, const EmbeddingArguments& a) {
  EmbeddingGradients gradients;
  std::vector<Tensor> given;
#define FASTPREFIX_ALLOCATE(type, name) \
  if (asked[static_cast<int64_t>(EmbeddingGradient::name)]) given.push_back(gradients.name = empty_gradient(a.name));
  FASTPREFIX_EMBEDDING_DIFFERENTIABLE(FASTPREFIX_ALLOCATE, FASTPREFIX_NOTHING)
#undef FASTPREFIX_ALLOCATE
  if (grad_output.numel() == 0) {
    for (const Tensor& result : given) result.zero_();
    return given;
  }
  Tensor dy = grad_output.size(2) == 1 || grad_output.stride(2) == 1 ? grad_output : grad_output.contiguous();
  dispatch(a.weight.scalar_type(), [&](auto type) {
    EmbeddingProblem<decltype(type)> problem(a);
    if (a.N() == 0)
      for (const Tensor& result : given) result.zero_();  // all but the prompt's
    EmbeddingBackward<decltype(type)>(problem, gradients, dy).run();
  });
  return given;
}

#define FASTPREFIX_PARAMETERS FASTPREFIX_EMBEDDING_ARGUMENTS(FASTPREFIX_PARAMETER, FASTPREFIX_COMMA)
#define FASTPREFIX_COLLECTED                                          \
  EmbeddingArguments {                                                \
    FASTPREFIX_EMBEDDING_ARGUMENTS(FASTPREFIX_NAME, FASTPREFIX_COMMA) \
  }

Tensor forward(FASTPREFIX_PARAMETERS) {
  return run_forward(FASTPREFIX_COLLECTED);
}

std::vector<Tensor> backward(const Tensor& grad_output, c10::List<bool> needs_grad, FASTPREFIX_PARAMETERS) {
  return run_backward(grad_output, needs_grad, FASTPREFIX_COLLECTED);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastprefix, CPU, library) {
  library.impl("prompt_embedding.cpu", forward);
  library.impl("prompt_embedding_backward.cpu", backward);
}

}  // namespace fastprefix::prompt_embedding
