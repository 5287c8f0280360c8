// Fuzz targets, one for each parser of outside bytes. Linked with replay_main.cc they run a seed corpus and mutations
// of it in every test run; with clang's libFuzzer (-DTC_FUZZ=ON) the one named by TC_FUZZ_TARGET searches on.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "runtime/io/safetensors.h"
#include "runtime/model/deepseek_v4/config.h"
#include "runtime/server/request_fields.h"
#include "runtime/text/chat_encoding.h"
#include "runtime/text/completion_parser.h"
#include "runtime/text/detokenizer.h"
#include "runtime/text/python_json.h"

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

void chat(std::string_view data) {
  const Result<Json> json = parse_json(data);
  if (!json) return;
  for (const bool thinking : {false, true})
    (void)render_chat(prose(), json->is_object() && json->contains("messages") ? (*json)["messages"] : *json,
                      {thinking, "", true});
}

void request(std::string_view data) {
  const Result<Json> json = parse_json(data);
  if (json && json->is_object()) (void)server::read_generation_fields(server::Fields(*json), {});
  (void)python_members(data);
}

void completion(std::string_view data) {
  const ProseConstants constants = prose();
  for (const bool thinking : {false, true}) {
    (void)parse_completion(constants, data, thinking);
    CompletionStream stream(constants, thinking);
    for (size_t i = 0; i < data.size(); i += 3) (void)stream.push(data.substr(i, 3));
    (void)stream.finish();
  }
}

constexpr std::pair<std::string_view, void (*)(std::string_view)> kTargets[] = {
    {"safetensors_header", safetensors_header},
    {"config", config},
    {"tokenizer", tokenizer},
    {"prose_constants", prose_constants},
    {"chat", chat},
    {"request", request},
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
