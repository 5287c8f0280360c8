// The small endpoints: names of the model, tokens and prompts, what runs, what an admin may do, and what
// is not offered.
#include <set>

#include "runtime/server/api/model_facts.h"
#include "tests/server/api_fixture.h"

namespace thermocline::server {
namespace {

constexpr const char* kWarning = "x-thermocline-warning";

/// The model has a second name and an admin's key is known.
class SmallEndpoints : public ApiTest {
 protected:
  SmallEndpoints() {
    model.aliases = {"gpt-5"};
    model.max_sequences = 4;
    model.facts = read_model_facts(test::demo_model(), test::demo_tokenizer(), bos(), 1).value();
    api->serve(model);
  }
  Answer as_admin(const std::string& method, const std::string& target) {
    ApiKeys::Options keys;
    keys.keys = {"secret-user-1234"};
    keys.admin_keys = {"secret-admin-1234"};
    EXPECT_TRUE(api->keys().load(keys).ok());
    HttpHead head = head_of(method, target);
    head.authorization = "Bearer secret-admin-1234";
    return ask_with(head, "");
  }
};

TEST_F(SmallEndpoints, EveryNameIsListedAndFound) {
  const Json list = get("/v1/models").json();
  ASSERT_EQ(list.at("data").size(), 2u);
  EXPECT_EQ(list.at("data")[0].at("id"), "org/demo");
  EXPECT_EQ(list.at("data")[1].at("id"), "gpt-5");
  EXPECT_EQ(list.at("data")[1].at("root"), "org/demo");
  for (const char* id : {"org/demo", "org%2Fdemo", "gpt-5"}) {
    const Answer one = get("/v1/models/" + std::string(id));
    ASSERT_EQ(one.status, 200) << id;
    EXPECT_EQ(one.json().at("id"), url_decoded(id));
    EXPECT_EQ(one.json().at("context_length"), 1024);
    EXPECT_EQ(one.json().at("max_model_len"), 1024);
    EXPECT_EQ(one.json().at("meta").at("n_params"), model.facts.parameters);
  }
  const Answer none = get("/v1/models/gpt-6");
  EXPECT_EQ(none.status, 404);
  EXPECT_NE(none.error().at("message").get<std::string>().find("'org/demo', 'gpt-5'"), std::string::npos);
}

TEST(Models, AreNamedWhileTheyLoad) {
  const std::unique_ptr<AccessLog> log = AccessLog::open("").value();
  Api api({.prep_threads = 1, .names = {"demo", "gpt-5"}}, *log);
  api.loading(.5);
  ASSERT_FALSE(api.check(head_of("GET", "/v1/models")));
  const Reply reply = std::get<Reply>(api.handle({head_of("GET", "/v1/models"), ""}));
  EXPECT_EQ(reply.status, 200);
  const Json list = parse_json(reply.body).value();
  ASSERT_EQ(list.at("data").size(), 2u);
  EXPECT_EQ(list.at("data")[1].at("id"), "gpt-5");
  EXPECT_TRUE(list.at("models").empty()) << "what Codex reads needs the model";
}

// Codex takes none of these as optional.
TEST_F(SmallEndpoints, TheCatalogueHasWhatCodexReads) {
  const Json models = get("/v1/models").json().at("models");
  ASSERT_EQ(models.size(), 2u);
  const Json& one = models[1];
  EXPECT_EQ(one.at("slug"), "gpt-5");
  for (const char* text : {"display_name", "shell_type", "visibility", "base_instructions"})
    EXPECT_TRUE(one.at(text).is_string()) << text;
  for (const char* flag :
       {"supported_in_api", "supports_reasoning_summaries", "support_verbosity", "supports_parallel_tool_calls"})
    EXPECT_TRUE(one.at(flag).is_boolean()) << flag;
  EXPECT_TRUE(one.at("experimental_supported_tools").is_array());
  EXPECT_EQ(one.at("context_window"), 1024);
  EXPECT_LT(one.at("auto_compact_token_limit"), 1024);
  EXPECT_LT(one.at("truncation_policy").at("limit"), 1024);
  std::set<std::string> efforts;
  for (const Json& level : one.at("supported_reasoning_levels")) efforts.insert(level.at("effort"));
  EXPECT_TRUE(efforts.contains(one.at("default_reasoning_level")));
  for (const std::string& effort : efforts) EXPECT_EQ(chat({{"reasoning_effort", effort}}).status, 200) << effort;
}

TEST_F(SmallEndpoints, AnotherNameIsServedWithAWarning) {
  for (const char* own : {"org/demo", "gpt-5"}) {
    const Answer answer = chat({{"model", own}});
    EXPECT_EQ(answer.json().at("model"), own);
    EXPECT_FALSE(answer.headers.contains(kWarning));
  }
  const std::string other = "gpt-6\r\nx-evil: 1";
  for (Answer answer :
       {chat({{"model", other}}), streamed(kChat, {{"model", other}}), post(kText, {{"model", other}, {"prompt", "a"}}),
        post("/tokenize", {{"model", other}, {"prompt", "a"}})}) {
    ASSERT_EQ(answer.status, 200);
    EXPECT_NE(answer.headers[kWarning].find("'org/demo', 'gpt-5'"), std::string::npos) << answer.headers[kWarning];
    EXPECT_EQ(answer.headers[kWarning].find_first_of("\r\n"), std::string::npos);
  }
  EXPECT_EQ(chat({{"model", other}}).json().at("model"), other) << "the answer echoes what was asked";
}

TEST_F(SmallEndpoints, AnotherNameIsRefusedWhereThatIsStrict) {
  model.strict_name = true;
  EXPECT_EQ(chat({{"model", "gpt-5"}}).status, 200);
  EXPECT_EQ(chat(Json::object()).status, 200) << "no name is the model's";
  for (const Answer& answer :
       {chat({{"model", "gpt-6"}}), streamed(kChat, {{"model", "gpt-6"}}),
        post(kText, {{"model", "gpt-6"}, {"prompt", "a"}}), post("/tokenize", {{"model", "gpt-6"}, {"prompt", "a"}})}) {
    ASSERT_EQ(answer.status, 404) << answer.body;
    EXPECT_EQ(answer.error().at("code"), "model_not_found");
    EXPECT_EQ(answer.param(), "model");
    EXPECT_NE(answer.error().at("message").get<std::string>().find("'gpt-5'"), std::string::npos);
  }
}

TEST(ModelFacts, AreThoseOfTheCheckpoint) {
  const ModelFacts facts = read_model_facts(test::demo_model(), test::demo_tokenizer(), bos(), 1).value();
  EXPECT_EQ(facts.folder, "demo");
  EXPECT_EQ(facts.bos_token, "<｜begin▁of▁sentence｜>");
  EXPECT_EQ(facts.eos_token, "<｜end▁of▁sentence｜>");
  EXPECT_EQ(facts.pad_token, "<｜▁pad▁｜>");
  // README.md of the model: 29 M parameters, half a byte each for most.
  EXPECT_GT(facts.parameters, 25'000'000);
  EXPECT_LT(facts.parameters, 33'000'000);
  EXPECT_LT(facts.weight_bytes, facts.parameters);
}

// --- tokens ---

TEST_F(SmallEndpoints, TokenizeSpeaksBothDialects) {
  const std::string text = "Hello there, Żółw";
  const std::vector<int32_t> ids = test::demo_tokenizer().encode(text).value();
  std::vector<int32_t> with_bos = ids;
  with_bos.insert(with_bos.begin(), bos());
  EXPECT_EQ(post("/tokenize", {{"content", text}}).json(), Json({{"tokens", ids}}));
  EXPECT_EQ(post("/tokenize", {{"content", text}, {"add_special", true}}).json().at("tokens"), with_bos);
  const Json counted = post("/v1/tokenize", {{"prompt", text}, {"return_token_strs", true}}).json();
  EXPECT_EQ(counted.at("tokens"), with_bos);
  EXPECT_EQ(counted.at("count"), with_bos.size());
  EXPECT_EQ(counted.at("max_model_len"), 1024);
  EXPECT_EQ(counted.at("token_strs").size(), with_bos.size());
  EXPECT_EQ(post("/tokenize", {{"prompt", text}, {"add_special_tokens", false}}).json().at("tokens"), ids);
  EXPECT_TRUE(post("/tokenize", {{"prompt", text}}).json().at("token_strs").is_null());
  const Json back = post("/detokenize", {{"tokens", ids}}).json();
  EXPECT_EQ(back.at("content"), text);
  EXPECT_EQ(back.at("prompt"), text);
}

TEST_F(SmallEndpoints, SpecialTokensInATextAreTextWhereThatIsAsked) {
  const std::string eos = model.facts.eos_token;
  for (const char* field : {"content", "prompt"}) {
    Json body = {{field, eos}, {"add_special_tokens", false}};
    EXPECT_EQ(post("/tokenize", body).json().at("tokens"), Json({1})) << field;
    body["parse_special"] = false;
    const Json tokens = post("/tokenize", body).json().at("tokens");
    EXPECT_GT(tokens.size(), 1u) << field;
    for (const Json& id : tokens) EXPECT_FALSE(test::demo_tokenizer().is_special(id)) << field;
    EXPECT_EQ(post("/detokenize", {{"tokens", tokens}}).json().at("content"), eos);
  }
}

TEST_F(SmallEndpoints, PiecesThatAreNoTextAreBytes) {
  const std::string text = "a \U0001F9F6";  // a character that is several tokens
  const Json tokens = post("/tokenize", {{"content", text}, {"with_pieces", true}}).json().at("tokens");
  std::string joined;
  bool bytes = false;
  for (const Json& token : tokens) {
    const Json& piece = token.at("piece");
    bytes |= piece.is_array();
    if (piece.is_string()) joined += piece.get<std::string>();
    if (piece.is_array())
      for (const Json& byte : piece) joined += static_cast<char>(byte.get<int>());
  }
  EXPECT_EQ(joined, text);
  EXPECT_TRUE(bytes) << tokens;
}

TEST_F(SmallEndpoints, MalformedTokenRequestsNameTheField) {
  const std::tuple<const char*, Json, const char*> cases[] = {
      {"/tokenize", Json::object(), "prompt"},
      {"/tokenize", {{"content", 5}}, "content"},
      {"/tokenize", {{"prompt", {1, 2}}}, "prompt"},
      {"/tokenize", {{"content", "a"}, {"with_pieces", 1}}, "with_pieces"},
      {"/tokenize", {{"prompt", "a"}, {"return_token_strs", "yes"}}, "return_token_strs"},
      {"/tokenize", {{"messages", 5}}, "messages"},
      {"/detokenize", Json::object(), "tokens"},
      {"/detokenize", {{"tokens", "a"}}, "tokens"},
      {"/detokenize", {{"tokens", {1, -1}}}, "tokens[1]"},
      {"/detokenize", {{"tokens", {99999}}}, "tokens[0]"},
      {"/apply-template", Json::object(), "messages"},
      {"/apply-template", {{"messages", {{{"role", "robot"}, {"content", ""}}}}}, "messages[0].role"},
      {"/tokenize", {{"content", "a"}, {"model", 5}}, "model"},
      {"/tokenize", {{"content", "a"}, {"model", std::string(300, 'm')}}, "model"},
  };
  for (const auto& [path, body, param] : cases) {
    const Answer answer = post(path, body);
    ASSERT_EQ(answer.status, 400) << path << body << answer.body;
    EXPECT_EQ(answer.param(), param) << path << body;
  }
  EXPECT_EQ(post_text("/tokenize", "{").error().at("code"), "invalid_json");
  EXPECT_EQ(post_text("/detokenize", "[]").param(), "body");
}

// As lm-eval's tokenizer of a remote server does: the ids of the tokens that the info names.
TEST_F(SmallEndpoints, TokenizerInfoAgreesWithTokenize) {
  const Json info = get("/tokenizer_info").json();
  for (const auto& [token, id] : {std::pair("bos_token", "bos_token_id"), {"eos_token", "eos_token_id"}}) {
    const Json tokens =
        post("/tokenize", {{"prompt", info.at(token)}, {"add_special_tokens", false}}).json().at("tokens");
    EXPECT_EQ(tokens, Json({info.at(id)})) << token;
  }
  EXPECT_TRUE(info.at("chat_template").is_null());
  EXPECT_EQ(info.at("vocab_size"), model.vocab_size);
  EXPECT_EQ(info.at("model_max_length"), 1024);
}

// What is rendered is what runs, and what a user wrote is no markup in it.
TEST_F(SmallEndpoints, RenderIsWhatTheChatRuns) {
  const Json tool = {{"type", "function"}, {"function", {{"name", "f"}, {"parameters", {{"type", "object"}}}}}};
  const Json body = {{"messages", {{{"role", "user"}, {"content", "no end: " + model.facts.eos_token}}}},
                     {"tools", {tool}},
                     {"reasoning_effort", "high"}};
  ASSERT_EQ(chat(body).status, 200);
  const std::vector<int32_t> ran = last().prompt;
  EXPECT_EQ(std::count(ran.begin(), ran.end(), 1), 0);
  for (const char* path : {"/apply-template", "/v1/apply-template", "/v1/chat/completions/render"}) {
    const Json rendered = post(path, body).json();
    EXPECT_EQ(rendered.at("token_ids"), ran) << path;
    EXPECT_EQ(rendered.at("prompt"), text_of(last())) << path;
  }
  EXPECT_EQ(post("/tokenize", body).json().at("tokens"), ran);
  EXPECT_EQ(backend.requests.size(), 1u) << "nothing else ran";
}

// --- what runs ---

TEST_F(SmallEndpoints, PropsTellNoPath) {
  model.defaults.temperature = 0.75;
  const Json props = get("/props").json();
  EXPECT_EQ(props.at("model_path"), "demo");
  EXPECT_EQ(props.at("total_slots"), 4);
  EXPECT_EQ(props.at("n_ctx"), 1024);
  EXPECT_EQ(props.at("default_generation_settings").at("params").at("temperature"), 0.75);
  EXPECT_EQ(props.at("modalities").at("vision"), false);
  EXPECT_EQ(props.at("chat_format"), "deepseek-v4");
}

TEST_F(SmallEndpoints, SlotsShowWhatRunsAndNoText) {
  EXPECT_EQ(get("/slots").json(), Json::array());
  backend.script = [](const Request&, RequestHandle& handle) { put_token(handle, 0, 100, "secret"); };
  const auto client = begin({{"prompt", "confidential"}});
  backend.await(0);
  client->exchange().take();
  const Answer answer = get("/slots");
  ASSERT_EQ(answer.json().size(), 1u);
  const Json slot = answer.json()[0];
  EXPECT_EQ(slot.at("id"), 0);
  EXPECT_EQ(slot.at("id_task"), "req-1");
  EXPECT_EQ(slot.at("n_ctx"), 1024);
  EXPECT_EQ(answer.body.find("confidential"), std::string::npos);
  EXPECT_EQ(answer.body.find("secret"), std::string::npos);
  client->close(false);
  EXPECT_EQ(get("/slots").json(), Json::array());
}

TEST_F(SmallEndpoints, SlotsSayWhenNoneIsFree) {
  EXPECT_EQ(get("/slots?fail_on_no_slot=1").status, 200);
  backend.counted.running = 4;
  EXPECT_EQ(get("/slots").status, 200);
  EXPECT_EQ(get("/slots?fail_on_no_slot=0").status, 200);
  EXPECT_EQ(get("/slots?fail_on_no_slot=1").status, 503);
}

TEST_F(SmallEndpoints, LoadCountsBoth) {
  EXPECT_EQ(get("/load").json().at("server_load"), 5);
  EXPECT_EQ(get("/load").json().at("running"), 3);
  EXPECT_EQ(get("/get_load").json()[0].at("num_reqs"), 5);
  EXPECT_EQ(get("/get_load").json()[0].at("num_waiting_reqs"), 2);
}

TEST_F(SmallEndpoints, WhatIsNotOfferedSaysSo) {
  for (const char* path : {"/v1/embeddings", "/embeddings", "/v1/rerank", "/rerank", "/v2/rerank", "/v1/moderations",
                           "/v1/images/generations", "/v1/audio/speech"}) {
    const Answer answer = post(path, {{"input", "a"}});
    ASSERT_EQ(answer.status, 501) << path;
    EXPECT_EQ(answer.error().at("code"), "not_supported");
  }
  HttpHead form = head_of("POST", "/v1/audio/transcriptions");
  form.content_type = "multipart/form-data; boundary=x";
  EXPECT_EQ(ask_with(form, "--x--").status, 501) << "not 415: JSON would not help";
}

// --- admins ---

TEST_F(SmallEndpoints, TheCacheIsForAdmins) {
  for (const auto& [method, path] : {std::pair("GET", "/v1/cache/stats"), {"POST", "/v1/cache/flush"}}) {
    EXPECT_EQ(ask_with(head_of(method, path), "").status, 403) << "nobody is an admin without keys";
    EXPECT_EQ(as_admin(method, path).status, 200) << path;
    HttpHead user = head_of(method, path);
    user.authorization = "Bearer secret-user-1234";
    EXPECT_EQ(ask_with(user, "").status, 403);
    ASSERT_TRUE(api->keys().load({}).ok());
  }
  const Json flushed = as_admin("POST", "/v1/cache/flush").json();
  EXPECT_EQ(flushed, Json({{"checkpoints", 4}, {"checkpoint_bytes", 400}, {"pages", 3}, {"page_bytes", 3000}}));
  const Json stats = as_admin("GET", "/v1/cache/stats").json();
  EXPECT_EQ(stats.at("lookups"), 0);
  EXPECT_TRUE(stats.at("hit_rate").is_null());
}

// --- strict fields ---

TEST_F(SmallEndpoints, UnknownFieldsAreRefusedWhereThatIsStrict) {
  const std::string strict = std::string(kChat) + "?strict=1";
  const Json typo = {{"messages", kHello}, {"temprature", 1}};
  EXPECT_EQ(post(kChat, typo).status, 200);
  EXPECT_EQ(post(std::string(kChat) + "?strict=0", typo).status, 200);
  const Answer refused = post(strict, typo);
  EXPECT_EQ(refused.status, 400);
  EXPECT_EQ(refused.param(), "temprature");
  EXPECT_EQ(post(std::string(kText) + "?strict=1", {{"prompt", "a"}, {"messages", 5}}).param(), "messages");
  model.strict_fields = true;
  EXPECT_EQ(post(kChat, typo).param(), "temprature");
  const Answer tokens = post("/tokenize", {{"messages", kHello}, {"return_token_strs", true}});
  EXPECT_EQ(tokens.status, 200) << tokens.body;
  EXPECT_EQ(tokens.json().at("token_strs").size(), tokens.json().at("count"));
}

// Whatever is read is known: a field that were missing in the list would be refused as unknown here.
TEST_F(SmallEndpoints, KnownFieldsAreNotUnknown) {
  model.strict_fields = true;
  const Json common = {{"model", "gpt-5"},
                       {"stream", true},
                       {"stream_options", {{"include_usage", true}}},
                       {"temperature", 1},
                       {"top_p", 1},
                       {"top_k", 1},
                       {"min_p", 0},
                       {"repetition_penalty", 1},
                       {"presence_penalty", 0},
                       {"frequency_penalty", 0},
                       {"seed", 1},
                       {"logit_bias", {{"5", 1}}},
                       {"max_tokens", 5},
                       {"max_completion_tokens", 5},
                       {"min_tokens", 0},
                       {"ignore_eos", false},
                       {"stop", "x"},
                       {"include_stop_str_in_output", false},
                       {"stop_token_ids", {5}},
                       {"skip_special_tokens", true},
                       {"n", 1},
                       {"priority", 0},
                       {"cache_salt", "a"},
                       {"timeout", 60},
                       {"user", "a"},
                       {"metadata", Json::object()},
                       {"store", false},
                       {"parallel_tool_calls", true},
                       {"suffix", ""},
                       {"grammar", ""},
                       {"functions", Json::array()}};
  Json chatty = common, text = common;
  chatty.update({{"messages", kHello},
                 {"tools", Json::array()},
                 {"tool_choice", "auto"},
                 {"response_format", {{"type", "text"}}},
                 {"reasoning_effort", "low"},
                 {"thinking", {{"type", "enabled"}}},
                 {"chat_template_kwargs", Json::object()},
                 {"continue_final_message", false},
                 {"add_generation_prompt", true},
                 {"logprobs", true},
                 {"top_logprobs", 1}});
  text.update({{"prompt", "a"},
               {"echo", false},
               {"return_token_ids", true},
               {"logprobs", 1},
               {"best_of", 1},
               {"add_special_tokens", true}});
  for (const auto& [path, body] : {std::pair(kChat, chatty), {kText, text}}) {
    const Answer answer = post(path, body);
    EXPECT_EQ(answer.status, 200) << answer.body;
  }
}

}  // namespace
}  // namespace thermocline::server
