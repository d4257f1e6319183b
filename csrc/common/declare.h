// Macros that expand a list of arguments into struct fields, enum members, parameter lists and so on. A list is a macro
// of X(type, name) entries with separators between them, so each argument is declared only once.
#pragma once

#include "tensor.h"

namespace fastprefix {

// The form in which PyTorch passes an argument of type T to an operator. The operator must release it.
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

// Runs `release` at the end of a scope, also when an exception leaves it.
template <class Release>
struct Finally {
  Release release;
  ~Finally() { release(); }
};
template <class Release>
Finally(Release) -> Finally<Release>;

// Convert a list of tensors to the type that an operator returns.
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
// For a list of arguments such as FASTPREFIX_ATTENTION_ARGUMENTS: a function's parameters, the arguments in a struct,
// and the statements that release the parameters.
#define FASTPREFIX_PARAMETERS(LIST) LIST(FASTPREFIX_PARAMETER, FASTPREFIX_COMMA)
#define FASTPREFIX_COLLECTED(STRUCT, LIST)    \
  STRUCT {                                    \
    LIST(FASTPREFIX_OPENED, FASTPREFIX_COMMA) \
  }
#define FASTPREFIX_RELEASE(LIST) LIST(FASTPREFIX_RELEASED, FASTPREFIX_NOTHING)
