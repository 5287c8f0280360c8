// ExpertRecorder: what an engine's routers chose, into counts (the profile of the next run) and, where asked for, into
// a trace file. Neither keeps a token's text; ids only where somebody agreed to it.
#pragma once

#include <cstdio>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "runtime/engine/expert_profile.h"
#include "runtime/exec/step_executor.h"
#include "scheduler/trace/trace.h"

namespace thermocline {

class ExpertRecorder final : public StepExecutor::Recorder {
 public:
  struct Options {
    std::filesystem::path trace;    // a file to write; empty: none
    std::filesystem::path profile;  // saved at the end; empty: not
  };
  /// `header`: of the model, without near misses. Errors: io for a trace file that cannot be written.
  static Result<std::unique_ptr<ExpertRecorder>> open(const Options& options, const sched::TraceHeader& header);
  /// Ends the trace, saves the profile. What fails is logged.
  ~ExpertRecorder() override;

  void stepped(const StepInput& input, const StepReport& report) override;
  const ExpertProfile& counts() const { return counts_; }

 private:
  struct Close {
    void operator()(FILE* file) const { std::fclose(file); }
  };
  ExpertRecorder(const Options& options, sched::TraceHeader header);
  void record(const StepInput& input, const RoutedExperts& routed);

  const Options options_;
  const sched::TraceHeader header_;
  ExpertProfile counts_;
  std::unique_ptr<FILE, Close> file_;
  std::string bytes_;
  uint32_t step_ = 0;
  int64_t tokens_ = 0;
};

}  // namespace thermocline
