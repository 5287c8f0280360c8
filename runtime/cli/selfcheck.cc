// `thermocline selfcheck`: the determinism contract on the user's own box and model. A token's logits depend on its own
// sequence only; every way to get to them must give the same bits, so every comparison here is for equality.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <random>

#include "runtime/cli/command.h"
#include "runtime/cli/model_folder.h"

namespace thermocline::cli {
namespace {

struct SelfcheckOptions {
  ModelOptions model;
  bool quick = false;
  std::string kv_disk_dir;
};

using Ids = std::vector<int32_t>;
using Logits = std::vector<float>;  // of one token or more, [tokens, V]

/// Stops a step after some of its layers.
class StopAfter : public StopToken {
 public:
  explicit StopAfter(int polls) : left_(polls) {}
  bool stop_requested() const override { return left_-- == 0; }

 private:
  mutable int left_;
};

class Selfcheck {
 public:
  static constexpr int kSequences = 4, kAnswer = 6;

  /// `disk`: null, or a tier that KV pages take a way through.
  Selfcheck(Engine& engine, bool quick, NvmeTier* disk)
      : engine_(engine), step_(&engine.step()), kv_(engine.driver().kv()), disk_(disk), tokens_(quick ? 40 : 300) {
    std::mt19937 random(1);
    for (Ids& ids : texts_) {
      const int64_t longer = static_cast<int64_t>(random() % 17);  // so that they stand at different positions
      for (int64_t i = 0; i < tokens_ + longer + kAnswer; ++i)
        ids.push_back(static_cast<int32_t>(random() % static_cast<uint64_t>(engine.geometry().vocab_size)));
    }
  }

  Status run() {
    fmt::print("{:<12} {:<58} {:>18}\n", "what", "compared with each text alone, prefilled in whole steps",
               "largest difference");
    for (const Ids& ids : texts_) {
      TC_ASSIGN(Logits logits, alone(ids, step_->options().max_tokens));
      expected_.push_back(std::move(logits));
    }
    TC_RETURN_IF_ERROR(repeats());
    TC_RETURN_IF_ERROR(chunks());
    TC_RETURN_IF_ERROR(batch());
    TC_RETURN_IF_ERROR(cancel());
    TC_RETURN_IF_ERROR(rollback());
    TC_RETURN_IF_ERROR(fork());
    TC_RETURN_IF_ERROR(checkpoint());
    TC_RETURN_IF_ERROR(tiers());
    TC_RETURN_IF_ERROR(threads());
    return cache();
  }
  bool same() const { return same_; }

 private:
  Result<std::unique_ptr<SequenceKv>> sequence() { return kv_.new_sequence(); }

  /// Feeds ids in chunks; appends the logits of the last one.
  Status feed(SequenceKv& kv, std::span<const int32_t> ids, int64_t chunk, Logits* out,
              const StopToken* stop = nullptr) {
    for (size_t at = 0; at < ids.size();) {
      const auto count = std::min(static_cast<size_t>(chunk), ids.size() - at);
      sched::Batch batch;
      batch.add(0, kv.length(), ids.data() + at, static_cast<int64_t>(count));
      at += count;
      if (at == ids.size()) batch.logit_rows.push_back(static_cast<int32_t>(count) - 1);
      SequenceKv* const sequence = &kv;
      TC_RETURN_IF_ERROR(step_->run({batch, std::span(&sequence, 1), {}, stop}));
    }
    if (out) append(0, *out);
    return {};
  }
  void append(int64_t row, Logits& out) const {
    const TensorView<const float, 2> logits = step_->logits();
    out.insert(out.end(), logits.row(row), logits.row(row) + logits.shape[1]);
  }
  /// The answer's tokens one by one.
  Status answer(SequenceKv& kv, const Ids& ids, Logits& out) {
    for (size_t i = ids.size() - kAnswer; i < ids.size(); ++i)
      TC_RETURN_IF_ERROR(feed(kv, std::span(ids).subspan(i, 1), 1, &out));
    return {};
  }
  static std::span<const int32_t> prompt(const Ids& ids) { return std::span(ids).first(ids.size() - kAnswer); }

  Result<Logits> alone(const Ids& ids, int64_t chunk) {
    TC_ASSIGN(const std::unique_ptr<SequenceKv> kv, sequence());
    Logits out;
    TC_RETURN_IF_ERROR(feed(*kv, prompt(ids), chunk, &out));
    TC_RETURN_IF_ERROR(answer(*kv, ids, out));
    return out;
  }

  void report(const char* what, const std::string& how, double difference) {
    same_ = same_ && difference == 0;
    fmt::print("{:<12} {:<58} {:>18}\n", what, how,
               difference == 0 ? "none" : fmt::format("{:.3g}  DIFFERENT", difference));
  }
  /// NaN differs from everything.
  static double difference(const Logits& a, const Logits& b) {
    double most = a.size() == b.size() ? 0 : INFINITY;
    for (size_t i = 0; i < std::min(a.size(), b.size()); ++i)
      if (const double d = std::fabs(static_cast<double>(a[i]) - b[i]); !(d <= most))
        most = std::isnan(d) ? INFINITY : d;
    return most;
  }

  Status repeats() {
    TC_ASSIGN(const Logits again, alone(texts_[0], step_->options().max_tokens));
    report("repeat", fmt::format("{} tokens and an answer of {}, again", prompt(texts_[0]).size(), kAnswer),
           difference(again, expected_[0]));
    return {};
  }

  Status chunks() {
    double most = 0;
    std::string sizes;
    for (const int64_t chunk : {int64_t{1}, int64_t{7}, int64_t{64}}) {
      if (chunk >= step_->options().max_tokens) continue;
      TC_ASSIGN(const Logits logits, alone(texts_[0], chunk));
      most = std::max(most, difference(logits, expected_[0]));
      sizes += (sizes.empty() ? "" : ", ") + std::to_string(chunk);
    }
    report("chunks", "prefilled by " + sizes, most);
    return {};
  }

  // All texts in one step, each at its own position.
  Status batch() {
    std::vector<std::unique_ptr<SequenceKv>> owned;
    std::vector<SequenceKv*> sequences;
    std::vector<Logits> got(kSequences);
    for (int s = 0; s < kSequences; ++s) {
      TC_ASSIGN(std::unique_ptr<SequenceKv> kv, sequence());
      TC_RETURN_IF_ERROR(feed(*kv, prompt(texts_[s]), step_->options().max_tokens, &got[static_cast<size_t>(s)]));
      sequences.push_back(kv.get());
      owned.push_back(std::move(kv));
    }
    for (int token = 0; token < kAnswer; ++token) {
      sched::Batch batch;
      for (int s = 0; s < kSequences; ++s) {
        const Ids& ids = texts_[s];
        batch.add(s, sequences[static_cast<size_t>(s)]->length(),
                  &ids[ids.size() - kAnswer + static_cast<size_t>(token)], 1);
        batch.logit_rows.push_back(s);
      }
      TC_RETURN_IF_ERROR(step_->run({batch, sequences}));
      for (int s = 0; s < kSequences; ++s) append(s, got[static_cast<size_t>(s)]);
    }
    double most = 0;
    for (size_t s = 0; s < kSequences; ++s) most = std::max(most, difference(got[s], expected_[s]));
    report("batch", fmt::format("{} sequences that decode in one step", kSequences), most);
    return {};
  }

  // A step is stopped on its way, then done again; by a device, which has written over the rings, from the start.
  Status cancel() {
    double most = 0;
    int stopped = 0;
    for (const int layers : {0, 1, engine_.geometry().n_layers / 2}) {
      TC_ASSIGN(std::unique_ptr<SequenceKv> kv, sequence());
      const std::span<const int32_t> text = prompt(texts_[0]);
      const size_t half = text.size() / 2;
      TC_RETURN_IF_ERROR(feed(*kv, text.first(half), step_->options().max_tokens, nullptr));
      const StopAfter stop(layers);
      const Status status = feed(*kv, text.subspan(half), step_->options().max_tokens, nullptr, &stop);
      if (!status.ok() && status.error().code != ErrorCode::cancelled) return status;
      stopped += !status.ok();
      if (kv->rollback_floor() > kv->length()) {
        kv.reset();
        TC_ASSIGN(kv, sequence());
      }
      Logits out;
      TC_RETURN_IF_ERROR(feed(*kv, text.subspan(static_cast<size_t>(kv->length())), step_->options().max_tokens, &out));
      if (static_cast<size_t>(kv->length()) != text.size())
        return Error{ErrorCode::internal, "a stopped step has left tokens"};
      TC_RETURN_IF_ERROR(answer(*kv, texts_[0], out));
      if (!status.ok()) most = std::max(most, difference(out, expected_[0]));
    }
    report("cancel", fmt::format("{} steps stopped between layers, then gone on", stopped), most);
    return {};
  }

  Status rollback() {
    TC_ASSIGN(const std::unique_ptr<SequenceKv> kv, sequence());
    Logits out;
    TC_RETURN_IF_ERROR(feed(*kv, prompt(texts_[0]), step_->options().max_tokens, &out));
    const int64_t length = kv->length();
    for (int64_t drafts = 1; drafts <= kv_.options().rollback_tokens; ++drafts) {
      TC_RETURN_IF_ERROR(feed(*kv, std::span(texts_[1]).first(static_cast<size_t>(drafts)), drafts, nullptr));
      kv->rollback(length);
    }
    TC_RETURN_IF_ERROR(answer(*kv, texts_[0], out));
    report("rollback", fmt::format("1 to {} tokens of another text fed and taken back", kv_.options().rollback_tokens),
           difference(out, expected_[0]));
    return {};
  }

  Status fork() {
    TC_ASSIGN(const std::unique_ptr<SequenceKv> first, sequence());
    Logits out;
    TC_RETURN_IF_ERROR(feed(*first, prompt(texts_[0]), step_->options().max_tokens, &out));
    TC_ASSIGN(const std::unique_ptr<SequenceKv> second, kv_.fork(*first));
    Logits other = out;
    for (size_t i = texts_[0].size() - kAnswer; i < texts_[0].size(); ++i) {  // by turns, over the same pages
      const auto token = std::span(texts_[0]).subspan(i, 1);
      TC_RETURN_IF_ERROR(feed(*first, token, 1, &out));
      TC_RETURN_IF_ERROR(feed(*second, token, 1, &other));
    }
    report("fork", "a sequence and its fork, by turns over shared pages",
           std::max(difference(out, expected_[0]), difference(other, expected_[0])));
    return {};
  }

  Status checkpoint() {
    double most = 0;
    const std::span<const int32_t> text = prompt(texts_[0]);
    const int64_t lengths[] = {1, 3, 5, tokens_ / 2, std::min<int64_t>(128, tokens_ - 1), tokens_ - 1};
    for (const int64_t length : lengths) {
      TC_ASSIGN(std::unique_ptr<SequenceKv> kv, sequence());
      TC_RETURN_IF_ERROR(feed(*kv, text.first(static_cast<size_t>(length)), step_->options().max_tokens, nullptr));
      TC_ASSIGN(const KvCheckpoint kept, kv_.checkpoint(*kv, length));
      TC_RETURN_IF_ERROR(feed(*kv, std::span(texts_[1]).first(20), step_->options().max_tokens, nullptr));
      kv.reset();
      TC_ASSIGN(const std::unique_ptr<SequenceKv> resumed, kv_.restore(kept));
      Logits out;
      TC_RETURN_IF_ERROR(feed(*resumed, text.subspan(static_cast<size_t>(length)), step_->options().max_tokens, &out));
      TC_RETURN_IF_ERROR(answer(*resumed, texts_[0], out));
      most = std::max(most, difference(out, expected_[0]));
    }
    report("checkpoint", fmt::format("gone on from {} lengths, as the prefix cache does", std::size(lengths)), most);
    return {};
  }

  // All bytes of a prefix leave its pages, go to the disk if there is one, and come back to other pages.
  Status tiers() {
    const std::span<const int32_t> text = prompt(texts_[0]), most = text.first(text.size() - 10);
    TC_ASSIGN(std::unique_ptr<SequenceKv> kv, sequence());
    TC_RETURN_IF_ERROR(feed(*kv, most, step_->options().max_tokens, nullptr));
    TC_ASSIGN(const KvCheckpoint kept, kv_.checkpoint(*kv, kv->length()));
    kv.reset();
    std::vector<std::vector<std::byte>> images;
    for (const int32_t page : kept.pages()) {
      images.emplace_back(static_cast<size_t>(kv_.layout().compressed_page_bytes()));
      TC_RETURN_IF_ERROR(kv_.memory().read(KvPool::compressed, page, images.back().data()));
    }
    images.emplace_back(kept.image().begin(), kept.image().end());
    if (disk_) TC_RETURN_IF_ERROR(through_disk(images));
    TC_ASSIGN(KvCheckpoint back, kv_.blank(kept.length(), {}));
    for (size_t i = 0; i < back.pages().size(); ++i)
      TC_RETURN_IF_ERROR(kv_.memory().write(KvPool::compressed, back.pages()[i], images[i].data()));
    std::copy(images.back().begin(), images.back().end(), back.image().begin());
    back.settle();
    TC_ASSIGN(const std::unique_ptr<SequenceKv> resumed, kv_.restore(back));
    Logits out;
    TC_RETURN_IF_ERROR(feed(*resumed, text.subspan(most.size()), step_->options().max_tokens, &out));
    TC_RETURN_IF_ERROR(answer(*resumed, texts_[0], out));
    report("tiers", fmt::format("{} tokens moved to other pages{}", most.size(), disk_ ? ", by way of the disk" : ""),
           difference(out, expected_[0]));
    return {};
  }
  Status through_disk(std::vector<std::vector<std::byte>>& images) {
    std::vector<KvItem> items;
    std::vector<KvRead> reads;
    std::random_device random;
    for (std::vector<std::byte>& image : images) {
      PrefixName name;
      for (uint8_t& byte : name) byte = static_cast<uint8_t>(random());
      const std::span<std::byte> copy = disk_->room(image.size());
      if (copy.empty()) return Error{ErrorCode::io, "the disk's queue is full"};
      std::copy(image.begin(), image.end(), copy.begin());
      items.push_back({{.name = name, .kind = KvItemKind::page}, {copy}});
      reads.push_back({name, {image}});
    }
    disk_->save(std::move(items));
    disk_->flush();
    for (std::vector<std::byte>& image : images) std::fill(image.begin(), image.end(), std::byte{0});
    bool read = false;
    disk_->read(std::move(reads), [&read](bool all) { read = all; });
    disk_->flush();
    if (!read) return Error{ErrorCode::io, "the disk did not give back what was saved to it"};
    return {};
  }

  // Other steps over the same weights: one worker a node, and half of them.
  Status threads() {
    if (engine_.gpu_step()) return {};
    const int all = engine_.pool().size(), nodes = engine_.pool().nodes();
    double most = 0;
    std::string counts;
    for (const int count : {nodes, (nodes + all) / 2}) {
      if (count >= all || (count == nodes && !counts.empty())) continue;
      WorkerPool pool(engine_.topology(), count);
      TC_ASSIGN(const std::unique_ptr<DeepseekV4Step> step,
                DeepseekV4Step::create(engine_.geometry(), engine_.weights(), {pool, engine_.kernels()},
                                       engine_.options().numerics, step_->options()));
      StepExecutor* const own = std::exchange(step_, step.get());
      Result<Logits> logits = alone(texts_[0], step_->options().max_tokens);
      step_ = own;
      if (!logits) return std::move(logits).error();
      most = std::max(most, difference(*logits, expected_[0]));
      counts += (counts.empty() ? "" : ", ") + std::to_string(count);
    }
    if (!counts.empty())
      report("threads", fmt::format("{} workers instead of {} on {} NUMA node(s)", counts, all, nodes), most);
    return {};
  }

  // The step loop, warm against cold: answers with the log-probabilities of twenty tokens each.
  Status cache() {
    Result<std::unique_ptr<Tokenizer>> tokenizer = Tokenizer::load(engine_.options().model);
    if (!tokenizer) {
      fmt::print("{:<12} not compared: {}\n", "cache", tokenizer.error().message);
      return {};
    }
    TC_RETURN_IF_ERROR(engine_.start(**tokenizer));
    TC_ASSIGN(const Logits cold, ask("cold"));
    TC_ASSIGN(const Logits first, ask("warm"));
    TC_ASSIGN(const Logits warm, ask("warm"));
    const int64_t saved = engine_.stats().prefix_cache.saved_tokens;
    report("cache", fmt::format("an answer of the server, {} tokens from the prefix cache", saved),
           std::max(difference(first, cold), difference(warm, cold)));
    return {};
  }
  Result<Logits> ask(const std::string& salt) {
    Request request;
    const std::span<const int32_t> text = prompt(texts_[0]);
    request.prompt.assign(text.begin(), text.end());
    request.sampling.temperature = 0;
    request.max_tokens = kAnswer;
    request.ignore_eos = true;
    request.top_logprobs = 20;
    request.cache_salt = salt;
    TC_ASSIGN(const std::shared_ptr<RequestHandle> handle, engine_.submit(std::move(request)));
    Logits out;
    while (!handle->stream().finished()) {
      handle->stream().wait_for(std::chrono::milliseconds(100));
      for (const TokenEvent& event : handle->stream().take()) {
        if (event.reason == FinishReason::error && event.kind == TokenEvent::Kind::finish) return event.error;
        if (event.logprobs)
          for (const TokenLogprob& top : event.logprobs->top) {
            out.push_back(static_cast<float>(top.id));
            out.push_back(top.logprob);
          }
      }
    }
    return out;
  }

  Engine& engine_;
  StepExecutor* step_;
  KvStore& kv_;
  NvmeTier* const disk_;
  const int64_t tokens_;
  Ids texts_[kSequences];
  std::vector<Logits> expected_;
  bool same_ = true;
};

Status selfcheck(const SelfcheckOptions& o) {
  TC_ASSIGN(EngineOptions options, o.model.engine_options());
  options.max_sequences = Selfcheck::kSequences;
  if (options.max_context == 0) options.max_context = 1024;
  TC_ASSIGN(const std::unique_ptr<Engine> engine, of_model(Engine::open(options)));
  if (engine->max_context() < 400)
    return invalid("selfcheck needs a context of 400 tokens, not " + std::to_string(engine->max_context()));
  // In a folder of its own beside what a server keeps there.
  std::filesystem::path folder;
  if (!o.kv_disk_dir.empty()) {
    std::string name = (std::filesystem::path(o.kv_disk_dir) / "selfcheck-XXXXXX").string();
    if (!mkdtemp(name.data())) return Error{ErrorCode::io, "no folder can be made in " + o.kv_disk_dir};
    folder = name;
  }
  const std::shared_ptr<void> removed(nullptr, [&folder](void*) {
    std::error_code ignored;
    if (!folder.empty()) std::filesystem::remove_all(folder, ignored);
  });
  std::unique_ptr<NvmeTier> disk;
  if (!folder.empty()) {
    TC_ASSIGN(disk, NvmeTier::open({.folder = folder, .space_bytes = 1 << 30}));
  }
  Selfcheck check(*engine, o.quick, disk.get());
  TC_RETURN_IF_ERROR(check.run());
  if (!check.same())
    return Error{ErrorCode::internal,
                 "results that should be the same are not: please report this with the table above"};
  fmt::print("every result is the same, bit for bit\n");
  return {};
}

}  // namespace

void add_selfcheck(CLI::App& app, Outcome& outcome) {
  auto options = std::make_shared<SelfcheckOptions>();
  CLI::App* command = app.add_subcommand(
      "selfcheck",
      "Check on this machine that results do not depend on batch, chunks, threads, cache, disk, cancels or rollbacks");
  options->model.add_to(*command);
  command->add_option("--kv-disk-dir", options->kv_disk_dir,
                      "A folder on the disk of serve's --kv-disk-dir: what is compared goes through it too");
  command->add_flag("--quick", options->quick, "Texts of 40 tokens instead of 300");
  command->callback([options, &outcome] { outcome.exit_code = exit_code_of(selfcheck(*options)); });
}

}  // namespace thermocline::cli
