#include "runtime/engine/calibrate.h"

#include <fmt/format.h>

#include <algorithm>
#include <memory>

#include "runtime/base/timing.h"
#include "runtime/engine/context_rigs.h"
#include "runtime/hw/cgroup.h"
#include "runtime/hw/memory_bandwidth.h"

namespace thermocline {
namespace {

using sched::KernelCurve;

constexpr double kSecondsOfDevices = 25, kShareOfDevices = 0.3;  // for all of them; of what progress counts
constexpr uint64_t kMostPinnedBytes = uint64_t{512} << 20;

/// V4-Flash's, or a quarter of its sides.
struct Shapes {
  MoeRig::Shape moe;
  std::vector<cpu::PackedShape> fp8, bf16;
  int64_t index_keys, index_lists, many;  // keys of a cache, caches; tokens of a chunk
};
Shapes shapes_of(bool quick) {
  if (quick)
    return {{1024, 512, 256, 6, 10.0f},
            {fp8_shape(8192, 256), fp8_shape(1024, 2048), fp8_shape(512, 1024)},
            {bf16_shape(2048, 1024), bf16_shape(512, 1024)},
            4096,
            16,
            16};
  // Queries, output, shared expert; compressors and vocabulary, the grouped output.
  return {{4096, 2048, 256, 6, 10.0f},
          {fp8_shape(32768, 1024), fp8_shape(4096, 8192), fp8_shape(2048, 4096)},
          {bf16_shape(8192, 4096), bf16_shape(1024, 4096)},
          32768,
          128,
          64};
}

/// Four times the last-level cache, and a GiB at least; an eighth of the free memory at most.
uint64_t working_set(const Topology& topology, bool quick) {
  const uint64_t cache = topology.last_level_cache_bytes,
                 wanted = quick ? std::max<uint64_t>(64 << 20, cache * 5 / 4) : std::max<uint64_t>(1 << 30, 4 * cache);
  return std::min(wanted, free_memory().bytes / 8);
}

/// One number: what is timed, and what came of it in each round.
struct Task {
  std::string name;
  std::function<Status()> prepare;  // outside of the time
  std::function<double()> run;      // returns how many units it did
  std::vector<double> ns_per_unit = {};
  double ns() const { return median(ns_per_unit); }
};

class Calibrator {
 public:
  Calibrator(const Topology& topology, const cpu::CpuContext& cpu, const CalibrateOptions& options)
      : topology_(topology), cpu_(cpu), options_(options), shapes_(shapes_of(options.quick)) {}

  Result<Calibration> measure(const std::string& cpu_name) {
    choose_working_set();
    TC_RETURN_IF_ERROR(stream());
    TC_RETURN_IF_ERROR(add_weights());
    TC_RETURN_IF_ERROR(add_context());
    TC_RETURN_IF_ERROR(add_elements());
    TC_RETURN_IF_ERROR(measure_in_rounds());
    regions();
    fill_in(cpu_name);
    if (!options_.disk_folder.empty()) {
      progress("disk", 1);
      TC_ASSIGN(out_.profile.disk.read_bytes_per_second, disk_read_rate(options_.disk_folder, options_.quick));
      std::error_code ignored;
      out_.profile.disk.free_bytes =
          static_cast<double>(std::filesystem::space(options_.disk_folder, ignored).available);
    }
    return std::move(out_);
  }

 private:
  static constexpr int kRounds = 7;
  static constexpr double kSecondsOfRounds = 60;
  double least_seconds() const { return options_.quick ? 0.002 : 0.05; }

  /// As many as the time holds, one at least.
  Status measure_in_rounds() {
    const Clock::time_point start = Clock::now();
    int rounds = options_.quick ? 1 : kRounds;
    for (int round = 0; round < rounds; ++round) {
      for (size_t i = 0; i < tasks_.size(); ++i) {
        const double in_round = static_cast<double>(i) / static_cast<double>(tasks_.size());
        progress(tasks_[i]->name, (round + in_round) / rounds);
        TC_RETURN_IF_ERROR(time(*tasks_[i]));
      }
      const double each = seconds_since(start) / (round + 1);
      rounds = std::min(rounds, std::max(round + 1, static_cast<int>(kSecondsOfRounds / each)));
    }
    out_.rounds = rounds;
    return {};
  }

  // Never back, though rounds may turn out fewer.
  void progress(const std::string& what, double share) {
    share_ = std::max(share_, share);
    options_.progress(what, share_);
  }

  void choose_working_set() {
    const uint64_t cache = topology_.last_level_cache_bytes;
    bytes_ = working_set(topology_, options_.quick);
    out_.working_set_bytes = static_cast<double>(bytes_);
    if (bytes_ < 2 * cache && !options_.quick)
      out_.notes.push_back(
          fmt::format("{:.1f} GiB of weights are less than twice the last-level cache: rates may be those of the "
                      "cache; free memory "
                      "and calibrate again",
                      static_cast<double>(bytes_) / (1 << 30)));
  }

  Task& add(
      std::string name, std::function<double()> run, std::function<Status()> prepare = [] { return Status(); }) {
    tasks_.push_back(std::make_unique<Task>(Task{std::move(name), std::move(prepare), std::move(run)}));
    return *tasks_.back();
  }

  Status time(Task& task) {
    TC_RETURN_IF_ERROR(task.prepare());
    const WorkerPool::StepScope scope(cpu_.pool);
    task.run();
    double units = 0;
    const Clock::time_point start = Clock::now();
    do units += task.run();
    while (seconds_since(start) < least_seconds());
    task.ns_per_unit.push_back(1e9 * seconds_since(start) / units);
    return {};
  }

  // With 1, 2, 4 .. all workers, then of each node alone.
  Status stream() {
    std::vector<int> counts;
    for (int threads = 1; threads < cpu_.pool.size(); threads *= 2) counts.push_back(threads);
    counts.push_back(cpu_.pool.size());
    for (const int threads : counts) {
      progress(fmt::format("STREAM read, {} threads", threads), 0);
      WorkerPool pool(topology_, threads);
      TC_ASSIGN(const double rate, stream_rate(pool));
      out_.by_threads.push_back({threads, rate});
    }
    for (size_t node = 0; cpu_.pool.nodes() > 1 && node < topology_.nodes.size(); ++node) {
      Topology one = topology_;
      std::erase_if(one.cores, [&](const Core& core) { return core.node != static_cast<int>(node); });
      if (one.cores.empty()) continue;
      WorkerPool pool(one, std::min(static_cast<int>(one.cores.size()), cpu_.pool.size() / cpu_.pool.nodes()));
      TC_ASSIGN(const double rate, stream_rate(pool));
      out_.by_node.push_back(rate);
    }
    return {};
  }
  Result<double> stream_rate(WorkerPool& pool) const {
    TC_ASSIGN(StreamRead read, StreamRead::create(pool, bytes_));
    return read.measure(options_.quick ? 1 : 5);
  }

  Status add_weights() {
    progress("weights", 0);
    TC_ASSIGN(MoeRig moe, MoeRig::create(cpu_, shapes_.moe, bytes_));
    moe_ = std::make_unique<MoeRig>(std::move(moe));
    TC_ASSIGN(GemmRig fp8, GemmRig::create(cpu_, shapes_.fp8, bytes_));
    fp8_ = std::make_unique<GemmRig>(std::move(fp8));
    TC_ASSIGN(GemmRig bf16, GemmRig::create(cpu_, shapes_.bf16, bytes_));
    bf16_ = std::make_unique<GemmRig>(std::move(bf16));
    for (size_t i = 0; i < KernelCurve::kTokens.size(); ++i) {
      const int n = KernelCurve::kTokens[i];
      const std::string tokens = fmt::format(", {} token{}", n, n == 1 ? "" : "s");
      curves_[2][i] = &add(
          "experts" + tokens, [this] { return moe_->run_in_turn().bytes; },
          [this, n] { return moe_->prepare(n, cpu_.table.activation); });
      curves_[1][i] = &add(
          "FP8" + tokens, [this] { return fp8_->run().bytes; }, [this, n] { return fp8_->prepare(n); });
      curves_[0][i] = &add(
          "BF16" + tokens, [this] { return bf16_->run().bytes; }, [this, n] { return bf16_->prepare(n); });
    }
    return {};
  }

  Status add_context() {
    for (const int64_t tokens : {int64_t{1}, shapes_.many}) {
      TC_ASSIGN(AttentionRig rig, AttentionRig::create(cpu_, tokens, true));
      attention_rigs_.push_back(std::make_unique<AttentionRig>(std::move(rig)));
      attention_.push_back(&add(fmt::format("attention, {} tokens", tokens),
                                [rig = attention_rigs_.back().get()] { return rig->run().flops; }));
    }
    TC_ASSIGN(IndexRig index, IndexRig::create(cpu_, shapes_.index_keys, shapes_.index_lists));
    index_rig_ = std::make_unique<IndexRig>(std::move(index));
    index_.push_back(&add("index, 1 token", [this] { return index_rig_->select_one().int8_ops; }));
    index_.push_back(&add("index, more tokens", [this] { return index_rig_->select_many(shapes_.many).int8_ops; }));
    return {};
  }

  // Units: steps of a layer.
  Status add_elements() {
    TC_ASSIGN(ElementRig rig, ElementRig::create(cpu_, shapes_.many));
    elements_rig_ = std::make_unique<ElementRig>(std::move(rig));
    for (const int64_t tokens : {int64_t{1}, shapes_.many}) {
      streams_.push_back(&add(fmt::format("residual streams, {} tokens", tokens), [this, tokens] {
        elements_rig_->streams(tokens);
        return 1.0;
      }));
      rows_.push_back(&add(fmt::format("rows, {} tokens", tokens), [this, tokens] {
        elements_rig_->rows(tokens);
        return 1.0;
      }));
    }
    return {};
  }
  sched::ElementCost element_cost(const std::vector<Task*>& tasks, int64_t elements) const {
    const double first = tasks[0]->ns() / static_cast<double>(elements),
                 all = tasks[1]->ns() / static_cast<double>(elements);
    return {first, std::max(all - first, all / 100) / static_cast<double>(shapes_.many - 1)};
  }

  // Empty regions, by workers that spin and by workers that sleep.
  void regions() {
    const auto ns_of = [&](int count) {
      const Clock::time_point start = Clock::now();
      for (int i = 0; i < count; ++i) cpu_.pool.run([](int) {});
      return std::max(1e9 * seconds_since(start) / count, 0.1);
    };
    std::vector<double> spinning, parked;
    for (int i = 0; i < (options_.quick ? 20 : 200); ++i) {
      {
        const WorkerPool::StepScope scope(cpu_.pool);
        ns_of(20);
        spinning.push_back(ns_of(200));
      }
      parked.push_back(ns_of(5));
    }
    out_.profile.cpu.region_ns = median(spinning);
    out_.parked_region_ns = median(parked);
  }

  double rate_of(double (*peak)(int64_t)) const {
    std::vector<double> rates;
    for (int i = 0; i < 5; ++i) {
      std::atomic<int64_t> total{0};
      const Clock::time_point start = Clock::now();
      cpu_.pool.run([&](int) { total += static_cast<int64_t>(peak(options_.quick ? 20'000 : 400'000)); });
      rates.push_back(static_cast<double>(total) / seconds_since(start));
    }
    return *std::max_element(rates.begin(), rates.end());
  }

  void fill_in(const std::string& cpu_name) {
    sched::CpuProfile& cpu = out_.profile.cpu;
    cpu.name = cpu_name;
    cpu.nodes = cpu_.pool.nodes();
    cpu.cores = cpu_.pool.size();
    cpu.memory_bytes = static_cast<double>(usable_memory_bytes());
    cpu.read_bytes_per_second = out_.by_threads.back().bytes_per_second;
    for (size_t f = 0; f < curves_.size(); ++f) {
      KernelCurve::Points ns{};
      for (size_t i = 0; i < ns.size(); ++i) ns[i] = curves_[f][i]->ns();
      cpu.weights[f] = KernelCurve(ns);
    }
    cpu.attention_flops_one = 1e9 / attention_[0]->ns();
    cpu.attention_flops_many = 1e9 / attention_[1]->ns();
    cpu.index_ops_one = 1e9 / index_[0]->ns();
    cpu.index_ops_many = 1e9 / index_[1]->ns();
    cpu.streams = element_cost(streams_, ElementRig::kStreamElements);
    cpu.rows = element_cost(rows_, ElementRig::kRowElements);
    const WorkerPool::StepScope scope(cpu_.pool);
    out_.peak_flops = rate_of(cpu_.table.peak_flops);
    out_.peak_int8_ops = rate_of(cpu_.table.peak_int8_ops);
  }

  const Topology& topology_;
  const cpu::CpuContext cpu_;
  const CalibrateOptions& options_;
  const Shapes shapes_;
  uint64_t bytes_ = 0;
  double share_ = 0;  // done
  Calibration out_;
  std::vector<std::unique_ptr<Task>> tasks_;
  std::array<std::array<Task*, KernelCurve::kTokens.size()>, 3> curves_{};  // by sched::WeightFormat
  std::vector<Task*> attention_, index_, streams_, rows_;                   // of one token, of many
  std::unique_ptr<MoeRig> moe_;
  std::unique_ptr<GemmRig> fp8_, bf16_;
  std::vector<std::unique_ptr<AttentionRig>> attention_rigs_;
  std::unique_ptr<IndexRig> index_rig_;
  std::unique_ptr<ElementRig> elements_rig_;
};

// One after the other; in the time for all of them.
Result<std::vector<DeviceCalibration>> calibrate_devices(const Topology& topology, WorkerPool& pool,
                                                         const CalibrateOptions& options, double share) {
  std::vector<DeviceCalibration> out;
  const auto count = static_cast<double>(options.devices.size());
  for (const std::unique_ptr<gpu::Device>& device : options.devices) {
    const uint64_t bytes = device->kind() == gpu::DeviceKind::simt ? 64 << 20 : working_set(topology, options.quick);
    const auto progress = [&, done = static_cast<double>(out.size())](const std::string& what, double part) {
      options.progress(device->name() + ", " + what, share * (done + part) / count);
    };
    Result<DeviceCalibration> measured = calibrate_device(*device, pool,
                                                          {.quick = options.quick,
                                                           .seconds = kSecondsOfDevices / count,
                                                           .read_bytes = bytes,
                                                           .pinned_bytes = std::min(bytes, kMostPinnedBytes),
                                                           .progress = progress});
    if (!measured) return std::move(measured).error().with(device->name() + " (--device none measures the CPU alone)");
    out.push_back(std::move(*measured));
  }
  return out;
}

}  // namespace

int Calibration::saturated_by() const {
  double best = 0;
  for (const ThreadRate& rate : by_threads) best = std::max(best, rate.bytes_per_second);
  for (const ThreadRate& rate : by_threads)
    if (rate.bytes_per_second >= 0.95 * best) return rate.threads;
  return 0;
}

Result<Calibration> calibrate(const Topology& topology, const std::string& cpu_name, const cpu::CpuContext& cpu,
                              const CalibrateOptions& options) {
  const double share = options.devices.empty() ? 0 : kShareOfDevices;
  TC_ASSIGN(std::vector<DeviceCalibration> devices, calibrate_devices(topology, cpu.pool, options, share));
  CalibrateOptions rest = options;
  rest.progress = [&](const std::string& what, double part) { options.progress(what, share + (1 - share) * part); };
  TC_ASSIGN(Calibration out, Calibrator(topology, cpu, rest).measure(cpu_name));
  for (const DeviceCalibration& device : devices) out.profile.gpus.push_back(device.profile);
  out.devices = std::move(devices);
  return out;
}

}  // namespace thermocline
