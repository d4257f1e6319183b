// Tensors, over the part of PyTorch's C++ interface that stays as it is from one version to the next
// (TORCH_TARGET_VERSION in setup.py), so that one library runs with every PyTorch from that version on.
//
// Sizes and strides are read once; what only rearranges them (select, transpose, ...) asks PyTorch nothing.
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

// Raises ValueError in Python.
template <class... Parts>
[[noreturn]] void refuse_value(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

// PyTorch's number of an element type.
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

  Tensor() = default;  // not there

  // PyTorch's tensor, which lives as long as somebody else holds it.
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {
    int64_t *sizes, *strides;
    const void* data;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &dim_));
    STD_TORCH_CHECK(dim_ <= kMaxDim, "fastprefix got a tensor with ", dim_, " dimensions");
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &strides));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &dtype_));
    STABLE_TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(handle, &data));
    std::copy_n(sizes, dim_, sizes_.begin());
    std::copy_n(strides, dim_, strides_.begin());
    data_ = const_cast<void*>(data);
  }

  // A tensor of our own.
  explicit Tensor(torch::stable::Tensor owner) : Tensor(owner.get()) { owner_ = std::move(owner); }

  bool defined() const { return handle_ != nullptr; }
  // As PyTorch's functions take it.
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
  // Whether its elements lie one after the other, the last dimension innermost.
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
    STD_TORCH_CHECK(holds<T>(), "fastprefix got a tensor of another dtype than that of its first tensor");
    return static_cast<T*>(data_);
  }

  // ---- other looks at the same elements ---------------------------------------------------------------------------

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
  // Dimension d as several. One of size 1, which broadcasts, becomes as many that do.
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

  // Elements become 0. The last dimension is dense.
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
      "fastprefix could not allocate a tensor on the CPU; is there enough memory?");
  return Tensor(torch::stable::Tensor(handle));
}

// Dense, the last dimension innermost.
inline Tensor empty(std::initializer_list<int64_t> sizes, int32_t dtype) {
  int64_t strides[Tensor::kMaxDim], stride = 1, dim = static_cast<int64_t>(sizes.size());
  for (int64_t d = dim - 1; d >= 0; stride *= std::max<int64_t>(sizes.begin()[d--], 1)) strides[d] = stride;
  return empty_strided(sizes.begin(), strides, dim, dtype);
}

template <class T>
Tensor empty(std::initializer_list<int64_t> sizes) {
  return empty(sizes, dtype_of<T>());
}

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

// x is a whole tensor, not a part of one.
inline Tensor contiguous(const Tensor& x) {
  return x.dense() ? x : Tensor(torch::stable::contiguous(x.owner()));
}

// Whole numbers as 64-bit ones, dense.
inline Tensor as_int64(const Tensor& x) {
  if (x.holds<int64_t>()) return contiguous(x);
  return contiguous(Tensor(torch::stable::to(x.owner(), torch::headeronly::ScalarType::Long)));
}

// Calls call(T{}) for the element type of x.
template <class Call>
void dispatch(const char* operation, const Tensor& x, Call call) {
  if (x.holds<float>()) return call(float{});
  if (x.holds<BFloat16>()) return call(BFloat16{});
  if (x.holds<Float16>()) return call(Float16{});
  if (x.holds<double>()) return call(double{});
  STD_TORCH_CHECK(false, operation, " on the CPU takes float32, float64, bfloat16 or float16");
}

}  // namespace fastprefix
