#include "runtime/exec/near_keys.h"

#include <algorithm>

#include "kernels_cpu/indexer.h"

namespace thermocline {

NearKeys::NearKeys(const SequenceKv& kv, int layer, int64_t groups)
    : kv_(kv), per_page_(kv.layout().rows_per_page(layer) / cpu::kKeyGroup), groups_(groups) {}

// A sequence may have pages for tokens to come, and its last visible page may be seen in part.
int64_t NearKeys::count(int node) const {
  const std::span<const int32_t> pages = kv_.pages_on(node);
  const int64_t last = (groups_ - 1) / per_page_;
  const auto end = std::upper_bound(pages.begin(), pages.end(), last);
  const int64_t all = (end - pages.begin()) * per_page_;
  return all > 0 && *(end - 1) == last ? all - ((last + 1) * per_page_ - groups_) : all;
}

bool NearKeys::fair(const WorkerPool& pool) const {
  if (pool.nodes() == 1 || kv_.nodes() != pool.nodes()) return false;
  for (int worker = 0; worker < pool.size(); ++worker) {
    const WorkerPool::Team& team = pool.team(worker);
    if (team.rank == 0 && 2 * count(team.node) * pool.size() > 3 * groups_ * team.size) return false;
  }
  return true;
}

}  // namespace thermocline
