// What a list of arguments can be expanded to. A list is a macro of X(type, name) with separators between them, so that
// structs, enums and parameter lists that name every argument are all made of one list.
#pragma once

#include "tensor.h"

namespace fastprefix {

// An argument as PyTorch hands it to an operator, who has to release it.
template <class T>
struct BoxedOf {
  using type = T;
  static const T& open(const T& argument) { return argument; }
  static void release(const T&) {}
};
template <>
struct BoxedOf<Tensor> {
  using type = AtenTensorHandle;
  static Tensor open(AtenTensorHandle handle) { return Tensor(handle); }
  static void release(AtenTensorHandle handle) { aoti_torch_delete_tensor_object(handle); }
};
template <>
struct BoxedOf<OptionalTensor> {
  using type = std::optional<AtenTensorHandle>;
  static OptionalTensor open(type handle) { return handle ? OptionalTensor(Tensor(*handle)) : std::nullopt; }
  static void release(type handle) {
    if (handle) BoxedOf<Tensor>::release(*handle);
  }
};
template <class T>
using Boxed = typename BoxedOf<T>::type;

// Releases arguments when the operator has run, or failed.
template <class Release>
struct Finally {
  Release release;
  ~Finally() { release(); }
};
template <class Release>
Finally(Release) -> Finally<Release>;

// Several tensors as an operator returns them.
inline std::vector<torch::stable::Tensor> boxed(const std::vector<Tensor>& tensors) {
  std::vector<torch::stable::Tensor> owners;
  for (const Tensor& tensor : tensors) owners.push_back(tensor.owner());
  return owners;
}

}  // namespace fastprefix

#define FASTPREFIX_NOTHING()
#define FASTPREFIX_COMMA() ,

#define FASTPREFIX_FIELD(type, name) type name;
#define FASTPREFIX_FLAG(type, name) bool name = false;
#define FASTPREFIX_RESULT(type, name) Tensor name;
#define FASTPREFIX_NAME(type, name) name
#define FASTPREFIX_PARAMETER(type, name) Boxed<type> name
#define FASTPREFIX_OPENED(type, name) BoxedOf<type>::open(name)
#define FASTPREFIX_RELEASED(type, name) BoxedOf<type>::release(name);
