// Requests to a started engine and their answers, collected.
#pragma once

#include "runtime/engine/engine.h"
#include "tests/support/models.h"

namespace thermocline::test {

/// What one choice of a request gave.
struct Answer {
  std::string text;
  std::vector<int32_t> ids;
  std::vector<SampledToken> logprobs, prompt_logprobs;
  FinishReason reason = FinishReason::error;
  Error error;
  AnswerStats stats;
  int ends = 0;  // finish events; one, if all is well
};

/// Waits for every choice.
inline std::vector<Answer> collect(RequestHandle& handle, int choices = 1) {
  std::vector<Answer> answers(static_cast<size_t>(choices));
  while (!handle.stream().finished()) {
    handle.stream().wait_for(std::chrono::seconds(60));
    for (TokenEvent& event : handle.stream().take()) {
      Answer& a = answers[static_cast<size_t>(event.choice)];
      a.text += event.text;
      if (event.kind == TokenEvent::Kind::token) a.ids.push_back(event.id);
      if (event.logprobs) a.logprobs.push_back(*event.logprobs);
      if (event.kind == TokenEvent::Kind::prompt) a.prompt_logprobs = event.prompt_logprobs;
      if (event.kind != TokenEvent::Kind::finish) continue;
      ++a.ends;
      a.reason = event.reason;
      a.error = event.error;
      a.stats = event.stats;
    }
  }
  return answers;
}

/// Submits, and waits. A refusal fails the test.
inline Answer ask(Engine& engine, Request request) {
  const int choices = request.choices;
  auto handle = engine.submit(std::move(request));
  TC_CHECK(handle.has_value(), handle ? "" : handle.error().message);
  return collect(**handle, choices)[0];
}

inline std::string chat_prompt(const std::string& question) {
  return "<｜begin▁of▁sentence｜><｜User｜>" + question + "<｜Assistant｜></think>";
}

/// A greedy request to the demo model.
inline Request request_of(const Tokenizer& tokenizer, const std::string& text, int64_t max_tokens = -1) {
  Request request;
  request.prompt = tokenizer.encode(text).value();
  request.sampling.temperature = 0;
  request.max_tokens = max_tokens;
  return request;
}

}  // namespace thermocline::test
