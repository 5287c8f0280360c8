// RateWindow: what was counted in the last seconds, from a small ring of counts.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>

namespace thermocline {

/// Counts that only grow.
struct RateCounts {
  static constexpr size_t kMostNodes = 8;  // of memory; what others have is not told apart
  int64_t prompt_tokens = 0, answer_tokens = 0;
  uint64_t read_bytes = 0;
  double step_seconds = 0, weight_seconds = 0;
  std::array<uint64_t, kMostNodes> node_bytes{};
};

/// What grew, and in how long.
struct RateSpan {
  double seconds = 0;  // 0: nothing is known yet
  RateCounts counts = {};
  double per_second(double count) const { return seconds > 0 ? count / seconds : 0; }
};

class RateWindow {
 public:
  using Clock = std::chrono::steady_clock;
  static constexpr std::chrono::seconds kWindow{10};

  /// The counts at a time; those closer than kEvery to the ones before are only kept as the latest.
  void add(Clock::time_point at, const RateCounts& counts);
  /// Of the last kWindow; where the latest counts are older than that, as a long step publishes none, of as far back as
  /// the ones before them.
  RateSpan span(Clock::time_point now) const;

 private:
  static constexpr std::chrono::milliseconds kEvery{250};
  struct Sample {
    Clock::time_point at{};
    RateCounts counts = {};
  };
  std::array<Sample, 64> ring_{};  // sixteen seconds
  size_t size_ = 0, next_ = 0;
  Sample latest_;
};

}  // namespace thermocline
