// NvmeTier: KV on a disk, behind the step. A thread of its own saves what it is given and reads back what is asked for;
// the step thread posts, goes on, and hears of it later.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <filesystem>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <unordered_set>
#include <vector>

#include "runtime/kv/copy_ring.h"
#include "runtime/kv/kv_log.h"

namespace thermocline {

struct NvmeTierOptions {
  std::filesystem::path folder;      // empty: there is no such tier
  uint64_t space_bytes = 0;          // of all files in it
  uint64_t queue_bytes = 256 << 20;  // copies that wait to be written: what comes on top is not saved
  bool use_io_uring = true;
  /// What it takes of host memory at most: the queue, the buffers, what moves within the log.
  uint64_t memory_bytes() const { return queue_bytes + (96 << 20); }
};

struct NvmeTierStats {
  KvLogStats log;
  int64_t skipped_items = 0;  // the queue was full
  int64_t queued_bytes = 0;   // now
};

class NvmeTier {
 public:
  /// Errors: invalid_argument for a folder that others could look into or for too little space; unavailable where
  /// another process has the folder; io.
  static Result<std::unique_ptr<NvmeTier>> open(const NvmeTierOptions& options);
  /// Over the files of somebody's choice. Errors: those of KvLog::open.
  static Result<std::unique_ptr<NvmeTier>> open(std::unique_ptr<DiskFiles> files, const NvmeTierOptions& options);
  /// Ends what was posted, then the log.
  ~NvmeTier();

  /// What names are made with, kept in the folder: the next process finds them again.
  const PrefixSecret& secret() const { return secret_; }

  // Step thread:

  /// There, or on its way there.
  bool has(const PrefixName& name) const { return saving_.contains(name) || log_->has(name); }
  std::vector<KvLog::Tail> checkpoints(const PrefixName& parent) const { return log_->checkpoints(parent); }
  /// Where a copy of what is to be saved goes, of the queue's memory. Empty: the queue is full, this item is not saved.
  std::span<std::byte> room(uint64_t bytes);
  /// Saves these, whose bytes are in room() taken since the last call.
  void save(std::vector<KvItem> items);
  /// Reads all of these and calls `done` from poll(), with whether all came; the places stay until then. Goes before
  /// what is to be saved.
  void read(std::vector<KvRead> reads, std::function<void(bool)> done);
  /// KvLog::touch, when the thread comes to it.
  void touch(std::vector<PrefixName> names);
  /// Calls what has ended.
  void poll();
  /// Waits for all that was posted, and calls it.
  void flush();
  NvmeTierStats stats() const;
  /// Called by the tier's thread when poll() has something to call.
  void set_wake(std::function<void()> wake);

 private:
  struct Job {
    std::vector<KvItem> save;
    std::vector<KvRead> read;
    std::vector<PrefixName> touch;
    std::function<void(bool)> done;
    uint64_t ring_end = 0;  // of its copies, 0: it has none
    bool ok = true;
  };

  NvmeTier(std::unique_ptr<KvLog> log, CopyRing copies, const PrefixSecret& secret);
  void post(std::deque<Job> NvmeTier::*queue, Job job);
  void run();
  void carry_out(Job& job);

  const PrefixSecret secret_;
  const std::unique_ptr<KvLog> log_;
  CopyRing copies_;
  std::unordered_set<PrefixName, PrefixNameHash> saving_;  // step thread
  int64_t skipped_ = 0;                                    // step thread

  mutable std::mutex mutex_;
  std::condition_variable wanted_, ended_;
  std::deque<Job> reads_, saves_, done_;
  int64_t under_way_ = 0;  // posted and not yet in done_
  std::function<void()> wake_;
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace thermocline
