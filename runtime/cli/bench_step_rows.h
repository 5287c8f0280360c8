// The tests of `bench step`: what their repetitions took and read, part by part, and what bounds them.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "runtime/cli/bench_peaks.h"
#include "runtime/cli/depth_projection.h"
#include "runtime/engine/step_forecast.h"

namespace thermocline::cli {

/// What counts: all of a step, or all of it but the head.
enum class StepPart { whole, layers };

/// One repetition, and the peaks that were measured right before it: both see the same neighbours.
struct StepSample {
  double seconds = 0;                      // of all steps, and what is between them
  double head_seconds = 0;                 // of `seconds`
  std::vector<double> layer_seconds = {};  // by layer; empty: nothing of a step is timed apart, on devices
  cpu::TrafficByKind kinds = {};           // what the CPU read
  Peaks peaks = {};

  void add(const StepReport& report, const cpu::WeightTraffic& traffic);
  double seconds_of(StepPart part) const { return part == StepPart::whole ? seconds : seconds - head_seconds; }
  double bytes_of(StepPart part) const;
  /// By layer, so that they add up to seconds_of(layers): what a step does around its layers is shared out over them.
  std::vector<double> whole_layer_seconds() const;
};

/// What one token reads and multiplies of the KV cache at the end of a context.
struct KvNeed {
  double bytes = 0, flops = 0, int8_ops = 0;
  double seconds(const Peaks& peaks) const;
};

/// Seconds of a token are those of a test by the tokens of all its sequences.
struct StepRow {
  const char* kind;                // "prefill", "decode"
  int64_t tokens = 0;              // of each sequence
  int64_t batch = 1;               // sequences of a step
  int64_t context = 0;             // tokens that a sequence ends with; 0: its own alone
  int64_t step_tokens = 1;         // of a step, at most
  double macs = 0, head_macs = 0;  // multiplications of weights, of all tokens; 0: a device does them
  KvNeed kv = {};                  // of a long context
  std::vector<StepSample> samples = {};
  double predicted_tokens_per_second = 0;  // by the cost model; 0: there is no profile of this box
  ForecastStats forecast = {};             // of the repetitions' steps

  bool prefill() const { return kind[0] == 'p'; }
  /// "pp512", "tg64 x8 @131072".
  std::string name() const;
  double all_tokens() const { return static_cast<double>(tokens * batch); }
  /// The repetition of which all seconds are shown, so that they add up: the middle one, of two the slower.
  const StepSample& middle() const;
  bool parted() const { return !middle().layer_seconds.empty(); }
  double tokens_per_second(StepPart part) const { return all_tokens() / middle().seconds_of(part); }
  double bytes_per_token(StepPart part) const { return middle().bytes_of(part) / all_tokens(); }
  double head_share_of_bytes() const;
  // Each repetition is judged by its own peaks; of those the median.
  double bound_tokens_per_second(StepPart part) const;
  double share_of_bound(StepPart part) const;

 private:
  double bound_seconds(const StepSample& sample, StepPart part) const;
};

/// Weights of one kind, in one test.
struct KindRow {
  cpu::WeightKind kind;
  double bytes = 0, seconds = 0;  // of a token
  double share_of_stream = 0;     // of the read that was measured before the repetition
  const char* name() const { return cpu::kWeightKindNames[static_cast<size_t>(kind)]; }
  double rate() const { return bytes / seconds; }
};

/// Those that the part reads.
std::vector<KindRow> kind_rows(const StepRow& row, StepPart part);

/// Why a row says nothing of the whole model; empty: it does. A step of several tokens reads more experts where there
/// are more to choose from.
std::string not_projected(const StepRow& row, const ModelGeometry& slice, const WholeModel& whole);
/// Of a token. `row` is parted.
DepthProjection project_row(const StepRow& row, StepPart part, const ModelGeometry& slice, const WholeModel& whole);

}  // namespace thermocline::cli
