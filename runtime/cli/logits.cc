// `thermocline logits`: the logits of given token ids at every position, for any chunking, to a safetensors file.
#include <charconv>

#include "runtime/cli/command.h"
#include "runtime/cli/model_folder.h"
#include "runtime/io/safetensors.h"

namespace thermocline::cli {
namespace {

struct LogitsOptions {
  ModelOptions model;
  std::string ids_path, out_path;
  int64_t chunk = 512;
  std::optional<int64_t> decode_from;
  bool mtp = false;
};

Result<std::vector<int32_t>> read_ids(const std::string& path) {
  TC_ASSIGN(const std::string text, read_text_file(path));
  std::vector<int32_t> ids;
  for (size_t i = 0; i < text.size();) {
    if (std::isspace(static_cast<unsigned char>(text[i]))) {
      ++i;
      continue;
    }
    int32_t id = 0;
    const auto [end, error] = std::from_chars(text.data() + i, text.data() + text.size(), id);
    const size_t next = static_cast<size_t>(end - text.data());
    if (error != std::errc() || (next < text.size() && !std::isspace(static_cast<unsigned char>(text[next]))))
      return corrupt(path + ": no token id at byte " + std::to_string(i));
    ids.push_back(id);
    i = next;
  }
  if (ids.empty()) return corrupt(path + " holds no token ids");
  return ids;
}

TensorInfo declare(const std::string& name, int64_t rows, int64_t cols) {
  TensorInfo tensor;
  tensor.name = name;
  tensor.dtype = DType::f32;
  tensor.shape = {rows, cols};
  return tensor;
}

// All rows of `logits` are written as they come; those of the MTP block wait, as they follow in the file.
Status write_logits(const LogitsOptions& o) {
  if (o.chunk < 1) return invalid("--chunk should be at least 1");
  TC_ASSIGN(const std::vector<int32_t> ids, read_ids(o.ids_path));
  TC_ASSIGN(EngineOptions options, o.model.engine_options());
  const int64_t tokens = static_cast<int64_t>(ids.size()), prefill_end = o.decode_from.value_or(tokens);
  if (prefill_end < 0 || prefill_end > tokens)
    return invalid("--decode-from " + std::to_string(prefill_end) + " is outside 0.." + std::to_string(tokens) +
                   ", the tokens of " + o.ids_path);
  if (options.max_context > 0 && options.max_context < tokens)
    return invalid(o.ids_path + " has " + std::to_string(tokens) + " tokens, more than the context of " +
                   std::to_string(options.max_context) + ": raise --max-model-len or leave it out");
  options.max_chunk = options.max_logit_rows = std::min(o.chunk, tokens);
  options.mtp = o.mtp;
  if (options.max_context == 0) options.max_context = tokens;
  TC_ASSIGN(const std::unique_ptr<Engine> engine, of_model(Engine::open(options)));
  if (o.mtp && engine->weights().mtp.empty())
    return Error{ErrorCode::not_found, o.model.model() + " has no MTP block (mtp.0.e_proj is missing)", "--model"};
  const int64_t vocab = engine->geometry().vocab_size;

  std::vector<TensorInfo> outputs = {declare("logits", tokens, vocab)};
  if (o.mtp) outputs.push_back(declare("mtp_logits", tokens - 1, vocab));
  TC_ASSIGN(SafetensorsWriter out, SafetensorsWriter::create(o.out_path, outputs));
  TC_ASSIGN(const std::unique_ptr<SequenceKv> sequence, engine->driver().new_sequence());
  std::vector<float> mtp_rows;
  while (sequence->length() < tokens) {
    const int64_t pos = sequence->length();
    const int64_t count = pos < prefill_end ? std::min(options.max_chunk, prefill_end - pos) : 1;
    sched::Batch batch;
    batch.add(0, pos, ids.data() + pos, count);
    std::vector<int32_t> next;
    for (int64_t i = 0; i < count; ++i) {
      batch.logit_rows.push_back(static_cast<int32_t>(i));
      if (o.mtp) next.push_back(pos + i + 1 < tokens ? ids[static_cast<size_t>(pos + i + 1)] : -1);
    }
    SequenceKv* const kv = sequence.get();
    TC_RETURN_IF_ERROR(engine->step().run({batch, std::span(&kv, 1), next}));
    const auto logits = engine->step().logits(), mtp = engine->step().mtp_logits();
    TC_RETURN_IF_ERROR(out.write(std::as_bytes(std::span(logits.data, static_cast<size_t>(logits.size())))));
    if (o.mtp) mtp_rows.insert(mtp_rows.end(), mtp.data, mtp.data + mtp.size());
  }
  TC_RETURN_IF_ERROR(out.write(std::as_bytes(std::span(mtp_rows))));
  return out.close();
}

}  // namespace

void add_logits(CLI::App& app, Outcome& outcome) {
  auto options = std::make_shared<LogitsOptions>();
  CLI::App* command = app.add_subcommand("logits", "Write the logits of token ids at every position");
  options->model.add_to(*command);
  command->add_option("--ids", options->ids_path, "File of whitespace-separated token ids")->required();
  command->add_option("--out", options->out_path, "Output file: logits [T, V] F32, with --mtp mtp_logits [T-1, V]")
      ->required();
  command->add_option("--chunk", options->chunk, "Tokens per prefill step")->capture_default_str();
  command->add_option("--decode-from", options->decode_from, "Prefill this many tokens, then one at a time");
  command->add_flag("--mtp", options->mtp, "Also the logits of the MTP block");
  command->callback([options, &outcome] { outcome.exit_code = exit_code_of(write_logits(*options)); });
}

}  // namespace thermocline::cli
