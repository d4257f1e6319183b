// The operators `fastprefix::prompt_embedding.cpu` and `fastprefix::prompt_embedding_backward.cpu`.
//
// They allocate the results and choose the kernels by dtype. Python defines the schemas, fakes and autograd
// (fastprefix/ops/prompt_embedding/registration.py).
#include <torch/csrc/stable/library.h>

#include "backward.h"
#include "forward.h"

namespace fastprefix::prompt_embedding {
namespace {

Tensor run_forward(const EmbeddingArguments& a) {
  Tensor output;
  dispatch("prompt_embedding", a.weight, [&](auto type) {
    EmbeddingProblem<decltype(type)> problem(a);  // checks the ids
    output = empty({a.B(), a.S() + a.N(), a.d()}, a.weight.dtype());
    if (output.numel() > 0) EmbeddingForward<decltype(type)>(problem, a.prompt, output).run();
  });
  return output;
}

std::vector<Tensor> run_backward(
    const Tensor& grad_output, const std::vector<bool>& asked, const EmbeddingArguments& a) {
  EmbeddingGradients gradients;
  std::vector<Tensor> given;
#define FASTPREFIX_ALLOCATE(type, name) \
  if (asked[static_cast<int64_t>(EmbeddingGradient::name)]) given.push_back(gradients.name = empty_like(a.name));
  FASTPREFIX_EMBEDDING_DIFFERENTIABLE(FASTPREFIX_ALLOCATE, FASTPREFIX_NOTHING)
#undef FASTPREFIX_ALLOCATE
  if (grad_output.numel() == 0) {
    for (const Tensor& result : given) result.zero();
    return given;
  }
  Tensor dy = grad_output.size(2) == 1 || grad_output.stride(2) == 1 ? grad_output : contiguous(grad_output);
  dispatch("prompt_embedding", a.weight, [&](auto type) {
    EmbeddingProblem<decltype(type)> problem(a);
    if (a.N() == 0)
      for (const Tensor& result : given) result.zero();  // EmbeddingBackward then writes the prompt's gradient only
    EmbeddingBackward<decltype(type)>(problem, gradients, dy).run();
  });
  return given;
}

torch::stable::Tensor forward(FASTPREFIX_PARAMETERS(FASTPREFIX_EMBEDDING_ARGUMENTS)) {
  Finally released{[&] { FASTPREFIX_RELEASE(FASTPREFIX_EMBEDDING_ARGUMENTS) }};
  return run_forward(FASTPREFIX_COLLECTED(EmbeddingArguments, FASTPREFIX_EMBEDDING_ARGUMENTS)).owner();
}

std::vector<torch::stable::Tensor> backward(
    AtenTensorHandle grad_output, std::vector<bool> needs_grad, FASTPREFIX_PARAMETERS(FASTPREFIX_EMBEDDING_ARGUMENTS)) {
  Finally released{[&] { FASTPREFIX_RELEASED(Tensor, grad_output) FASTPREFIX_RELEASE(FASTPREFIX_EMBEDDING_ARGUMENTS) }};
  return boxed(run_backward(
      Tensor(grad_output), needs_grad, FASTPREFIX_COLLECTED(EmbeddingArguments, FASTPREFIX_EMBEDDING_ARGUMENTS)));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastprefix, CPU, library) {
  library.impl("prompt_embedding.cpu", TORCH_BOX(&forward));
  library.impl("prompt_embedding_backward.cpu", TORCH_BOX(&backward));
}

}  // namespace fastprefix::prompt_embedding
