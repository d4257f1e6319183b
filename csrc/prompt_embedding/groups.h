// Groups of equal token ids. ADePT's offset of a token depends only on its id, so it is computed once per group.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

namespace fastprefix::prompt_embedding {

// Group u is the token token[u], which occurs at the places place[start[u]] to place[start[u + 1] - 1] of the flat ids.
struct Groups {
  std::vector<int64_t> token, start, place;
  // With a bank of offsets, the user (see EmbeddingProblem) of each group, sorted. Otherwise empty.
  std::vector<int64_t> user;

  int64_t count() const { return static_cast<int64_t>(token.size()); }
  int64_t size(int64_t u) const { return start[u + 1] - start[u]; }
  int64_t user_of(int64_t u) const { return user.empty() ? 0 : user[u]; }

  // Return the end, at most `last`, of the groups from u on that have the same offset.
  int64_t run(int64_t u, int64_t last) const {
    return user.empty() ? last : std::upper_bound(user.begin() + u, user.begin() + last, user[u]) - user.begin();
  }

  // Make one group per occurrence.
  static Groups singles(const int64_t* ids, int64_t tokens) {
    Groups groups{std::vector<int64_t>(ids, ids + tokens), std::vector<int64_t>(tokens + 1), {}, {}};
    std::iota(groups.start.begin(), groups.start.end(), 0);
    groups.place.assign(groups.start.begin(), groups.start.end() - 1);
    return groups;
  }

  // Make one group per distinct id, in the order of their first occurrence.
  static Groups distinct(const int64_t* ids, int64_t tokens) {
    int bits = 4;
    while ((int64_t{1} << bits) < 2 * tokens) ++bits;
    std::vector<int32_t> table(size_t{1} << bits, -1);  // hash table with open addressing; holds groups
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

  // Append the groups of one user. Their places count only this user's tokens. places(t) maps place t to the flat ids.
  template <class Places>
  void append(const Groups& groups, int64_t of_user, Places places) {
    if (start.empty()) start.push_back(0);
    for (int64_t u = 0; u < groups.count(); ++u) start.push_back(start.back() + groups.size(u));
    for (int64_t t : groups.place) place.push_back(places(t));
    token.insert(token.end(), groups.token.begin(), groups.token.end());
    user.insert(user.end(), groups.count(), of_user);
  }

  // Combine two levels of groups: the places of this object are groups of `inner`. Return each id's places in `inner`.
  Groups flatten(const Groups& inner) const {
    Groups flat{token, {0}, {}, {}};
    for (int64_t u = 0; u < count(); ++u) {
      for (int64_t i = start[u]; i < start[u + 1]; ++i) {
        auto of = inner.start.begin() + place[i];
        flat.place.insert(flat.place.end(), inner.place.begin() + of[0], inner.place.begin() + of[1]);
      }
      flat.start.push_back(static_cast<int64_t>(flat.place.size()));
    }
    return flat;
  }

  // Return the first group of share `slot` out of `slots` shares of equal cost. A group costs `fixed` plus 1 per
  // occurrence.
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
