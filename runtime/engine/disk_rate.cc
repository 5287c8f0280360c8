#include <fmt/format.h>

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>

#include "runtime/engine/calibrate.h"
#include "runtime/io/disk_files.h"

namespace thermocline {
namespace {

// A file once, in eighths of the buffer, as many under way as the KV tiers have.
Status transfer(DiskFiles& files, int file, int64_t blocks, bool write) {
  const uint64_t block = files.buffer().size() / DiskFiles::kDepth;
  std::vector<uint64_t> idle(DiskFiles::kDepth);
  std::iota(idle.begin(), idle.end(), 0);
  Status first;
  const auto wait = [&] {
    const DiskFiles::Done done = files.wait();
    idle.push_back(done.tag);
    if (done.error != 0 && first.ok())
      first =
          Error{ErrorCode::io, fmt::format("a block was not {}: {}", write ? "written" : "read", strerror(done.error))};
  };
  for (int64_t i = 0; i < blocks && first.ok(); ++i) {
    if (idle.empty()) wait();
    const uint64_t slot = idle.back();
    idle.pop_back();
    files.submit({file, write, static_cast<uint64_t>(i) * block, files.buffer().subspan(slot * block, block), slot});
  }
  while (idle.size() < DiskFiles::kDepth) wait();
  return first;
}

Result<double> rate_in(const std::filesystem::path& folder, uint64_t bytes) {
  using Clock = std::chrono::steady_clock;
  TC_ASSIGN(const std::unique_ptr<DiskFiles> files, DiskFiles::open(folder, {}));
  TC_ASSIGN(const int file, files->open_file("blocks", true));
  const auto blocks = static_cast<int64_t>(bytes / (files->buffer().size() / DiskFiles::kDepth));
  TC_RETURN_IF_ERROR(transfer(*files, file, blocks, true));
  TC_RETURN_IF_ERROR(files->sync(file));
  const Clock::time_point start = Clock::now();
  TC_RETURN_IF_ERROR(transfer(*files, file, blocks, false));
  return static_cast<double>(bytes) / std::chrono::duration<double>(Clock::now() - start).count();
}

}  // namespace

Result<double> disk_read_rate(const std::filesystem::path& folder, bool quick) {
  std::string own = (folder / "calibrate-XXXXXX").string();
  if (!mkdtemp(own.data())) return Error{ErrorCode::io, "no folder can be made in " + folder.string()};
  Result<double> rate = rate_in(own, quick ? 64 << 20 : 512 << 20);
  std::error_code ignored;
  std::filesystem::remove_all(own, ignored);
  return rate;
}

}  // namespace thermocline
