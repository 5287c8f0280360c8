// ExpertPrefetch: while a device is at attention the CPU reads the experts that will probably be missing into its
// caches, by what the layer's router said a layer ahead. Results are the same to the bit; whether steps are shorter for
// it, the referee says by the clock. Source: spec/scheduler.md 2.6 and 2.7.
#pragma once

#include <functional>
#include <span>
#include <string_view>
#include <vector>

#include "kernels_cpu/moe.h"
#include "scheduler/predict/referee.h"

namespace thermocline {

class ExpertPrefetch {
 public:
  enum class Mode { off, automatic, on };
  /// "off", "auto", "on". Errors: invalid_argument.
  static Result<Mode> parse(std::string_view name);

  struct Options {
    Mode mode = Mode::off;
    int64_t worker_bytes = 0;  // that a worker's own cache holds of experts beside what it works on
  };
  ExpertPrefetch(const Options& options, int experts) : o_(options), staged_(static_cast<size_t>(experts)) {}

  /// Whether a step of so many tokens should ask routers ahead.
  bool on(int64_t tokens) const;
  /// Reads those of `guesses` that are `missing` until `stop`; the likeliest first, -1: none.
  void stage(const cpu::CpuContext& cpu, std::span<const cpu::ExpertWeights> experts, std::span<const int32_t> guesses,
             const std::function<bool(int32_t)>& missing, const std::function<bool()>& stop);
  /// The layer's router has spoken: the CPU's pairs, -1: the device's. Until the next stage().
  void missed(std::span<const int32_t> ids);
  /// A step of so many tokens took so long. `now_ns`: by any clock that goes on.
  void stepped(int64_t tokens, double ns, int64_t now_ns);

  /// Experts read ahead, begun with at least; those read whole; and those that were needed.
  int64_t staged() const { return count_; }
  int64_t staged_whole() const { return whole_; }
  int64_t right() const { return right_; }
  sched::Referee::State verdict() const { return referee_.state(); }

 private:
  const Options o_;
  sched::Referee referee_;
  std::vector<bool> staged_;      // of the layer
  std::vector<int32_t> in_turn_;  // the same
  std::vector<const cpu::ExpertWeights*> weights_;
  int64_t count_ = 0, whole_ = 0, right_ = 0;
};

}  // namespace thermocline
