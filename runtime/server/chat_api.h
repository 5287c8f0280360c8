// The OpenAI-compatible API: requests to generations, generations to replies and event streams.
#pragma once

#include <optional>
#include <string>

#include "runtime/engine/generation.h"
#include "runtime/server/exchange.h"
#include "runtime/server/generation_queue.h"
#include "runtime/server/request_fields.h"
#include "runtime/text/completion_parser.h"
#include "runtime/text/prose_constants.h"

namespace thermocline::server {

/// One loaded model behind /v1/models, /v1/completions, /v1/chat/completions and /health. handle() is called from the
/// network thread; generations run on the queue's step thread.
class ChatApi {
 public:
  struct Options {
    std::string model_name;
    bool think = false;  // whether a chat thinks when the request does not say
  };
  /// `constants` is the error of reading them where the checkpoint has none: chat requests answer with it.
  ChatApi(Engine& engine, const Tokenizer& tokenizer, Result<ProseConstants> constants, SamplingParams defaults,
          Options options);

  Outcome handle(const HttpRequest& request);
  /// Cancels all generations and ends the step thread.
  void stop() { queue_.stop(); }

 private:
  struct Call;  // a checked request

  Outcome completions(const Json& body);
  Outcome chat_completions(const Json& body);
  Result<std::shared_ptr<Call>> read_call(const Json& body) const;
  Result<std::vector<std::vector<int32_t>>> read_prompts(const Json& body) const;
  Status read_chat(const Json& body, Call& call) const;
  Status check_length(const std::vector<int32_t>& prompt) const;
  Outcome start(std::shared_ptr<Call> call, void (ChatApi::*work)(Call&, Exchange&));
  void run_completions(Call& call, Exchange& exchange);
  void run_chat(Call& call, Exchange& exchange);
  Result<GenerationResult> generate_one(const GenerationRequest& request, Exchange& exchange, const TextSink& sink);
  Json model() const;

  Engine& engine_;
  const Tokenizer& tokenizer_;
  const Result<ProseConstants> constants_;
  const SamplingParams defaults_;
  const Options options_;
  const int64_t created_;
  GenerationQueue queue_;
};

}  // namespace thermocline::server
