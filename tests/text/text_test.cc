// runtime/text: tokenizer vectors, hostile input, streaming, prompts and completions against recorded ones.
#include <chrono>
#include <functional>

#include "runtime/text/chat_encoding.h"
#include "runtime/text/completion_parser.h"
#include "runtime/text/detokenizer.h"
#include "runtime/text/python_json.h"
#include "tests/support/demo_text.h"

namespace thermocline {
namespace {

std::filesystem::path vectors(const char* name) { return test::source_dir() / "tests" / "data" / "text" / name; }

TEST(Utf8, IllFormedPartsBecomeOneReplacementEach) {
  const std::pair<const char*, const char*> cases[] = {{"abc", "abc"},
                                                       {"\xc3\xa9", "é"},
                                                       {"\xc3", "\uFFFD"},
                                                       {"\xc0\x80", "\uFFFD\uFFFD"},
                                                       {"\xe2\x82", "\uFFFD"},
                                                       {"\xe2\x82x", "\uFFFDx"},
                                                       {"\xed\xa0\x80", "\uFFFD\uFFFD\uFFFD"},
                                                       {"\xf0\x9f\x99\x82", "🙂"},
                                                       {"\xf0\x9f\x99", "\uFFFD"},
                                                       {"\xf5\x80", "\uFFFD\uFFFD"},
                                                       {"\x80", "\uFFFD"}};
  for (const auto& [bytes, text] : cases) EXPECT_EQ(to_valid_utf8(bytes), text);
}

TEST(Tokenizer, VectorsOfTheDemoTokenizer) {
  for (const Json& line : test::read_jsonl(vectors("tokenizer_demo.jsonl"))) {
    const std::vector<int32_t> ids = test::demo_tokenizer().encode(line["text"].get<std::string>()).value();
    EXPECT_EQ(ids, line["ids"].get<std::vector<int32_t>>()) << line["text"];
    EXPECT_EQ(detokenize(test::demo_tokenizer(), ids).value(), line["decoded"].get<std::string>());
  }
}

TEST(Tokenizer, LiteralSpansHoldNoSpecialTokens) {
  const std::string text = "<｜User｜>a</think>b<｜Assistant｜>";
  const std::vector<int32_t> trusted = test::demo_tokenizer().encode(text).value();
  EXPECT_EQ(trusted.front(), test::demo_tokenizer().id_of("<｜User｜>").value());
  const TextSpan all[] = {{0, text.size()}};
  const std::vector<int32_t> literal = test::demo_tokenizer().encode(text, all).value();
  for (const int32_t id : literal) EXPECT_FALSE(test::demo_tokenizer().is_special(id));
  EXPECT_EQ(detokenize(test::demo_tokenizer(), literal).value(), text);
  const size_t think = text.find("</think>");
  const TextSpan middle[] = {{think, think + 3}};  // touching it is enough
  const std::vector<int32_t> mixed = test::demo_tokenizer().encode(text, middle).value();
  EXPECT_EQ(mixed.front(), trusted.front());
  EXPECT_EQ(std::count(mixed.begin(), mixed.end(), test::demo_tokenizer().id_of("</think>").value()), 0);
}

TEST(Detokenizer, AnyTokensStreamToWholeCharacters) {
  std::mt19937 random(5);
  for (int round = 0; round < 200; ++round) {
    std::vector<int32_t> ids;
    std::string bytes;
    for (int i = 0; i < 30; ++i) {
      const int32_t id = static_cast<int32_t>(random() % static_cast<unsigned>(test::demo_tokenizer().size()));
      if (test::demo_tokenizer().token_bytes(id).empty()) continue;
      ids.push_back(id);
      bytes += test::demo_tokenizer().token_bytes(id);
    }
    Detokenizer stream(test::demo_tokenizer());
    std::string text;
    for (const int32_t id : ids) {
      const std::string piece = stream.push(id);
      EXPECT_EQ(to_valid_utf8(piece), piece) << "half a character";
      text += piece;
    }
    text += stream.finish();
    EXPECT_EQ(text, to_valid_utf8(bytes));
  }
}

// Twice the text may take a little over twice the time; a quadratic merge would take four times. Counted in the work a
// clock sees, so with room for a noisy neighbour: the ratio of ratios between 1 and 16 times the length.
TEST(Tokenizer, HostileInputIsLinear) {
  const auto seconds = [](const std::string& text) {
    double best = 1e9;
    for (int i = 0; i < 3; ++i) {
      const auto start = std::chrono::steady_clock::now();
      EXPECT_TRUE(test::demo_tokenizer().encode(text));
      best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    return best;
  };
  const std::string units[] = {"a",  "ab",  " ", "\n", "é", "!", "1", "<", "<｜", "aA", " \n", "<｜place▁holder▁no▁",
                               "한", "\t x"};
  for (const std::string& unit : units) {
    std::string small, large;
    while (small.size() < 20'000) small += unit;
    while (large.size() < 320'000) large += unit;
    EXPECT_LT(seconds(large), 16 * 6 * seconds(small) + 0.05) << "'" << unit << "' repeated";
  }
}

TEST(Tokenizer, EveryBrokenFieldIsNamed) {
  const std::string text = read_text_file(test::demo_model() / "tokenizer.json").value();
  const Json good = parse_json(text).value();
  const auto error_of = [](const Json& json) {
    const auto tokenizer = Tokenizer::parse(dump_json(json));
    return tokenizer ? "" : tokenizer.error().message;
  };
  ASSERT_EQ(error_of(good), "");
  const auto with = [&](const std::function<void(Json&)>& change) {
    Json json = good;
    change(json);
    return error_of(json);
  };
  EXPECT_NE(with([](Json& j) { j.erase("model"); }).find("model"), std::string::npos);
  EXPECT_NE(with([](Json& j) { j["model"]["type"] = "WordPiece"; }).find("WordPiece"), std::string::npos);
  EXPECT_NE(with([](Json& j) { j["model"].erase("vocab"); }).find("vocab"), std::string::npos);
  EXPECT_NE(with([](Json& j) { j["model"]["vocab"]["zzz"] = -1; }).find("zzz"), std::string::npos);
  EXPECT_NE(with([](Json& j) { j["model"]["vocab"]["zzz"] = 5; }).find("another token"), std::string::npos);
  EXPECT_NE(with([](Json& j) { j["model"]["vocab"]["zzz"] = uint64_t{1} << 60; }).find("zzz"), std::string::npos);
  EXPECT_NE(with([](Json& j) { j["model"]["vocab"].erase("a"); }).find("byte 97"), std::string::npos);
  EXPECT_NE(with([](Json& j) { j["model"]["merges"][3] = "nospace"; }).find("merges[3]"), std::string::npos);
  EXPECT_NE(with([](Json& j) { j["model"]["merges"][3] = 7; }).find("merges[3]"), std::string::npos);
  EXPECT_NE(with([](Json& j) { j["model"]["merges"].push_back("qqqq zzzz"); }).find("qqqq"), std::string::npos);
  EXPECT_NE(with([](Json& j) { j["model"]["byte_fallback"] = true; }).find("byte_fallback"), std::string::npos);
  EXPECT_NE(with([](Json& j) {
              j["pre_tokenizer"] = {{"type", "Split"}, {"pattern", {{"Regex", "(["}}}, {"behavior", "Isolated"}};
            }).find("offset"),
            std::string::npos);
  EXPECT_NE(with([](Json& j) { j["pre_tokenizer"]["type"] = "Mystery"; }).find("Mystery"), std::string::npos);
  EXPECT_NE(with([](Json& j) { j["normalizer"] = {{"type", "Lowercase"}}; }).find("Lowercase"), std::string::npos);
  EXPECT_NE(with([](Json& j) { j["added_tokens"][0].erase("content"); }).find("added_tokens: [0]"), std::string::npos);
  EXPECT_NE(with([](Json& j) { j["added_tokens"][0]["id"] = -4; }).find("[0]"), std::string::npos);
  EXPECT_FALSE(Tokenizer::parse(text.substr(0, text.size() / 2)));
}

// 10^8 merges are a gigabyte: the file is refused by its size, before any of it is read.
TEST(Tokenizer, AFileOfAGigabyteIsRefused) {
  const test::TempDir dir;
  ASSERT_TRUE(write_text_file(dir.path() / "tokenizer.json", "{").ok());
  std::filesystem::resize_file(dir.path() / "tokenizer.json", uint64_t{1} << 30);
  const auto tokenizer = Tokenizer::load(dir.path());
  ASSERT_FALSE(tokenizer);
  EXPECT_NE(tokenizer.error().message.find("1073741824 bytes"), std::string::npos) << tokenizer.error().message;
}

TEST(Bpe, IgnoreMergesTakesWholePieces) {
  Json json = parse_json(read_text_file(test::demo_model() / "tokenizer.json").value()).value();
  json["model"]["ignore_merges"] = true;
  json["model"]["vocab"]["Ġxqzj"] = 4095 + 1000;
  const auto tokenizer = Tokenizer::parse(dump_json(json)).value();
  const std::vector<int32_t> ids = tokenizer->encode("a xqzj").value();
  EXPECT_EQ(ids.back(), 4095 + 1000);
}

TEST(PreTokenizer, SplitBehavioursAndNormalizersWork) {
  Json json = parse_json(read_text_file(test::demo_model() / "tokenizer.json").value()).value();
  const auto pieces = [&](const char* behavior, bool invert, const std::string& text) {
    const SortedJson split = {
        {"type", "Split"}, {"pattern", {{"String", "-"}}}, {"behavior", behavior}, {"invert", invert}};
    const PreTokenizer pre = PreTokenizer::parse(split).value();
    std::vector<Piece> cut;
    PreTokenizer::Scratch scratch(pre);
    EXPECT_TRUE(pre.split(text, scratch, cut).ok());
    std::string out;
    for (const Piece& piece : cut) out += "[" + text.substr(piece.begin, piece.end - piece.begin) + "]";
    return out;
  };
  EXPECT_EQ(pieces("Isolated", false, "a-b--c"), "[a][-][b][-][-][c]");
  EXPECT_EQ(pieces("Removed", false, "a-b--c"), "[a][b][c]");
  EXPECT_EQ(pieces("MergedWithPrevious", false, "a-b--c"), "[a-][b-][-][c]");
  EXPECT_EQ(pieces("MergedWithNext", false, "a-b--c"), "[a][-b][-][-c]");
  EXPECT_EQ(pieces("Contiguous", false, "a-b--c"), "[a][-][b][--][c]");
  EXPECT_EQ(pieces("Removed", true, "a-b--c"), "[-][-][-]");
  json["normalizer"] = {{"type", "Sequence"}, {"normalizers", {{{"type", "NFC"}}}}};
  const auto nfc = Tokenizer::parse(dump_json(json)).value();
  EXPECT_EQ(nfc->encode("e\u0301").value(), test::demo_tokenizer().encode("é").value());
}

TEST(PythonJson, WritesWhatJsonDumpsWrites) {
  const std::pair<double, const char*> floats[] = {
      {1, "1.0"},     {0.1, "0.1"},    {1e-7, "1e-07"},    {1e16, "1e+16"},       {1e15, "1000000000000000.0"},
      {-2.5, "-2.5"}, {1e21, "1e+21"}, {0.0001, "0.0001"}, {1.5e300, "1.5e+300"}, {-0.0, "-0.0"}};
  for (const auto& [value, text] : floats) EXPECT_EQ(python_float_repr(value), text);
  EXPECT_EQ(python_dumps(parse_json("{\"b\":[1,2.0,null,true,\"\\u00e9\\n\\u0001\\\"\"],\"a\":{},\"c\":[]}").value()),
            "{\"b\": [1, 2.0, null, true, \"é\\n\\u0001\\\"\"], \"a\": {}, \"c\": []}");
  const auto members =
      python_members(
          "{\"a\": {\"x\": [1, {\"y\": 2}]}, \"big\": 123456789012345678901234567890, \"s\": \"t\\n\", \"a\": 1e5}")
          .value();
  ASSERT_EQ(members.size(), 3u);
  EXPECT_EQ(members[0].value, "100000.0");
  EXPECT_EQ(members[1].value, "123456789012345678901234567890");
  EXPECT_TRUE(members[2].is_string);
  EXPECT_EQ(members[2].value, "t\n");
  EXPECT_FALSE(python_members("[1]"));
  EXPECT_FALSE(python_members("{\"a\": "));
}

TEST(ProseConstants, PythonLiteralsAreReadAndNothingElse) {
  const auto c = python_string_constants(
                     "\"\"\"doc A = 'x'\"\"\"\nimport os\nA = \"a\\n\\x41\\u00e9\"\nB: str = (\n    \"one \"  # "
                     "comment\n    'two'\n)\nC = r'\\n'\nD = f\"{x}\"\nE = \"a\" + \"b\"\n"
                     "F = \"\"\"line\n  \\\"q\\\" \\\ncontinued\"\"\"\ndef f():\n    G = \"inner\"\nH == \"no\"\nI = "
                     "5\nJ = 'it''s'\n")
                     .value();
  EXPECT_EQ(c.at("A"), "a\nAé");
  EXPECT_EQ(c.at("B"), "one two");
  EXPECT_EQ(c.at("C"), "\\n");
  EXPECT_EQ(c.at("F"), "line\n  \"q\" continued");
  EXPECT_EQ(c.at("J"), "its");
  for (const char* absent : {"D", "E", "G", "H", "I"}) EXPECT_FALSE(c.contains(absent)) << absent;
  EXPECT_FALSE(python_string_constants("A = \"open\n"));
  const std::vector<TemplatePart> parts = template_parts("{{a}} {b}{c}").value();
  std::string shown;
  for (const TemplatePart& part : parts) shown += part.placeholder ? "[" + part.text + "]" : part.text;
  EXPECT_EQ(shown, "{a} [b][c]");
  EXPECT_FALSE(template_parts("{open"));
}

TEST(ProseConstants, AbsentFileIsNamed) {
  const test::TempDir dir;
  const auto constants_of = read_prose_constants(dir.path());
  ASSERT_FALSE(constants_of);
  EXPECT_NE(constants_of.error().message.find("encoding_dsv4.py"), std::string::npos);
}

TEST(ChatEncoding, PromptsAreTheRecordedOnes) {
  const ProseConstants prose = test::demo_prose();
  for (const Json& line : test::read_jsonl(vectors("chat_encoding.jsonl"))) {
    ChatOptions options;
    options.thinking = line["thinking_mode"] == "thinking";
    if (line["reasoning_effort"].is_string()) options.reasoning_effort = line["reasoning_effort"].get<std::string>();
    options.drop_thinking = line["drop_thinking"].get<bool>();
    const Result<RenderedPrompt> prompt = render_chat(prose, line["messages"], options);
    ASSERT_TRUE(prompt) << prompt.error().message;
    EXPECT_EQ(prompt->text, line["text"].get<std::string>());
    size_t last = 0;
    for (const TextSpan& span : prompt->literal) {
      EXPECT_LE(last, span.begin);
      EXPECT_LT(span.begin, span.end);
      last = span.end;
    }
    EXPECT_LE(last, prompt->text.size());
  }
}

TEST(ChatEncoding, BadMessagesNameTheField) {
  const ProseConstants prose = test::demo_prose();
  const auto field_of = [&](const char* messages) {
    const auto prompt = render_chat(prose, parse_json(messages).value(), {});
    return prompt ? std::string("no error") : prompt.error().field;
  };
  EXPECT_EQ(field_of("[]"), "messages");
  EXPECT_EQ(field_of("[5]"), "messages[0]");
  EXPECT_EQ(field_of(R"([{"content": "a"}])"), "messages[0].role");
  EXPECT_EQ(field_of(R"([{"role": "user", "content": "a"}, {"role": "wizard"}])"), "messages[1].role");
  EXPECT_EQ(field_of(R"([{"role": "user", "content": 5}])"), "messages[0].content");
  EXPECT_EQ(field_of(R"([{"role": "user", "content": [{"type": "text"}]}])"), "messages[0].content[0].text");
  EXPECT_EQ(field_of(R"([{"role": "assistant", "tool_calls": [{}]}])"), "messages[0].tool_calls[0].function");
  EXPECT_EQ(field_of(R"([{"role": "system", "tools": [{"type": "function"}]}])"), "tools[0].function");
  EXPECT_EQ(field_of(R"([{"role": "user", "task": "dance"}])"), "messages[0].task");
}

// As a server sees a completion: token by token, or all at once.
ParsedCompletion stream_tokens(const ProseConstants& prose, const std::string& text, bool thinking,
                               bool at_once = false) {
  CompletionStream stream(prose, thinking);
  ParsedCompletion out;
  const auto take = [&](const std::vector<CompletionStream::Event>& events) {
    using Kind = CompletionStream::Event::Kind;
    for (const auto& event : events) {
      if (event.kind == Kind::reasoning) out.reasoning += event.text;
      if (event.kind == Kind::content) out.content += event.text;
      if (event.kind == Kind::tool_name) out.tool_calls.push_back({event.text, ""});
      if (event.kind == Kind::tool_arguments)
        out.tool_calls.at(static_cast<size_t>(event.index)).arguments += event.text;
    }
  };
  Detokenizer detokenizer(test::demo_tokenizer());
  if (at_once) {
    take(stream.push(text));
  } else {
    const std::vector<int32_t> ids = test::demo_tokenizer().encode(text).value();
    for (const int32_t id : ids) take(stream.push(detokenizer.push(id)));
  }
  take(stream.finish());
  return out;
}

TEST(CompletionParser, RecordedCompletionsParseAndStreamTheSame) {
  const ProseConstants prose = test::demo_prose();
  for (const Json& line : test::read_jsonl(vectors("completion_parsing.jsonl"))) {
    const std::string text = line["text"].get<std::string>();
    const bool thinking = line["thinking_mode"] == "thinking";
    const Result<ParsedCompletion> parsed = parse_completion(prose, text, thinking);
    EXPECT_EQ(!parsed, line.contains("error")) << text;
    if (!parsed || line.contains("error")) continue;
    const Json& expected = line["parsed"];
    EXPECT_EQ(parsed->content, expected["content"].get<std::string>());
    EXPECT_EQ(parsed->reasoning, expected["reasoning_content"].get<std::string>());
    ASSERT_EQ(parsed->tool_calls.size(), expected["tool_calls"].size());
    for (size_t i = 0; i < parsed->tool_calls.size(); ++i) {
      EXPECT_EQ(parsed->tool_calls[i].name, expected["tool_calls"][i]["function"]["name"].get<std::string>());
      EXPECT_EQ(parsed->tool_calls[i].arguments, expected["tool_calls"][i]["function"]["arguments"].get<std::string>());
    }
    for (const bool at_once : {false, true}) {
      const ParsedCompletion streamed = stream_tokens(prose, text, thinking, at_once);
      EXPECT_EQ(streamed.reasoning, parsed->reasoning);
      EXPECT_EQ(streamed.content, parsed->content);
      ASSERT_EQ(streamed.tool_calls.size(), parsed->tool_calls.size());
      for (size_t i = 0; i < parsed->tool_calls.size(); ++i)
        EXPECT_EQ(streamed.tool_calls[i].arguments, parsed->tool_calls[i].arguments);
    }
  }
}

TEST(CompletionParser, LenientWhereServersMustBe) {
  const ProseConstants prose = test::demo_prose();
  const std::string call =
      "<｜DSML｜invoke name=\"f\">\n<｜DSML｜parameter name=\"a\" "
      "string=\"true\">x</｜DSML｜parameter>\n</｜DSML｜invoke>\n";
  const auto run = [&](const std::string& text, bool thinking) { return stream_tokens(prose, text, thinking); };
  ParsedCompletion p = run("no end", false);  // cut by a length limit
  EXPECT_EQ(p.content, "no end");
  p = run("thought\n\n<｜DSML｜tool_calls>\n" + call + "</｜DSML｜tool_calls>", true);  // no </think>
  EXPECT_EQ(p.reasoning, "thought");
  ASSERT_EQ(p.tool_calls.size(), 1u);
  EXPECT_EQ(p.tool_calls[0].arguments, "{\"a\": \"x\"}");
  p = run("hi\n\n<｜DSML｜function_calls>\n" + call + "</｜DSML｜function_calls>", false);  // the V3.2 name
  EXPECT_EQ(p.content, "hi");
  EXPECT_EQ(p.tool_calls.size(), 1u);
  p = run("hi\n<｜DSML｜tool_calls>  \n " + call + " </｜DSML｜tool_calls>", false);  // white space
  EXPECT_EQ(p.content, "hi");
  EXPECT_EQ(p.tool_calls.size(), 1u);
  p = run("a</think>b</think>c", true);
  EXPECT_EQ(p.reasoning, "a");
  EXPECT_EQ(p.content, "bc");
  p =
      run("\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"f\">\n<｜DSML｜parameter name=\"a\" "
          "string=\"false\">{broken</｜DSML｜parameter>\n</｜DSML｜invoke>",
          false);
  EXPECT_TRUE(parse_json(p.tool_calls.at(0).arguments)) << p.tool_calls[0].arguments;
}

// What may begin a tag waits for the next byte that tells, and no longer.
TEST(CompletionParser, TextIsHeldBackOnlyAsLongAsItMayBeATag) {
  CompletionStream stream(test::demo_prose(), false);
  const auto text_of = [&](std::string_view piece) {
    std::string text;
    for (const auto& event : stream.push(piece)) text += event.text;
    return text;
  };
  EXPECT_EQ(text_of("a <"), "a ");
  EXPECT_EQ(text_of("b"), "<b");
  EXPECT_EQ(text_of("\n\n\n"), "\n");
  EXPECT_EQ(text_of("</t"), "\n\n");  // perhaps </think>, which takes no line breaks with it
  EXPECT_EQ(text_of("d> <｜D"), "</td> ");
  EXPECT_EQ(text_of("\xc3\xa9"), "<｜Dé");
  EXPECT_EQ(text_of("\n\n<"), "");
  const auto rest = stream.finish();
  ASSERT_EQ(rest.size(), 1u);
  EXPECT_EQ(rest[0].text, "\n\n<") << "a text that ends so is text";
}

}  // namespace
}  // namespace thermocline
