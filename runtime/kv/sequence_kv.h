// SequenceKv: what one sequence keeps: its length, its block tables, its ring. Step thread only.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "runtime/base/result.h"
#include "runtime/kv/kv_layout.h"

namespace thermocline {

class KvStore;

/// Gives back its pages and its ring when destroyed. Nothing of a step is seen before commit(): rows beyond length()
/// may be written and written again.
class SequenceKv {
 public:
  ~SequenceKv();
  SequenceKv(const SequenceKv&) = delete;
  SequenceKv& operator=(const SequenceKv&) = delete;

  /// Counted from 1 by its store: tells sequences apart, the freed ones too.
  uint32_t number() const { return number_; }
  /// Tokens whose rows are stored.
  int64_t length() const { return length_; }
  const KvLayout& layout() const;
  /// Makes room for tokens length() .. length() + count, and the page they begin on this sequence's own.
  /// Errors: out_of_memory, and nothing changed; internal (a device fault, an abandoned sequence).
  Status reserve(int64_t count);
  /// The reserved tokens are stored; window pages that no token reaches any more, not even after a rollback, go back.
  void commit(int64_t count);
  /// Back to `length` tokens, as if no later one had been fed: rollback_floor() <= length <= length().
  void rollback(int64_t length);
  int64_t rollback_floor() const { return rollback_floor_; }
  /// After a step that ended midway: nothing goes on from it, and nothing of it is kept.
  void abandon() { rollback_floor_ = length_ + 1; }

  std::byte* raw_row(int layer, int64_t pos) const;
  std::byte* compressed_row(int layer, int64_t row) const;
  std::byte* index_group(int layer, int64_t group) const;
  /// The ring slot of a position: a [width], z [width], index a [index_width], index z [index_width].
  float* ring_slot(int layer, int64_t pos) const;

  /// The block tables: logical page first_window_page() + i of the window, logical page i of compressed rows.
  const std::vector<int32_t>& window_pages() const { return window_pages_; }
  const std::vector<int32_t>& compressed_pages() const { return compressed_pages_; }
  int64_t first_window_page() const { return first_window_page_; }
  /// Nodes that compressed pages are dealt out to, and of several the logical pages on one of them, in rising order.
  int nodes() const { return static_cast<int>(pages_on_.size()); }
  std::span<const int32_t> pages_on(int node) const { return pages_on_[static_cast<size_t>(node)]; }
  int32_t ring() const { return ring_; }
  /// Compressed pages that reserve() need not take: those it has, but for one that it would write and another has too.
  int64_t own_pages() const;
  /// Compressed pages that no other sequence has: available when this one goes.
  int64_t exclusive_pages() const;

 private:
  friend class KvStore;
  explicit SequenceKv(KvStore& store);
  const int32_t* tail() const;
  bool tail_is_used() const;
  Status own_tail();
  void list_by_node();

  KvStore& store_;
  uint32_t number_ = 0;
  int64_t length_ = 0, rollback_floor_ = 0;
  int64_t first_window_page_ = 0;      // logical number of window_pages_[0]
  std::vector<int32_t> window_pages_;  // logical page -> page of the pool
  std::vector<int32_t> compressed_pages_;
  std::vector<std::vector<int32_t>> pages_on_;  // by node
  int32_t ring_ = 0;
};

}  // namespace thermocline
