#include "scheduler/trace/analysis.h"

#include <algorithm>
#include <unordered_map>

namespace thermocline::sched {

std::vector<double> skew_curve(const Trace& trace) {
  const TraceHeader& h = trace.header();
  std::vector<double> curve(static_cast<size_t>(h.experts) + 1);
  std::vector<int64_t> counts(static_cast<size_t>(h.experts));
  for (int layer = 0; layer < h.layers; ++layer) {
    std::fill(counts.begin(), counts.end(), 0);
    for (int64_t i = 0; i < trace.size(); ++i)
      for (const TracePick& pick : trace.picks(i, layer)) ++counts[pick.expert];
    std::sort(counts.rbegin(), counts.rend());
    int64_t sum = 0;
    for (size_t n = 0; n < counts.size(); ++n) curve[n + 1] += static_cast<double>(sum += counts[n]);
  }
  const double all = curve.back();
  for (double& share : curve) share = all > 0 ? share / all : 0;
  return curve;
}

std::vector<double> lru_curve(const Trace& trace) {
  const TraceHeader& h = trace.header();
  std::vector<int64_t> found_at(static_cast<size_t>(h.experts) + 1);  // uses by distance
  int64_t uses = 0;
  std::vector<uint16_t> stack;  // the last used first
  for (int layer = 0; layer < h.layers; ++layer) {
    stack.clear();
    for (int64_t i = 0; i < trace.size(); ++i) {
      const auto picks = trace.picks(i, layer);
      uses += static_cast<int64_t>(picks.size());
      // A token's experts are looked for at once: none pushes out another before it was asked for.
      for (const TracePick& pick : picks) {
        const auto at = std::find(stack.begin(), stack.end(), pick.expert);
        if (at != stack.end()) ++found_at[static_cast<size_t>(at - stack.begin()) + 1];
      }
      for (const TracePick& pick : picks) {
        const auto at = std::find(stack.begin(), stack.end(), pick.expert);
        if (at == stack.end())
          stack.insert(stack.begin(), pick.expert);
        else
          std::rotate(stack.begin(), at, at + 1);
      }
    }
  }
  std::vector<double> curve(found_at.size());
  int64_t sum = 0;
  for (size_t n = 0; n < curve.size(); ++n)
    curve[n] = uses > 0 ? static_cast<double>(sum += found_at[n]) / static_cast<double>(uses) : 0;
  return curve;
}

double previous_token_overlap(const Trace& trace) {
  const TraceHeader& h = trace.header();
  std::unordered_map<uint32_t, int64_t> last;
  int64_t same = 0, all = 0;
  for (int64_t i = 0; i < trace.size(); ++i) {
    const auto [before, first] = last.try_emplace(trace.token(i).request, i);
    if (first) continue;
    for (int layer = 0; layer < h.layers; ++layer)
      for (const TracePick& pick : trace.picks(i, layer)) {
        const auto old = trace.picks(before->second, layer);
        same += std::any_of(old.begin(), old.end(), [&](const TracePick& p) { return p.expert == pick.expert; });
        ++all;
      }
    before->second = i;
  }
  return all > 0 ? static_cast<double>(same) / static_cast<double>(all) : 0;
}

}  // namespace thermocline::sched
