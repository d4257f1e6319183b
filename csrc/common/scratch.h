// Scratch memory from PyTorch's allocator, and the division of work into slots. A slot is a consecutive range of work
// items with its own scratch memory, run by one thread.
#pragma once

#include <algorithm>
#include <numeric>
#include <ranges>
#include <vector>

#include "tensor.h"

namespace fastprefix {

// Divides a piece of memory into arrays, each on its own cache lines. Without memory (nullptr), it only counts the
// bytes needed.
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

  // Allocate memory for `bytes` bytes that start on a cache line. `align` returns that start.
  static Tensor allocate(int64_t bytes) { return empty<char>({bytes + kLine}); }
  static char* align(const Tensor& memory) {
    auto address = reinterpret_cast<uintptr_t>(memory.data<char>());
    return reinterpret_cast<char*>((address + kLine - 1) / kLine * kLine);
  }

 private:
  char* memory_;
  int64_t used_ = 0;
};

// The work items [0, items) in consecutive shares of about equal cost, one per slot. The shares depend only on the
// costs and the number of threads, so sums over slots have the same order in every run.
class Slots {
 public:
  int64_t items, count;

  // Divide consecutive groups of items, which consist of `repeats` runs of items. Item i of a run costs
  // of_item[i] + of_group[group].
  Slots(int64_t repeats, const std::vector<int64_t>& of_item, const std::vector<int64_t>& of_group)
      : items(repeats * std::ssize(of_item) * std::ssize(of_group)),
        count(std::min<int64_t>(items, get_num_threads())) {
    int64_t run = std::ssize(of_item), size = repeats * run, groups = std::ssize(of_group), total = 0;
    std::vector<int64_t> sums(run + 1, 0);  // of the first items of a run, without the costs of the group
    std::partial_sum(of_item.begin(), of_item.end(), sums.begin() + 1);
    // Return the cost of the first i items of a group.
    auto cost = [&](int64_t group, int64_t i) { return i / run * sums[run] + sums[i % run] + i * of_group[group]; };
    if (items > 0)
      for (int64_t group = 0; group < groups; ++group) total += cost(group, size);
    for (int64_t slot = 0, group = 0, before = 0; slot < count; ++slot) {
      // A slot begins where the cost of all earlier items is closest to its share.
      int64_t target = slot * total / count;
      while (before + cost(group, size) <= target) before += cost(group++, size);
      auto is_within = [&](int64_t i) { return before + cost(group, i) <= target; };
      int64_t first = *std::ranges::partition_point(std::views::iota(int64_t{1}, size + 1), is_within) - 1;
      if (before + cost(group, first + 1) - target < target - before - cost(group, first)) ++first;
      firsts_.push_back(std::max(group * size + first, slot));
    }
    firsts_.push_back(items);
    for (int64_t slot = count - 1; slot > 0; --slot) firsts_[slot] = std::min(firsts_[slot], firsts_[slot + 1] - 1);
  }

  // Divide items of equal cost.
  explicit Slots(int64_t items) : Slots(items, {1}, {0}) {}

  int64_t first(int64_t slot) const { return firsts_[slot]; }
  // Return the slot of an item.
  int64_t of(int64_t item) const {
    return std::upper_bound(firsts_.begin(), firsts_.end(), item) - firsts_.begin() - 1;
  }

  // Run body(slot, scratch) for every slot in parallel. Each slot has `bytes` bytes of scratch memory.
  template <class Body>
  void run(int64_t bytes, Body body) const {
    Tensor memory = Arena::allocate(count * bytes);
    char* aligned = Arena::align(memory);
    parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t slot = begin; slot < end; ++slot) body(slot, aligned + slot * bytes);
    });
  }

 private:
  std::vector<int64_t> firsts_;  // [count + 1]; every slot has at least one item
};

}  // namespace fastprefix
