#include "scheduler/cost/machine_profile.h"

#include <algorithm>
#include <cmath>

namespace thermocline::sched {

KernelCurve KernelCurve::roof(double bytes_per_second, double flops_per_second, double flops_per_byte) {
  Points ns{};
  for (size_t i = 0; i < ns.size(); ++i)
    ns[i] = 1e9 * std::max(1 / bytes_per_second, kTokens[i] * flops_per_byte / flops_per_second);
  return KernelCurve(ns);
}

double KernelCurve::ns_per_byte(double n) const {
  if (n <= 1) return ns_.front();
  if (n >= kTokens.back()) return ns_.back() * n / kTokens.back();
  size_t i = 0;
  while (n > kTokens[i + 1]) ++i;
  const double t = std::log(n / kTokens[i]) / std::log(static_cast<double>(kTokens[i + 1]) / kTokens[i]);
  return ns_[i] * std::pow(ns_[i + 1] / ns_[i], t);
}

}  // namespace thermocline::sched
