// What an expert's tokens cost on each side, and which missing experts of a prefill chunk are worth streaming to the
// device. Source: spec/scheduler.md 2.2, 2.8 and 2.9.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

namespace thermocline::sched {

/// Time of one expert by its number of tokens: measured points, log-linear between them.
class ExpertTime {
 public:
  static constexpr std::array<int, 5> kTokens = {1, 8, 32, 128, 512};
  ExpertTime() = default;
  explicit ExpertTime(const std::array<double, 5>& ns) : ns_(ns) {}
  /// Nanoseconds for n tokens, n >= 1; beyond the last point in proportion.
  double ns(int64_t n) const;

 private:
  std::array<double, 5> ns_{};
};

struct ExpertCosts {
  ExpertTime cpu, gpu;
  double h2d_ns = 0;   // copying one expert to the device
  double sync_ns = 0;  // handing a layer to the CPU and back

  /// Tokens of one expert from which copying it beats computing it on the CPU, each alone: 0 where it never does.
  int64_t crossover() const;
};

/// Which experts of a layer to stream: a prefix of those with the most tokens, chosen so that the slowest of device,
/// CPU and copies ends first.
///   missing   tokens of every missing expert
///   resident  tokens of every resident one
/// Returns indices into `missing`, by falling token count (a tie goes to the lower index).
std::vector<int> choose_streamed(std::span<const int64_t> missing, std::span<const int64_t> resident,
                                 const ExpertCosts& costs);

}  // namespace thermocline::sched
