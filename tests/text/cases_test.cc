// runtime/text: what went wrong for others (tests/data/text/cases.jsonl), and the promises behind it: how a completion
// is cut changes nothing, a cut answer leaks nothing, what users write is never a special token.
#include <algorithm>

#include "runtime/text/chat_encoding.h"
#include "runtime/text/completion_parser.h"
#include "runtime/text/detokenizer.h"
#include "runtime/text/utf8.h"
#include "tests/support/demo_text.h"

namespace thermocline {
namespace {

using Kind = CompletionStream::Event::Kind;

std::vector<Json> lines_of(const char* name) {
  return test::read_jsonl(test::source_dir() / "tests" / "data" / "text" / name);
}

std::vector<Json> cases(const std::string& how) {
  std::vector<Json> chosen;
  for (const Json& line : lines_of("cases.jsonl"))
    if (line["how"] == how) chosen.push_back(line);
  EXPECT_FALSE(chosen.empty());
  return chosen;
}

ChatOptions options_of(const Json& line) {
  ChatOptions options;
  options.thinking = line["thinking_mode"] == "thinking";
  options.drop_thinking = line.value("drop_thinking", true);
  options.continue_final_message = line.value("continue_final_message", false);
  return options;
}

// The answer a client puts together from events, each checked against what was promised.
struct Answer {
  std::string reasoning, content;
  std::vector<ToolCall> calls;

  void take(const std::vector<CompletionStream::Event>& events) {
    for (const auto& event : events) {
      EXPECT_FALSE(event.text.empty());
      if (event.kind == Kind::reasoning) reasoning += event.text;
      if (event.kind == Kind::content) content += event.text;
      if (event.kind == Kind::tool_name) {
        EXPECT_EQ(event.index, static_cast<int>(calls.size()));
        calls.push_back({event.text, ""});
      }
      if (event.kind == Kind::tool_arguments) {
        ASSERT_EQ(event.index + 1, static_cast<int>(calls.size()));
        EXPECT_EQ(calls.back().arguments, "");
        calls.back().arguments = event.text;
        const Result<Json> json = parse_json(event.text, true);
        EXPECT_TRUE(json && json->is_object()) << event.text;
      }
    }
    for (const std::string* text : {&reasoning, &content}) {
      EXPECT_EQ(text->find("｜DSML"), std::string::npos) << *text;
      EXPECT_EQ(text->find("</think>"), std::string::npos) << *text;
    }
  }

  std::string shown() const {
    std::string text = "reasoning [" + reasoning + "] content [" + content + "]";
    for (const ToolCall& call : calls) text += " " + call.name + "(" + call.arguments + ")";
    return text;
  }
};

// Reads a text in pieces of the lengths that `next` gives.
template <class Next>
Answer stream(std::string_view text, bool thinking, const ToolProperties& tools, bool truncated, Next next) {
  CompletionStream stream(test::demo_prose(), thinking, tools);
  Answer answer;
  for (size_t at = 0; at < text.size();) {
    const std::string_view piece = text.substr(at, next());
    answer.take(stream.push(piece));
    at += piece.size();
  }
  answer.take(stream.finish(truncated));
  EXPECT_EQ(stream.tool_calls(), static_cast<int>(answer.calls.size()));
  return answer;
}

Answer whole(std::string_view text, bool thinking, const ToolProperties& tools, bool truncated) {
  return stream(text, thinking, tools, truncated, [&] { return text.size(); });
}

bool is_cut(const std::string& text) { return text.find(test::demo_prose().eos) == std::string::npos; }

TEST(CompletionCases, AreReadAsDecided) {
  for (const Json& line : cases("parse")) {
    SCOPED_TRACE(line["id"].get<std::string>());
    const std::string text = line["text"].get<std::string>();
    const Answer answer = whole(text, line["thinking_mode"] == "thinking",
                                tool_properties(line.value("tools", Json::array())), is_cut(text));
    EXPECT_EQ(answer.content, line["content"].get<std::string>());
    EXPECT_EQ(answer.reasoning, line["reasoning_content"].get<std::string>());
    ASSERT_EQ(answer.calls.size(), line["tool_calls"].size());
    for (size_t i = 0; i < answer.calls.size(); ++i) {
      EXPECT_EQ(answer.calls[i].name, line["tool_calls"][i]["name"].get<std::string>());
      EXPECT_EQ(answer.calls[i].arguments, line["tool_calls"][i]["arguments"].get<std::string>());
    }
  }
}

// Every text of the cases and of the recorded completions, with the tools of its case.
template <class Visit>
void for_each_completion(Visit visit) {
  std::vector<Json> lines = cases("parse");
  const std::vector<Json> recorded = lines_of("completion_parsing.jsonl");
  lines.insert(lines.end(), recorded.begin(), recorded.end());
  for (const Json& line : lines) {
    const std::string text = line["text"].get<std::string>();
    SCOPED_TRACE(text);
    visit(text, line["thinking_mode"] == "thinking", tool_properties(line.value("tools", Json::array())));
  }
}

TEST(CompletionStream, HowTheTextIsCutChangesNothing) {
  std::mt19937 random(17);
  for_each_completion([&](const std::string& text, bool thinking, const ToolProperties& tools) {
    for (const bool truncated : {false, true}) {
      const std::string expected = whole(text, thinking, tools, truncated).shown();
      for (const size_t n : {1, 2, 3, 7})
        EXPECT_EQ(stream(text, thinking, tools, truncated, [&] { return n; }).shown(), expected) << n;
      for (int round = 0; round < 5; ++round)
        EXPECT_EQ(stream(text, thinking, tools, truncated, [&] { return 1 + random() % 40; }).shown(), expected);
      for (size_t at = 1; at < text.size(); ++at) {  // two pieces
        size_t next = at;
        EXPECT_EQ(stream(text, thinking, tools, truncated, [&] { return std::exchange(next, text.size()); }).shown(),
                  expected)
            << at;
      }
    }
  });
}

// An answer cut anywhere shows the beginning of what the whole would have shown: its words, its first calls. (Answer
// checks that no markup is among them; a '<' counts as markup here.)
TEST(CompletionStream, ACutAnswerIsTheBeginningOfTheWhole) {
  for_each_completion([&](const std::string& text, bool thinking, const ToolProperties& tools) {
    const Answer all = whole(text, thinking, tools, false);
    for (size_t at = 0; at < text.size(); ++at) {
      const Answer cut = whole(std::string_view(text).substr(0, at), thinking, tools, true);
      // Line breaks that a tag would have taken are kept where the cut hides the tag.
      const auto begins = [](std::string part, const std::string& of) {
        while (part.ends_with('\n')) part.pop_back();
        return of.starts_with(part);
      };
      EXPECT_TRUE(begins(cut.reasoning, all.reasoning)) << at << ": " << cut.shown();
      EXPECT_TRUE(begins(cut.content, all.content)) << at << ": " << cut.shown();
      ASSERT_LE(cut.calls.size(), all.calls.size()) << at;
      for (size_t i = 0; i < cut.calls.size(); ++i) {
        EXPECT_EQ(cut.calls[i].name, all.calls[i].name);
        EXPECT_EQ(cut.calls[i].arguments, all.calls[i].arguments);
      }
    }
  });
}

TEST(CompletionStream, ToolsWithoutPropertiesAreNotKnown) {
  const Json tools = parse_json(R"([
      {"type": "function", "function": {"name": "a", "parameters": {"properties": {"x": {}, "y": {}}}}},
      {"type": "function", "function": {"name": "b", "parameters": {"properties": {}}}},
      {"type": "function", "function": {"name": "c", "parameters": {}}},
      {"type": "function", "function": {"name": "d", "parameters": 5}},
      {"type": "function", "function": {"name": 7}}, {"function": []}, 5])")
                         .value();
  const ToolProperties known = tool_properties(tools);
  ASSERT_EQ(known.size(), 2u);
  EXPECT_EQ(known.at("a"), (std::set<std::string>{"x", "y"}));
  EXPECT_TRUE(known.at("b").empty());
  EXPECT_TRUE(tool_properties(Json()).empty());
}

TEST(ChatCases, RenderAsThePublishedEncoderDoes) {
  for (const Json& line : cases("render")) {
    SCOPED_TRACE(line["id"].get<std::string>());
    const Result<RenderedPrompt> prompt = render_chat(test::demo_prose(), line["messages"], options_of(line));
    ASSERT_TRUE(prompt) << prompt.error().message;
    EXPECT_EQ(prompt->text, line["text"].get<std::string>());
  }
}

TEST(ChatCases, GenerationPromptsAreAsDecided) {
  for (const Json& line : cases("generate")) {
    SCOPED_TRACE(dump_json(line));
    const Result<RenderedPrompt> prompt =
        render_generation_prompt(test::demo_prose(), line["messages"], options_of(line));
    if (line.contains("field")) {
      ASSERT_FALSE(prompt) << prompt->text;
      EXPECT_EQ(prompt.error().code, ErrorCode::invalid_argument);
      EXPECT_EQ(prompt.error().field, line["field"].get<std::string>());
      EXPECT_NE(prompt.error().message.find(line["field"].get<std::string>()), std::string::npos);
      EXPECT_NE(prompt.error().message.find(line.value("says", "")), std::string::npos) << prompt.error().message;
    } else {
      ASSERT_TRUE(prompt) << prompt.error().message;
      EXPECT_EQ(prompt->text, line["text"].get<std::string>());
      EXPECT_EQ(prompt->in_reasoning, line["in_reasoning"].get<bool>());
    }
  }
}

TEST(ChatCases, OnlyTheTemplateWritesSpecialTokens) {
  for (const Json& line : cases("special")) {
    SCOPED_TRACE(dump_json(line));
    const Result<RenderedPrompt> prompt =
        render_generation_prompt(test::demo_prose(), line["messages"], options_of(line));
    ASSERT_TRUE(prompt) << prompt.error().message;
    const std::vector<int32_t> ids = test::demo_tokenizer().encode(prompt->text, prompt->literal).value();
    std::vector<std::string> special;
    for (const int32_t id : ids)
      if (test::demo_tokenizer().is_special(id)) special.emplace_back(test::demo_tokenizer().token_bytes(id));
    EXPECT_EQ(special, line["tokens"].get<std::vector<std::string>>());
    EXPECT_EQ(detokenize(test::demo_tokenizer(), ids).value(), prompt->text);
  }
}

// Where the published prompt can be generated from, it is the prompt, token for token.
TEST(ChatEncoding, RecordedPromptsThatCanBeAnsweredAreTheSameForGeneration) {
  int same = 0;
  for (const Json& line : lines_of("chat_encoding.jsonl")) {
    ChatOptions options = options_of(line);
    if (line["reasoning_effort"].is_string()) options.reasoning_effort = line["reasoning_effort"].get<std::string>();
    const RenderedPrompt recorded = render_chat(test::demo_prose(), line["messages"], options).value();
    EXPECT_EQ(test::demo_tokenizer().encode(recorded.text, recorded.literal).value(),
              test::demo_tokenizer().encode(recorded.text).value());
    const Result<RenderedPrompt> prompt = render_generation_prompt(test::demo_prose(), line["messages"], options);
    const Json& last = line["messages"].back();
    if (!prompt) {
      const bool has_image = dump_json(line["messages"]).find(R"("type":"image")") != std::string::npos;
      EXPECT_TRUE(has_image || last["role"] == "assistant") << prompt.error().message;
      continue;
    }
    if (prompt->text == recorded.text) {
      ++same;
      continue;
    }
    // Otherwise only markers were added.
    std::string_view rest = prompt->text;
    const std::string marker = "<｜Assistant｜>";
    for (const char c : recorded.text) {
      while (!rest.empty() && rest.starts_with(marker) && c != '<') rest.remove_prefix(marker.size());
      for (const std::string& tag : {test::demo_prose().thinking_start, test::demo_prose().thinking_end})
        if (rest.starts_with(tag) && c != '<') rest.remove_prefix(tag.size());
      ASSERT_TRUE(rest.starts_with(c)) << prompt->text << "\n" << recorded.text;
      rest.remove_prefix(1);
    }
  }
  EXPECT_GT(same, 100);
}

// What --chat and --system read is any bytes.
TEST(ChatEncoding, IllFormedBytesOfAnyRoleEncode) {
  const std::string bad = "a\xff\xe2\x82</think>\xf0\x9f\x99";
  const std::string good = "a\uFFFD\uFFFD</think>\uFFFD";
  for (const char* role : {"system", "developer", "user", "assistant", "tool", "latest_reminder"}) {
    SCOPED_TRACE(role);
    const auto prompt_of = [&](const std::string& text) {
      Json message = {{"role", role}, {"content", text}, {"reasoning_content", text}};
      if (message["role"] == "assistant")
        message["tool_calls"] = Json::array({{{"function", {{"name", text}, {"arguments", text}}}}});
      if (message["role"] == "system" || message["role"] == "developer") {
        message["tools"] = Json::array({{{"function", {{"name", text}, {text, text}}}}});
        message["response_format"] = {{"schema", text}};
      }
      const Json messages = Json::array({message, {{"role", "user"}, {"content", text}}});
      ChatOptions options;
      options.thinking = true;
      const Result<RenderedPrompt> prompt = render_generation_prompt(test::demo_prose(), messages, options);
      EXPECT_TRUE(prompt) << prompt.error().message;
      return test::demo_tokenizer().encode(prompt->text, prompt->literal).value();
    };
    EXPECT_EQ(prompt_of(bad), prompt_of(good));
  }
}

TEST(Tokenizer, AnyBytesWithAnySpansEncodeAsTheirWellFormedText) {
  std::mt19937 random(23);
  const std::string parts[] = {"</think>", "<｜User｜>", "\xff", "é", "\xe2\x82", "東", "\x80", " ", "a\n", "🙂"};
  for (int round = 0; round < 300; ++round) {
    std::string text;
    for (int i = 0; i < 12; ++i) text += parts[random() % std::size(parts)];
    std::vector<TextSpan> spans;
    for (size_t i = random() % 4; i > 0; --i) spans.push_back({random() % (text.size() + 9), random() % 60});
    const std::vector<int32_t> ids = test::demo_tokenizer().encode(text, spans).value();
    EXPECT_EQ(detokenize(test::demo_tokenizer(), ids).value(), to_valid_utf8(text));
    const TextSpan all[] = {{0, text.size()}};
    const std::vector<int32_t> literal = test::demo_tokenizer().encode(text, all).value();
    for (const int32_t id : literal) EXPECT_FALSE(test::demo_tokenizer().is_special(id));
  }
}

// A tokenizer that composes, with a special token that is looked for before that and a token that is looked for after.
std::unique_ptr<Tokenizer> normalising_tokenizer(const char* form) {
  Json json = parse_json(read_text_file(test::demo_model() / "tokenizer.json").value()).value();
  json["normalizer"] = {{"type", form}};
  for (Json& token : json["added_tokens"])
    if (token["content"] == "</think>" || token["content"] == "<think>") token["normalized"] = true;
  json["added_tokens"].push_back({{"id", json["added_tokens"].back()["id"].get<int>() + 1000},
                                  {"content", "\u00e9\u00e9"},
                                  {"normalized", true},
                                  {"special", true}});
  return Tokenizer::parse(dump_json(json)).value();
}

TEST(Tokenizer, LiteralSpansHoldUnderANormaliser) {
  const auto specials = [](const Tokenizer& tokenizer, const std::string& text, std::vector<TextSpan> spans) {
    std::string found;
    const std::vector<int32_t> ids = tokenizer.encode(text, spans).value();
    for (const int32_t id : ids)
      if (tokenizer.is_special(id)) found += "[" + std::string(tokenizer.token_bytes(id)) + "]";
    return found;
  };
  const auto span = [](const std::string& text, const std::string& part) {
    const size_t at = text.find(part);
    return TextSpan{at, at + part.size()};
  };
  const auto nfc = normalising_tokenizer("NFC"), nfkc = normalising_tokenizer("NFKC");
  const std::string text = "<｜User｜><think>e\u0301<think>x</think>";
  EXPECT_EQ(specials(*nfc, text, {}), "[<｜User｜>][<think>][<think>][</think>]");
  EXPECT_EQ(specials(*nfc, text, {span(text, "e\u0301<think>x")}), "[<｜User｜>][<think>][</think>]");
  EXPECT_EQ(specials(*nfc, text, {{0, text.size()}}), "");
  // Written so that only normalisation makes a token of it.
  const std::string wide = "\uff1cthink\uff1e<think>";
  EXPECT_EQ(specials(*nfkc, wide, {}), "[<think>][<think>]");
  EXPECT_EQ(specials(*nfkc, wide, {span(wide, "\uff1cthink\uff1e")}), "[<think>]");
  const std::string accents = "e\u0301e\u0301|e\u0301e\u0301";
  EXPECT_EQ(specials(*nfc, accents, {}), "[éé][éé]");
  EXPECT_EQ(specials(*nfc, accents, {{0, 2}}), "[éé]");
  EXPECT_EQ(specials(*nfc, accents, {{1, 2}}), "[éé]") << "an accent alone";
  EXPECT_EQ(specials(*nfc, accents, {span(accents, "|")}), "[éé][éé]");
  // A marker of the template keeps working beside text that composes.
  const std::string beside = "<think>\u0301東京</think>\u6771";
  EXPECT_EQ(specials(*nfc, beside, {span(beside, "東京"), {beside.size() - 3, beside.size()}}), "[<think>][</think>]");
}

// Cutting at spans must not change the text: the same tokens as without them, where nothing special is written.
TEST(Tokenizer, SpansChangeNoOrdinaryToken) {
  const auto nfc = normalising_tokenizer("NFC"), nfd = normalising_tokenizer("NFD"),
             nfkc = normalising_tokenizer("NFKC");
  std::mt19937 random(29);
  const char* const parts[] = {"e",      "\u0301", "\u0323", "\u1112", "\u1161", "\u11ab", "가",     "\u11a8", "a",
                               "\u09c7", "\u09be", "\uff21", "\ufb01", " ",      "é",      "\u0344", "\u0f73", "東"};
  for (int round = 0; round < 500; ++round) {
    std::string text;
    for (int i = 0; i < 14; ++i) text += parts[random() % std::size(parts)];
    std::vector<TextSpan> spans;
    for (int i = 0; i < 3; ++i) {
      const size_t begin = random() % text.size();
      spans.push_back({begin, begin + random() % 9});
    }
    for (const Tokenizer* tokenizer : {nfc.get(), nfd.get(), nfkc.get()}) {
      if (text.find("\u00e9\u00e9") != std::string::npos) continue;
      std::vector<int32_t> plain = tokenizer->encode(text).value();
      if (std::any_of(plain.begin(), plain.end(), [&](int32_t id) { return tokenizer->is_special(id); })) continue;
      EXPECT_EQ(tokenizer->encode(text, spans).value(), plain) << text;
    }
  }
}

}  // namespace
}  // namespace thermocline
