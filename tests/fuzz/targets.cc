// Fuzz targets, one for each parser of outside bytes. Linked with replay_main.cc they run a seed corpus and mutations
// of it in every test run; with clang's libFuzzer (-DTC_FUZZ=ON) the one named by TC_FUZZ_TARGET searches on.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <sstream>
#include <string_view>

#include "runtime/cli/config_file.h"
#include "runtime/engine/doctor.h"
#include "runtime/engine/expert_profile.h"
#include "runtime/engine/machine_profile_json.h"
#include "runtime/engine/planned_model.h"
#include "runtime/io/safetensors.h"
#include "runtime/kv/kv_log_format.h"
#include "runtime/model/deepseek_v4/config.h"
#include "runtime/server/api/chat_completions.h"
#include "runtime/server/api/completions.h"
#include "runtime/server/api/messages.h"
#include "runtime/server/api/responses.h"
#include "runtime/text/chat_encoding.h"
#include "runtime/text/completion_parser.h"
#include "runtime/text/detokenizer.h"
#include "runtime/text/python_json.h"
#include "runtime/text/utf8.h"
#include "scheduler/trace/analysis.h"
#include "scheduler/trace/trace_csv.h"

namespace thermocline {
namespace {

ProseConstants prose() {
  ProseConstants constants;
  constants.tools_template = "{tool_schemas} {dsml_token} {thinking_start_token} {thinking_end_token}";
  constants.response_format_template = "{schema}";
  return constants;
}

void safetensors_header(std::string_view data) {
  for (const uint64_t extra : {0, 24}) (void)parse_safetensors_header(data, 8 + data.size() + extra);
}

void config(std::string_view data) { (void)deepseek_v4::parse_config(data); }

void planned_config(std::string_view data) {
  const Result<Json> json = parse_json(data, true);
  if (!json) return;
  for (const auto planned : {deepseek_v3::planned, deepseek_v41::planned})
    if (const Result<PlannedModel> model = planned(*json)) (void)model->costs.routed_bytes();
}

void tokenizer(std::string_view data) {
  const auto parsed = Tokenizer::parse(data);
  if (!parsed) return;
  const auto ids = (*parsed)->encode("Hello, wörld! 123 <｜User｜>\n\n  x");
  if (ids) (void)detokenize(**parsed, *ids);
}

void prose_constants(std::string_view data) {
  const auto constants = python_string_constants(data);
  if (!constants) return;
  for (const auto& [name, text] : *constants) (void)template_parts(text);
}

void check(bool promise) {
  if (!promise) std::abort();
}

// A tokenizer of single bytes with special tokens, some of them looked for after normalisation.
std::unique_ptr<Tokenizer> byte_tokenizer(const char* form) {
  Json vocabulary = Json::object();
  for (int byte = 0, next = 256; byte < 256; ++byte) {  // GPT-2's characters for bytes
    const bool shown = (byte >= 33 && byte <= 126) || (byte >= 161 && byte != 173);
    const int c = shown ? byte : next++;
    const std::string text = c < 128
                                 ? std::string(1, static_cast<char>(c))
                                 : std::string{static_cast<char>(0xc0 | c >> 6), static_cast<char>(0x80 | (c & 63))};
    vocabulary[text] = byte;
  }
  Json added = Json::array();
  for (const char* token : {"<｜User｜>", "</think>", "｜DSML｜", "<think>", "\u00e9", "  "})
    added.push_back({{"id", 256 + added.size()},
                     {"content", token},
                     {"special", true},
                     {"normalized", added.size() >= 3},
                     {"rstrip", added.size() == 1}});
  Json json = {{"model", {{"type", "BPE"}, {"vocab", vocabulary}, {"merges", Json::array()}}}, {"added_tokens", added}};
  json["pre_tokenizer"] = {{"type", "Sequence"},
                           {"pretokenizers",
                            {{{"type", "Split"},
                              {"pattern", {{"Regex", "\\p{N}{1,3}|[\\p{L}\\p{M}]+|\\s+(?!\\S)"}}},
                              {"behavior", "Isolated"}},
                             {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}}}}};
  if (form) json["normalizer"] = {{"type", form}};
  return Tokenizer::parse(dump_json(json)).value();
}

// The first bytes choose literal spans, the others are the text. Nothing special comes of literal text, no byte is
// lost.
void encode(std::string_view data) {
  static const std::unique_ptr<Tokenizer> tokenizers[] = {byte_tokenizer(nullptr), byte_tokenizer("NFC"),
                                                          byte_tokenizer("NFKD")};
  const std::string_view choice = data.substr(0, 8), text = data.substr(choice.size());
  std::vector<TextSpan> spans;
  for (size_t i = 0; i + 1 < choice.size(); i += 2)
    spans.push_back({static_cast<unsigned char>(choice[i]) * text.size() / 256,
                     static_cast<unsigned char>(choice[i + 1]) * text.size() / 200});
  const TextSpan all[] = {{0, text.size()}};
  for (const auto& tokenizer : tokenizers) {
    const auto mixed = tokenizer->encode(text, spans), trusted = tokenizer->encode(text),
               literal = tokenizer->encode(text, all);
    check(mixed && trusted && literal);
    for (const int32_t id : *literal) check(!tokenizer->is_special(id));
    const auto special = [&](int32_t id) { return tokenizer->is_special(id); };
    if (std::none_of(trusted->begin(), trusted->end(), special)) check(*mixed == *literal && *trusted == *literal);
    if (tokenizer == tokenizers[0]) check(detokenize(*tokenizer, *literal).value() == to_valid_utf8(text));
  }
}

void chat(std::string_view data) {
  const Result<Json> json = parse_json(data);
  if (!json) return;
  const Json& messages = json->is_object() && json->contains("messages") ? (*json)["messages"] : *json;
  for (const bool thinking : {false, true}) {
    ChatOptions options;
    options.thinking = thinking;
    (void)render_chat(prose(), messages, options);
    for (const bool continues : {false, true}) {
      options.continue_final_message = continues;
      const auto prompt = render_generation_prompt(prose(), messages, options);
      if (!prompt) continue;
      size_t last = 0;
      for (const TextSpan& span : prompt->literal) {
        check(last <= span.begin && span.begin < span.end);
        last = span.end;
      }
      check(last <= prompt->text.size() && (!prompt->in_reasoning || thinking));
    }
  }
}

// The server's own way of a body: bounded JSON, typed fields, rendering, tokenising, for every protocol.
void request(std::string_view data) {
  static const std::unique_ptr<Tokenizer> tokenizer = Tokenizer::load(TC_SOURCE_DIR "/models/demo").value();
  static const server::ServedModel model{
      .vocab_size = 4096, .max_context = 2048, .tokenizer = *tokenizer, .constants = prose(), .name = "demo"};
  static const std::unique_ptr<server::AccessLog> log = server::AccessLog::open("").value();
  static server::PrepPool prep(1);
  static server::RequestBook book(*log);
  static server::ApiKeys keys;
  static metrics::Metrics counts({});
  static server::Ticker ticker(std::chrono::milliseconds(500));
  static server::Services services{prep, book, keys, counts, ticker, [] { return server::ServerState(); }};
  const Result<Json> json = parse_bounded_json(data, {.values = 10'000, .keys = 100});
  if (!json || !json->is_object()) return;
  const auto read = [&](const auto& generation) {
    const auto requests = generation->read(*json);
    if (requests)
      for (const Request& r : *requests) (void)r.sampling.check(model.vocab_size);
  };
  read(std::make_shared<server::ChatGeneration>(server::Call{.model = &model}, services));
  read(std::make_shared<server::CompletionGeneration>(server::Call{.model = &model}, services));
  read(std::make_shared<server::MessagesGeneration>(server::Call{.model = &model}, services));
  static server::ResponseStore store({});
  read(std::make_shared<server::ResponsesGeneration>(server::Call{.model = &model}, services, store));
}

void python_json(std::string_view data) { (void)python_members(data); }

// What a client keeps of a completion; its arguments are JSON without a key twice, whatever the model wrote.
std::string answer(std::string_view text, size_t step, bool thinking, const ToolProperties& tools) {
  CompletionStream stream(prose(), thinking, tools);
  std::string kept[4];
  const auto take = [&](const std::vector<CompletionStream::Event>& events) {
    using Kind = CompletionStream::Event::Kind;
    for (const auto& event : events) {
      kept[static_cast<size_t>(event.kind)] += event.text;
      if (event.kind == Kind::tool_arguments) check(parse_json(event.text).has_value());
    }
  };
  for (size_t at = 0; at < text.size(); at += step) take(stream.push(text.substr(at, step)));
  take(stream.finish());
  return kept[0] + "|" + kept[1] + "|" + kept[2] + "|" + kept[3];
}

// A seed may be a line with "text" and the "tools" of its request.
void completion(std::string_view data) {
  const Result<Json> json = parse_json(data);
  const bool seed = json && json->is_object() && json->contains("text") && (*json)["text"].is_string();
  const std::string text = to_valid_utf8(seed ? (*json)["text"].get_ref<const std::string&>() : data);
  ToolProperties tools = {{"get_weather", {"city"}}, {"f0", {"a", "b"}}};
  if (seed && json->contains("tools")) tools = tool_properties((*json)["tools"]);
  for (const bool thinking : {false, true}) {
    (void)parse_completion(prose(), text, thinking);
    const std::string whole = answer(text, text.size() + 1, thinking, tools);
    for (const size_t step : {1, 3}) check(answer(text, step, thinking, tools) == whole);
  }
}

// A group's head and an index with a checksum that fits whatever else is in them.
void kv_log(std::string_view data) {
  std::string bytes(data);
  seal(std::as_writable_bytes(std::span(bytes)));
  if (const auto index = parse_index(bytes)) check(write_index(*index) == bytes);
  bytes.resize(kKvBlock);
  seal(std::as_writable_bytes(std::span(bytes)));
  const auto block = std::as_bytes(std::span(bytes)).first<kKvBlock>();
  if (const auto parts = parse_group_head(block)) check(!parts->empty() && parts->size() <= kKvGroupParts);
}

void trace(std::string_view data) {
  const auto parsed = sched::parse_trace(data);
  if (!parsed) return;
  const std::string again = trace_bytes(*parsed);
  check(sched::parse_trace(again).value() == *parsed);
  if (parsed->size() > 0) (void)lru_curve(*parsed);
}

void trace_csv(std::string_view data) {
  if (const auto parsed = sched::parse_trace_csv(data))
    check(sched::parse_trace_csv(sched::trace_csv(*parsed)).value().size() == parsed->size());
}

void expert_profile(std::string_view data) {
  if (const auto parsed = parse_expert_profile(data))
    check(parse_expert_profile(expert_profile_text(*parsed)).value().uses == parsed->uses);
}

// What is taken is what is written again; and the memory table of a board, which is as foreign.
void machine_profile(std::string_view data) {
  (void)parse_memory_modules(data);
  const auto profile = parse_machine_profile(data);
  if (!profile) return;
  const Json json = machine_profile_json(*profile);
  const auto again = parse_machine_profile(dump_json(json));
  check(again && machine_profile_json(*again) == json);
}

void settings_file(std::string_view data) {
  std::istringstream in{std::string(data)};
  try {
    for (const cli::ConfigLine& line : cli::read_config(in, "file"))
      check(line.kind == cli::ConfigLine::Kind::list || line.values.size() == 1);
  } catch (const std::exception&) {  // CLI11's errors are
  }
}

constexpr std::pair<std::string_view, void (*)(std::string_view)> kTargets[] = {
    {"settings_file", settings_file},
    {"trace", trace},
    {"trace_csv", trace_csv},
    {"expert_profile", expert_profile},
    {"safetensors_header", safetensors_header},
    {"config", config},
    {"planned_config", planned_config},
    {"tokenizer", tokenizer},
    {"prose_constants", prose_constants},
    {"encode", encode},
    {"chat", chat},
    {"request", request},
    {"python_json", python_json},
    {"kv_log", kv_log},
    {"machine_profile", machine_profile},
    {"completion", completion}};

}  // namespace
}  // namespace thermocline

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const auto target = [] {
    const char* const name = std::getenv("TC_FUZZ_TARGET");
    for (const auto& [known, function] : thermocline::kTargets)
      if (name && known == name) return function;
    std::abort();  // set TC_FUZZ_TARGET to one of the names above
  }();
  target({reinterpret_cast<const char*>(data), size});
  return 0;
}
