// Scratch memory, one piece for each slot of parallel work, from PyTorch's allocator.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>

namespace fastprefix {

// Hands out arrays, each on its own cache lines. Without memory (nullptr) it only counts what will be needed.
class Arena {
 public:
  explicit Arena(char* memory) : memory_(memory) {}

  template <class T>
  T* take(int64_t count) {
    T* array = memory_ ? reinterpret_cast<T*>(memory_ + used_) : nullptr;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + kLine - 1) / kLine * kLine;
    return array;
  }
  int64_t used() const { return used_; }

  static constexpr int64_t kLine = 128;

 private:
  char* memory_;
  int64_t used_ = 0;
};

// Work [0, items) in equal, consecutive shares, one a slot; the shares depend on the number of threads alone.
struct Slots {
  int64_t items, count;

  explicit Slots(int64_t items)
      : items(items), count(std::min<int64_t>(items, at::in_parallel_region() ? 1 : at::get_num_threads())) {}

  int64_t first(int64_t slot) const { return slot * items / count; }
  int64_t of(int64_t item) const {
    int64_t slot = item * count / items;
    while (first(slot + 1) <= item) ++slot;
    while (first(slot) > item) --slot;
    return slot;
  }

  // Runs body(slot, scratch) for every slot; `bytes` of scratch each.
  template <class Body>
  void run(int64_t bytes, Body body) const {
    at::Tensor memory = at::empty({count * bytes + Arena::kLine}, at::kByte);
    auto address = reinterpret_cast<uintptr_t>(memory.data_ptr());
    char* aligned = reinterpret_cast<char*>((address + Arena::kLine - 1) / Arena::kLine * Arena::kLine);
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t slot = begin; slot < end; ++slot) body(slot, aligned + slot * bytes);
    });
  }
};

}  // namespace fastprefix
