// What the operators call: one pair of functions for each type of tensor, compiled in its own file.
#pragma once

#include "backward.h"
#include "forward.h"

namespace fastprefix {

template <class T>
void forward_kernel(const Arguments& a, Tensor& output, Tensor& normalizers);

template <class T>
void backward_kernel(
    const Arguments& a,
    const Needs& needs,
    const Gradients& gradients,
    const Tensor& grad_output,
    const Tensor& output,
    const Tensor& normalizers);

// The body of both, for tensors of type T and products in the manner of M.
#define FASTPREFIX_DEFINE_KERNELS(T, M)                                                                       \
  template <>                                                                                                 \
  void forward_kernel<T>(const Arguments& a, Tensor& output, Tensor& normalizers) {                                   \
    Problem<T, M::Accumulator> problem(a);                                                                    \
    Forward<M, T>(problem, output, normalizers).run();                                                                \
  }                                                                                                           \
  template <>                                                                                                 \
  void backward_kernel<T>(                                                                                    \
      const Arguments& a, const Needs& needs, const Gradients& gradients, const Tensor& grad_output,          \
      const Tensor& output, const Tensor& normalizers) {                                                              \
    Problem<T, M::Accumulator> problem(a);                                                                    \
    Backward<M, T>(problem, needs, gradients, grad_output, output, normalizers).run();                                \
  }

}  // namespace fastprefix
