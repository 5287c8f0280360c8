// POST /v1/completions: texts and token ids continued, scored (echo, logprobs), several at once.
#pragma once

#include <string>
#include <vector>

#include "runtime/server/api/generation.h"
#include "runtime/server/api/logprobs.h"

namespace thermocline::server {

class CompletionGeneration : public Generation {
 public:
  using Generation::Generation;
  Result<std::vector<Request>> read(const Json& body) override;

 protected:
  void on_event(size_t prompt, const TokenEvent& event, std::string& out) override;
  std::string last_events() override;
  const char* chunk_object() const override { return "text_completion"; }
  Json reply_body() override;
  const char* prompt_field() const override { return "prompt"; }

 private:
  struct Choice {
    CompletionLogprobs logprobs;
    std::string text = {}, finish = {};
    std::vector<int32_t> ids = {};
    double logprob_sum = 0;
    bool echoed = false;
  };
  struct Prompt {
    std::vector<int32_t> ids;
    std::string text;  // what echo gives
    std::vector<SampledToken> logprobs = {};
    std::vector<TokenEvent> held = {};  // of other choices, until the log-probabilities that come first are here
    std::vector<Choice> choices = {};
  };

  Result<std::vector<Prompt>> read_prompts(const Json& body) const;
  bool shown(int32_t id) const { return !hide_special_ || !model_.tokenizer.is_special(id); }
  void tell(size_t index, const TokenEvent& event, std::string& out);
  std::string echo(Prompt& prompt, Choice& choice);
  std::string chunk(size_t prompt, const TokenEvent& event, const std::string& text, Json reason,
                    const std::vector<int32_t>& ids);
  std::vector<Choice*> chosen(Prompt& prompt) const;

  std::vector<Prompt> prompts_;
  int n_ = 1;        // choices a reply shows
  int best_of_ = 1;  // choices that are made
  bool echo_ = false, hide_special_ = true;
  Json last_timings_;
  int top_ = -1;  // alternatives; -1: no logprobs
};

std::vector<Endpoint> completions_endpoints(Services& services);

}  // namespace thermocline::server
