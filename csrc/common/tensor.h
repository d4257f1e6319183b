// A tensor class on PyTorch's stable C++ interface. A library compiled for TORCH_TARGET_VERSION (setup.py) runs with
// that version of PyTorch and every later one.
//
// Sizes and strides are read once. Functions that only rearrange them (select, transpose, ...) do not call PyTorch.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <numeric>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <type_traits>

#include "types.h"

namespace fastprefix {

using torch::stable::get_num_threads;
using torch::stable::parallel_for;

// Throw an exception that becomes an IndexError in Python. The operators convert it to ValueError
// (fastprefix/ops/registration.py), because PyTorch 2.15 converts no standard exception to ValueError.
template <class... Parts>
[[noreturn]] void refuse_value(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::out_of_range(message.str());
}

// Return PyTorch's number for an element type.
template <class T>
int32_t dtype_of() {
  if constexpr (std::is_same_v<T, float>) return aoti_torch_dtype_float32();
  if constexpr (std::is_same_v<T, double>) return aoti_torch_dtype_float64();
  if constexpr (std::is_same_v<T, BFloat16>) return aoti_torch_dtype_bfloat16();
  if constexpr (std::is_same_v<T, Float16>) return aoti_torch_dtype_float16();
  if constexpr (std::is_same_v<T, int64_t>) return aoti_torch_dtype_int64();
  if constexpr (std::is_same_v<T, bool>) return aoti_torch_dtype_bool();
  if constexpr (std::is_same_v<T, char>) return aoti_torch_dtype_uint8();
}

class Tensor {
 public:
  static constexpr int64_t kMaxDim = 5;

  Tensor() = default;  // undefined

  // Refer to PyTorch's tensor without owning it. The caller keeps it alive.
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {
    int64_t *sizes, *strides;
    const void* data;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &dim_));
    STD_TORCH_CHECK(
        dim_ <= kMaxDim, "fastprefix supports tensors with up to ", kMaxDim, " dimensions, but got one with ", dim_);
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &strides));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &dtype_));
    STABLE_TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(handle, &data));
    std::copy_n(sizes, dim_, sizes_.begin());
    std::copy_n(strides, dim_, strides_.begin());
    data_ = const_cast<void*>(data);
  }

  // Own a tensor.
  explicit Tensor(torch::stable::Tensor owner) : Tensor(owner.get()) { owner_ = std::move(owner); }

  bool defined() const { return handle_ != nullptr; }
  // Return the tensor in the form that PyTorch's functions accept.
  torch::stable::Tensor owner() const {
    if (owner_) return *owner_;
    AtenTensorHandle another;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(handle_, &another));
    return torch::stable::Tensor(another);
  }
  int64_t dim() const { return dim_; }
  int64_t size(int64_t d) const { return sizes_[index(d)]; }
  int64_t stride(int64_t d) const { return strides_[index(d)]; }
  int64_t numel() const {
    return std::accumulate(sizes_.begin(), sizes_.begin() + dim_, int64_t{1}, std::multiplies<>());
  }
  // Return true if the tensor is contiguous.
  bool dense() const {
    for (int64_t d = dim_ - 1, stride = 1; d >= 0; stride *= sizes_[d--])
      if (sizes_[d] != 1 && strides_[d] != stride) return false;
    return true;
  }
  int32_t dtype() const { return dtype_; }
  int64_t bytes_each() const { return static_cast<int64_t>(aoti_torch_dtype_element_size(dtype_)); }

  template <class T>
  bool holds() const {
    return dtype_ == dtype_of<std::remove_const_t<T>>();
  }
  template <class T>
  T* data() const {
    STD_TORCH_CHECK(holds<T>(), "fastprefix received a tensor whose dtype differs from the dtype of its first tensor");
    return static_cast<T*>(data_);
  }

  // ---- views ------------------------------------------------------------------------------------------------------

  Tensor select(int64_t d, int64_t i) const {
    Tensor part = *this;
    part.offset(i * stride(d));
    part.dim_ -= 1;
    std::copy(sizes_.begin() + d + 1, sizes_.end(), part.sizes_.begin() + d);
    std::copy(strides_.begin() + d + 1, strides_.end(), part.strides_.begin() + d);
    return part;
  }
  Tensor narrow(int64_t d, int64_t from, int64_t count) const {
    Tensor part = *this;
    part.offset(from * stride(d));
    part.sizes_[index(d)] = count;
    return part;
  }
  Tensor transpose(int64_t d0, int64_t d1) const {
    Tensor turned = *this;
    std::swap(turned.sizes_[d0], turned.sizes_[d1]);
    std::swap(turned.strides_[d0], turned.strides_[d1]);
    return turned;
  }
  // Split dimension d into several. A dimension of size 1, which broadcasts, becomes several dimensions of size 1.
  Tensor unflatten(int64_t d, std::initializer_list<int64_t> sizes) const {
    int64_t more = static_cast<int64_t>(sizes.size()) - 1, stride = strides_[d];
    Tensor split = *this;
    split.dim_ += more;
    std::copy(sizes_.begin() + d + 1, sizes_.begin() + dim_, split.sizes_.begin() + d + 1 + more);
    std::copy(strides_.begin() + d + 1, strides_.begin() + dim_, split.strides_.begin() + d + 1 + more);
    for (int64_t i = more; i >= 0; --i) {
      split.sizes_[d + i] = sizes_[d] == 1 ? 1 : sizes.begin()[i];
      split.strides_[d + i] = stride;
      stride *= split.sizes_[d + i];
    }
    return split;
  }
  Tensor unsqueeze(int64_t d) const {
    Tensor wider = *this;
    wider.dim_ += 1;
    std::copy(sizes_.begin() + d, sizes_.begin() + dim_, wider.sizes_.begin() + d + 1);
    std::copy(strides_.begin() + d, strides_.begin() + dim_, wider.strides_.begin() + d + 1);
    wider.sizes_[d] = 1;
    return wider;
  }

  // Set all elements to 0. The last dimension must have stride 1.
  void zero() const {
    if (numel() == 0) return;
    int64_t last = dim_ - 1, width = dim_ == 0 ? 1 : sizes_[last], each = bytes_each();
    parallel_for(0, numel() / width, 1 + (int64_t{1} << 16) / (width * each), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        int64_t at = 0;
        for (int64_t d = last - 1, rest = row; d >= 0; rest /= sizes_[d--]) at += rest % sizes_[d] * strides_[d];
        std::memset(static_cast<char*>(data_) + at * each, 0, width * each);
      }
    });
  }

 private:
  int64_t index(int64_t d) const { return d < 0 ? d + dim_ : d; }
  void offset(int64_t elements) { data_ = static_cast<char*>(data_) + elements * bytes_each(); }

  AtenTensorHandle handle_ = nullptr;
  std::optional<torch::stable::Tensor> owner_;
  void* data_ = nullptr;
  int64_t dim_ = 0;
  std::array<int64_t, kMaxDim> sizes_{}, strides_{};
  int32_t dtype_ = 0;
};

using OptionalTensor = std::optional<Tensor>;

inline Tensor empty_strided(const int64_t* sizes, const int64_t* strides, int64_t dim, int32_t dtype) {
  AtenTensorHandle handle = nullptr;
  STD_TORCH_CHECK(
      aoti_torch_empty_strided(dim, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle) ==
          AOTI_TORCH_SUCCESS,
      "fastprefix could not allocate a tensor on the CPU. Check that enough memory is free.");
  return Tensor(torch::stable::Tensor(handle));
}

// Allocate a contiguous tensor.
inline Tensor empty(std::initializer_list<int64_t> sizes, int32_t dtype) {
  int64_t strides[Tensor::kMaxDim], stride = 1, dim = static_cast<int64_t>(sizes.size());
  for (int64_t d = dim - 1; d >= 0; stride *= std::max<int64_t>(sizes.begin()[d--], 1)) strides[d] = stride;
  return empty_strided(sizes.begin(), strides, dim, dtype);
}

template <class T>
Tensor empty(std::initializer_list<int64_t> sizes) {
  return empty(sizes, dtype_of<T>());
}

// Allocate a contiguous tensor with the sizes and dtype of x.
inline Tensor empty_like(const Tensor& x) {
  int64_t sizes[Tensor::kMaxDim], strides[Tensor::kMaxDim], stride = 1;
  for (int64_t d = x.dim() - 1; d >= 0; stride *= std::max<int64_t>(sizes[d--], 1)) {
    sizes[d] = x.size(d);
    strides[d] = stride;
  }
  return empty_strided(sizes, strides, x.dim(), x.dtype());
}

inline Tensor empty_like(const OptionalTensor& x) {
  return empty_like(*x);
}

// Return x, or a contiguous copy. x must not be a view made by this class, since the copy is made from PyTorch's
// tensor.
inline Tensor contiguous(const Tensor& x) {
  return x.dense() ? x : Tensor(torch::stable::contiguous(x.owner()));
}

// Return x as a contiguous int64 tensor. The same restriction applies.
inline Tensor as_int64(const Tensor& x) {
  if (x.holds<int64_t>()) return contiguous(x);
  return contiguous(Tensor(torch::stable::to(x.owner(), torch::headeronly::ScalarType::Long)));
}

// Call call(T{}) with the element type T of x.
template <class Call>
void dispatch(const char* operation, const Tensor& x, Call call) {
  if (x.holds<float>()) return call(float{});
  if (x.holds<BFloat16>()) return call(BFloat16{});
  if (x.holds<Float16>()) return call(Float16{});
  if (x.holds<double>()) return call(double{});
  STD_TORCH_CHECK(false, operation, " on the CPU supports float32, float64, bfloat16 and float16 only");
}

}  // namespace fastprefix
