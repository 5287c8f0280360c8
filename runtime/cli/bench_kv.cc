// `thermocline bench kv`: a conversation's KV to a disk and back, through the prefix cache as the server does it,
// against plain O_DIRECT writes and reads of as many bytes on the same disk. No weights are needed: rows are synthetic.
#include <fmt/format.h>

#include <chrono>
#include <functional>

#include "runtime/cli/bench_peaks.h"
#include "runtime/cli/command.h"
#include "runtime/engine/machine_info.h"
#include "runtime/hw/host_memory.h"
#include "runtime/io/file.h"
#include "runtime/kv/prefix_cache.h"
#include "runtime/kv/synthetic_rows.h"
#include "runtime/model/deepseek_v4/synthesize.h"

namespace thermocline::cli {
namespace {

using Clock = std::chrono::steady_clock;

constexpr double kPlainShare = 0.8;  // of the plain rate

struct KvBenchOptions {
  std::string shapes = "v4-flash", folder, json_path;
  int64_t tokens = 30'000;
  int repetitions = 5;
  bool threads = false;
};

double seconds_of(const std::function<void()>& work) {
  const Clock::time_point start = Clock::now();
  work();
  return std::chrono::duration<double>(Clock::now() - start).count();
}

/// Bytes per second, one a repetition.
struct Rates {
  std::vector<double> save, restore, plain_write, plain_read;
  int64_t bytes = 0;
};

// Both directions of a file that is new each time, as the log's files are.
Status measure_plain(const std::filesystem::path& folder, const DiskFiles::Options& options, Rates& rates) {
  TC_ASSIGN(const std::unique_ptr<DiskFiles> files, DiskFiles::open(folder, options));
  (void)files->remove("plain");
  TC_ASSIGN(const int file, files->open_file("plain", true));
  Status written, read;
  const auto bytes = static_cast<double>(rates.bytes);
  rates.plain_write.push_back(
      bytes / seconds_of([&] { written = transfer(*files, file, static_cast<uint64_t>(rates.bytes), true); }));
  rates.plain_read.push_back(
      bytes / seconds_of([&] { read = transfer(*files, file, static_cast<uint64_t>(rates.bytes), false); }));
  TC_RETURN_IF_ERROR(std::move(written));
  TC_RETURN_IF_ERROR(std::move(read));
  return files->remove("plain");
}

class KvBench {
 public:
  KvBench(const KvBenchOptions& o, const ModelGeometry& g, WorkerPool& pool) : o_(o), g_(g), pool_(pool) {}

  Result<Rates> run() {
    const HostMemoryLedger ledger;  // memory is resident, as a server's is before its first request
    TC_ASSIGN(store_, KvStore::create(g_, {.fp8_rows = true, .max_tokens = 2 * o_.tokens, .max_sequences = 2}));
    ledger.make_resident(pool_);
    for (int64_t i = 0; i < o_.tokens; ++i) ids_.push_back(static_cast<int32_t>(i * 7919 % g_.vocab_size));
    TC_ASSIGN(const std::unique_ptr<SequenceKv> sequence, synthetic_sequence(*store_, g_, pool_, o_.tokens));
    const std::filesystem::path folder = o_.folder;
    for (int i = 0; i < o_.repetitions; ++i) {
      std::filesystem::remove_all(folder / "kv");
      TC_RETURN_IF_ERROR(save(*sequence));
      TC_RETURN_IF_ERROR(measure_plain(folder / "plain", {.use_io_uring = !o_.threads}, rates_));
      TC_RETURN_IF_ERROR(restore());
    }
    std::filesystem::remove_all(folder / "kv");
    std::filesystem::remove_all(folder / "plain");
    return std::move(rates_);
  }

 private:
  Result<std::unique_ptr<NvmeTier>> open_disk() const {
    const int64_t all_bytes = pages_of(o_.tokens, kPageTokens) * store_->layout().compressed_page_bytes();
    return NvmeTier::open({.folder = std::filesystem::path(o_.folder) / "kv",
                           .space_bytes = uint64_t{64} << 30,
                           .queue_bytes = static_cast<uint64_t>(all_bytes) + (64 << 20),
                           .use_io_uring = !o_.threads});
  }
  PrefixCache::Options cache_options(NvmeTier& disk) const {
    return {.bytes = int64_t{1} << 30, .model = "bench", .disk = &disk};
  }

  Status save(const SequenceKv& sequence) {
    const HostMemoryLedger ledger;
    TC_ASSIGN(const std::unique_ptr<NvmeTier> disk, open_disk());
    ledger.make_resident(pool_);
    PrefixCache cache(*store_, cache_options(*disk));
    PrefixKeys keys = cache.keys("");
    Status status;
    const double seconds = seconds_of([&] {
      status = cache.keep(keys, ids_, sequence, sequence.length(), 0);
      disk->flush();
    });
    rates_.bytes = disk->stats().log.saved_bytes;
    rates_.save.push_back(static_cast<double>(rates_.bytes) / seconds);
    return status;
  }

  // What a server does that was just started.
  Status restore() {
    TC_ASSIGN(const std::unique_ptr<NvmeTier> disk, open_disk());
    PrefixCache cache(*store_, cache_options(*disk));
    PrefixKeys keys = cache.keys("");
    int64_t length = 0;
    const double seconds = seconds_of([&] {
      const auto arrival = cache.fetch(keys, ids_, 0);
      cache.flush();
      if (const auto sequence = cache.resume(keys, ids_, 0); sequence && *sequence) length = (*sequence)->length();
    });
    if (length != o_.tokens)
      return Error{ErrorCode::internal, fmt::format("{} of {} tokens came back", length, o_.tokens)};
    rates_.restore.push_back(static_cast<double>(rates_.bytes) / seconds);
    return {};
  }

  const KvBenchOptions& o_;
  const ModelGeometry& g_;
  WorkerPool& pool_;
  std::unique_ptr<KvStore> store_;
  std::vector<int32_t> ids_;
  Rates rates_;
};

Status bench_kv(const KvBenchOptions& o) {
  if (o.tokens < 1 || o.repetitions < 1) return invalid("--tokens and --repetitions should be at least 1");
  std::error_code error;
  std::filesystem::create_directories(o.folder, error);
  if (error) return invalid("the folder " + o.folder + " cannot be made: " + error.message());
  TC_ASSIGN(const ModelGeometry geometry, deepseek_v4::published_geometry(o.shapes, 0));
  if (o.tokens > geometry.max_position_embeddings)
    return invalid(fmt::format("{} tokens are more than the {} of the model's context", o.tokens,
                               geometry.max_position_embeddings));
  TC_ASSIGN(const Topology topology, read_topology(""));
  WorkerPool pool(topology, 0);
  TC_ASSIGN(const Rates rates, KvBench(o, geometry, pool).run());
  fmt::print("a conversation of {} tokens, {}: {:.1f} MB; O_DIRECT by {}\n\n", o.tokens, o.shapes,
             static_cast<double>(rates.bytes) / 1e6, o.threads ? "threads" : "io_uring where there is one");
  fmt::print(
      "|         |  ms | GB/s | plain GB/s | share | target |      |\n"
      "| ------- | --: | ---: | ---------: | ----: | -----: | ---- |\n");
  Json json{{"shapes", o.shapes}, {"tokens", o.tokens}, {"bytes", rates.bytes}, {"build", build_json()}};
  const auto row = [&](const char* name, const std::vector<double>& ours, const std::vector<double>& disk) {
    std::vector<double> shares;
    for (size_t i = 0; i < ours.size(); ++i) shares.push_back(ours[i] / disk[i]);
    const double rate = median(ours), share = median(shares);
    fmt::print("| {:7} | {:3.0f} | {:4.2f} | {:10.2f} | {:3.0f} % |   {:2.0f} % | {} |\n", name,
               static_cast<double>(rates.bytes) / rate * 1e3, rate / 1e9, median(disk) / 1e9, share * 100,
               kPlainShare * 100, share >= kPlainShare ? "pass" : "FAIL");
    json[name] = {{"bytes_per_second", rate}, {"plain_bytes_per_second", median(disk)}, {"share", share}};
  };
  row("save", rates.save, rates.plain_write);
  row("restore", rates.restore, rates.plain_read);
  fmt::print("\nmedian of {}; plain: as many bytes written to and read from one file, {} operations under way\n",
             o.repetitions, DiskFiles::kDepth);
  return o.json_path.empty() ? Status() : write_text_file(o.json_path, dump_json(json) + "\n");
}

}  // namespace

void add_bench_kv(CLI::App& bench, Outcome& outcome) {
  auto o = std::make_shared<KvBenchOptions>();
  CLI::App* command = bench.add_subcommand("kv", "A conversation's KV to a disk and back");
  command->add_option("--dir", o->folder, "A folder on the disk to measure; what the bench writes there goes again")
      ->required();
  command->add_option("--shapes", o->shapes, "v4-flash, v4-pro or demo")->capture_default_str();
  command->add_option("--tokens", o->tokens, "Length of the conversation")->capture_default_str();
  command->add_option("--repetitions,-r", o->repetitions, "Repetitions; the median counts")->capture_default_str();
  command->add_flag("--threads-io", o->threads, "As on a system without io_uring");
  command->add_option("--json", o->json_path, "Also a JSON document");
  command->callback([o, &outcome] { outcome.exit_code = exit_code_of(bench_kv(*o)); });
}

}  // namespace thermocline::cli
