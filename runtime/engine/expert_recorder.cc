#include "runtime/engine/expert_recorder.h"

#include <cerrno>
#include <cstring>
#include <exception>

#include <unistd.h>

#include "runtime/base/log.h"
#include "runtime/base/number_formats.h"

namespace thermocline {

ExpertRecorder::ExpertRecorder(const Options& options, sched::TraceHeader header)
    : options_(options), header_(std::move(header)) {
  counts_.model_hash = header_.model_hash;
  counts_.layers = header_.layers;
  counts_.experts = header_.experts;
  counts_.uses.resize(static_cast<size_t>(header_.layers) * static_cast<size_t>(header_.experts));
}

Result<std::unique_ptr<ExpertRecorder>> ExpertRecorder::open(const Options& options, const sched::TraceHeader& header) {
  std::unique_ptr<ExpertRecorder> recorder(new ExpertRecorder(options, header));
  if (options.trace.empty()) return recorder;
  recorder->file_.reset(std::fopen(options.trace.c_str(), "abe"));  // what is there stays until there is something new
  if (!recorder->file_)
    return Error{ErrorCode::io, "--record-trace " + options.trace.string() + ": " + std::strerror(errno)};
  return recorder;
}

ExpertRecorder::~ExpertRecorder() {
  try {
    if (file_) log_info("{} tokens recorded in {}", tokens_, options_.trace.string());
    if (options_.profile.empty() || step_ == 0) return;
    if (const Status saved = save_expert_profile(options_.profile, counts_); !saved.ok())
      log_warn("the expert profile: {}", saved.error().message);
  } catch (const std::exception& e) {  // no memory left for the text
    std::fprintf(stderr, "the expert profile is not saved: %s\n", e.what());
  }
}

void ExpertRecorder::stepped(const StepInput& input, const StepReport& report) {
  const RoutedExperts& routed = report.routed;
  for (int layer = 0; layer < header_.layers; ++layer) {
    double* const uses = &counts_.uses[static_cast<size_t>(layer) * static_cast<size_t>(header_.experts)];
    const int32_t* const ids = routed.ids[static_cast<size_t>(layer)];
    for (int64_t i = 0; i < routed.tokens * routed.top_k; ++i) ++uses[ids[i]];
  }
  if (file_) record(input, routed);
  ++step_;
}

void ExpertRecorder::record(const StepInput& input, const RoutedExperts& routed) {
  const int k = header_.top_k, near = header_.near_misses;
  std::vector<sched::TracePick> picks(static_cast<size_t>(header_.picks_per_token()));
  bytes_.clear();
  if (tokens_ == 0) {
    (void)!ftruncate(fileno(file_.get()), 0);  // a pipe has no length
    bytes_ = sched::trace_header_bytes(header_);
  }
  for (const sched::Segment& segment : input.batch.segments)
    for (int64_t i = 0; i < segment.num_tokens; ++i) {
      const int64_t token = segment.first_token + i;
      sched::TracePick* pick = picks.data();
      for (size_t layer = 0; layer < static_cast<size_t>(header_.layers); ++layer) {
        for (int64_t j = token * k; j < (token + 1) * k; ++j)
          *pick++ = {static_cast<uint16_t>(routed.ids[layer][j]),
                     routed.weights.empty() ? uint16_t{0} : float_to_bf16(routed.weights[layer][j])};
        for (int64_t j = token * near; j < (token + 1) * near; ++j)
          *pick++ = {static_cast<uint16_t>(routed.near_ids[layer][j]), 0};
        for (const auto& guesses : routed.guess_ids)
          for (int64_t j = token * header_.guesses; j < (token + 1) * header_.guesses; ++j)
            *pick++ = {static_cast<uint16_t>(guesses[layer][j]), 0};
      }
      append_trace_record(bytes_, header_,
                          {.step = step_,
                           .request = input.sequences[static_cast<size_t>(segment.sequence)]->number(),
                           .position = static_cast<uint32_t>(segment.first_pos + i),
                           .phase = segment.num_tokens > 1 ? sched::TracePhase::prefill : sched::TracePhase::decode,
                           .token_id = input.batch.token_ids[static_cast<size_t>(token)]},
                          picks);
      ++tokens_;
    }
  if (std::fwrite(bytes_.data(), 1, bytes_.size(), file_.get()) == bytes_.size() && std::fflush(file_.get()) == 0)
    return;
  log_warn("the trace {}: {}; it ends here", options_.trace.string(), std::strerror(errno));
  file_.reset();
}

}  // namespace thermocline
