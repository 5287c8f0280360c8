// What an expert's tokens cost on each side, and which missing experts of a prefill chunk are worth streaming to the
// device. Source: spec/scheduler.md 2.2, 2.8 and 2.9.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "runtime/base/result.h"
#include "scheduler/cost/cost_model.h"

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

/// What the cost model says of them. Without a device the CPU's time stands for both.
ExpertCosts expert_costs(const CostModel& cost);

/// Which experts of a layer to stream: a prefix of those with the most tokens, chosen so that the slowest of device,
/// CPU and copies ends first.
///   missing   tokens of every missing expert
///   resident  tokens of every resident one
/// Returns indices into `missing`, by falling token count (a tie goes to the lower index).
std::vector<int> choose_streamed(std::span<const int64_t> missing, std::span<const int64_t> resident,
                                 const ExpertCosts& costs);

/// Missing experts of prefill steps.
enum class PrefillExperts {
  cpu,     // on the CPU, as in decode: the same bits for every chunking
  stream,  // all copied to the device and computed there
  hybrid,  // those with the most tokens are copied, by what both sides cost
};
constexpr std::array<const char*, 3> kPrefillExpertsNames = {"cpu", "stream", "hybrid"};
/// Errors: invalid_argument, with the names there are.
Result<PrefillExperts> parse_prefill_experts(std::string_view name);

/// Who computes what of a prefill layer, where not everybody computes what is his.
struct LayerSplit {
  std::vector<int> streamed;  // missing experts that go to the device, in the order they do
  std::vector<int> returned;  // light residents that the CPU takes over from a device that would end last
};
/// Source: spec/scheduler.md 2.8.
///   tokens     of every expert of the layer
///   on_device  whether the device has it
LayerSplit split_layer(PrefillExperts mode, std::span<const int64_t> tokens, const std::vector<bool>& on_device,
                       const ExpertCosts& costs);

}  // namespace thermocline::sched
