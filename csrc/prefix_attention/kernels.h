// What the operators call: one pair of functions for each type of tensor, compiled in its own file.
#pragma once

#include "backward.h"
#include "forward.h"

namespace fastprefix {

template <class T>
void forward_kernel(const AttentionArguments& a, Tensor& output, Tensor& normalizers);

template <class T>
void backward_kernel(
    const AttentionArguments& a,
    const AttentionNeeds& needs,
    AttentionGradients& gradients,
    const Tensor& grad_output,
    const Tensor& output,
    const Tensor& normalizers);

// The body of both, for tensors of type T and products in the manner of Manner.
#define FASTPREFIX_DEFINE_KERNELS(T, Manner)                                                         \
  template <>                                                                                        \
  void forward_kernel<T>(const AttentionArguments& a, Tensor& output, Tensor& normalizers) {         \
    AttentionProblem<T, Manner::Accumulator> problem(a);                                             \
    AttentionForward<Manner, T>(problem, output, normalizers).run();                                 \
  }                                                                                                  \
  template <>                                                                                        \
  void backward_kernel<T>(                                                                           \
      const AttentionArguments& a, const AttentionNeeds& needs, AttentionGradients& gradients,       \
      const Tensor& grad_output, const Tensor& output, const Tensor& normalizers) {                  \
    AttentionProblem<T, Manner::Accumulator> problem(a);                                             \
    AttentionBackward<Manner, T>(problem, needs, gradients, grad_output, output, normalizers).run(); \
  }

}  // namespace fastprefix
