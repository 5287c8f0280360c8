// StopMatcher: ends an answer at a stop string that may lie across tokens.
#pragma once

#include <string>
#include <vector>

namespace thermocline {

/// Holds back text that may be the start of a stop string.
class StopMatcher {
 public:
  /// `include`: a stop string that was met is part of the text.
  explicit StopMatcher(const std::vector<std::string>& stops, bool include = false)
      : stops_(stops), include_(include) {}
  /// The text that is certain; `stopped` turns true when a stop string was met (what follows is dropped).
  std::string push(const std::string& text, bool& stopped);
  std::string finish() { return std::move(held_); }
  /// The stop string that was met; null before.
  const std::string* met() const { return met_; }

 private:
  const std::vector<std::string>& stops_;
  const bool include_;
  std::string held_;
  const std::string* met_ = nullptr;
};

}  // namespace thermocline
