// PrefixCache: checkpoints by the tokens they stand for, so that a request whose prompt begins like an earlier one goes
// on from there. Warm is cold, bit for bit: rows are kept by position and depend on their own tokens only. With a disk
// they are saved as they are kept, and read back when somebody asks for what is not kept any more.
#pragma once

#include <chrono>
#include <list>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "runtime/kv/kv_store.h"
#include "runtime/kv/nvme_tier.h"
#include "runtime/kv/prefix_keys.h"

namespace thermocline {

/// Of the cache, since it was made; bytes, pages and checkpoints are now.
struct PrefixCacheStats {
  int64_t checkpoints = 0, checkpoint_bytes = 0, cached_pages = 0;
  int64_t lookups = 0, hits = 0, saved_tokens = 0, evictions = 0;
  int64_t fetches = 0, fetched_tokens = 0, failed_fetches = 0;  // from the disk
  NvmeTierStats disk = {};
};

/// What PrefixCache::clear let go: checkpoints, and the pages that nothing else refers to.
struct PrefixCacheFlush {
  int64_t checkpoints = 0, checkpoint_bytes = 0, pages = 0, page_bytes = 0;
};

/// A prefix on its way from the disk.
struct PrefixArrival {
  bool done = false;  // it is kept now, or could not be read
};

/// Step thread only. Goes before its store and its disk, after every sequence it made.
class PrefixCache {
 public:
  struct Options {
    int64_t bytes = 0;  // of host memory for checkpoints, their pages not among them; 0: nothing is kept
    std::string model;  // whatever rows depend on beside tokens: the model's identity, numerics
    NvmeTier* disk = nullptr;
    int64_t half_life_ns = 6 * int64_t{3600} * 1'000'000'000;  // of the chance that a prefix is asked for again
  };
  PrefixCache(KvStore& store, Options options);
  ~PrefixCache();
  PrefixCache(const PrefixCache&) = delete;
  PrefixCache& operator=(const PrefixCache&) = delete;

  bool enabled() const { return options_.bytes > 0; }
  /// For a list of tokens; only requests of one salt share what they leave.
  PrefixKeys keys(std::string_view salt) const { return {secret_, secret_.root(options_.model, salt)}; }

  /// Tokens of the longest prefix of `ids` that a sequence could go on from. Changes nothing.
  int64_t find(PrefixKeys& keys, std::span<const int32_t> ids) const;
  /// A sequence of that many tokens; nullptr: none is kept. Errors: those of KvStore::restore.
  Result<std::unique_ptr<SequenceKv>> resume(PrefixKeys& keys, std::span<const int32_t> ids, int64_t now_ns);
  /// Keeps what `sequence` was at `length`, the first tokens of `ids` (KvStore::checkpoint). What is worth least goes
  /// where the bytes do not suffice. Its pages are saved to the disk, and the checkpoint too if it is `durable`.
  /// Errors: internal (a device fault).
  Status keep(PrefixKeys& keys, std::span<const int32_t> ids, const SequenceKv& sequence, int64_t length,
              int64_t now_ns, bool durable = true);
  /// Begins to read what the disk has of `ids`, if that is longer than what is kept and there is room for it; where too
  /// much is on its way already, one of those is what to wait for. nullptr where there is nothing to wait for.
  std::shared_ptr<const PrefixArrival> fetch(PrefixKeys& keys, std::span<const int32_t> ids, int64_t now_ns);
  static constexpr std::chrono::seconds kPatience{10};  // for a disk; what takes longer is computed
  /// Whether pages wait for what the disk reads, and not for longer than kPatience.
  bool holds_blank_pages(int64_t now_ns) const;
  /// Takes in what the disk has read and saved by now.
  void poll(int64_t now_ns);
  /// Waits for the disk.
  void flush();
  /// Lets go of what is worth least: a restore's tokens, by the chance of one, by the bytes. False: nothing is kept.
  bool evict(int64_t now_ns);
  /// Lets go of everything that is kept. Sequences that grew from it stay as they are, and so does the disk.
  PrefixCacheFlush clear();

  PrefixCacheStats stats() const;

 private:
  struct Entry {
    KvCheckpoint checkpoint;
    PrefixName name;            // of its whole pages
    std::vector<int32_t> tail;  // its tokens behind those
    int64_t used_ns = 0, hits = 0;
    int64_t own_pages = 0;    // that the one it grew from does not have
    bool superseded = false;  // a longer one grew from it
  };
  using Entries = std::list<Entry>;
  struct OnDisk;
  /// A prefix on its way.
  struct Arriving {
    std::shared_ptr<PrefixArrival> arrival = std::make_shared<PrefixArrival>();
    PrefixName name{};    // of its checkpoint on the disk
    PrefixName parent{};  // of its whole pages
    int64_t begun_ns = 0;
    std::vector<int32_t> tail;
    KvCheckpoint checkpoint;
    std::vector<std::pair<int32_t, std::vector<std::byte>>> beside;  // pages that are not in host memory
  };
  std::optional<OnDisk> longest_on_disk(PrefixKeys& keys, std::span<const int32_t> ids, const Entry* kept) const;
  Pieces<std::byte> place(Arriving& arriving, int32_t page) const;
  void arrive(Arriving& arriving, bool read);
  Status save(PrefixKeys& keys, std::span<const int32_t> ids, Entry& entry, bool durable);
  void insert(Entry entry);
  Entry* longest(PrefixKeys& keys, std::span<const int32_t> ids) const;
  double worth(const Entry& entry, int64_t now_ns) const;
  void drop(Entries::iterator entry);

  KvStore& store_;
  const Options options_;
  const PrefixSecret secret_;
  Entries entries_;
  std::unordered_map<PrefixName, std::vector<Entries::iterator>, PrefixNameHash> by_name_;
  std::list<Arriving> arriving_;
  int64_t bytes_ = 0, now_ns_ = 0;
  PrefixCacheStats counted_;
};

}  // namespace thermocline
