// The functions that the operators call: one forward and one backward per dtype. Each dtype is compiled in its own
// file.
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

// Define both functions for tensors of type T. Manner (gemm.h) multiplies.
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
