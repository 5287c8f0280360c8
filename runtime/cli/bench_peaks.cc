#include "runtime/cli/bench_peaks.h"

#include <algorithm>
#include <chrono>

#include "runtime/base/log.h"

namespace thermocline::cli {
namespace {

using Clock = std::chrono::steady_clock;

double rate_of(WorkerPool& pool, double (*peak)(int64_t)) {
  constexpr int64_t kRounds = 400'000;
  std::atomic<int64_t> total{0};
  const auto start = Clock::now();
  pool.run([&](int) { total += static_cast<int64_t>(peak(kRounds)); });
  return static_cast<double>(total) / std::chrono::duration<double>(Clock::now() - start).count();
}

}  // namespace

void Peaks::raise(const Peaks& other) {
  read_bandwidth = std::max(read_bandwidth, other.read_bandwidth);
  flops = std::max(flops, other.flops);
  int8_ops = std::max(int8_ops, other.int8_ops);
}

Result<PeakMeter> PeakMeter::create(WorkerPool& pool, const cpu::KernelTable& table) {
  TC_ASSIGN(StreamRead stream, StreamRead::create(pool));
  if (!stream.note().empty()) log_warn("STREAM {}", stream.note());
  return PeakMeter(pool, table, std::move(stream));
}

Peaks PeakMeter::measure() {
  Peaks peaks;
  peaks.read_bandwidth = stream_.measure(3);
  for (int i = 0; i < 3; ++i) {
    peaks.flops = std::max(peaks.flops, rate_of(*pool_, table_->peak_flops));
    peaks.int8_ops = std::max(peaks.int8_ops, rate_of(*pool_, table_->peak_int8_ops));
  }
  return peaks;
}

}  // namespace thermocline::cli
