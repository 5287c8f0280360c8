#include "runtime/engine/calibrate_device.h"

#include <fmt/format.h>

#include <algorithm>
#include <deque>
#include <optional>

#include "kernels_gpu/device_list.h"
#include "runtime/base/timing.h"
#include "runtime/engine/bus_rigs.h"

namespace thermocline {
namespace {

using sched::KernelCurve;

/// How much is done: on a card as much as steps do; on the interpreter enough to go through every line.
struct Amounts {
  const char* shapes;
  int64_t most_tokens;  // of a matrix; more of them in proportion
  int64_t copied_bytes, small_launches, attention_tokens, index_tokens, index_keys;
  int layers, handovers;  // of a graph; graphs a round
  double least_seconds;   // of a sample
};
constexpr Amounts kCard = {"v4-flash", 512, 256 << 20, 256, 64, 64, 32768, 32, 48, 0.02},
                  kInterpreter = {"tiny", 32, 4 << 20, 16, 4, 4, 256, 8, 3, 0};

/// One number: what is timed, and the seconds of each round.
struct DeviceTask {
  std::string name;
  std::function<Result<double>()> sample;
  std::vector<double> seconds = {};
  double ns() const { return 1e9 * median(seconds); }
};

// The driver counts what others have taken too, as data sheets do.
double memory_of(const gpu::Device& device) {
  if (device.kind() == gpu::DeviceKind::cuda)
    for (const gpu::DeviceInfo& info : gpu::list_devices())
      if (info.name == device.name()) return static_cast<double>(info.memory_bytes);
  return static_cast<double>(device.capacity());
}

class DeviceCalibrator {
 public:
  DeviceCalibrator(gpu::Device& device, WorkerPool& pool, const DeviceCalibrateOptions& options)
      : pool_(pool),
        options_(options),
        interpreted_(device.kind() == gpu::DeviceKind::simt),
        amounts_(interpreted_ ? kInterpreter : kCard) {}

  Result<DeviceCalibration> measure(gpu::Device& device) {
    options_.progress("weights", 0);
    TC_ASSIGN(const DeviceShapes shapes, device_shapes(amounts_.shapes));
    TC_ASSIGN(rig_, DeviceRig::create(device, shapes));
    TC_RETURN_IF_ERROR(add_weights());
    TC_RETURN_IF_ERROR(add_kernels());
    TC_RETURN_IF_ERROR(add_bus());
    TC_RETURN_IF_ERROR(measure_in_rounds());
    fill_in(device);
    return std::move(out_);
  }

 private:
  static constexpr int kRounds = 7;

  DeviceTask& add(std::string name, std::function<Result<double>()> sample) {
    return tasks_.emplace_back(DeviceTask{std::move(name), std::move(sample)});
  }

  /// A graph's runs, one after the other for as long as a sample takes.
  Result<DeviceTask*> add(std::string name, Result<DeviceRun> captured) {
    if (!captured) return std::move(captured).error();
    DeviceRun& run = runs_.emplace_back(std::move(*captured));
    return &add(std::move(name), [this, &run]() -> Result<double> {
      if (!interpreted_) TC_RETURN_IF_ERROR(warm_up(run));
      const Clock::time_point start = Clock::now();
      int count = 0;
      do {
        TC_ASSIGN(const double each, run.seconds());
        (void)each;
        ++count;
      } while (seconds_since(start) < amounts_.least_seconds);
      return seconds_since(start) / count;
    });
  }
  static Status warm_up(DeviceRun& run) {
    TC_ASSIGN(const double ignored, run.seconds());
    (void)ignored;
    return {};
  }

  // V4-Flash's queries, output and shared expert; the grouped output and compressors.
  Status add_weights() {
    const DeviceShapes& s = rig_->shapes();
    const DeviceRig::Side fp8[] = {{s.heads * s.head_dim, s.q_rank}, {s.dim, 2 * s.dim}, {s.inter, s.dim}},
                          bf16[] = {{2 * s.dim, s.dim}, {2 * s.head_dim, s.dim}};
    TC_ASSIGN(fp8_, rig_->matrices(cpu::WeightFormat::fp8, fp8));
    TC_ASSIGN(bf16_, rig_->matrices(cpu::WeightFormat::bf16, bf16));
    TC_ASSIGN(experts_, rig_->experts());
    for (size_t i = 0; i < KernelCurve::kTokens.size(); ++i) {
      const int64_t n = std::min<int64_t>(KernelCurve::kTokens[i], amounts_.most_tokens);
      const std::string tokens = fmt::format(", {} token{}", n, n == 1 ? "" : "s");
      TC_RETURN_IF_ERROR(add_point(2, i, "experts" + tokens, rig_->moe(experts_, n), 2));
      TC_RETURN_IF_ERROR(add_point(1, i, "FP8" + tokens, rig_->gemm(fp8_, n), 1));
      TC_RETURN_IF_ERROR(add_point(0, i, "BF16" + tokens, rig_->gemm(bf16_, n), 1));
    }
    return {};
  }
  Status add_point(size_t format, size_t i, std::string name, Result<DeviceRun> run, int64_t kernels) {
    TC_ASSIGN(DeviceTask* const task, add(std::move(name), std::move(run)));
    const DeviceRun& added = runs_.back();
    curves_[format][i] = {task, added.work().bytes, added.launches() * kernels};
    return {};
  }

  Status add_kernels() {
    TC_ASSIGN(copy_, add("its memory", rig_->copy(amounts_.copied_bytes)));
    copied_ = runs_.back().work().bytes;
    TC_ASSIGN(launch_, add("launches", rig_->small_launches(amounts_.small_launches)));
    TC_ASSIGN(attention_, add("attention", rig_->attention(amounts_.attention_tokens)));
    attention_flops_ = runs_.back().work().flops;
    TC_ASSIGN(index_, add("index", rig_->index(amounts_.index_tokens, amounts_.index_keys)));
    index_ops_ = runs_.back().work().flops;
    return {};
  }

  Status add_bus() {
    TC_ASSIGN(bus_, CopyRig::create(*rig_, options_.pinned_bytes));
    for (size_t i = 0; i < CopyRig::kBytes.size(); ++i)
      copies_[i] = &add(fmt::format("copies of {:.0f} MB", CopyRig::kBytes[i] / 1e6),
                        [this, bytes = CopyRig::kBytes[i]] { return copy_seconds(bytes); });
    TC_ASSIGN(read_, StreamRead::create(pool_, options_.read_bytes));
    // These two keep what they find themselves.
    add("reads beside copies", [this]() -> Result<double> {
      TC_ASSIGN(const double share, bus_->read_share(*read_, CopyRig::kBytes.back() / median(copies_.back()->seconds)));
      read_shares_.push_back(share);
      return 0.0;
    });
    TC_ASSIGN(handover_, HandoverRig::create(*rig_, amounts_.layers));
    add("hand-over", [this]() -> Result<double> {
      for (int i = 0; i < amounts_.handovers; ++i) {
        {
          const WorkerPool::StepScope scope(pool_);
          TC_RETURN_IF_ERROR(handover_->run(pool_, spinning_));
        }
        TC_RETURN_IF_ERROR(handover_->run(pool_, parked_));
      }
      return 0.0;
    });
    return {};
  }
  Result<double> copy_seconds(double bytes) {
    std::vector<double> seconds;
    for (int i = 0; i < 5; ++i) {
      TC_ASSIGN(const double one, bus_->seconds(bytes));
      seconds.push_back(one);
    }
    return median(seconds);
  }

  /// As many as the time holds, one at least.
  Status measure_in_rounds() {
    const Clock::time_point start = Clock::now();
    const int most = options_.quick || interpreted_ ? 1 : kRounds;
    do {
      double done = 0;
      for (DeviceTask& task : tasks_) {
        options_.progress(task.name, (out_.rounds + done++ / static_cast<double>(tasks_.size())) / most);
        TC_ASSIGN(const double seconds, task.sample());
        task.seconds.push_back(seconds);
      }
      ++out_.rounds;
    } while (out_.rounds < most && seconds_since(start) * (out_.rounds + 1) / out_.rounds < options_.seconds);
    return {};
  }

  /// A prediction adds kernel_ns for every launch.
  double without_launches(double ns, double launches) const { return std::max(ns - launches * kernel_ns(), ns / 2); }
  double kernel_ns() const { return launch_->ns() / static_cast<double>(amounts_.small_launches); }

  void fill_in(const gpu::Device& device) {
    sched::GpuProfile& gpu = out_.profile;
    gpu.name = device.name();
    gpu.memory_bytes = memory_of(device);
    gpu.bytes_per_second = 1e9 * copied_ / copy_->ns();
    for (size_t f = 0; f < curves_.size(); ++f) {
      KernelCurve::Points ns{};
      for (size_t i = 0; i < ns.size(); ++i) {
        const Point& point = curves_[f][i];
        const double measured = without_launches(point.task->ns(), static_cast<double>(point.kernels)) / point.bytes;
        ns[i] = measured * std::max(1.0, KernelCurve::kTokens[i] / static_cast<double>(amounts_.most_tokens));
        gpu.bytes_per_second = std::max(gpu.bytes_per_second, 1e9 / ns[i]);  // reading alone may be faster than copying
      }
      gpu.weights[f] = KernelCurve(ns);
    }
    gpu.attention_flops = 1e9 * attention_flops_ / attention_->ns();
    gpu.index_ops = 1e9 * index_ops_ / index_->ns();
    gpu.kernel_ns = kernel_ns();
    fill_in_bus(gpu);
    out_.interpreted = interpreted_;
  }

  void fill_in_bus(sched::GpuProfile& gpu) {
    std::array<CopyTime, CopyRig::kBytes.size()> times;
    for (size_t i = 0; i < times.size(); ++i) times[i] = {CopyRig::kBytes[i], copies_[i]->ns()};
    const CopyCost cost = fit_copies(times);
    gpu.h2d_bytes_per_second = cost.bytes_per_second;
    gpu.h2d_ns = std::max(cost.fixed_ns, 1.0);
    gpu.cpu_read_share_beside_h2d = median(read_shares_);
    const auto sync = [this](double ns) { return without_launches(ns, 2); };  // publish and fetch
    gpu.sync_ns = sync(median(spinning_));
    out_.sync_p99_ns = sync(percentile(spinning_, 99));
    out_.parked_sync_ns = sync(median(parked_));
    out_.parked_sync_p99_ns = sync(percentile(parked_, 99));
  }

  /// Of a curve: what is timed, the bytes of weights and the kernels in it.
  struct Point {
    DeviceTask* task = nullptr;
    double bytes = 0;
    int64_t kernels = 0;
  };

  WorkerPool& pool_;
  const DeviceCalibrateOptions& options_;
  const bool interpreted_;
  const Amounts& amounts_;
  DeviceCalibration out_;
  std::optional<DeviceRig> rig_;
  DeviceMatrices fp8_, bf16_;
  DeviceExperts experts_;
  std::optional<CopyRig> bus_;
  std::optional<StreamRead> read_;
  std::optional<HandoverRig> handover_;
  std::deque<DeviceRun> runs_;
  std::deque<DeviceTask> tasks_;                                            // stay where they are
  std::array<std::array<Point, KernelCurve::kTokens.size()>, 3> curves_{};  // by sched::WeightFormat
  std::array<DeviceTask*, CopyRig::kBytes.size()> copies_{};
  DeviceTask *copy_ = nullptr, *launch_ = nullptr, *attention_ = nullptr, *index_ = nullptr;
  double copied_ = 0, attention_flops_ = 0, index_ops_ = 0;  // of a run
  std::vector<double> read_shares_, spinning_, parked_;      // ns, but for the shares
};

}  // namespace

Result<DeviceCalibration> calibrate_device(gpu::Device& device, WorkerPool& pool,
                                           const DeviceCalibrateOptions& options) {
  return DeviceCalibrator(device, pool, options).measure(device);
}

}  // namespace thermocline
