// PagePool: numbered pages with counts of who refers to them. Sequences write pages; the prefix cache only keeps them.
#pragma once

#include <cstdint>
#include <vector>

#include "runtime/base/check.h"

namespace thermocline {

class PagePool {
 public:
  explicit PagePool(int64_t pages = 0) : pages_(pages) {}

  enum class Owner : uint8_t { sequence, cache };

  int64_t pages() const { return pages_; }
  /// Pages nobody refers to.
  int64_t free_pages() const {
    return pages_ - static_cast<int64_t>(counts_.size()) + static_cast<int64_t>(free_.size());
  }
  /// Pages that only the cache refers to: free once it lets go of them.
  int64_t cached_pages() const { return cached_; }
  int32_t sequences(int32_t page) const { return of(page).sequences; }
  /// Whether more than one refers to it: whoever writes it takes a copy first.
  bool shared(int32_t page) const { return of(page).sequences + of(page).cache > 1; }

  /// A free page, one sequence's from now on.
  int32_t take() {
    TC_CHECK(free_pages() > 0);
    int32_t page = static_cast<int32_t>(counts_.size());
    if (free_.empty()) {
      counts_.emplace_back();
    } else {
      page = free_.back();
      free_.pop_back();
    }
    add(page, Owner::sequence);
    return page;
  }
  void add(int32_t page, Owner owner) {
    Count& count = of(page);
    cached_ -= count.only_cached();
    ++(owner == Owner::cache ? count.cache : count.sequences);
    cached_ += count.only_cached();
  }
  void drop(int32_t page, Owner owner) {
    Count& count = of(page);
    int32_t& mine = owner == Owner::cache ? count.cache : count.sequences;
    TC_CHECK(mine > 0);
    cached_ -= count.only_cached();
    --mine;
    cached_ += count.only_cached();
    if (count.sequences + count.cache == 0) free_.push_back(page);
  }

 private:
  struct Count {
    int32_t sequences = 0, cache = 0;
    int only_cached() const { return sequences == 0 && cache > 0; }
  };
  Count& of(int32_t page) { return counts_[static_cast<size_t>(page)]; }
  const Count& of(int32_t page) const { return counts_[static_cast<size_t>(page)]; }

  int64_t pages_ = 0, cached_ = 0;
  std::vector<Count> counts_;  // of the pages that were ever taken
  std::vector<int32_t> free_;  // those among them that came back
};

}  // namespace thermocline
