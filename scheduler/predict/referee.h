// Referee: whether speculation pays, by the clock and nothing else. Windows with it and without take turns; it stays on
// only where the time a token is at least 1 % lower with 90 % confidence (Welch's test), and is asked again every hour.
// Every measure of a predictor can look better while the box gets slower. Source: spec/scheduler.md 2.6.
#pragma once

#include <cmath>
#include <cstdint>

namespace thermocline::sched {

class Referee {
 public:
  enum class State { testing, on, off };
  static constexpr int64_t kMostTokens = 8;                       // of a step; with more the CPU has no time to spare
  static constexpr int kWindowTokens = 128, kWindows = 16;        // of each kind
  static constexpr double kLeastGain = 0.01, kConfidence = 1.34;  // t of 90 %, one-sided, some 15 degrees of freedom
  static constexpr int64_t kRetestNs = 3'600'000'000'000;

  /// Whether the next step speculates.
  bool on() const { return state_ == State::on || (state_ == State::testing && with_.count <= without_.count); }
  State state() const { return state_; }

  /// A step of `tokens` took `ns`; `now_ns` is the caller's clock.
  void step(int64_t tokens, double ns, int64_t now_ns) {
    if (state_ != State::testing) {
      if (now_ns - decided_ns_ < kRetestNs) return;
      *this = {};
    }
    tokens_ += tokens;
    ns_ += ns;
    if (tokens_ < kWindowTokens) return;
    (on() ? with_ : without_).add(ns_ / static_cast<double>(tokens_));
    tokens_ = 0;
    ns_ = 0;
    if (with_.count < kWindows || without_.count < kWindows) return;
    decided_ns_ = now_ns;
    state_ = pays() ? State::on : State::off;
  }

 private:
  struct Sample {
    int count = 0;
    double mean = 0, squares = 0;
    void add(double x) {
      const double delta = x - mean;
      mean += delta / ++count;
      squares += delta * (x - mean);
    }
    double variance_of_mean() const { return squares / (count - 1) / count; }
  };
  bool pays() const {
    const double gain = without_.mean * (1 - kLeastGain) - with_.mean;
    return gain > kConfidence * std::sqrt(with_.variance_of_mean() + without_.variance_of_mean());
  }

  State state_ = State::testing;
  Sample with_, without_;
  int64_t tokens_ = 0, decided_ns_ = 0;
  double ns_ = 0;
};

}  // namespace thermocline::sched
