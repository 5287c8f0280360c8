// StopToken: whether anybody still wants the step that runs. Polled between layers.
#pragma once

#include "runtime/base/result.h"

namespace thermocline {

class StopToken {
 public:
  virtual ~StopToken() = default;
  /// Cheap, from the step thread.
  virtual bool stop_requested() const = 0;
};
/// What such a step ends with.
inline Error nobody_wants_it() { return {ErrorCode::cancelled, "nobody wants this step any more"}; }

}  // namespace thermocline
