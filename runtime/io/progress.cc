#include "runtime/io/progress.h"

#include <fmt/format.h>
#include <unistd.h>

#include <cstdio>

namespace thermocline {

Progress::Progress(std::string label, uint64_t total_bytes, bool quiet)
    : label_(std::move(label)), total_(total_bytes), quiet_(quiet), terminal_(isatty(STDERR_FILENO) == 1) {}

Progress::~Progress() {
  if (!quiet_) print(true);
}

double Progress::seconds() const { return std::chrono::duration<double>(Clock::now() - start_).count(); }

void Progress::add(uint64_t bytes) {
  done_ += bytes;
  if (quiet_) return;
  const std::unique_lock lock(mutex_, std::try_to_lock);
  if (!lock || Clock::now() - printed_ < (terminal_ ? std::chrono::milliseconds(100) : std::chrono::milliseconds(5000)))
    return;
  print(false);
  printed_ = Clock::now();
}

void Progress::print(bool last) {
  const double done = static_cast<double>(done_.load()), total = static_cast<double>(total_), elapsed = seconds();
  const double rate = elapsed > 0 ? done / elapsed : 0;
  const std::string numbers = fmt::format("{:.2f} of {:.2f} GB, {:.2f} GB/s", done / 1e9, total / 1e9, rate / 1e9);
  const std::string time =
      last ? fmt::format("{:.1f} s", elapsed) : fmt::format("{:.0f} s left", rate > 0 ? (total - done) / rate : 0.0);
  if (!terminal_) {
    fmt::print(stderr, "{}: {}, {}\n", label_, numbers, time);
    return;
  }
  constexpr int kWidth = 30;
  const int filled = total > 0 ? static_cast<int>(kWidth * done / total) : kWidth;
  fmt::print(stderr, "\r{} [{:#<{}}{:.<{}}] {}, {}\033[K{}", label_, "", filled, "", kWidth - filled, numbers, time,
             last ? "\n" : "");
  std::fflush(stderr);
}

}  // namespace thermocline
