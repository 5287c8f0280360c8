// OpenAI's Responses API: POST /v1/responses, GET and DELETE /v1/responses/{id}, POST /v1/responses/{id}/cancel.
#pragma once

#include <optional>
#include <set>
#include <string>
#include <vector>

#include "runtime/server/api/generation.h"
#include "runtime/server/api/response_store.h"
#include "runtime/text/completion_parser.h"

namespace thermocline::server {

class ResponsesGeneration : public Generation {
 public:
  ResponsesGeneration(Call call, Services& services, ResponseStore& store)
      : Generation(std::move(call), services), store_(store) {}
  Result<std::vector<Request>> read(const Json& body) override;

 protected:
  void on_event(size_t prompt, const TokenEvent& event, std::string& out) override;
  std::string last_events() override;
  Json reply_body() override;
  const char* prompt_field() const override { return "input"; }
  void closed(bool complete, int status) override;
  std::string sign_of_life() override;
  std::string error_events(const Reply& reply) override;
  const char* end_of_stream() const override { return ""; }

 private:
  void echo_fields(const Json& body, const Request& request);
  std::string event(const std::string& type, const Json& members);
  void begin(std::string& out);
  void tell(const CompletionStream::Event& piece, std::string& out);
  void open_item(Json item, std::string& out);
  void open_part(const char* type, std::string& out);
  void grow(const char* event_type, const std::string& piece, std::string& text, std::string& out);
  void close_item(const char* status, std::string& out);
  void add_call(const CompletionStream::Event& piece, std::string& out);
  Json place() const;  // of the item that grows
  Json response(const char* status) const;
  void keep(const char* status);
  std::string assistant_message() const;

  ResponseStore& store_;
  std::optional<CompletionStream> stream_;
  std::set<std::string> custom_tools_;
  bool stored_ = true, kept_ = false;  // kept_: how it ended
  std::string history_;                // the prompt's messages, a JSON list that is not closed
  Json echoed_;                        // fields of the request that the response repeats
  Json items_ = Json::array();         // the output so far
  bool open_ = false, began_ = false;  // an item grows; response.created is out
  std::string call_name_;
  const char* status_ = "completed";
  int64_t sequence_ = 0;
};

std::vector<Endpoint> responses_endpoints(Services& services);

}  // namespace thermocline::server
