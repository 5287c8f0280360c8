// `thermocline bench gpu`: the kernels of a device at a model's shapes, each as bytes and multiplications a second and
// as a share of the device's own copy rate. Random weights; as many copies of them as exceed the L2 cache.
#include <fmt/format.h>

#include <chrono>
#include <random>

#include "kernels_cpu/kernel_table.h"
#include "kernels_gpu/kernels.h"
#include "kernels_gpu/open_device.h"
#include "runtime/cli/bench_peaks.h"
#include "runtime/cli/command.h"
#include "runtime/engine/machine_info.h"
#include "runtime/io/file.h"
#include "runtime/kv/kv_store.h"

namespace thermocline::cli {
namespace {

using Clock = std::chrono::steady_clock;
using gpu::DeviceMatrix;

constexpr double kTarget = 0.6;  // of the copy rate, where bytes are the bound

struct Shapes {
  int64_t dim, inter, heads, head_dim, q_rank, vocab, experts, index_heads, index_dim, topk, window;
};
Result<Shapes> shapes_of(const std::string& name) {
  if (name == "v4-flash") return Shapes{4096, 2048, 64, 512, 1024, 129280, 6, 64, 128, 512, 128};
  if (name == "v4-pro") return Shapes{7168, 3072, 128, 512, 1536, 129280, 6, 64, 128, 1024, 128};
  if (name == "tiny") return Shapes{256, 128, 8, 128, 128, 1024, 4, 8, 64, 32, 64};
  return invalid("unknown shapes '" + name + "': use v4-flash, v4-pro or tiny");
}

struct Row {
  std::string name;
  double bytes = 0, flops = 0, seconds = 0;
};

class GpuBench {
 public:
  static Result<std::unique_ptr<GpuBench>> create(std::unique_ptr<gpu::Device> device, const Shapes& shapes,
                                                  int repetitions) {
    std::unique_ptr<GpuBench> bench(new GpuBench(std::move(device), shapes, repetitions));
    TC_ASSIGN(bench->stream_, bench->device_->new_stream());
    return bench;
  }

  Status run() {
    TC_RETURN_IF_ERROR(copy_rate());
    for (const int64_t tokens : {1, 8, 16, 64, 512}) {
      if (tokens > most_tokens()) break;
      TC_RETURN_IF_ERROR(gemm("wq_b, FP8", cpu::WeightFormat::fp8, s_.heads * s_.head_dim, s_.q_rank, tokens));
      TC_RETURN_IF_ERROR(gemm("wo_b, FP8", cpu::WeightFormat::fp8, s_.dim, 2 * s_.dim, tokens));
      TC_RETURN_IF_ERROR(gemm("compressor, BF16", cpu::WeightFormat::bf16, 2 * s_.head_dim, s_.dim, tokens));
      TC_RETURN_IF_ERROR(experts(tokens));
    }
    TC_RETURN_IF_ERROR(gemm("head, BF16", cpu::WeightFormat::bf16, s_.vocab, s_.dim, 1));
    for (const int64_t tokens : {1, 16}) TC_RETURN_IF_ERROR(attention(tokens));
    return index_scan();
  }

  const std::vector<Row>& rows() const { return rows_; }
  double copied_bytes_per_second() const { return copy_rate_; }
  gpu::Device& device() { return *device_; }

 private:
  GpuBench(std::unique_ptr<gpu::Device> device, const Shapes& shapes, int repetitions)
      : device_(std::move(device)), s_(shapes), repetitions_(repetitions) {}

  bool interpreted() const { return device_->kind() == gpu::DeviceKind::simt; }
  int64_t most_tokens() const { return interpreted() ? 16 : 512; }
  /// Launches of a graph: the copies of the weights in turn, more than any L2 holds.
  int64_t copies_of(double bytes) const {
    return interpreted() ? 1 : std::clamp<int64_t>(static_cast<int64_t>(256e6 / bytes), 2, 64);
  }

  /// Captures `launches` calls of fn(i) and times the graph.
  template <class Fn>
  Status measure(const std::string& name, int64_t launches, double bytes, double flops, const Fn& fn) {
    fmt::print(stderr, "measuring: {}\n", name);
    stream_->begin_capture();
    for (int64_t i = 0; i < launches; ++i) fn(i);
    TC_ASSIGN(const std::unique_ptr<gpu::Graph> graph, stream_->end_capture());
    std::vector<double> seconds;
    for (int i = 0; i <= repetitions_; ++i) {  // the first is warm-up
      const Clock::time_point start = Clock::now();
      stream_->launch(*graph);
      TC_RETURN_IF_ERROR(stream_->synchronize());
      const double elapsed = std::chrono::duration<double>(Clock::now() - start).count();
      if (i > 0) seconds.push_back(elapsed / static_cast<double>(launches));
    }
    rows_.push_back({name, bytes, flops, median(seconds)});
    held_.clear();
    return {};
  }

  template <class T>
  Result<T*> array(int64_t count) {
    TC_ASSIGN(gpu::DeviceBuffer buffer, device_->allocate(static_cast<size_t>(count) * sizeof(T)));
    T* const data = reinterpret_cast<T*>(buffer.data());
    // Random bytes would be NaN now and then; a pattern of small numbers in every format.
    std::vector<uint8_t> pattern(std::min<size_t>(buffer.size(), size_t{1} << 20));
    std::mt19937 random(1);
    for (uint8_t& byte : pattern) byte = static_cast<uint8_t>(0x30 + random() % 12);
    for (size_t at = 0; at < buffer.size(); at += pattern.size())
      stream_->copy(buffer.data() + at, pattern.data(), std::min(pattern.size(), buffer.size() - at),
                    gpu::CopyKind::h2d);
    TC_RETURN_IF_ERROR(stream_->synchronize());
    held_.push_back(std::move(buffer));
    return data;
  }
  template <class T>
  Result<T*> values(const std::vector<T>& from) {
    TC_ASSIGN(gpu::DeviceBuffer buffer, device_->allocate(from.size() * sizeof(T)));
    stream_->copy(buffer.data(), from.data(), from.size() * sizeof(T), gpu::CopyKind::h2d);
    TC_RETURN_IF_ERROR(stream_->synchronize());
    T* const data = reinterpret_cast<T*>(buffer.data());
    held_.push_back(std::move(buffer));
    return data;
  }
  Result<DeviceMatrix> matrix(cpu::WeightFormat format, int64_t n, int64_t k) {
    DeviceMatrix w;
    w.format = format;
    w.scale = format == cpu::WeightFormat::mxfp4 ? cpu::ScaleFormat::e8m0_rows
              : format == cpu::WeightFormat::fp8 ? cpu::ScaleFormat::f32_blocks
                                                 : cpu::ScaleFormat::none;
    w.n = n;
    w.k = k;
    w.scale_tiles = format == cpu::WeightFormat::fp8 ? 4 : 1;
    TC_ASSIGN(const uint8_t* const tiles, array<uint8_t>(w.tile_plane_bytes()));
    TC_ASSIGN(const uint8_t* const scales, array<uint8_t>(std::max<int64_t>(w.scale_plane_bytes(), 1)));
    w.tiles = {tiles, {w.tile_plane_bytes()}};
    w.scales = {scales, {w.scale_plane_bytes()}};
    return w;
  }

  Status copy_rate() {
    const int64_t bytes = interpreted() ? 16 << 20 : 1 << 30;
    TC_ASSIGN(std::byte* const from, array<std::byte>(bytes));
    TC_ASSIGN(std::byte* const to, array<std::byte>(bytes));
    TC_RETURN_IF_ERROR(measure("copy", 4, 2.0 * static_cast<double>(bytes), 0, [&](int64_t) {
      stream_->copy(to, from, static_cast<size_t>(bytes), gpu::CopyKind::d2d);
    }));
    copy_rate_ = rows_[0].bytes / rows_[0].seconds;
    return {};
  }

  Status gemm(const std::string& name, cpu::WeightFormat format, int64_t n, int64_t k, int64_t tokens) {
    const double bytes =
        static_cast<double>(DeviceMatrix{{format, cpu::ScaleFormat::none, n, k}, {}, {}}.tile_plane_bytes());
    const int64_t copies = copies_of(bytes);
    std::vector<DeviceMatrix> weights;
    for (int64_t i = 0; i < copies; ++i) {
      TC_ASSIGN(DeviceMatrix w, matrix(format, n, k));
      weights.push_back(w);
    }
    TC_ASSIGN(bf16* const x, array<bf16>(tokens * k));
    TC_ASSIGN(float* const y, array<float>(tokens * n));
    return measure(fmt::format("{} {} x {}, {} token{}", name, n, k, tokens, tokens == 1 ? "" : "s"), copies,
                   static_cast<double>(weights[0].bytes()), 2.0 * static_cast<double>(n * k * tokens), [&](int64_t i) {
                     gpu::GemmArgs args;
                     args.num_jobs = 1;
                     args.jobs[0] = {weights[static_cast<size_t>(i)], x,   k, y, n, tokens, 0,
                                     weights[0].row_groups(),         true};
                     device_->kernels().gemm(*stream_, args);
                   });
  }

  // Every expert has `tokens` pairs: one token's experts, or a batch of its own for each.
  Status experts(int64_t tokens) {
    const int64_t pairs = tokens * s_.experts, item = tokens <= 8 ? 8 : tokens <= 16 ? 16 : 64;
    TC_ASSIGN(DeviceMatrix w1, matrix(cpu::WeightFormat::mxfp4, s_.inter, s_.dim));
    TC_ASSIGN(DeviceMatrix w2, matrix(cpu::WeightFormat::mxfp4, s_.dim, s_.inter));
    const int64_t slot = (2 * w1.bytes() + w2.bytes() + 4095) / 4096 * 4096;
    const int64_t sets = copies_of(static_cast<double>(slot * s_.experts));
    TC_ASSIGN(uint8_t* const slots, array<uint8_t>(sets * s_.experts * slot));
    const auto place = [&](DeviceMatrix w, int64_t at) {
      w.tiles = {slots + at, {w.tile_plane_bytes()}};
      w.scales = {slots + at + w.tile_plane_bytes(), {w.scale_plane_bytes()}};
      return w;
    };
    std::vector<std::vector<gpu::ExpertItem>> items(static_cast<size_t>(sets));
    std::vector<gpu::ExpertItem*> device_items;
    for (int64_t set = 0; set < sets; ++set) {
      for (int64_t e = 0; e < s_.experts; ++e)
        for (int64_t first = 0; first < tokens; first += item)
          items[static_cast<size_t>(set)].push_back({static_cast<int32_t>(set * s_.experts + e),
                                                     static_cast<int32_t>(e * tokens + first),
                                                     static_cast<int32_t>(std::min(item, tokens - first))});
      TC_ASSIGN(gpu::ExpertItem* const data, values(items[static_cast<size_t>(set)]));
      device_items.push_back(data);
    }
    TC_ASSIGN(bf16* const x, array<bf16>(pairs * s_.dim));
    TC_ASSIGN(bf16* const h, array<bf16>(pairs * s_.inter));
    TC_ASSIGN(bf16* const y, array<bf16>(pairs * s_.dim));
    return measure(fmt::format("{} experts, MXFP4, {} token{} each", s_.experts, tokens, tokens == 1 ? "" : "s"), sets,
                   static_cast<double>(s_.experts * (2 * w1.bytes() + w2.bytes())),
                   6.0 * static_cast<double>(pairs * s_.dim * s_.inter), [&](int64_t set) {
                     gpu::GateUpArgs up;
                     up.w1 = place(w1, 0);
                     up.w3 = place(w1, w1.bytes());
                     up.slot_bytes = slot;
                     up.items = {device_items[static_cast<size_t>(set)], {static_cast<int64_t>(items[0].size())}};
                     up.x = {x, {pairs, s_.dim}};
                     up.h = {h, {pairs, s_.inter}};
                     up.item_pairs = item;
                     up.swiglu_limit = 10;
                     device_->kernels().gate_up(*stream_, up);
                     gpu::DownArgs down;
                     down.w2 = place(w2, 2 * w1.bytes());
                     down.slot_bytes = slot;
                     down.items = up.items;
                     down.h = {h, {pairs, s_.inter}};
                     down.y = {y, {pairs, s_.dim}};
                     down.item_pairs = item;
                     device_->kernels().down(*stream_, down);
                   });
  }

  /// One sequence per token, `pos` long, all with the same pages.
  Result<gpu::StepTables> tables(int64_t tokens, int64_t pos, int64_t pages) {
    std::vector<gpu::TokenInfo> infos(static_cast<size_t>(tokens),
                                      {0, static_cast<int32_t>(pos), 0, static_cast<int32_t>(pos), 0, 1});
    std::vector<int32_t> table(static_cast<size_t>(pages));
    for (int64_t i = 0; i < pages; ++i) table[static_cast<size_t>(i)] = static_cast<int32_t>(i);
    gpu::StepTables step;
    TC_ASSIGN(gpu::TokenInfo* const token_data, values(infos));
    TC_ASSIGN(gpu::SequenceInfo* const sequence, values(std::vector<gpu::SequenceInfo>(1)));
    TC_ASSIGN(int32_t* const page_data, values(table));
    TC_ASSIGN(float* const angles, array<float>(tokens * 32));
    step.tokens = {token_data, {tokens}};
    step.sequences = {sequence, {1}};
    step.pages = {page_data, {pages}};
    step.cos = step.sin = {angles, {1, tokens, 32}};
    return step;
  }

  Status attention(int64_t tokens) {
    const int64_t rows = s_.window + s_.topk, row_bytes = fp8_row_bytes(s_.head_dim, 64),
                  pages = (rows + kWindowPageTokens - 1) / kWindowPageTokens,
                  page_bytes = kWindowPageTokens * row_bytes;
    gpu::AttendMergeArgs merge;
    gpu::AttendArgs& attend = merge.attend;
    // As if every row were of the window: the same loads as chosen compressed rows.
    TC_ASSIGN(attend.step, tables(tokens, rows - 1, pages));
    TC_ASSIGN(uint8_t* const pool, array<uint8_t>(pages * page_bytes));
    TC_ASSIGN(bf16* const q, array<bf16>(tokens * s_.heads * s_.head_dim));
    attend.pages.window = {pool, {pages * page_bytes}};
    attend.pages.window_page_bytes = page_bytes;
    attend.pages.row_bytes = row_bytes;
    attend.q = {q, {tokens, s_.heads, s_.head_dim}};
    attend.splits = (rows + gpu::kAttentionSplit - 1) / gpu::kAttentionSplit;
    TC_ASSIGN(float* const partial, array<float>(tokens * attend.splits * s_.heads * (s_.head_dim + 2)));
    attend.partial = {partial, {tokens * attend.splits, s_.heads, s_.head_dim + 2}};
    attend.tokens = tokens;
    attend.window = rows;
    attend.rope_dim = 64;
    attend.scale = 0.05f;
    TC_ASSIGN(float* const sinks, array<float>(s_.heads));
    TC_ASSIGN(bf16* const out, array<bf16>(tokens * s_.heads * s_.head_dim));
    merge.sinks = {sinks, {s_.heads}};
    merge.out = {out, {tokens, s_.heads, s_.head_dim}};
    merge.rope_dim = 64;
    return measure(fmt::format("attention, {} rows, {} token{}", rows, tokens, tokens == 1 ? "" : "s"), 4,
                   static_cast<double>(tokens * rows * row_bytes),
                   4.0 * static_cast<double>(tokens * s_.heads * rows * s_.head_dim), [&](int64_t) {
                     device_->kernels().attend(*stream_, attend);
                     device_->kernels().attend_merge(*stream_, merge);
                   });
  }

  Status index_scan() {
    const int64_t keys = interpreted() ? 1024 : 32768, tiles = s_.index_dim / 32,
                  group_bytes = cpu::key_group_bytes(tiles);
    gpu::IndexScoresArgs args;
    const int64_t pages = keys / 64;
    TC_ASSIGN(args.step, tables(1, 4 * keys - 1, pages));
    TC_ASSIGN(uint8_t* const pool, array<uint8_t>(pages * 4 * group_bytes));
    TC_ASSIGN(bf16* const q, array<bf16>(s_.index_heads * s_.index_dim));
    TC_ASSIGN(float* const gates, array<float>(s_.index_heads));
    TC_ASSIGN(float* const scores, array<float>(keys));
    TC_ASSIGN(int32_t* const selected, array<int32_t>(s_.topk));
    args.pages.keys = {pool, {pages * 4 * group_bytes}};
    args.pages.key_page_bytes = 4 * group_bytes;
    args.pages.rows_per_page = 64;
    args.pages.index_group_bytes = group_bytes;
    args.q = {q, {1, s_.index_heads, s_.index_dim}};
    args.gates = {gates, {1, s_.index_heads}};
    args.scores = {scores, {1, keys}};
    args.ratio = 4;
    args.topk = s_.topk;
    return measure(fmt::format("index scan and top-{}, {} keys, 1 token", s_.topk, keys), 4,
                   static_cast<double>(keys / 16 * group_bytes),
                   2.0 * static_cast<double>(keys * s_.index_heads * s_.index_dim), [&](int64_t) {
                     device_->kernels().index_scores(*stream_, args);
                     device_->kernels().select(*stream_, {args.step, {scores, {1, keys}}, {selected, {1, s_.topk}}, 4});
                   });
  }

  std::unique_ptr<gpu::Device> device_;
  std::unique_ptr<gpu::Stream> stream_;
  const Shapes s_;
  const int repetitions_;
  std::vector<gpu::DeviceBuffer> held_;  // of the row being measured
  std::vector<Row> rows_;
  double copy_rate_ = 0;
};

struct Options {
  std::string device = "cuda", shapes = "v4-flash", json_path;
  int repetitions = 5;
};

Status bench_gpu(const Options& o) {
  TC_ASSIGN(const Shapes shapes, shapes_of(o.shapes));
  TC_ASSIGN(gpu::DeviceChoice choice, gpu::parse_device(o.device));
  if (choice.kind == gpu::DeviceChoice::Kind::none) return invalid("bench gpu needs a device: cuda or simt");
  choice.count = std::max(choice.count, 1);
  TC_ASSIGN(std::vector<std::unique_ptr<gpu::Device>> devices, gpu::open_devices(choice, 0));
  if (devices.empty()) return unsupported("no CUDA card was found: --device simt interprets the kernels, slowly");
  if (o.repetitions < 1) return invalid("--repetitions should be at least 1");
  TC_ASSIGN(const std::unique_ptr<GpuBench> bench, GpuBench::create(std::move(devices[0]), shapes, o.repetitions));
  TC_RETURN_IF_ERROR(bench->run());
  const double copy_rate = bench->copied_bytes_per_second();
  fmt::print(
      "{}, {} shapes; copying within the device reads and writes {:.0f} GB/s\n\n"
      "| {:<48} | {:>9} | {:>8} | {:>8} | {:>9} |\n| {:-<48} | {:->8}: | {:->7}: | {:->7}: | {:->8}: |\n",
      bench->device().name(), o.shapes, copy_rate / 1e9, "kernel", "us", "GB/s", "TFLOP/s", "of copy", "", "", "", "",
      "");
  Json rows = Json::array();
  for (const Row& row : bench->rows()) {
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
  const Json document = {{"device", bench->device().name()},
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
