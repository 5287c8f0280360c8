// StopToken: whether anybody still wants the step that runs. Polled between layers.
#pragma once

namespace thermocline {

class StopToken {
 public:
  virtual ~StopToken() = default;
  /// Cheap, from the step thread.
  virtual bool stop_requested() const = 0;
};

}  // namespace thermocline
