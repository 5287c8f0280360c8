// Progress of long work on stderr: a bar with GB, GB/s and time left on a terminal, a plain line every few seconds
// elsewhere.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <string>

namespace thermocline {

class Progress {
 public:
  /// `quiet` prints nothing.
  Progress(std::string label, uint64_t total_bytes, bool quiet);
  ~Progress();

  /// Adds finished bytes; any thread. Prints at most ten times a second (terminal) or every five seconds.
  void add(uint64_t bytes);
  uint64_t done() const { return done_; }
  double seconds() const;

 private:
  using Clock = std::chrono::steady_clock;
  void print(bool last);

  const std::string label_;
  const uint64_t total_;
  const bool quiet_, terminal_;
  const Clock::time_point start_ = Clock::now();
  std::atomic<uint64_t> done_{0};
  std::mutex mutex_;
  Clock::time_point printed_ = start_;
};

}  // namespace thermocline
