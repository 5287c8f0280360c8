// DiskFiles: the files of one private folder, read and written in whole blocks past the page cache, many at a time: by
// io_uring, or by a few threads where the system refuses it. The one way of the KV cache to a disk, so that tests can
// put their own faults in between.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/base/result.h"

namespace thermocline {

/// One thread uses it. Every error names the file.
class DiskFiles {
 public:
  static constexpr uint64_t kBlock = 4096;
  static constexpr int kDepth = 8;  // operations under way at most

  struct Op {
    int file = -1;  // of open_file()
    bool write = false;
    uint64_t offset = 0;          // in whole blocks
    std::span<std::byte> data{};  // whole blocks, of buffer()
    uint64_t tag = 0;             // the caller's
  };
  struct Done {
    uint64_t tag = 0;
    int error = 0;  // errno; a read that meets the end of the file: ENODATA, a write cut short: ENOSPC
  };
  struct Options {
    uint64_t buffer_bytes = 32 << 20;
    bool use_io_uring = true;
  };

  /// Makes the folder (0700) where it is missing, and locks it until this is destroyed.
  /// Errors: invalid_argument for a folder that is a symbolic link, another user's, or open to others; unavailable when
  /// another process holds it; io.
  static Result<std::unique_ptr<DiskFiles>> open(const std::filesystem::path& folder, const Options& options);
  virtual ~DiskFiles() = default;

  /// Memory that operations read into and write from.
  virtual std::span<std::byte> buffer() = 0;
  /// How operations are carried out: io_uring, threads.
  virtual std::string_view kind() const = 0;

  /// A number for a file of the folder; `create`: a new one, of mode 0600. Errors: not_found, io; symbolic links are
  /// refused.
  virtual Result<int> open_file(const std::string& name, bool create) = 0;
  virtual void close_file(int file) = 0;
  virtual Result<uint64_t> size(int file) = 0;
  virtual Status sync(int file) = 0;
  virtual Status remove(const std::string& name) = 0;
  virtual Result<std::vector<std::string>> list() = 0;

  /// Begins one; fewer than kDepth are under way.
  virtual void submit(const Op& op) = 0;
  /// Waits until one of those under way has ended, whichever.
  virtual Done wait() = 0;

  /// A whole small file. Errors: not_found, io, corrupt above `limit_bytes`.
  virtual Result<std::string> read_small(const std::string& name, uint64_t limit_bytes) = 0;
  /// The file has these bytes, or what it had before, whatever happens meanwhile.
  virtual Status replace_small(const std::string& name, std::string_view bytes) = 0;
};

/// Whether the system lets this process use io_uring.
bool io_uring_allowed();

/// Writes or reads a file from its begin, whole slots of the buffer up to `bytes`, DiskFiles::kDepth of them under way.
/// What is written is what the buffer holds. For measuring. Errors: io.
Status transfer(DiskFiles& files, int file, uint64_t bytes, bool write);

}  // namespace thermocline
