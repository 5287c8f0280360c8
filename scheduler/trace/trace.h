// Trace: which experts the routers chose, token by token: what policies are judged on before there is hardware, and
// what a running engine records. Source: spec/scheduler.md 3.2.
//
//   file = "TCTRACE1", header (40 bytes and the model's name), records of one size; integers are little-endian
//   record = step, request, position (u32 each), phase, flags (u8), 2 bytes 0, [token id (i32)],
//            per layer: top_k + near_misses + 2 guesses x { expert (u16), gate weight (bf16) }
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/base/result.h"

namespace thermocline::sched {

struct TraceHeader {
  std::string model;        // a name, for people
  uint64_t model_hash = 0;  // of its config.json; 0: none, a synthetic one
  int layers = 0, experts = 0, top_k = 0;
  int near_misses = 0;     // of ranks top_k, top_k + 1, ... kept beside the chosen ones
  bool token_ids = false;  // whoever recorded it agreed to that
  int guesses = 0;         // of the layer's router asked one layer ahead, and as many of two: kept behind those
  int picks_per_layer() const { return top_k + near_misses + 2 * guesses; }
  int picks_per_token() const { return layers * picks_per_layer(); }
  bool operator==(const TraceHeader&) const = default;
};

enum class TracePhase : uint8_t { prefill, decode };

struct TraceToken {
  uint32_t step = 0, request = 0, position = 0;
  TracePhase phase = TracePhase::decode;
  uint8_t flags = 0;  // kDraft, kAccepted
  int32_t token_id = -1;
  static constexpr uint8_t kDraft = 1, kAccepted = 2;
  bool operator==(const TraceToken&) const = default;
};

/// An expert and its normalised gate weight, as bf16; near misses and guesses have none. kNobody: a guess that nobody
/// could make.
struct TracePick {
  static constexpr uint16_t kNobody = 0xffff;
  uint16_t expert = 0, weight = 0;
  bool operator==(const TracePick&) const = default;
};

class Trace {
 public:
  explicit Trace(TraceHeader header = {}) : header_(std::move(header)) {}

  const TraceHeader& header() const { return header_; }
  int64_t size() const { return static_cast<int64_t>(tokens_.size()); }
  const TraceToken& token(int64_t i) const { return tokens_[static_cast<size_t>(i)]; }
  /// The experts a token was routed to in a layer, [top_k], the heaviest first.
  std::span<const TracePick> picks(int64_t i, int layer) const {
    return {at(i, layer), static_cast<size_t>(header_.top_k)};
  }
  std::span<const TracePick> near_misses(int64_t i, int layer) const {
    return {at(i, layer) + header_.top_k, static_cast<size_t>(header_.near_misses)};
  }
  /// What the layer's router, asked one layer ahead (`distance` 1) or two, would have chosen: the likeliest first, down
  /// to kNobody.
  std::span<const TracePick> guesses(int64_t i, int layer, int distance) const {
    return {at(i, layer) + header_.top_k + header_.near_misses + (distance - 1) * header_.guesses,
            static_cast<size_t>(header_.guesses)};
  }
  /// `picks`: [layers, picks_per_layer()]
  void add(const TraceToken& token, std::span<const TracePick> picks);
  /// Tokens [begin, end).
  Trace slice(int64_t begin, int64_t end) const;
  /// Bytes of a file that ended in the middle of a record.
  int64_t cut_bytes() const { return cut_bytes_; }
  bool operator==(const Trace& other) const {
    return header_ == other.header_ && tokens_ == other.tokens_ && picks_ == other.picks_;
  }

 private:
  friend Result<Trace> parse_trace(std::string_view bytes);
  const TracePick* at(int64_t i, int layer) const {
    return picks_.data() + i * header_.picks_per_token() + layer * header_.picks_per_layer();
  }
  TraceHeader header_;
  std::vector<TraceToken> tokens_;
  std::vector<TracePick> picks_;
  int64_t cut_bytes_ = 0;
};

/// What a file begins with, and what each token adds.
std::string trace_header_bytes(const TraceHeader& header);
void append_trace_record(std::string& out, const TraceHeader& header, const TraceToken& token,
                         std::span<const TracePick> picks);
std::string trace_bytes(const Trace& trace);
/// Errors: corrupt, with the offset: no trace, sizes out of range, an expert beyond the model's, one twice in a layer.
/// A record that is not whole is left out (a recording that was cut off).
Result<Trace> parse_trace(std::string_view bytes);

}  // namespace thermocline::sched
