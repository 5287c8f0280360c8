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

}  // namespace thermocline::sched
