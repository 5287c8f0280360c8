// `thermocline bench gpu`: the kernels of a device at a model's shapes, each as bytes and multiplications a second and
// as a share of the device's own copy rate. Random weights; as many copies of them as exceed the L2 cache.
#include <fmt/format.h>

#include "kernels_gpu/open_device.h"
#include "runtime/base/timing.h"
#include "runtime/cli/command.h"
#include "runtime/engine/device_rigs.h"
#include "runtime/engine/machine_info.h"
#include "runtime/io/file.h"

namespace thermocline::cli {
namespace {

constexpr double kTarget = 0.6;  // of the copy rate, where bytes are the bound

struct Row {
  std::string name;
  double bytes = 0, flops = 0, seconds = 0;  // of a launch
};

std::string plural(int64_t tokens) { return fmt::format("{} token{}", tokens, tokens == 1 ? "" : "s"); }

class GpuBench {
 public:
  GpuBench(DeviceRig& rig, int repetitions) : rig_(rig), repetitions_(repetitions) {}

  Status run() {
    const DeviceShapes& s = rig_.shapes();
    TC_RETURN_IF_ERROR(measure("copy", rig_.copy(rig_.interpreted() ? 16 << 20 : 1 << 30)));
    for (const int64_t tokens : {1, 8, 16, 64, 512}) {
      if (tokens > most_tokens()) break;
      TC_RETURN_IF_ERROR(gemm("wq_b, FP8", cpu::WeightFormat::fp8, {s.heads * s.head_dim, s.q_rank}, tokens));
      TC_RETURN_IF_ERROR(gemm("wo_b, FP8", cpu::WeightFormat::fp8, {s.dim, 2 * s.dim}, tokens));
      TC_RETURN_IF_ERROR(gemm("compressor, BF16", cpu::WeightFormat::bf16, {2 * s.head_dim, s.dim}, tokens));
      TC_RETURN_IF_ERROR(experts(tokens));
    }
    TC_RETURN_IF_ERROR(gemm("head, BF16", cpu::WeightFormat::bf16, {s.vocab, s.dim}, 1));
    for (const int64_t tokens : {1, 16})
      TC_RETURN_IF_ERROR(
          measure(fmt::format("attention, {} rows, {}", s.window + s.topk, plural(tokens)), rig_.attention(tokens)));
    const int64_t keys = rig_.interpreted() ? 1024 : 32768;
    return measure(fmt::format("index scan and top-{}, {} keys, 1 token", s.topk, keys), rig_.index(1, keys));
  }

  const std::vector<Row>& rows() const { return rows_; }
  double copied_bytes_per_second() const { return rows_[0].bytes / rows_[0].seconds; }

 private:
  int64_t most_tokens() const { return rig_.interpreted() ? 16 : 512; }

  Status measure(const std::string& name, Result<DeviceRun> run) {
    if (!run) return std::move(run).error();
    fmt::print(stderr, "measuring: {}\n", name);
    const auto launches = static_cast<double>(run->launches());
    std::vector<double> seconds;
    for (int i = 0; i <= repetitions_; ++i) {  // the first is warm-up
      TC_ASSIGN(const double elapsed, run->seconds());
      if (i > 0) seconds.push_back(elapsed / launches);
    }
    const KernelWork& work = run->work();
    rows_.push_back({name, work.bytes / launches, (work.flops + work.int8_ops) / launches, median(seconds)});
    return {};
  }

  Status gemm(const std::string& name, cpu::WeightFormat format, const DeviceRig::Side& side, int64_t tokens) {
    TC_ASSIGN(const DeviceMatrices weights, rig_.matrices(format, {&side, 1}));
    return measure(fmt::format("{} {} x {}, {}", name, side.n, side.k, plural(tokens)), rig_.gemm(weights, tokens));
  }

  // One token's experts, or a batch of its own for each.
  Status experts(int64_t tokens) {
    TC_ASSIGN(const DeviceExperts weights, rig_.experts());
    return measure(fmt::format("{} experts, MXFP4, {} each", rig_.shapes().experts, plural(tokens)),
                   rig_.moe(weights, tokens));
  }

  DeviceRig& rig_;
  const int repetitions_;
  std::vector<Row> rows_;
};

struct Options {
  std::string device = "cuda", shapes = "v4-flash", json_path;
  int repetitions = 5;
};

Status bench_gpu(const Options& o) {
  TC_ASSIGN(const DeviceShapes shapes, device_shapes(o.shapes));
  TC_ASSIGN(gpu::DeviceChoice choice, gpu::parse_device(o.device));
  if (choice.kind == gpu::DeviceChoice::Kind::none) return invalid("bench gpu needs a device: cuda or simt");
  choice.count = std::max(choice.count, 1);
  TC_ASSIGN(std::vector<std::unique_ptr<gpu::Device>> devices, gpu::open_devices(choice, 0));
  if (devices.empty()) return unsupported("no CUDA card was found: --device simt interprets the kernels, slowly");
  if (o.repetitions < 1) return invalid("--repetitions should be at least 1");
  TC_ASSIGN(DeviceRig rig, DeviceRig::create(*devices[0], shapes));
  GpuBench bench(rig, o.repetitions);
  TC_RETURN_IF_ERROR(bench.run());
  const double copy_rate = bench.copied_bytes_per_second();
  fmt::print(
      "{}, {} shapes; copying within the device reads and writes {:.0f} GB/s\n\n"
      "| {:<48} | {:>9} | {:>8} | {:>8} | {:>9} |\n| {:-<48} | {:->8}: | {:->7}: | {:->7}: | {:->8}: |\n",
      devices[0]->name(), o.shapes, copy_rate / 1e9, "kernel", "us", "GB/s", "TFLOP/s", "of copy", "", "", "", "", "");
  Json rows = Json::array();
  for (const Row& row : bench.rows()) {
    const double share = row.bytes / row.seconds / copy_rate;
    fmt::print("| {:<48} | {:>9.1f} | {:>8.1f} | {:>8.2f} | {:>7.0f} % |\n", row.name, row.seconds * 1e6,
               row.bytes / row.seconds / 1e9, row.flops / row.seconds / 1e12, 100 * share);
    rows.push_back({{"kernel", row.name},
                    {"seconds", row.seconds},
                    {"bytes_per_second", row.bytes / row.seconds},
                    {"flops", row.flops / row.seconds},
                    {"share_of_copy", share}});
  }
  fmt::print(
      "\nmedian of {}; bytes are those of weights, rows and keys; up to 16 tokens they should reach {:.0f} % of the "
      "copy rate\n",
      o.repetitions, 100 * kTarget);
  if (o.json_path.empty()) return {};
  const Json document = {{"device", devices[0]->name()},
                         {"shapes", o.shapes},
                         {"copy_bytes_per_second", copy_rate},
                         {"build", build_json()},
                         {"kernels", rows}};
  return write_text_file(o.json_path, dump_json(document, 2) + "\n");
}

}  // namespace

void add_bench_gpu(CLI::App& bench, Outcome& outcome) {
  auto o = std::make_shared<Options>();
  CLI::App* command = bench.add_subcommand("gpu", "The kernels of a device at a model's shapes");
  command->add_option("--device", o->device, "cuda, or simt to see it run")->capture_default_str();
  command->add_option("--shapes", o->shapes, "v4-flash, v4-pro or tiny")->capture_default_str();
  command->add_option("--repetitions,-r", o->repetitions, "Repetitions; the median counts")->capture_default_str();
  command->add_option("--json", o->json_path, "Also a JSON document");
  command->callback([o, &outcome] { outcome.exit_code = exit_code_of(bench_gpu(*o)); });
}

}  // namespace thermocline::cli
