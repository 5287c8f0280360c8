#include "scheduler/batch/batch.h"

#include <algorithm>

namespace thermocline::sched {

std::vector<int64_t> chunk_prefill(int64_t begin, int64_t end, int64_t max_chunk) {
  std::vector<int64_t> ends;
  for (int64_t pos = begin; pos < end;) ends.push_back(pos = std::min(end, pos + max_chunk));
  return ends;
}

}  // namespace thermocline::sched
