#include "runtime/engine/generation.h"

#include <algorithm>
#include <chrono>

#include "runtime/text/detokenizer.h"

namespace thermocline {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

Status check(const Engine& engine, const GenerationRequest& request) {
  const auto fail = [](const char* field, const std::string& text) {
    Error error = invalid(text);
    error.field = field;
    return error;
  };
  TC_RETURN_IF_ERROR(request.sampling.check(engine.geometry().vocab_size));
  if (request.prompt.empty()) return fail("prompt", "the prompt is empty");
  const int64_t length = static_cast<int64_t>(request.prompt.size());
  if (length > engine.max_context())
    return fail("prompt", "the prompt has " + std::to_string(length) + " tokens, the context holds " +
                              std::to_string(engine.max_context()));
  for (const int32_t id : request.prompt)
    if (id < 0 || id >= engine.geometry().vocab_size)
      return fail("prompt", "token id " + std::to_string(id) + " is outside the vocabulary of " +
                                std::to_string(engine.geometry().vocab_size));
  return {};
}

}  // namespace

std::string StopMatcher::push(const std::string& text, bool& stopped) {
  held_ += text;
  size_t at = std::string::npos;
  for (const std::string& stop : stops_) at = std::min(at, held_.find(stop));
  stopped = at != std::string::npos;
  size_t keep = 0;
  if (!stopped) {
    for (const std::string& stop : stops_)
      for (size_t n = std::min(held_.size(), stop.size() - 1); n > keep; --n)
        if (held_.compare(held_.size() - n, n, stop, 0, n) == 0) keep = n;
    at = held_.size() - keep;
  }
  std::string out = held_.substr(0, at);
  held_.erase(0, stopped ? held_.size() : at);
  return out;
}

Result<GenerationResult> generate(Engine& engine, const Tokenizer& tokenizer, Sequence& sequence,
                                  const GenerationRequest& request, const std::atomic<bool>& cancel,
                                  const TextSink& sink) {
  TC_RETURN_IF_ERROR(check(engine, request));
  GenerationResult result;
  result.prompt_tokens = static_cast<int64_t>(request.prompt.size());
  result.prefilled_tokens = result.prompt_tokens - sequence.length();
  const int64_t room = engine.max_context() - result.prompt_tokens;
  const int64_t limit = request.max_tokens < 0 ? room : std::min(room, request.max_tokens);
  const int32_t eos = engine.geometry().eos_token_id;

  const auto prefill_start = Clock::now();
  Status status =
      engine.prefill(sequence, std::span(request.prompt).subspan(static_cast<size_t>(sequence.length())), &cancel);
  result.prefill_seconds = seconds_since(prefill_start);
  if (!status.ok() && status.error().code == ErrorCode::cancelled)
    return result.reason = FinishReason::cancelled, result;
  TC_RETURN_IF_ERROR(std::move(status));

  Sampler sampler(request.sampling, request.prompt);
  Detokenizer detokenizer(tokenizer, request.keep_special);
  StopMatcher stops(request.stop);
  SamplingScratch scratch(engine.geometry().vocab_size);
  bool stopped = false;
  result.reason = FinishReason::length;
  const auto decode_start = Clock::now();
  while (result.completion_tokens < limit) {
    if (result.completion_tokens > 0) TC_RETURN_IF_ERROR(engine.decode(sequence, result.ids.back()));
    const bool no_eos = request.ignore_eos || result.completion_tokens < request.min_tokens;
    std::optional<int32_t> chosen;
    if (request.sampling.greedy() && !no_eos) chosen = engine.most_likely();
    if (!chosen) {
      const std::span<const int32_t> banned(&eos, no_eos ? 1 : 0);
      TC_ASSIGN(const SampledToken token,
                sampler.sample(engine.logits(), {.top_logprobs = -1, .banned = banned}, scratch));
      chosen = token.id;
    }
    const int32_t id = *chosen;
    result.ids.push_back(id);
    ++result.completion_tokens;
    if (id == eos) {
      result.reason = FinishReason::stop;
      break;
    }
    const bool wanted = sink(stops.push(detokenizer.push(id), stopped), id);
    if (stopped) {
      result.reason = FinishReason::stop;
      break;
    }
    if (!wanted || cancel) {
      result.reason = FinishReason::cancelled;
      break;
    }
  }
  result.decode_seconds = seconds_since(decode_start);
  if (!stopped) {
    std::string rest = stops.push(detokenizer.finish(), stopped);
    if (!stopped) rest += stops.finish();
    if (!rest.empty() && result.reason != FinishReason::cancelled) sink(rest, -1);
  }
  return result;
}

}  // namespace thermocline
