// Scratch memory, one piece for each slot of parallel work, from PyTorch's allocator.
#pragma once

#include <vector>

#include "tensor.h"

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

  // Memory for so many bytes, and where it begins on a cache line.
  static Tensor allocate(int64_t bytes) { return empty<char>({bytes + kLine}); }
  static char* align(const Tensor& memory) {
    auto address = reinterpret_cast<uintptr_t>(memory.data<char>());
    return reinterpret_cast<char*>((address + kLine - 1) / kLine * kLine);
  }

 private:
  char* memory_;
  int64_t used_ = 0;
};

// Work [0, items) in consecutive shares, one a slot, equal by what the items cost; the shares depend on that and on the
// number of threads alone.
class Slots {
 public:
  int64_t items, count;

  // Groups of `size` items follow one another, each item of which costs what `costs` says of its group.
  Slots(int64_t size, const std::vector<int64_t>& costs)
      : items(size * static_cast<int64_t>(costs.size())), count(std::min<int64_t>(items, get_num_threads())) {
    int64_t total = size * std::accumulate(costs.begin(), costs.end(), int64_t{0}), before = 0, group = 0;
    for (int64_t slot = 0; slot < count; ++slot) {
      int64_t target = slot * total / count;
      while (before + size * costs[group] <= target) before += size * costs[group++];
      firsts_.push_back(std::max(group * size + (target - before) / costs[group], slot));
    }
    firsts_.push_back(items);
    for (int64_t slot = count - 1; slot > 0; --slot) firsts_[slot] = std::min(firsts_[slot], firsts_[slot + 1] - 1);
  }

  explicit Slots(int64_t items) : Slots(items, std::vector<int64_t>(1, 1)) {}

  int64_t first(int64_t slot) const { return firsts_[slot]; }
  int64_t of(int64_t item) const {
    return std::upper_bound(firsts_.begin(), firsts_.end(), item) - firsts_.begin() - 1;
  }

  // Runs body(slot, scratch) for every slot; `bytes` of scratch each.
  template <class Body>
  void run(int64_t bytes, Body body) const {
    Tensor memory = Arena::allocate(count * bytes);
    char* aligned = Arena::align(memory);
    parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t slot = begin; slot < end; ++slot) body(slot, aligned + slot * bytes);
    });
  }

 private:
  std::vector<int64_t> firsts_;  // [count + 1]; every slot has an item
};

}  // namespace fastprefix
