// The occurrences of each distinct token id, for a token's offset depends on its id alone.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

namespace fastprefix::prompt_embedding {

// Group u: the token `token[u]`, at the places `place[start[u]]` to `place[start[u + 1] - 1]` of the flat ids.
struct Groups {
  std::vector<int64_t> token, start, place;

  int64_t count() const { return static_cast<int64_t>(token.size()); }

  // Every occurrence a group of its own.
  static Groups singles(const int64_t* ids, int64_t tokens) {
    Groups groups{std::vector<int64_t>(ids, ids + tokens), std::vector<int64_t>(tokens + 1), {}};
    std::iota(groups.start.begin(), groups.start.end(), 0);
    groups.place = groups.start;
    return groups;
  }

  // One group for each id, in the order in which they first occur.
  static Groups distinct(const int64_t* ids, int64_t tokens) {
    int bits = 4;
    while ((int64_t{1} << bits) < 2 * tokens) ++bits;
    std::vector<int32_t> table(size_t{1} << bits, -1);  // open addressing; holds groups
    std::vector<int32_t> group(tokens);
    Groups groups;
    std::vector<int64_t> size;
    for (int64_t t = 0; t < tokens; ++t) {
      size_t slot = (static_cast<uint64_t>(ids[t]) * 0x9E3779B97F4A7C15u) >> (64 - bits);
      while (table[slot] >= 0 && groups.token[table[slot]] != ids[t]) slot = (slot + 1) & (table.size() - 1);
      if (table[slot] < 0) {
        table[slot] = static_cast<int32_t>(groups.token.size());
        groups.token.push_back(ids[t]);
        size.push_back(0);
      }
      group[t] = table[slot];
      ++size[table[slot]];
    }
    groups.start.assign(1, 0);
    for (int64_t n : size) groups.start.push_back(groups.start.back() + n);
    groups.place.resize(tokens);
    std::vector<int64_t> next(groups.start.begin(), groups.start.end() - 1);
    for (int64_t t = 0; t < tokens; ++t) groups.place[next[group[t]]++] = t;
    return groups;
  }

  // The first group of share `slot` out of `slots`, where a group costs `fixed` and 1 more for each occurrence.
  int64_t cut(int64_t slot, int64_t slots, int64_t fixed) const {
    int64_t total = start.back() + fixed * count(), target = slot * total / slots, low = 0, high = count();
    while (low < high) {
      int64_t middle = (low + high) / 2;
      if (start[middle] + fixed * middle < target) low = middle + 1;
      else high = middle;
    }
    return low;
  }
};

}  // namespace fastprefix::prompt_embedding
