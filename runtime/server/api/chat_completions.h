// POST /v1/chat/completions: messages to a prompt, tokens to messages with reasoning and tool calls.
#pragma once

#include <string>
#include <vector>

#include "runtime/server/api/generation.h"
#include "runtime/text/completion_parser.h"

namespace thermocline::server {

class ChatGeneration : public Generation {
 public:
  using Generation::Generation;
  Result<std::vector<Request>> read(const Json& body) override;

 protected:
  void on_event(size_t prompt, const TokenEvent& event, std::string& out) override;
  std::string last_events() override;
  const char* chunk_object() const override { return "chat.completion.chunk"; }
  Json reply_body() override;
  const char* prompt_field() const override { return "messages"; }

 private:
  /// A choice's message as it grows.
  struct Choice {
    CompletionStream stream;
    std::string reasoning = {}, content = {};
    Json calls = Json::array();
    Json logprobs = Json::array();  // not yet told in a stream; all of them for a reply
    std::vector<int32_t> ids = {};  // the same
    bool began = false;             // the role was told
    std::string finish = {};
  };

  Status read_logprobs(const Json& body, Request& request) const;
  void tell(int index, const std::vector<CompletionStream::Event>& events, std::string& out);
  std::string chunk(int index, Json delta, Json reason, const AnswerStats* stats = nullptr);
  void finish(int index, const TokenEvent& event, std::string& out);

  std::vector<Choice> choices_;
  bool logprobs_ = false;
  std::vector<int32_t> prompt_ids_;  // where they are asked for, until a stream has told them
  Json prompt_scores_, last_timings_;
};

std::vector<Endpoint> chat_completions_endpoints(Services& services);

}  // namespace thermocline::server
