#include "runtime/server/api/completions.h"

#include <algorithm>

#include "runtime/server/wire/request_fields.h"

namespace thermocline::server {
namespace {

constexpr size_t kMostPrompts = 64, kMostChoices = 128;
constexpr int64_t kDefaultMaxTokens = 16;  // OpenAI's

}  // namespace

Result<std::vector<Request>> CompletionGeneration::read(const Json& body) {
  TC_RETURN_IF_ERROR(read_common(body, "cmpl-"));
  const Fields fields(body);
  static constexpr const char* kOwn[] = {"prompt",
                                         "echo",
                                         "logprobs",
                                         "best_of",
                                         "add_special_tokens",
                                         "return_token_ids",
                                         "return_progress",
                                         "prompt_logprobs",
                                         "timings_per_token"};
  TC_RETURN_IF_ERROR(check_fields(body, kOwn));
  const int64_t vocab = model_.vocab_size;
  TC_ASSIGN(const Request common, read_generation_fields(fields, model_.defaults, vocab, arrived_));
  TC_ASSIGN(echo_, fields.boolean("echo", false));
  const Json* const logprobs = fields.find("logprobs");
  if (logprobs && *logprobs != false) {
    TC_ASSIGN(const int64_t top, fields.integer("logprobs", -1, 0, 20));
    top_ = static_cast<int>(top);
  }
  n_ = common.choices;
  hide_special_ = common.skip_special_tokens;
  TC_ASSIGN(const int64_t best_of, fields.integer("best_of", n_, 1, 20));
  if (best_of < n_) return field_error("best_of", "should not be less than n");
  if (best_of > n_ && streams_) return field_error("best_of", "cannot be streamed: the best is known in the end");
  best_of_ = static_cast<int>(best_of);
  TC_ASSIGN(prompts_, read_prompts(body));
  if (prompts_.size() * static_cast<size_t>(best_of_) > kMostChoices)
    return field_error("prompt", "and n ask for more than " + std::to_string(kMostChoices) + " answers");
  if (common.max_tokens == 0 && !echo_) return field_error("max_tokens", "should be at least 1, or 0 with echo");
  std::vector<Request> requests;
  for (Prompt& prompt : prompts_) {
    Request request;
    request.sampling = common.sampling;
    request.max_tokens = common.max_tokens < 0 ? kDefaultMaxTokens : common.max_tokens;
    request.min_tokens = common.min_tokens;
    request.stop = common.stop;
    request.include_stop = common.include_stop;
    request.stop_token_ids = common.stop_token_ids;
    request.ignore_eos = common.ignore_eos;
    request.skip_special_tokens = common.skip_special_tokens;
    request.priority = common.priority;
    request.cache_salt = common.cache_salt;
    request.deadline = common.deadline;
    request.choices = best_of_;
    TC_RETURN_IF_ERROR(read_extras(fields, request));
    request.prompt = prompt.ids;
    request.top_logprobs = best_of_ > n_ ? std::max(top_, 0) : top_;
    if (echo_ && top_ >= 0) {
      if (prompt_logprobs_ && request.prompt_top_logprobs != top_)
        return field_error("prompt_logprobs", "should be as many as logprobs where the prompt is echoed with them");
      request.prompt_top_logprobs = top_;
    }
    for (int i = 0; i < best_of_; ++i) prompt.choices.push_back({CompletionLogprobs(model_.tokenizer)});
    requests.push_back(std::move(request));
  }
  return requests;
}

// A string, a list of strings, token ids, or a list of such lists. Text gets a BOS in front unless it has one, or is
// not to get one.
Result<std::vector<CompletionGeneration::Prompt>> CompletionGeneration::read_prompts(const Json& body) const {
  const Json* const given = Fields(body).find("prompt");
  TC_ASSIGN(const bool add_bos, Fields(body).boolean("add_special_tokens", true));
  if (!given) return field_error("prompt", "is missing");
  const bool one = given->is_string() || (given->is_array() && !given->empty() && (*given)[0].is_number());
  const size_t count = one ? 1 : given->is_array() ? given->size() : 0;
  if (count == 0 || count > kMostPrompts)
    return field_error("prompt",
                       "should be a string, token ids, or a list of 1 to " + std::to_string(kMostPrompts) + " of them");
  std::vector<Prompt> prompts;
  for (size_t i = 0; i < count; ++i) {
    TC_RETURN_IF_ERROR(wanted());
    const Json& source = one ? *given : (*given)[i];
    const std::string where = one ? "prompt" : "prompt[" + std::to_string(i) + "]";
    Prompt prompt;
    if (const std::string* const text = source.get_ptr<const std::string*>()) {
      TC_RETURN_IF_ERROR(model_.check_bytes(text->size(), where));
      TC_ASSIGN(prompt.ids, model_.tokenizer.encode(*text));
      if (prompt.ids.empty() && !add_bos) return field_error(where, "should not be empty");
      if (prompt.ids.empty() || (add_bos && prompt.ids[0] != model_.bos_token_id))
        prompt.ids.insert(prompt.ids.begin(), model_.bos_token_id);
    } else if (source.is_array()) {
      for (const Json& id : source) {
        const std::optional<int32_t> token = token_id_of(id, model_.vocab_size);
        if (!token)
          return field_error(where + "[" + std::to_string(prompt.ids.size()) + "]",
                             "should be a token id below " + std::to_string(model_.vocab_size));
        prompt.ids.push_back(*token);
      }
      if (prompt.ids.empty()) return field_error(where, "should not be empty");
    } else {
      return field_error(where, "should be a string or a list of token ids");
    }
    if (echo_) {
      const bool has_bos = prompt.ids[0] == model_.bos_token_id;
      for (const int32_t id : std::span(prompt.ids).subspan(has_bos)) prompt.text += model_.tokenizer.token_bytes(id);
    }
    prompts.push_back(std::move(prompt));
  }
  return prompts;
}

// --- network thread ---

// The prompt in front of an answer, once, with its log-probabilities.
std::string CompletionGeneration::echo(Prompt& prompt, Choice& choice) {
  if (!echo_ || choice.echoed) return "";
  choice.echoed = true;
  if (top_ >= 0)
    for (size_t t = 0; t < prompt.ids.size(); ++t)
      choice.logprobs.add(prompt.logprobs[t],
                          {.known = t > 0, .top = top_ > 0, .in_text = t > 0 || prompt.ids[t] != model_.bos_token_id});
  return prompt.text;
}

void CompletionGeneration::on_event(size_t index, const TokenEvent& event, std::string& out) {
  Prompt& prompt = prompts_[index];
  const bool waits = echo_ && top_ >= 0 && prompt.logprobs.empty();
  if (event.kind == TokenEvent::Kind::prompt) {
    prompt.logprobs = event.prompt_logprobs;
    for (const TokenEvent& held : std::exchange(prompt.held, {})) tell(index, held, out);
  } else if (waits) {
    prompt.held.push_back(event);
  } else {
    tell(index, event, out);
  }
}

void CompletionGeneration::tell(size_t index, const TokenEvent& event, std::string& out) {
  Prompt& prompt = prompts_[index];
  Choice& choice = prompt.choices[static_cast<size_t>(event.choice)];
  std::string text = echo(prompt, choice);
  text += event.text;
  choice.text += text;
  std::vector<int32_t> ids;
  if (event.kind == TokenEvent::Kind::token) {
    ids.push_back(event.id);
    choice.ids.push_back(event.id);
    if (event.logprobs) {
      choice.logprob_sum += event.logprobs->logprob;
      if (top_ >= 0) choice.logprobs.add(*event.logprobs, {.known = true, .top = top_ > 0, .in_text = shown(event.id)});
    }
  }
  Json reason;
  if (event.kind == TokenEvent::Kind::finish) {
    reason = choice.finish = finish_name(event.reason);
    if (entry_.finish.empty() || entry_.finish == "stop") entry_.finish = choice.finish;
  }
  const bool news = !text.empty() || !reason.is_null() || (return_ids_ && !ids.empty()) || !choice.logprobs.empty();
  if (timings_ && event.kind == TokenEvent::Kind::finish) last_timings_ = timings_json(event.stats);
  if (streams_ && news) out += chunk(index, event, text, std::move(reason), ids);
}

std::string CompletionGeneration::chunk(size_t prompt, const TokenEvent& event, const std::string& text, Json reason,
                                        const std::vector<int32_t>& ids) {
  const auto choice = static_cast<size_t>(event.choice);
  Json one = {{"text", text}, {"index", prompt * static_cast<size_t>(n_) + choice}};
  CompletionLogprobs& logprobs = prompts_[prompt].choices[choice].logprobs;
  one["logprobs"] = top_ >= 0 && !logprobs.empty() ? logprobs.take() : Json();
  one["finish_reason"] = std::move(reason);
  if (return_ids_) one["token_ids"] = ids;
  Json json = head(chunk_object());
  json["choices"] = Json::array({std::move(one)});
  if (timings_ && event.kind == TokenEvent::Kind::finish) json["timings"] = timings_json(event.stats);
  if (continuous_usage_) json["usage"] = usage_.json();
  return event_of(json);
}

std::string CompletionGeneration::last_events() {
  if (!include_usage_) return "";
  Json last = head(chunk_object());
  last["choices"] = Json::array();
  last["usage"] = usage_.json();
  return event_of(last);
}

// With best_of those of the highest mean log-probability, the best first.
std::vector<CompletionGeneration::Choice*> CompletionGeneration::chosen(Prompt& prompt) const {
  std::vector<Choice*> choices;
  for (Choice& c : prompt.choices) choices.push_back(&c);
  const auto mean = [](const Choice* c) {
    return c->ids.empty() ? 0.0 : c->logprob_sum / static_cast<double>(c->ids.size());
  };
  if (best_of_ > n_)
    std::stable_sort(choices.begin(), choices.end(),
                     [&](const Choice* a, const Choice* b) { return mean(a) > mean(b); });
  choices.resize(static_cast<size_t>(n_));
  return choices;
}

Json CompletionGeneration::reply_body() {
  Json body = head("text_completion");
  Json choices = Json::array();
  for (Prompt& prompt : prompts_)
    for (Choice* const c : chosen(prompt)) {
      Json one = {{"text", c->text}, {"index", choices.size()}};
      one["logprobs"] = top_ >= 0 ? c->logprobs.take() : Json();
      one["finish_reason"] = c->finish;
      if (return_ids_) one["token_ids"] = c->ids;
      if (prompt_logprobs_) one["prompt_logprobs"] = prompt_logprobs(model_.tokenizer, prompt.logprobs);
      choices.push_back(std::move(one));
    }
  body["choices"] = std::move(choices);
  body["usage"] = usage_.json();
  if (timings_) body["timings"] = last_timings_;
  return body;
}

std::vector<Endpoint> completions_endpoints(Services& services) {
  return {{.method = "POST", .path = "/v1/completions", .queued = true, .answer = [&services](Call call) {
             return Generation::begin(std::make_shared<CompletionGeneration>(std::move(call), services));
           }}};
}

}  // namespace thermocline::server
