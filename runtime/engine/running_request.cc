#include "runtime/engine/running_request.h"

#include <algorithm>

namespace thermocline {
namespace {

SamplingParams params_of(const Request& request, int choice) {
  SamplingParams params = request.sampling;
  params.seed += static_cast<uint64_t>(choice);
  return params;
}

}  // namespace

RunningRequest::RunningRequest(uint64_t id, std::shared_ptr<SubmittedRequest> submitted, int choice,
                               const Tokenizer& tokenizer, int32_t eos, int64_t limit)
    : sampler(params_of(submitted->request, choice), submitted->request.prompt),
      id_(id),
      submitted_(std::move(submitted)),
      choice_(choice),
      eos_(eos),
      prompt_tokens_(static_cast<int64_t>(request().prompt.size())),
      limit_(limit),
      ids_(request().prompt),
      ends_(request().stop_token_ids),
      tokenizer_(tokenizer),
      detokenizer_(tokenizer),
      stops_(request().stop, request().include_stop) {
  banned_ = ends_;
  banned_.push_back(eos);
  if (!request().ignore_eos) ends_.push_back(eos);
  reasons_ = request().reasoning_budget >= 0 && request().reasoning_end >= 0;
  if (choice == 0 && request().prompt_top_logprobs >= 0) prompt_logprobs_.push_back({ids_[0], 0, {}});
}

bool RunningRequest::wants_all_logits() const {
  return !prompt_logprobs_.empty() && static_cast<int64_t>(prompt_logprobs_.size()) < prompt_tokens_;
}

SampleOptions RunningRequest::sample_options() const {
  SampleOptions options;
  options.top_logprobs = request().top_logprobs;
  if (answered() < request().min_tokens)
    options.banned = banned_;
  else if (request().ignore_eos)
    options.banned = std::span(&eos_, 1);
  return options;
}

bool RunningRequest::takes_argmax() const {
  return request().sampling.greedy() && request().top_logprobs < 0 && sample_options().banned.empty() &&
         !must_end_reasoning();
}

Result<SampledToken> RunningRequest::draw(std::span<const float> logits, SamplingScratch& scratch) {
  if (!must_end_reasoning()) return sampler.sample(logits, sample_options(), scratch);
  sampler.accept(request().reasoning_end);
  if (request().top_logprobs < 0) return SampledToken{request().reasoning_end, 0, {}};
  return logprobs_of(logits, request().reasoning_end, request().top_logprobs, scratch);
}

Result<SampledToken> RunningRequest::prompt_logprob(int64_t position, std::span<const float> logits,
                                                    SamplingScratch& scratch) const {
  return logprobs_of(logits, ids_[static_cast<size_t>(position) + 1], request().prompt_top_logprobs, scratch);
}

void RunningRequest::add_prompt_logprob(int64_t position, SampledToken token) {
  if (static_cast<int64_t>(prompt_logprobs_.size()) == position + 1) prompt_logprobs_.push_back(std::move(token));
}

void RunningRequest::finish_prompt() {
  if (ended_) return;
  if (!prompt_logprobs_.empty() && !prompt_published_) {
    TokenEvent e = event(TokenEvent::Kind::prompt);
    e.prompt_logprobs = prompt_logprobs_;
    prompt_published_ = true;
    handle().stream().push(std::move(e));
  }
  if (static_cast<int64_t>(ids_.size()) >= limit_) finish(FinishReason::length);
}

void RunningRequest::tell_progress() {
  if (!request().report_progress || choice_ != 0 || answered() > 0 || ended_ || !handle().stream().room()) return;
  TokenEvent e = event(TokenEvent::Kind::progress);
  e.stats.prompt_tokens = prompt_tokens_;
  e.stats.cached_tokens = cached_tokens;
  Milestones{submitted().at, admitted, first_token}.tell(Clock::now(), e.stats);
  e.processed_tokens = std::min(stored(), prompt_tokens_);
  handle().stream().push(std::move(e));
}

bool RunningRequest::hidden(int32_t id) const {
  const std::vector<int32_t>& shown = request().shown_special;
  return request().skip_special_tokens && tokenizer_.is_special(id) &&
         std::find(shown.begin(), shown.end(), id) == shown.end();
}

void RunningRequest::take(SampledToken token) {
  if (ended_) return;
  const int32_t id = token.id;
  ids_.push_back(id);
  reasons_ = reasons_ && id != request().reasoning_end;
  last_token = Clock::now();
  if (answered() == 1) handle().note_first_token(first_token = last_token);
  TokenEvent e = event(TokenEvent::Kind::token);
  e.id = id;
  e.stats.cached_tokens = cached_tokens;
  if (request().top_logprobs >= 0) e.logprobs = std::move(token);
  const bool end = std::find(ends_.begin(), ends_.end(), id) != ends_.end();
  bool stopped = false;
  if (!end) {
    const std::string text = hidden(id) ? "" : detokenizer_.push(id);
    e.text = answered() >= request().min_tokens ? stops_.push(text, stopped) : text;
  }
  handle().stream().push(std::move(e));
  stop_met_ = stopped;
  if (end || stopped) return finish(FinishReason::stop);
  if (static_cast<int64_t>(ids_.size()) >= limit_) finish(FinishReason::length);
}

void RunningRequest::finish(FinishReason reason) {
  TokenEvent e = event(TokenEvent::Kind::finish);
  e.reason = reason;
  if (reason != FinishReason::cancelled && !stop_met_) {
    bool stopped = false;
    e.text = stops_.push(detokenizer_.finish(), stopped);
    if (!stopped) e.text += stops_.finish();
  }
  if (const std::string* const stop = stops_.met()) e.stop = *stop;
  end(std::move(e));
}

void RunningRequest::fail(Error error) {
  TokenEvent e = event(TokenEvent::Kind::finish);
  e.reason = FinishReason::error;
  e.error = std::move(error);
  end(std::move(e));
}

void RunningRequest::end(TokenEvent e) {
  if (ended_) return;
  ended_ = true;
  e.stats.prompt_tokens = prompt_tokens_;
  e.stats.completion_tokens = answered();
  e.stats.cached_tokens = cached_tokens;
  e.stats.preemptions = preemptions;
  Milestones{submitted().at, admitted, first_token}.tell(Clock::now(), e.stats);
  end_ = std::move(e);
}

void RunningRequest::tell_end() { handle().stream().finish(std::move(end_)); }

}  // namespace thermocline
