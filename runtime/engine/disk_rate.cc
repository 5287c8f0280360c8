#include <fmt/format.h>

#include <chrono>
#include <cstdlib>
#include <memory>

#include "runtime/engine/calibrate.h"
#include "runtime/io/disk_files.h"

namespace thermocline {
namespace {

Result<double> rate_in(const std::filesystem::path& folder, uint64_t bytes) {
  using Clock = std::chrono::steady_clock;
  TC_ASSIGN(const std::unique_ptr<DiskFiles> files, DiskFiles::open(folder, {}));
  TC_ASSIGN(const int file, files->open_file("blocks", true));
  TC_RETURN_IF_ERROR(transfer(*files, file, bytes, true));
  TC_RETURN_IF_ERROR(files->sync(file));
  const Clock::time_point start = Clock::now();
  TC_RETURN_IF_ERROR(transfer(*files, file, bytes, false));
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
