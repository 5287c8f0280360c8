// Anthropic's POST /v1/messages and /v1/messages/count_tokens.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "runtime/server/api/generation.h"
#include "runtime/text/completion_parser.h"

namespace thermocline::server {

class MessagesGeneration : public Generation {
 public:
  using Generation::Generation;
  Result<std::vector<Request>> read(const Json& body) override;

 protected:
  void on_event(size_t prompt, const TokenEvent& event, std::string& out) override;
  std::string last_events() override;
  Json reply_body() override;
  const char* prompt_field() const override { return "messages"; }
  Error told(Error error) const override;
  std::string sign_of_life() override;
  std::string error_events(const Reply& reply) override;
  const char* end_of_stream() const override { return ""; }

 private:
  void tell(const CompletionStream::Event& event, std::string& out);
  Json& block(const std::string& type, const Json& fresh, std::string& out);
  void delta(Json delta, std::string& out) const;
  void close_block(std::string& out);
  Json message() const;
  Json usage() const;

  std::optional<CompletionStream> stream_;
  Json blocks_ = Json::array();  // of the answer, the last of them open or not
  bool open_ = false, began_ = false;
  std::string stop_reason_;
  Json stop_sequence_;  // the one that was met
};

std::vector<Endpoint> messages_endpoints(Services& services);

}  // namespace thermocline::server
