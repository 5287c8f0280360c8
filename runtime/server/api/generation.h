// Generation: a request of either completion endpoint on its way: read in the prep pool, run by the engine, told to the
// client as an event stream or as one reply. The endpoints say how it is read and what its answer looks like.
#pragma once

#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "runtime/server/api/endpoint.h"
#include "runtime/server/wire/request_fields.h"

namespace thermocline::server {

/// Counts over the choices of a reply.
struct Usage {
  int64_t prompt = 0, cached = 0, completion = 0, reasoning = 0;
  Json json() const;
};

/// llama.cpp's `timings` of an answer.
Json timings_json(const AnswerStats& stats);

/// One server-sent event.
std::string event_of(const Json& json);
constexpr const char* kDone = "data: [DONE]\n\n";
const char* finish_name(FinishReason reason);

class Generation : public Exchange, public RequestInProgress, public std::enable_shared_from_this<Generation> {
 public:
  /// Takes the request's place in the queue, and has it prepared. An error where there is no place.
  static Outcome begin(const std::shared_ptr<Generation>& generation);

  Generation(Call call, Services& services);

  /// Prep pool: reads the body, hands the requests to the engine. Never throws.
  void prepare();

  // Exchange, network thread.
  Output take() override;
  bool streams() const override { return streams_; }
  ServedModel::Headers headers() const override;
  std::string keep_alive() override {
    bytes_sent_ = true;  // the status line is out: errors are events from now on
    return sign_of_life();
  }
  void cancel() override;
  Output abort(const Error& error) override;
  bool ended() const override;
  void closed(bool complete, int status) override;

  Look look() const override;

  /// Prep thread: the engine's requests, from the body; each has Request::choices choices.
  /// Errors: those of the client's fields, and of the checkpoint's templates.
  virtual Result<std::vector<Request>> read(const Json& body) = 0;

 protected:
  /// Network thread: an event of choice event.choice of prompt `prompt`; what a stream says of it is appended to `out`.
  virtual void on_event(size_t prompt, const TokenEvent& event, std::string& out) = 0;
  /// Network thread: every choice has ended well: the rest of a stream but its [DONE], or the reply's body.
  virtual std::string last_events() = 0;
  virtual Json reply_body() = 0;
  /// The `object` of a chunk, where a stream can be told how far its prompt is; nullptr elsewhere.
  virtual const char* chunk_object() const { return nullptr; }
  /// The field a prompt comes from.
  virtual const char* prompt_field() const = 0;
  /// An error of the engine in the words of the request.
  virtual Error told(Error error) const;
  /// What a silent stream says.
  virtual std::string sign_of_life() { return Exchange::keep_alive(); }
  /// How a stream ends in an error, and how it ends well.
  virtual std::string error_events(const Reply& reply) { return "data: " + reply.body + "\n\n" + kDone; }
  virtual const char* end_of_stream() const { return kDone; }

  /// The fields both endpoints share: stream, stream_options, model, choices.
  Status read_common(const Json& body, const char* id_prefix);
  /// Where unknown fields are refused (?strict=1, --strict-fields): that the body has none beside `own`, those that
  /// read_common and read_generation_fields read, and some that never change an answer.
  Status check_fields(const Json& body, std::span<const char* const> own) const;
  /// What OpenAI's endpoints tell besides, where it is asked for: `return_progress`, of a stream chunks without choices
  /// that say how much of the prompt is computed; `prompt_logprobs`; `return_token_ids`; `timings_per_token`.
  Status read_extras(const Fields& fields, Request& request);
  Json head(const char* object) const;
  /// Prep thread, between the stages of read(): whether anybody still wants what they make.
  Status wanted() const;

  Services& services_;
  Call call_;
  const ServedModel& model_;
  const std::chrono::steady_clock::time_point arrived_ = std::chrono::steady_clock::now();
  bool include_usage_ = false, continuous_usage_ = false;
  bool prompt_logprobs_ = false, return_ids_ = false, timings_ = false;
  std::atomic<bool> streams_{false};
  Usage usage_;        // so far; network thread
  bool read_ = false;  // read() is over, and what it made is there; network thread
  std::string id_, model_name_;
  int64_t created_ = 0;
  AccessEntry entry_;

 private:
  Result<std::vector<std::shared_ptr<RequestHandle>>> submit(std::vector<Request> requests);
  void refuse(Reply reply);
  void count_times(const AnswerStats& stats);
  void count_untaken_times();
  void count(size_t prompt, const TokenEvent& event);
  std::string progress(const TokenEvent& event) const;
  Reply shaped(Reply reply) const;
  Output fail(const Error& error, const std::string& before);
  Output end_with(Reply reply);

  QueueTicket ticket_;
  KeyPlace place_;  // of its key, until it is closed

  mutable std::mutex mutex_;  // what prep hands to the network
  std::optional<Reply> refusal_;
  ServedModel::Headers name_headers_;
  int64_t prompt_tokens_ = 0, max_tokens_ = -1;
  int choices_ = 0;
  std::vector<std::shared_ptr<RequestHandle>> handles_;
  std::atomic<bool> cancelled_{false};

  // Network thread.
  bool bytes_sent_ = false;
  bool over_ = false;
  std::vector<int64_t> cached_of_;                // each prompt's share of usage_.cached
  std::atomic<int64_t> answered_{0}, cached_{0};  // for look()
};

}  // namespace thermocline::server
