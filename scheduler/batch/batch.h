// Batch: the tokens of one step, each at its own position of its own sequence. Plain numbers; the scheduler makes
// batches, exec computes them.
#pragma once

#include <cstdint>
#include <vector>

namespace thermocline::sched {

/// Consecutive tokens of one sequence. `sequence` indexes the step's list of KV states.
struct Segment {
  int sequence = 0;
  int64_t first_pos = 0;    // position of the first token
  int64_t first_token = 0;  // its index in Batch::token_ids
  int64_t num_tokens = 0;
};

struct Batch {
  std::vector<int32_t> token_ids;
  std::vector<Segment> segments;    // in the order of token_ids, covering it
  std::vector<int32_t> logit_rows;  // token indices whose logits are wanted, rising

  int64_t size() const { return static_cast<int64_t>(token_ids.size()); }
  /// Appends tokens of a sequence as one segment.
  void add(int sequence, int64_t first_pos, const int32_t* ids, int64_t count) {
    segments.push_back({sequence, first_pos, size(), count});
    token_ids.insert(token_ids.end(), ids, ids + count);
  }
};

/// Splits tokens [begin, end) of a prompt into chunks of at most `max_chunk`; returns the chunk ends.
/// Any split gives the same rows and logits, bit for bit.
std::vector<int64_t> chunk_prefill(int64_t begin, int64_t end, int64_t max_chunk);

}  // namespace thermocline::sched
