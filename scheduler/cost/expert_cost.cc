#include "scheduler/cost/expert_cost.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace thermocline::sched {

double ExpertTime::ns(int64_t n) const {
  const double tokens = static_cast<double>(n);
  if (n >= kTokens.back()) return ns_.back() * tokens / kTokens.back();
  size_t i = 0;
  while (i + 2 < kTokens.size() && n > kTokens[i + 1]) ++i;
  const double share = std::log(tokens / kTokens[i]) / std::log(static_cast<double>(kTokens[i + 1]) / kTokens[i]);
  return std::exp(std::log(std::max(ns_[i], 1.0)) * (1 - share) + std::log(std::max(ns_[i + 1], 1.0)) * share);
}

int64_t ExpertCosts::crossover() const {
  for (int64_t n = 1; n <= 1 << 16; n += std::max<int64_t>(1, n / 16))
    if (h2d_ns + gpu.ns(n) < cpu.ns(n)) return n;
  return 0;
}

std::vector<int> choose_streamed(std::span<const int64_t> missing, std::span<const int64_t> resident,
                                 const ExpertCosts& costs) {
  std::vector<int> order(missing.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return missing[static_cast<size_t>(a)] > missing[static_cast<size_t>(b)]; });
  double device = 0, cpu = missing.empty() ? 0 : costs.sync_ns, copies = 0;
  for (const int64_t n : resident) device += n > 0 ? costs.gpu.ns(n) : 0;
  for (const int64_t n : missing) cpu += costs.cpu.ns(n);
  std::vector<int> streamed;
  for (const int i : order) {
    const int64_t n = missing[static_cast<size_t>(i)];
    const double on_device = device + costs.gpu.ns(n), on_cpu = cpu - costs.cpu.ns(n), copied = copies + costs.h2d_ns;
    const double now = std::max({device, cpu, copies});
    if (std::max({on_device, on_cpu, copied + costs.gpu.ns(n)}) >= now) break;
    device = on_device;
    cpu = on_cpu;
    copies = copied;
    streamed.push_back(i);
  }
  return streamed;
}

ExpertCosts expert_costs(const CostModel& cost) {
  ExpertCosts costs;
  std::array<double, ExpertTime::kTokens.size()> cpu{}, gpu{};
  for (size_t i = 0; i < cpu.size(); ++i) {
    cpu[i] = cost.expert_cpu_ns(ExpertTime::kTokens[i]);
    gpu[i] = cost.on_device() ? cost.expert_gpu_ns(ExpertTime::kTokens[i]) : cpu[i];
  }
  costs.cpu = ExpertTime(cpu);
  costs.gpu = ExpertTime(gpu);
  costs.h2d_ns = cost.on_device() ? cost.h2d_ns() : 0;
  costs.sync_ns = cost.handover_ns();
  return costs;
}

Result<PrefillExperts> parse_prefill_experts(std::string_view name) {
  for (size_t i = 0; i < kPrefillExpertsNames.size(); ++i)
    if (name == kPrefillExpertsNames[i]) return static_cast<PrefillExperts>(i);
  return invalid("unknown prefill mode '" + std::string(name) + "': use cpu, stream or hybrid");
}

namespace {

// Residents with few tokens, the lightest first, while the CPU would end before the device that has them.
std::vector<int> choose_returned(std::span<const int64_t> tokens, std::vector<int> resident, double device, double cpu,
                                 const ExpertCosts& costs) {
  std::stable_sort(resident.begin(), resident.end(),
                   [&](int a, int b) { return tokens[static_cast<size_t>(a)] < tokens[static_cast<size_t>(b)]; });
  std::vector<int> returned;
  for (const int e : resident) {
    const int64_t n = tokens[static_cast<size_t>(e)];
    const double on_device = device - costs.gpu.ns(n), on_cpu = (cpu > 0 ? cpu : costs.sync_ns) + costs.cpu.ns(n);
    if (std::max(on_device, on_cpu) >= std::max(device, cpu)) break;
    device = on_device;
    cpu = on_cpu;
    returned.push_back(e);
  }
  return returned;
}

}  // namespace

LayerSplit split_layer(PrefillExperts mode, std::span<const int64_t> tokens, const std::vector<bool>& on_device,
                       const ExpertCosts& costs) {
  LayerSplit split;
  if (mode == PrefillExperts::cpu) return split;
  std::vector<int64_t> missing_tokens, resident_tokens;
  std::vector<int> missing, resident;
  for (size_t e = 0; e < tokens.size(); ++e) {
    if (tokens[e] == 0) continue;
    (on_device[e] ? resident_tokens : missing_tokens).push_back(tokens[e]);
    (on_device[e] ? resident : missing).push_back(static_cast<int>(e));
  }
  if (mode == PrefillExperts::stream) {
    std::stable_sort(missing.begin(), missing.end(),
                     [&](int a, int b) { return tokens[static_cast<size_t>(a)] > tokens[static_cast<size_t>(b)]; });
    split.streamed = std::move(missing);
    return split;
  }
  double device = 0, cpu = missing.empty() ? 0 : costs.sync_ns;
  for (const int64_t n : resident_tokens) device += costs.gpu.ns(n);
  for (const int64_t n : missing_tokens) cpu += costs.cpu.ns(n);
  for (const int i : choose_streamed(missing_tokens, resident_tokens, costs)) {
    const int64_t n = missing_tokens[static_cast<size_t>(i)];
    split.streamed.push_back(missing[static_cast<size_t>(i)]);
    device += costs.gpu.ns(n);
    cpu -= costs.cpu.ns(n);
  }
  if (split.streamed.empty()) split.returned = choose_returned(tokens, std::move(resident), device, cpu, costs);
  return split;
}

}  // namespace thermocline::sched
