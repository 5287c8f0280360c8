#include "runtime/cli/bench_load.h"

#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <memory>

#include "runtime/hw/numa_buffer.h"
#include "runtime/hw/topology.h"
#include "runtime/hw/uneven_work.h"
#include "runtime/model/deepseek_v4/config.h"
#include "runtime/model/deepseek_v4/weights.h"

namespace thermocline::cli {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kReadBytes = 8 << 20;

struct Shard {
  std::filesystem::path path;
  int64_t bytes = 0;
};

class Descriptor {
 public:
  explicit Descriptor(const std::filesystem::path& path) : fd_(open(path.c_str(), O_RDONLY | O_CLOEXEC)) {}
  ~Descriptor() {
    if (fd_ >= 0) close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int fd() const { return fd_; }

 private:
  int fd_;
};

void drop_from_cache(const std::vector<Shard>& shards) {
  for (const Shard& shard : shards) {
    const Descriptor file(shard.path);
    if (file.fd() >= 0) fdatasync(file.fd());  // what was just written stays until it is on disk
    if (file.fd() >= 0) posix_fadvise(file.fd(), 0, 0, POSIX_FADV_DONTNEED);
  }
}

// Seconds of reading every byte once, into memory as fresh as a loader's: without that the page cache would be read
// into the processor's caches, and nothing would be loaded.
Result<double> read_all(const std::vector<Shard>& shards, int threads) {
  struct Piece {
    size_t shard;
    int64_t offset;
  };
  std::vector<Piece> pieces;
  for (size_t i = 0; i < shards.size(); ++i)
    for (int64_t at = 0; at < shards[i].bytes; at += kReadBytes) pieces.push_back({i, at});
  std::vector<std::unique_ptr<Descriptor>> files;
  for (const Shard& shard : shards) files.push_back(std::make_unique<Descriptor>(shard.path));
  std::atomic<bool> failed{false};
  const Clock::time_point start = Clock::now();
  TC_ASSIGN(const NumaBuffer memory, NumaBuffer::allocate(static_cast<uint64_t>(pieces.size()) * kReadBytes));
  for_each_uneven(static_cast<int64_t>(pieces.size()), threads, [&](int64_t i, int) {
    const Piece& piece = pieces[static_cast<size_t>(i)];
    const int64_t count = std::min(kReadBytes, shards[piece.shard].bytes - piece.offset);
    for (int64_t done = 0; done < count;) {
      const ssize_t got = pread(files[piece.shard]->fd(), memory.data() + i * kReadBytes + done,
                                static_cast<size_t>(count - done), piece.offset + done);
      if (got <= 0) {
        failed = true;
        return;
      }
      done += got;
    }
  });
  if (failed) return Error{ErrorCode::io, "a shard could not be read"};
  return std::chrono::duration<double>(Clock::now() - start).count();
}

}  // namespace

Result<LoadComparison> compare_loading(const std::filesystem::path& folder, bool warm, int threads) {
  TC_ASSIGN(const ModelGeometry geometry, deepseek_v4::read_config(folder));
  std::vector<Shard> shards;
  int64_t bytes = 0;
  for (const auto& entry : std::filesystem::directory_iterator(folder))
    if (entry.path().extension() == ".safetensors") {
      shards.push_back({entry.path(), static_cast<int64_t>(entry.file_size())});
      bytes += shards.back().bytes;
    }
  LoadComparison result;
  if (warm && 2.1 * static_cast<double>(bytes) > static_cast<double>(usable_memory_bytes())) {
    result.skipped = "the files and the weights do not fit the memory together: --load-model with fewer layers";
    return result;
  }
  for (int repetition = 0; repetition < 3; ++repetition) {
    if (warm)
      TC_RETURN_IF_ERROR(read_all(shards, threads));
    else
      drop_from_cache(shards);
    TC_ASSIGN(const double read_seconds, read_all(shards, threads));
    if (!warm) drop_from_cache(shards);
    const Clock::time_point start = Clock::now();
    deepseek_v4::LoadOptions options;
    options.quiet = true;
    options.mtp = true;
    TC_ASSIGN(const auto weights, deepseek_v4::load_weights(folder, geometry, options));
    const double load_seconds = std::chrono::duration<double>(Clock::now() - start).count();
    result.read.push_back(static_cast<double>(bytes) / read_seconds);
    result.load.push_back(static_cast<double>(bytes) / load_seconds);
  }
  return result;
}

}  // namespace thermocline::cli
