// KvStore: the KV cache of all sequences: pages and rings by number, counted, and the memory behind them.
// Rows are final (normed, rotated, rounded), so a page means the same wherever it is and whoever refers to it.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "runtime/base/result.h"
#include "runtime/kv/checkpoint.h"
#include "runtime/kv/kv_layout.h"
#include "runtime/kv/kv_memory.h"
#include "runtime/kv/page_pool.h"
#include "runtime/kv/sequence_kv.h"

namespace thermocline {

/// One thread owns it, its sequences and its checkpoints.
class KvStore {
 public:
  /// Errors: out_of_memory.
  static Result<std::unique_ptr<KvStore>> create(const ModelGeometry& geometry, const KvOptions& options);
  static constexpr const char* kPlanOwner = "KV pages";            // of its rows in a memory plan
  static constexpr const char* kPlanHostRows = "KV rows of GPUs";  // of those that devices keep in host memory
  /// Bytes of host memory that create() takes.
  static uint64_t bytes(const ModelGeometry& geometry, const KvOptions& options);

  /// Allocates nothing. Errors: out_of_memory when max_sequences are in use.
  Result<std::unique_ptr<SequenceKv>> new_sequence();
  /// What `sequence` was at `length`: rollback_floor() <= length <= length(). Copies its window and open compressor
  /// windows, refers to its compressed pages. Errors: internal (a device fault).
  Result<KvCheckpoint> checkpoint(const SequenceKv& sequence, int64_t length);
  /// A checkpoint of that length without its bytes: its first pages are those given, the others and the copies are to
  /// be filled, and nobody else takes them until settle(). Errors: out_of_memory when too few pages are available.
  Result<KvCheckpoint> blank(int64_t length, std::span<const int32_t> first_pages);
  /// A sequence that goes on from there, to the same bits as the one it was taken from.
  /// Errors: out_of_memory when max_sequences are in use; internal (a device fault).
  Result<std::unique_ptr<SequenceKv>> restore(const KvCheckpoint& checkpoint);
  /// A second sequence that goes on from the first one's present. Errors: those of restore().
  Result<std::unique_ptr<SequenceKv>> fork(const SequenceKv& sequence);

  /// Tokens that one sequence may have, if it has all the pages; INT64_MAX where nothing is compressed.
  int64_t most_tokens() const {
    return layout_.compressed_page_bytes() == 0 ? INT64_MAX : compressed_.pages() * kPageTokens;
  }
  const KvLayout& layout() const { return layout_; }
  const KvOptions& options() const { return options_; }
  int64_t window_pages() const { return window_.pages(); }
  int64_t compressed_pages() const { return compressed_.pages(); }
  /// Compressed pages that a sequence can take: the free ones, and those that only checkpoints refer to.
  int64_t available_pages() const { return compressed_.free_pages() + (reclaim_ ? compressed_.cached_pages() : 0); }
  int64_t cached_pages() const { return compressed_.cached_pages(); }

  /// Where the pages are.
  KvMemory& memory() {
    TC_CHECK(memory_ != nullptr, "KvStore::attach comes first");
    return *memory_;
  }
  /// Their place, if not in host memory (host_rows = false). It outlives the store's use.
  void attach(KvMemory& memory) { memory_ = &memory; }
  /// Who lets go of checkpoints when pages run out: one at a time, false when there is none left.
  void set_reclaim(std::function<bool()> reclaim) { reclaim_ = std::move(reclaim); }

 private:
  friend class SequenceKv;
  KvStore(const ModelGeometry& geometry, const KvOptions& options);
  int32_t take_compressed();
  bool reclaim() { return reclaim_ && reclaim_(); }
  /// Calls fn(at, floats) for the ring slots of positions still pooled at `length`: a place in the ring's image and how
  /// much of it, at most to a layer's end.
  template <class Fn>
  void for_live_slots(int64_t length, const Fn& fn) const;
  int64_t window_pages_at(int64_t length) const;
  int64_t compressed_pages_at(int64_t length) const;
  size_t live_floats(int64_t length) const;
  float* ring_image(int32_t ring);

  const KvOptions options_;
  const int64_t window_size_;
  const KvLayout layout_;
  PagePool window_, compressed_, rings_;
  HostKvMemory host_;
  KvMemory* memory_ = nullptr;
  std::vector<float> ring_copy_;  // of a ring that is not in host memory
  std::function<bool()> reclaim_;
  uint32_t sequences_made_ = 0;
};

}  // namespace thermocline
