#include "runtime/kv/page_pool.h"

#include <gtest/gtest.h>

#include <random>
#include <set>

namespace thermocline {
namespace {

using Owner = PagePool::Owner;

// Against plain bookkeeping: references by page and owner.
TEST(PagePool, CountsWhoRefersToAPage) {
  constexpr int64_t kPages = 12;
  PagePool pool(kPages);
  std::multiset<std::pair<int32_t, Owner>> held;
  std::mt19937 random(3);
  const auto count = [&](int32_t page, Owner owner) { return static_cast<int64_t>(held.count({page, owner})); };
  for (int step = 0; step < 20000; ++step) {
    const auto any = [&] {
      auto it = held.begin();
      std::advance(it, static_cast<int64_t>(random() % held.size()));
      return it;
    };
    switch (random() % 3) {
      case 0:
        if (pool.free_pages() > 0) held.insert({pool.take(), Owner::sequence});
        break;
      case 1:
        if (!held.empty() && held.size() < 40) {
          const int32_t page = any()->first;
          const Owner owner = random() % 2 ? Owner::cache : Owner::sequence;
          pool.add(page, owner);
          held.insert({page, owner});
        }
        break;
      default:
        if (!held.empty()) {
          const auto it = any();
          pool.drop(it->first, it->second);
          held.erase(it);
        }
    }
    int64_t used = 0, cached = 0;
    for (int32_t page = 0; page < kPages; ++page) {
      const int64_t sequences = count(page, Owner::sequence), cache = count(page, Owner::cache);
      used += sequences + cache > 0;
      cached += sequences == 0 && cache > 0;
      if (sequences + cache > 0) {
        EXPECT_EQ(pool.shared(page), sequences + cache > 1);
      }
    }
    ASSERT_EQ(pool.free_pages(), kPages - used) << "step " << step;
    ASSERT_EQ(pool.cached_pages(), cached) << "step " << step;
  }
}

}  // namespace
}  // namespace thermocline
