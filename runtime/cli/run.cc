// `thermocline run`: a prompt, a chat or a raw continuation on the terminal.
#include <fmt/format.h>
#include <unistd.h>

#include <csignal>
#include <iostream>
#include <iterator>

#include "runtime/cli/command.h"
#include "runtime/engine/generation.h"
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
  GenerationRequest request;
  int64_t seed = -1;
};

/// Totals of a run, for the lines at its end.
struct Totals {
  int64_t prefill_tokens = 0, decode_tokens = 0;
  double prefill_seconds = 0, decode_seconds = 0;
  void add(const GenerationResult& r) {
    prefill_tokens += r.prefilled_tokens;
    prefill_seconds += r.prefill_seconds;
    decode_tokens += std::max<int64_t>(0, r.completion_tokens - 1);  // the first one comes out of the prefill
    decode_seconds += r.decode_seconds;
  }
};

/// A model, its text layer and one conversation.
class Session {
 public:
  static Result<std::unique_ptr<Session>> open(const RunOptions& o) {
    auto session = std::make_unique<Session>();
    TC_ASSIGN(session->tokenizer_, Tokenizer::load(o.model.model()));
    if (!o.raw) {
      TC_ASSIGN(session->constants_, read_prose_constants(o.model.model()));
    }
    TC_ASSIGN(EngineOptions options, o.model.engine_options());
    options.quiet = o.quiet;
    TC_ASSIGN(session->engine_, Engine::open(options));
    return session;
  }

  Engine& engine() { return *engine_; }
  const Totals& totals() const { return totals_; }

  /// Continues the text itself.
  Status raw(const RunOptions& o, std::string text) {
    const ModelGeometry& g = engine_->geometry();
    GenerationRequest request = o.request;
    TC_ASSIGN(request.prompt, tokenizer_->encode(text));
    if (request.prompt.empty() || request.prompt[0] != g.bos_token_id)
      request.prompt.insert(request.prompt.begin(), g.bos_token_id);
    TC_ASSIGN(const GenerationResult result, answer(request, [](const std::string& piece, int32_t) {
                std::cout << piece << std::flush;
                return static_cast<bool>(std::cout);
              }));
    std::cout << std::endl;
    return result.reason == FinishReason::cancelled ? Status(Error{ErrorCode::cancelled, "cancelled"}) : Status();
  }

  /// One user turn. Reasoning is shown between its tags, unless quiet.
  Status turn(const RunOptions& o, const std::string& text) {
    if (messages_.empty() && !o.system.empty()) messages_.push_back({{"role", "system"}, {"content", o.system}});
    messages_.push_back({{"role", "user"}, {"content", text}});
    TC_ASSIGN(const RenderedPrompt prompt, render_chat(constants_, messages_, {o.think, o.effort, true}));
    GenerationRequest request = o.request;
    TC_ASSIGN(request.prompt, tokenizer_->encode(prompt.text, prompt.literal));
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
    TC_ASSIGN(const GenerationResult result, answer(request, [&](const std::string& piece, int32_t) {
                show(stream.push(piece));
                return static_cast<bool>(std::cout);
              }));
    show(stream.finish());
    std::cout << std::endl;
    messages_.push_back({{"role", "assistant"}, {"content", content}, {"reasoning_content", reasoning}});
    return result.reason == FinishReason::cancelled ? Status(Error{ErrorCode::cancelled, "cancelled"}) : Status();
  }

 private:
  // A prompt that begins with everything the sequence holds continues it; any other starts afresh.
  Result<GenerationResult> answer(const GenerationRequest& request, const TextSink& sink) {
    const bool continues = sequence_ && history_.size() < request.prompt.size() &&
                           std::equal(history_.begin(), history_.end(), request.prompt.begin());
    if (!continues) {
      sequence_.reset();
      TC_ASSIGN(sequence_, engine_->new_sequence());
    }
    g_cancel = false;
    Result<GenerationResult> result = generate(*engine_, *tokenizer_, *sequence_, request, g_cancel, sink);
    if (!result) {
      sequence_.reset();
      return result;
    }
    history_ = request.prompt;
    history_.insert(history_.end(), result->ids.begin(), result->ids.end());
    history_.resize(static_cast<size_t>(sequence_->length()));  // the last token was chosen, not yet fed
    totals_.add(*result);
    return result;
  }

  std::unique_ptr<Tokenizer> tokenizer_;
  ProseConstants constants_;
  std::unique_ptr<Engine> engine_;
  std::unique_ptr<Sequence> sequence_;
  std::vector<int32_t> history_;
  Json messages_ = Json::array();
  Totals totals_;
};

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
    if (!status.ok() && status.error().code != ErrorCode::cancelled) return status;
  }
  if (terminal) fmt::print(stderr, "\n");
  return {};
}

void print_totals(Session& session) {
  const Totals& t = session.totals();
  const auto rate = [](int64_t tokens, double seconds) {
    return seconds > 0 ? static_cast<double>(tokens) / seconds : 0.0;
  };
  const double bytes = static_cast<double>(session.engine().weights().bytes_per_token(session.engine().geometry()));
  const double decode = rate(t.decode_tokens, t.decode_seconds), bandwidth = decode * bytes;
  const uint64_t memory = peak_resident_bytes();  // before the measurement below takes its own
  Result<StreamRead> stream = StreamRead::create(session.engine().pool());
  const double peak = stream ? stream->measure() : 0;
  fmt::print(stderr, "prefill {} tokens, {:.1f} t/s; decode {} tokens, {:.1f} t/s", t.prefill_tokens,
             rate(t.prefill_tokens, t.prefill_seconds), t.decode_tokens, decode);
  if (peak > 0)
    fmt::print(stderr, ", {:.2f} GB/s of weights = {:.0f} % of the STREAM-read peak of {:.1f} GB/s", bandwidth / 1e9,
               100 * bandwidth / peak, peak / 1e9);
  fmt::print(stderr, "; {:.0f} MiB of memory at most\n", static_cast<double>(memory) / (1 << 20));
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
  if (g_cancel) return Error{ErrorCode::cancelled, "cancelled"};
  Status status = o.chat  ? chat(*session, o)
                  : o.raw ? session->raw(o, prompt)
                          : session->turn(o, to_valid_utf8(prompt));
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
  command->callback([o, &outcome] { outcome.exit_code = exit_code_of(run(*o)); });
}

}  // namespace thermocline::cli
