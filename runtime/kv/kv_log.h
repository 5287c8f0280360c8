// KvLog: named items of KV bytes in an append log on a disk, kept within a cap. Nothing that is read back is trusted:
// heads and parts have checksums, and whatever does not fit is a miss.
//
//   index                what the log holds, written beside and renamed; what it does not name is read from the log
//   log-00000001 ...     groups, one after the other: a block of 4 KiB that names up to 39 parts, then their bytes
//
// A file of the log is written once, then only read; the oldest goes when the cap is reached.
#pragma once

#include <deque>
#include <memory>
#include <mutex>
#include <span>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "runtime/io/disk_files.h"
#include "runtime/kv/kv_log_format.h"

namespace thermocline {

/// Bytes of an item, wherever they lie.
template <class Byte>
using Pieces = std::vector<std::span<Byte>>;

struct KvItem {
  KvItemHead head;
  Pieces<const std::byte> bytes;
};
struct KvRead {
  PrefixName name{};
  Pieces<std::byte> to;  // as many bytes as were saved, or the read fails
  bool ok = false;       // out
};

struct KvLogStats {
  int64_t items = 0, bytes = 0;  // now; bytes: of all files of the log
  int64_t saved_bytes = 0, read_bytes = 0;
  int64_t io_errors = 0, corrupt_items = 0, dropped_items = 0;  // dropped: to stay within the cap
};

class KvLog {
 public:
  static constexpr uint64_t kLeastSpace = 64 << 20;

  /// Takes in what `files` hold and keeps all files of the log together within `space_bytes`, at least kLeastSpace;
  /// what cannot be read goes, counted and logged. Errors: invalid_argument for too little space; io for a folder that
  /// cannot be listed.
  static Result<std::unique_ptr<KvLog>> open(std::unique_ptr<DiskFiles> files, uint64_t space_bytes);
  /// Writes the index.
  ~KvLog();

  // Any thread:

  bool has(const PrefixName& name) const;
  struct Tail {
    PrefixName name;
    int64_t tokens = 0, bytes = 0;
  };
  /// The checkpoints behind these whole pages.
  std::vector<Tail> checkpoints(const PrefixName& parent) const;
  KvLogStats stats() const;

  // One thread:

  /// Begins to write those that are not there yet; their bytes are copied. Errors are counted and logged, and what met
  /// one is not there.
  void append(std::span<const KvItem> items);
  /// Waits for what was begun: it is there.
  void drain();
  /// Fills each from the disk, or says that it could not; such an item is not there any more.
  void read(std::span<KvRead> reads);
  /// Somebody still needs them: when their file's turn to go comes, they move to the end of the log, once a touch.
  void touch(std::span<const PrefixName> names);
  void write_index();

 private:
  struct Segment {
    uint32_t number = 0;
    int file = -1;
    uint64_t bytes = 0;
    bool holds = false;  // groups that were written whole
  };
  /// A group on its way to the disk: it lies in the slot of the buffer with its number in writing_.
  struct Writing {
    bool busy = false;
    uint32_t segment = 0;
    uint64_t offset = 0, bytes = 0;  // of its parts
    std::vector<KvPartHead> parts;
  };
  struct Wanted;
  /// Neighbouring parts, read at once: whole blocks of a file.
  struct Run {
    uint32_t segment = 0;
    uint64_t begin = 0, end = 0;
    size_t first_part = 0, last_part = 0;
  };
  using Survivors = std::vector<std::pair<KvItemHead, std::vector<std::byte>>>;

  KvLog(std::unique_ptr<DiskFiles> files, uint64_t space_bytes);
  Status recover();
  void recover_from_index();
  void scan(const Segment& segment, uint64_t from);
  void insert_part(const KvPartHead& part, const KvPlace& place);
  void erase(const PrefixName& name);
  void forget_segment(uint32_t number);
  void remove(const Segment& s);
  void write(std::span<const KvItem> items);
  bool make_room();
  void back_off();
  Survivors drop_oldest(uint64_t most_bytes);
  Writing& free_slot();
  void add_part(Writing& group, const KvItem& item, uint64_t bytes, uint64_t part);
  void submit(Writing& group);
  void finish(const DiskFiles::Done& done);
  std::vector<Wanted> wanted(std::span<KvRead> reads) const;
  std::vector<Run> runs_of(std::span<const Wanted> parts) const;
  void count_read(std::span<const KvRead> reads, int64_t corrupt);
  void failed(const std::string& what);
  void count_bytes();
  const Segment* segment(uint32_t number) const;
  std::span<std::byte> slot(ptrdiff_t number) const;

  const std::unique_ptr<DiskFiles> files_;
  const uint64_t space_bytes_, segment_bytes_;
  std::deque<Segment> segments_;     // oldest first
  bool writable_ = false;            // the last one takes more groups
  bool moving_ = false;              // what survives its file is written again
  bool crowded_ = false;             // the disk was full
  bool failing_ = false;             // said already
  int64_t skip_ = 0, failures_ = 0;  // appends that are not tried after an error, more with each
  uint32_t next_segment_ = 1;
  uint64_t clock_ = 1;
  std::vector<Writing> writing_;  // by slot

  mutable std::mutex mutex_;  // of what follows
  std::unordered_map<PrefixName, KvEntry, PrefixNameHash> entries_;
  std::unordered_map<PrefixName, std::vector<PrefixName>, PrefixNameHash> checkpoints_;  // by parent
  std::unordered_map<PrefixName, KvEntry, PrefixNameHash> partial_;  // whose other parts are to come
  KvLogStats stats_;
};

}  // namespace thermocline
