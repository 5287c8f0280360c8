#include "runtime/engine/stop_matcher.h"

#include <algorithm>

namespace thermocline {

std::string StopMatcher::push(const std::string& text, bool& stopped) {
  held_ += text;
  size_t at = std::string::npos, length = 0;
  for (const std::string& stop : stops_)
    if (const size_t found = held_.find(stop); found < at) {
      at = found;
      length = stop.size();
      met_ = &stop;
    }
  stopped = at != std::string::npos;
  if (stopped) {
    std::string out = held_.substr(0, at + (include_ ? length : 0));
    held_.clear();
    return out;
  }
  size_t keep = 0;
  for (const std::string& stop : stops_)
    for (size_t n = std::min(held_.size(), stop.size() - 1); n > keep; --n)
      if (held_.compare(held_.size() - n, n, stop, 0, n) == 0) keep = n;
  std::string out = held_.substr(0, held_.size() - keep);
  held_.erase(0, held_.size() - keep);
  return out;
}

}  // namespace thermocline
