// NearKeys: the key groups of one sequence by the NUMA node they lie on, and each worker's share of those on its own.
#pragma once

#include <cstdint>
#include <span>

#include "runtime/hw/worker_pool.h"
#include "runtime/kv/sequence_kv.h"

namespace thermocline {

class NearKeys {
 public:
  /// The first `groups` key groups of a CSA layer. Nodes are those of the pool that the sequence's store was told of;
  /// all that follows is of stores with several.
  NearKeys(const SequenceKv& kv, int layer, int64_t groups);

  /// Key groups on a node; the i-th of them, in rising order.
  int64_t count(int node) const;
  int64_t group(int node, int64_t i) const { return kv_.pages_on(node)[i / per_page_] * per_page_ + i % per_page_; }

  struct Share {
    int64_t begin = 0, end = 0;
  };
  /// Of the groups on a worker's node.
  Share share(const WorkerPool::Team& team) const {
    const int64_t all = count(team.node);
    return {all * team.rank / team.size, all * (team.rank + 1) / team.size};
  }
  /// Whether every team may keep to its own node: none has more than half as much again as in an even split. Pages are
  /// shared and used again, so they may lie anywhere. Beyond that teams would wait for one, and a key from elsewhere
  /// costs twice one from here. Of any store and pool.
  bool fair(const WorkerPool& pool) const;

 private:
  const SequenceKv& kv_;
  const int64_t per_page_, groups_;
};

}  // namespace thermocline
