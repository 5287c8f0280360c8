// `thermocline tokenize | detokenize | render | parse`: the text layer, line by line, JSON in and JSON out.
#include <functional>
#include <iostream>

#include "runtime/cli/command.h"
#include "runtime/cli/model_folder.h"
#include "runtime/io/json_document.h"
#include "runtime/server/wire/request_fields.h"
#include "runtime/text/chat_encoding.h"
#include "runtime/text/completion_parser.h"
#include "runtime/text/detokenizer.h"

namespace thermocline::cli {
namespace {

using server::Fields;
using LineFunction = std::function<Result<Json>(const Json& line)>;

// ASCII with \u escapes: some readers break lines at U+2028 or U+0085 too.
std::string one_line(const Json& json) { return dump_json(json, -1, true); }

// As a server reads the body of a request.
Result<Json> read_line(const std::string& text) {
  TC_ASSIGN(Json line, parse_bounded_json(text, {}));
  if (!line.is_object()) return server::field_error("it", "should be a JSON object");
  return line;
}

// Every line gets a line: the result, or {"error"} naming what is wrong with it. The exit code is 1 if one failed to be
// read as JSON or lacks its fields; what a parser refuses is a result.
Status each_line(const LineFunction& function) {
  Status status;
  std::string line;
  for (size_t number = 1; std::getline(std::cin, line); ++number) {
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    Result<Json> json = read_line(line);
    Result<Json> out = json ? function(*json) : Result<Json>(std::move(json).error());
    if (out) {
      std::cout << one_line(*out) << '\n';
      continue;
    }
    std::cout << one_line(Json{{"error", out.error().message}}) << '\n';
    status = corrupt("line " + std::to_string(number) + ": " + out.error().message);
  }
  std::cout.flush();
  if (!std::cout) return Error{ErrorCode::io, "writing to standard output failed"};
  return status;
}

Result<bool> is_thinking(const Json& line) {
  TC_ASSIGN(const std::string mode, Fields(line).text("thinking_mode", "chat"));
  if (mode != "chat" && mode != "thinking")
    return server::field_error("thinking_mode", "should be chat or thinking, not '" + mode.substr(0, 60) + "'");
  return mode == "thinking";
}

Status tokenize(const std::string& model) {
  TC_ASSIGN(const std::unique_ptr<Tokenizer> tokenizer, load_tokenizer(model));
  return each_line([&](const Json& line) -> Result<Json> {
    TC_ASSIGN(const std::string text, Fields(line).required_text("text"));
    TC_ASSIGN(const std::vector<int32_t> ids, tokenizer->encode(text));
    return Json{{"ids", ids}};
  });
}

Status detokenize_lines(const std::string& model) {
  TC_ASSIGN(const std::unique_ptr<Tokenizer> tokenizer, load_tokenizer(model));
  return each_line([&](const Json& line) -> Result<Json> {
    if (!Fields(line).find("ids")) return server::field_error("ids", "is missing");
    TC_ASSIGN(const std::vector<int32_t> ids, Fields(line).token_ids("ids", tokenizer->size(), JsonLimits().values));
    TC_ASSIGN(const std::string text, detokenize(*tokenizer, ids));
    return Json{{"text", text}};
  });
}

Status render(const std::string& model, bool for_generation) {
  TC_ASSIGN(const ProseConstants constants, of_model(read_prose_constants(model)));
  return each_line([&](const Json& line) -> Result<Json> {
    const Fields fields(line);
    if (!fields.find("messages")) return server::field_error("messages", "is missing");
    ChatOptions options;
    TC_ASSIGN(options.thinking, is_thinking(line));
    TC_ASSIGN(options.reasoning_effort, fields.text("reasoning_effort", ""));
    TC_ASSIGN(options.drop_thinking, fields.boolean("drop_thinking", true));
    if (!for_generation) {
      TC_ASSIGN(const RenderedPrompt prompt, render_chat(constants, line["messages"], options));
      return Json{{"text", prompt.text}};
    }
    TC_ASSIGN(options.continue_final_message, fields.boolean("continue_final_message", false));
    TC_ASSIGN(const RenderedPrompt prompt, render_generation_prompt(constants, line["messages"], options));
    return Json{{"text", prompt.text}, {"in_reasoning", prompt.in_reasoning}};
  });
}

Json message_of(const ParsedCompletion& parsed) {
  Json calls = Json::array();
  for (const ToolCall& call : parsed.tool_calls)
    calls.push_back({{"type", "function"}, {"function", {{"name", call.name}, {"arguments", call.arguments}}}});
  return {{"role", "assistant"},
          {"content", parsed.content},
          {"reasoning_content", parsed.reasoning},
          {"tool_calls", calls}};
}

// A text without its EOS was cut.
ParsedCompletion parse_leniently(const ProseConstants& constants, const std::string& text, bool thinking,
                                 ToolProperties tools) {
  CompletionStream stream(constants, thinking, std::move(tools));
  ParsedCompletion parsed;
  const auto take = [&](const std::vector<CompletionStream::Event>& events) {
    using Kind = CompletionStream::Event::Kind;
    for (const auto& event : events) {
      if (event.kind == Kind::reasoning) parsed.reasoning += event.text;
      if (event.kind == Kind::content) parsed.content += event.text;
      if (event.kind == Kind::tool_name) parsed.tool_calls.push_back({event.text, ""});
      if (event.kind == Kind::tool_arguments)
        parsed.tool_calls[static_cast<size_t>(event.index)].arguments += event.text;
    }
  };
  take(stream.push(text));
  take(stream.finish(text.find(constants.eos) == std::string::npos));
  return parsed;
}

Status parse(const std::string& model, bool lenient) {
  TC_ASSIGN(const ProseConstants constants, of_model(read_prose_constants(model)));
  return each_line([&](const Json& line) -> Result<Json> {
    TC_ASSIGN(const std::string text, Fields(line).required_text("text"));
    TC_ASSIGN(const bool thinking, is_thinking(line));
    if (lenient) {
      ToolProperties tools = tool_properties(line.value("tools", Json::array()));
      return Json{{"parsed", message_of(parse_leniently(constants, text, thinking, std::move(tools)))}};
    }
    Result<ParsedCompletion> parsed = parse_completion(constants, text, thinking);
    if (!parsed) return Json{{"error", parsed.error().message}};
    return Json{{"parsed", message_of(*parsed)}};
  });
}

// A command of this file: --model, and --jsonl, which names the only format there is.
CLI::App* add(CLI::App& app, Outcome& outcome, const char* name, const char* help,
              std::function<Status(const std::string&)> run) {
  struct Options {
    ModelOptions model;
    bool jsonl = true;
  };
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand(name, help);
  options->model.add_to(*command, false);
  command->add_flag("--jsonl", options->jsonl, "One JSON object a line on stdin and stdout (the only format)");
  command->callback([options, run = std::move(run), &outcome] {
    const Status folder = options->model.check_folder();
    outcome.exit_code = exit_code_of(folder.ok() ? run(options->model.model()) : folder);
  });
  return command;
}

}  // namespace

void add_chat_tools(CLI::App& app, Outcome& outcome) {
  add(app, outcome, "tokenize", R"({"text"} -> {"ids"}; special tokens in the text are recognised, none are added)",
      tokenize);
  add(app, outcome, "detokenize", R"({"ids"} -> {"text"})", detokenize_lines);
  auto for_generation = std::make_shared<bool>(false);
  CLI::App* render_command =
      add(app, outcome, "render", R"({"messages", "thinking_mode", "reasoning_effort", "drop_thinking"} -> {"text"})",
          [for_generation](const std::string& model) { return render(model, *for_generation); });
  render_command->add_flag("--generation-prompt", *for_generation,
                           "What a server generates from: the last message is answered, or continued where it has "
                           "\"prefix\": true or the line \"continue_final_message\": true");
  auto lenient = std::make_shared<bool>(false);
  CLI::App* parse_command = add(app, outcome, "parse", R"({"text", "thinking_mode"} -> {"parsed"} or {"error"})",
                                [lenient](const std::string& model) { return parse(model, *lenient); });
  parse_command->add_flag("--lenient", *lenient,
                          "Accept what a server accepts: missing EOS, truncated calls, stray tags; a line may have the "
                          "\"tools\" of its request, to unwrap arguments by");
}

}  // namespace thermocline::cli
