// `thermocline run`: a prompt, a chat or a raw continuation on the terminal.
#include <fmt/format.h>
#include <unistd.h>

#include <csignal>
#include <iostream>
#include <iterator>

#include "runtime/cli/aliases.h"
#include "runtime/cli/box.h"
#include "runtime/cli/command.h"
#include "runtime/cli/model_folder.h"
#include "runtime/cli/prediction.h"
#include "runtime/engine/engine.h"
#include "runtime/hw/memory_bandwidth.h"
#include "runtime/io/json_document.h"
#include "runtime/text/chat_encoding.h"
#include "runtime/text/completion_parser.h"
#include "runtime/text/utf8.h"

namespace thermocline::cli {
namespace {

std::atomic<bool> g_cancel{false};

// The first Ctrl-C stops the answer, a second one (or one while nothing is generated) leaves.
void on_interrupt(int) {
  if (g_cancel.exchange(true)) _exit(130);
}

struct RunOptions {
  ModelOptions model;
  std::string prompt, system, effort;
  bool chat = false, think = false, raw = false, quiet = false;
  Request request;
  int64_t seed = -1;
};

/// Totals of a run, for the lines at its end.
struct Totals {
  int64_t answers = 0, prefill_tokens = 0, decode_tokens = 0;
  double prefill_seconds = 0, decode_seconds = 0;
  void add(const AnswerStats& s) {
    ++answers;
    prefill_tokens += s.prompt_tokens - s.cached_tokens;
    prefill_seconds += s.prefill_seconds;
    decode_tokens += std::max<int64_t>(0, s.completion_tokens - 1);  // the first one comes out of the prefill
    decode_seconds += s.decode_seconds;
  }
};

/// A model, its text layer and one conversation.
class Session {
 public:
  static Result<std::unique_ptr<Session>> open(const RunOptions& o) {
    auto session = std::make_unique<Session>();
    TC_RETURN_IF_ERROR(o.model.check_architecture());
    TC_ASSIGN(session->tokenizer_, load_tokenizer(o.model.model()));
    if (!o.raw) {
      TC_ASSIGN(session->constants_, of_model(read_prose_constants(o.model.model())));
    }
    TC_ASSIGN(EngineOptions options, o.model.engine_options());
    options.quiet = o.quiet;
    options.cancel = &g_cancel;
    options.calibrated = true;
    TC_ASSIGN(session->engine_, of_model(Engine::open(options)));
    TC_RETURN_IF_ERROR(session->engine_->start(*session->tokenizer_));
    return session;
  }

  Engine& engine() { return *engine_; }
  const Totals& totals() const { return totals_; }

  /// Continues the text itself.
  Status raw(const RunOptions& o, const std::string& text) {
    const int32_t bos = engine_->geometry().bos_token_id;
    TC_ASSIGN(std::vector<int32_t> prompt, tokenizer_->encode(text));
    if (prompt.empty() || prompt[0] != bos) prompt.insert(prompt.begin(), bos);
    Status status = answer(o, prompt, [](const std::string& piece) { std::cout << piece << std::flush; });
    std::cout << std::endl;
    return status;
  }

  /// One user turn. Reasoning is shown between its tags, unless quiet. A turn that fails is forgotten.
  Status turn(const RunOptions& o, const std::string& text) {
    if (messages_.empty() && !o.system.empty())
      messages_.push_back({{"role", "system"}, {"content", to_valid_utf8(o.system)}});
    messages_.push_back({{"role", "user"}, {"content", to_valid_utf8(text)}});
    std::vector<int32_t> prompt;
    if (Status status = make_prompt(o, prompt); !status.ok()) {
      messages_.erase(messages_.size() - 1);
      return status;
    }
    CompletionStream stream(constants_, o.think);
    std::string content, reasoning;
    const auto show = [&](const std::vector<CompletionStream::Event>& events) {
      using Kind = CompletionStream::Event::Kind;
      for (const auto& event : events) {
        if (event.kind == Kind::reasoning) {
          if (!o.quiet) std::cout << (reasoning.empty() ? constants_.thinking_start : "") << event.text;
          reasoning += event.text;
          continue;
        }
        if (event.kind == Kind::content) {
          if (content.empty() && !reasoning.empty() && !o.quiet) std::cout << constants_.thinking_end << "\n";
          content += event.text;
        }
        if (event.kind == Kind::tool_name) std::cout << "\n[call] ";
        std::cout << event.text << (event.kind == Kind::tool_name ? " " : "");
      }
      std::cout << std::flush;
    };
    Status status = answer(o, prompt, [&](const std::string& piece) { show(stream.push(piece)); });
    if (!status.ok() && status.error().code != ErrorCode::cancelled) {
      messages_.erase(messages_.size() - 1);
      return status;
    }
    show(stream.finish(!status.ok()));
    std::cout << std::endl;
    messages_.push_back({{"role", "assistant"}, {"content", content}, {"reasoning_content", reasoning}});
    return status;
  }

 private:
  // What the sequence holds and the new turn behind it, where thinking has left nothing in it that the next prompt
  // leaves out; else, or where the context is full, all messages anew, without the oldest turns if they do not fit.
  Status make_prompt(const RunOptions& o, std::vector<int32_t>& prompt) {
    const int64_t room = engine_->max_context() - kAnswerRoom;
    if (!o.think && !transcript_.empty()) {
      TC_ASSIGN(prompt, encode(o, Json::array({messages_.back()})));
      const auto user = std::find(prompt.begin(), prompt.end(), tokenizer_->id_of("<｜User｜>").value_or(-1));
      prompt.erase(prompt.begin(), user);
      prompt.insert(prompt.begin(), transcript_.begin(), transcript_.end());
      if (user != prompt.end() && static_cast<int64_t>(prompt.size()) <= room) return {};
    }
    TC_ASSIGN(prompt, encode(o, messages_));
    const size_t first = messages_[0]["role"] == "system" ? 1 : 0;
    while (static_cast<int64_t>(prompt.size()) > room && messages_.size() > first + 1) {
      if (!o.quiet) fmt::print(stderr, "(the context is full: the oldest turn is left out)\n");
      messages_.erase(first);
      while (messages_.size() > first + 1 && messages_[first]["role"] != "user") messages_.erase(first);
      TC_ASSIGN(prompt, encode(o, messages_));
    }
    return {};
  }

  Result<std::vector<int32_t>> encode(const RunOptions& o, const Json& messages) const {
    ChatOptions options;
    options.thinking = o.think;
    options.reasoning_effort = o.effort;
    TC_ASSIGN(const RenderedPrompt prompt, render_generation_prompt(constants_, messages, options));
    return tokenizer_->encode(prompt.text, prompt.literal);
  }

  // Errors: cancelled after Ctrl-C, or when nobody reads standard output any more.
  Status answer(const RunOptions& o, const std::vector<int32_t>& prompt,
                const std::function<void(const std::string&)>& show) {
    g_cancel = false;
    Request request = copy_of(o.request);
    request.prompt = prompt;
    TC_ASSIGN(const std::shared_ptr<RequestHandle> handle, engine_->submit(std::move(request)));
    transcript_ = prompt;
    Status status;
    TokenStream& stream = handle->stream();
    while (!stream.finished()) {
      stream.wait_for(std::chrono::milliseconds(50));
      if (g_cancel || !std::cout) handle->cancel();
      for (TokenEvent& event : stream.take()) {
        if (event.id >= 0) transcript_.push_back(event.id);
        if (!event.text.empty()) show(event.text);
        if (event.kind != TokenEvent::Kind::finish) continue;
        totals_.add(event.stats);
        if (event.reason == FinishReason::error) status = std::move(event.error);
        if (event.reason == FinishReason::cancelled) status = Error{ErrorCode::cancelled, "cancelled"};
      }
    }
    if (const int32_t eos = engine_->geometry().eos_token_id; transcript_.back() != eos) transcript_.push_back(eos);
    return status;
  }

  static Request copy_of(const Request& o) {
    Request request;
    request.sampling = o.sampling;
    request.max_tokens = o.max_tokens;
    request.stop = o.stop;
    request.ignore_eos = o.ignore_eos;
    request.skip_special_tokens = false;
    return request;
  }

  static constexpr int64_t kAnswerRoom = 64;  // tokens that an answer should have at least

  std::unique_ptr<Tokenizer> tokenizer_;
  ProseConstants constants_;
  std::unique_ptr<Engine> engine_;
  std::vector<int32_t> transcript_;  // of the turns so far, each with its EOS
  Json messages_ = Json::array();
  Totals totals_;
};

// A line that cannot be answered says so, and the conversation goes on.
Status chat(Session& session, const RunOptions& o) {
  const bool terminal = isatty(STDIN_FILENO) == 1;
  std::string line;
  while (true) {
    if (terminal) fmt::print(stderr, "> ");
    g_cancel = true;  // Ctrl-C at the prompt leaves at once
    if (!std::getline(std::cin, line)) break;
    g_cancel = false;
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    Status status = session.turn(o, line);
    if (status.ok() || status.error().code == ErrorCode::cancelled) continue;
    if (status.error().code != ErrorCode::context_length && status.error().code != ErrorCode::invalid_argument)
      return status;
    fmt::print(stderr, "error: {}\n", status.error().message);
  }
  if (terminal) fmt::print(stderr, "\n");
  return {};
}

// What was foreseen of a prompt and an answer of this length: by a stored profile, else by the STREAM read alone.
void print_predicted(Session& session, double stream_read, const Prediction& measured) {
  std::optional<sched::MachineProfile> box;
  if (session.engine().predictable()) box = session.engine().options().machine;
  if (!box && (stream_read <= 0 || session.engine().gpu_step())) return;
  if (!box) box = profile_of(session.engine(), stream_read);
  const Totals& t = session.totals();
  if (t.answers == 0) return;
  const double prompt = static_cast<double>(t.prefill_tokens) / static_cast<double>(t.answers),
               answer = static_cast<double>(t.decode_tokens) / static_cast<double>(t.answers);
  const Prediction predicted = predict(session.engine(), *box, prompt, 1, prompt + answer / 2);
  fmt::print(stderr, "{}\n", prediction_line(predicted, measured));
  if (const std::string line = forecast_line(session.engine().stats().forecast); !line.empty())
    fmt::print(stderr, "{}\n", line);
}

void print_totals(Session& session) {
  const Totals& t = session.totals();
  const auto rate = [](int64_t tokens, double seconds) {
    return seconds > 0 ? static_cast<double>(tokens) / seconds : 0.0;
  };
  const double bytes = static_cast<double>(session.engine().weights().bytes_per_token(session.engine().geometry()));
  const double prefill = rate(t.prefill_tokens, t.prefill_seconds), decode = rate(t.decode_tokens, t.decode_seconds),
               bandwidth = decode * bytes;
  const uint64_t memory = peak_resident_bytes();  // before the measurement below takes its own
  Result<StreamRead> stream = StreamRead::create(session.engine().pool());
  const double peak = stream ? stream->measure() : 0;
  fmt::print(stderr, "prefill {} tokens, {:.1f} t/s; decode {} tokens, {:.1f} t/s", t.prefill_tokens, prefill,
             t.decode_tokens, decode);
  if (peak > 0)
    fmt::print(stderr, ", {:.2f} GB/s of weights = {:.0f} % of the STREAM-read peak of {:.1f} GB/s{}", bandwidth / 1e9,
               100 * bandwidth / peak, peak / 1e9, stream->note().empty() ? "" : " (" + stream->note() + ")");
  fmt::print(stderr, "; {:.0f} MiB of memory at most\n", static_cast<double>(memory) / (1 << 20));
  if (const std::string line = expert_line(session.engine().stats().experts); !line.empty())
    fmt::print(stderr, "{}\n", line);
  print_predicted(session, peak, {.prefill = prefill, .decode = decode});
}

Status run(RunOptions& o) {
  if (o.raw && (o.chat || o.think || !o.system.empty()))
    return invalid("--raw continues the prompt itself: --chat, --think and --system do not go with it");
  if (o.seed >= 0) o.request.sampling.seed = static_cast<uint64_t>(o.seed), o.request.sampling.has_seed = true;
  for (const std::string& stop : o.request.stop)
    if (stop.empty()) return invalid("--stop should not be empty");
  TC_RETURN_IF_ERROR(o.request.sampling.check());
  std::string prompt = o.prompt;
  if (!o.chat && prompt.empty()) {
    if (isatty(STDIN_FILENO) == 1) return invalid("nothing to answer: give --prompt, --chat or text on standard input");
    prompt.assign(std::istreambuf_iterator<char>(std::cin), {});
    if (!o.raw && prompt.ends_with("\n")) prompt.pop_back();
  }
  struct sigaction action {};
  action.sa_handler = on_interrupt;
  sigaction(SIGINT, &action, nullptr);
  TC_ASSIGN(const std::unique_ptr<Session> session, Session::open(o));
  if (const auto& box = session->engine().options().machine; session->engine().predictable() && !o.quiet)
    fmt::print(stderr, "{}\n", prediction_line(predict(session->engine(), *box, 512, 1, 1024)));
  if (g_cancel) return Error{ErrorCode::cancelled, "cancelled"};
  Status status = o.chat ? chat(*session, o) : o.raw ? session->raw(o, prompt) : session->turn(o, prompt);
  if (!o.quiet && (status.ok() || status.error().code == ErrorCode::cancelled)) print_totals(*session);
  return status;
}

}  // namespace

void add_run(CLI::App& app, Outcome& outcome) {
  auto o = std::make_shared<RunOptions>();
  CLI::App* command = app.add_subcommand("run", "Answer a prompt, chat, or continue a text");
  o->model.add_to(*command);
  SamplingParams& s = o->request.sampling;
  command->add_option("--prompt,-p", o->prompt, "The user's message; without it and --chat, standard input");
  command->add_flag("--chat", o->chat, "A conversation, one message a line");
  command->add_option("--system", o->system, "System message");
  command->add_flag("--think", o->think, "Let the model think first");
  command->add_option("--reasoning-effort", o->effort, "With --think: low, high or max");
  command->add_flag("--raw", o->raw, "Continue the prompt itself, without the chat encoding");
  command
      ->add_option("--max-tokens,-n", o->request.max_tokens, "Tokens of the answer at most; -1: what the context holds")
      ->capture_default_str();
  command->add_option("--temperature", s.temperature, "0: the most likely token")->capture_default_str();
  command->add_option("--top-p", s.top_p, "Keep the most likely tokens up to this mass")->capture_default_str();
  command->add_option("--top-k", s.top_k, "Keep this many tokens; 0: all")->capture_default_str();
  command->add_option("--min-p", s.min_p, "Keep tokens with this share of the best one's probability")
      ->capture_default_str();
  command->add_option("--seed", o->seed, "Seed of the sampler; -1: a new one every time")->capture_default_str();
  command->add_option("--repetition-penalty", s.repetition_penalty, "Divisor for tokens seen before")
      ->capture_default_str();
  command->add_option("--presence-penalty", s.presence_penalty, "Subtracted once for tokens of the answer")
      ->capture_default_str();
  command->add_option("--frequency-penalty", s.frequency_penalty, "Subtracted for every time a token was in the answer")
      ->capture_default_str();
  command->add_option("--stop", o->request.stop, "End the answer before this text; may be given again")
      ->allow_extra_args(false);
  command->add_flag("--ignore-eos", o->request.ignore_eos, "Go on after the end-of-sentence token");
  command->add_flag("--quiet,-q", o->quiet, "Print only the answer");
  add_aliases(*command, o->model.settings());
  command->callback([o, &outcome] { outcome.exit_code = exit_code_of(run(*o)); });
}

}  // namespace thermocline::cli
