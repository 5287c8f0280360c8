// `thermocline perplexity`: how well a model predicts a text, and how far it is from a recorded run.
#include <fmt/format.h>

#include <cmath>
#include <cstring>

#include "runtime/cli/command.h"
#include "runtime/cli/model_folder.h"
#include "runtime/io/json_document.h"
#include "runtime/io/safetensors.h"
#include "runtime/text/tokenizer.h"

namespace thermocline::cli {
namespace {

constexpr int64_t kChunk = 128;

struct PerplexityOptions {
  ModelOptions model;
  std::string text_path, reference_path, reference_tensor = "logits";
  bool json = false;
};

/// Log-probabilities of one row of logits.
std::vector<double> log_softmax(const float* logits, int64_t n) {
  double max = -INFINITY, sum = 0;
  for (int64_t i = 0; i < n; ++i) max = std::max(max, static_cast<double>(logits[i]));
  for (int64_t i = 0; i < n; ++i) sum += std::exp(logits[i] - max);
  std::vector<double> out(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) out[static_cast<size_t>(i)] = logits[i] - max - std::log(sum);
  return out;
}

/// A recorded run, mapped: rows are read where they lie.
class Reference {
 public:
  static Result<Reference> open(const PerplexityOptions& o, int64_t vocab) {
    TC_ASSIGN(const InputFile file, InputFile::open(o.reference_path));
    TC_ASSIGN(const std::vector<TensorInfo> tensors, read_safetensors_header(file));
    for (const TensorInfo& tensor : tensors) {
      if (tensor.name != o.reference_tensor) continue;
      if (tensor.dtype != DType::f32 || tensor.shape.size() != 2 || tensor.shape[1] != vocab)
        return corrupt(o.reference_path + ", tensor '" + tensor.name + "' should be F32 [T, " + std::to_string(vocab) +
                       "], not " + tensor.shape_text());
      TC_ASSIGN(MappedFile mapped, MappedFile::open(o.reference_path));
      return Reference(std::move(mapped), tensor);
    }
    return Error{ErrorCode::not_found, o.reference_path + " holds no tensor '" + o.reference_tensor + "'"};
  }
  int64_t rows() const { return tensor_.shape[0]; }
  std::vector<float> row(int64_t i) const {
    std::vector<float> out(static_cast<size_t>(tensor_.shape[1]));
    const uint64_t bytes = out.size() * 4;
    std::memcpy(out.data(), file_.bytes().data() + tensor_.begin + static_cast<uint64_t>(i) * bytes, bytes);
    return out;
  }

 private:
  Reference(MappedFile file, TensorInfo tensor) : file_(std::move(file)), tensor_(std::move(tensor)) {}
  MappedFile file_;
  TensorInfo tensor_;
};

struct Sums {
  double nll = 0, kl = 0, kl_max = 0;
  int64_t predicted = 0, compared = 0, same_top1 = 0;
};

void compare(const std::vector<float>& recorded, const float* logits, const std::vector<double>& ours, Sums& sums) {
  const int64_t n = static_cast<int64_t>(recorded.size());
  const std::vector<double> theirs = log_softmax(recorded.data(), n);
  double kl = 0;
  for (int64_t i = 0; i < n; ++i)
    kl += std::exp(theirs[static_cast<size_t>(i)]) * (theirs[static_cast<size_t>(i)] - ours[static_cast<size_t>(i)]);
  sums.kl += kl;
  sums.kl_max = std::max(sums.kl_max, kl);
  sums.same_top1 += std::max_element(logits, logits + n) - logits ==
                    std::max_element(recorded.begin(), recorded.end()) - recorded.begin();
  ++sums.compared;
}

void report(const PerplexityOptions& o, const Sums& s) {
  const double perplexity = std::exp(s.nll / static_cast<double>(s.predicted));
  const double count = static_cast<double>(std::max<int64_t>(1, s.compared));
  if (o.json) {
    Json json = {{"tokens", s.predicted}, {"perplexity", perplexity}};
    if (s.compared > 0)
      json.update(Json{{"compared", s.compared},
                       {"mean_kl", s.kl / count},
                       {"max_kl", s.kl_max},
                       {"top1_agreement", static_cast<double>(s.same_top1) / count}});
    fmt::print("{}\n", dump_json(json));
    return;
  }
  fmt::print("perplexity {:.4f} over {} predicted tokens\n", perplexity, s.predicted);
  if (s.compared > 0)
    fmt::print("against {}: mean KL {:.3g}, largest {:.3g}, top-1 agreement {:.4f} at {} positions\n", o.reference_path,
               s.kl / count, s.kl_max, static_cast<double>(s.same_top1) / count, s.compared);
}

Status perplexity(const PerplexityOptions& o) {
  TC_ASSIGN(EngineOptions options, o.model.engine_options());
  options.max_chunk = options.max_logit_rows = kChunk;
  options.quiet = o.json;
  TC_ASSIGN(const std::unique_ptr<Tokenizer> tokenizer, load_tokenizer(o.model.model()));
  TC_ASSIGN(const std::string text, read_text_file(o.text_path));
  TC_ASSIGN(std::vector<int32_t> ids, tokenizer->encode(text));
  TC_ASSIGN(const std::unique_ptr<Engine> engine, of_model(Engine::open(options)));
  const int32_t bos = engine->geometry().bos_token_id;
  if (ids.empty() || ids[0] != bos) ids.insert(ids.begin(), bos);
  const int64_t vocab = engine->geometry().vocab_size, total = static_cast<int64_t>(ids.size());
  if (total < 2) return corrupt(o.text_path + " holds no text to predict");
  if (engine->max_context() < 2)
    return invalid("a context of one token predicts nothing: --max-model-len should be at least 2");
  for (const int32_t id : ids)
    if (id < 0 || id >= vocab)
      return corrupt("the tokenizer gives token " + std::to_string(id) + ", outside the vocabulary of " +
                     std::to_string(vocab) + " in config.json");
  std::optional<Reference> reference;
  if (!o.reference_path.empty()) {
    TC_ASSIGN(reference, Reference::open(o, vocab));
    if (reference->rows() > total)
      return corrupt(o.reference_path + " has logits of " + std::to_string(reference->rows()) +
                     " tokens, the text only " + std::to_string(total) + " with its BOS");
    if (total > engine->max_context())
      return invalid("the text has " + std::to_string(total) + " tokens, more than the context of " +
                     std::to_string(engine->max_context()) + ": no recorded run can match it");
  }
  Sums sums;
  // A text longer than the context is read in pieces, each with nothing before it but a BOS. A context holds two tokens
  // or more, so every piece moves on.
  for (int64_t begin = 0; begin < total;) {
    TC_ASSIGN(const std::unique_ptr<SequenceKv> sequence, engine->driver().new_sequence());
    std::vector<int32_t> piece;
    if (begin > 0) piece.push_back(bos);
    const int64_t count = std::min(total - begin, engine->max_context() - static_cast<int64_t>(piece.size()));
    piece.insert(piece.end(), ids.begin() + begin, ids.begin() + begin + count);
    for (const int64_t end : sched::chunk_prefill(0, static_cast<int64_t>(piece.size()), kChunk)) {
      sched::Batch batch;
      const int64_t pos = sequence->length();
      batch.add(0, pos, piece.data() + pos, end - pos);
      for (int32_t i = 0; i < end - pos; ++i) batch.logit_rows.push_back(i);
      SequenceKv* const kv = sequence.get();
      TC_RETURN_IF_ERROR(engine->step().run({batch, std::span(&kv, 1)}));
      for (int64_t t = pos; t < end; ++t) {
        const float* logits = engine->step().logits().row(t - pos);
        const std::vector<double> ours = log_softmax(logits, vocab);
        if (t + 1 < static_cast<int64_t>(piece.size())) {
          sums.nll -= ours[static_cast<size_t>(piece[static_cast<size_t>(t + 1)])];
          ++sums.predicted;
        }
        if (reference && t < reference->rows()) compare(reference->row(t), logits, ours, sums);
      }
    }
    begin += count;
  }
  report(o, sums);
  return {};
}

}  // namespace

void add_perplexity(CLI::App& app, Outcome& outcome) {
  auto o = std::make_shared<PerplexityOptions>();
  CLI::App* command = app.add_subcommand("perplexity", "Perplexity of a text, and KL against a recorded run");
  o->model.add_to(*command);
  command->add_option("--text", o->text_path, "Text file; a BOS is put in front unless it is there")->required();
  command->add_option("--reference", o->reference_path,
                      "Logits of the same tokens, as `thermocline logits` writes them");
  not_empty(command->add_option("--reference-tensor", o->reference_tensor, "Name of the tensor in that file"))
      ->capture_default_str();
  command->add_flag("--json", o->json, "One JSON object on standard output");
  command->callback([o, &outcome] { outcome.exit_code = exit_code_of(perplexity(*o)); });
}

}  // namespace thermocline::cli
