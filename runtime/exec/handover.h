// The host's side of handing a layer's misses to the CPU: the device raises a flag in pinned memory (gpu::PublishArgs),
// the driving thread answers there (gpu::FetchArgs).
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

#include "runtime/hw/device.h"

namespace thermocline {

/// Whether the step's number is in a flag; what was written before it is then there too.
inline bool flag_is_up(uint32_t& flag, uint32_t step) {
  return std::atomic_ref<uint32_t>(flag).load(std::memory_order_acquire) == step;
}

/// Waits until the step's number is in a flag. Errors: the stream's fault, as then no flag will come.
inline Status await_flag(const gpu::Stream& stream, uint32_t& flag, uint32_t step) {
  for (int64_t spins = 1; !flag_is_up(flag, step); ++spins) {
    __builtin_ia32_pause();
    if (spins % 1024 == 0) std::this_thread::yield();
    if (spins % 16384 == 0) TC_RETURN_IF_ERROR(stream.status());
  }
  return {};
}

/// What the host has written before is there for the device that waits.
inline void raise_answer(uint32_t& answer, uint32_t step) {
  std::atomic_ref<uint32_t>(answer).store(step, std::memory_order_release);
}

}  // namespace thermocline
