// Work off the step path whose pieces take different times: loading, packing, writing. oneTBB hands pieces to whoever
// is free; the step itself uses WorkerPool and a static split.
#pragma once

#include <cstdint>
#include <functional>

namespace thermocline {

/// Calls fn(index, slot) for every index in [0, count), on up to `threads` threads (0: as many as cores); returns when
/// all are done. Calls with the same slot (below `threads`) never overlap, so per-thread buffers are indexed by it.
void for_each_uneven(int64_t count, int threads, const std::function<void(int64_t index, int slot)>& fn);

/// The threads that `threads` = 0 stands for.
int default_uneven_threads();

}  // namespace thermocline
