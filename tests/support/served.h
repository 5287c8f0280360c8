// An engine on the demo model with its loop running, for tests of the step loop.
#pragma once
#include <condition_variable>
#include <thread>

#include "tests/support/answers.h"

namespace thermocline::test {

inline const char* const kQuestions[] = {
    "What is the capital of Norway?", "Tell me a story about a fox.", "What is 3 + 4?",
    "What is the opposite of hot?",   "What is a thermocline?",       "Who are you?"};

/// An engine on the demo model with its loop running.
struct Served {
  explicit Served(ModelSetup setup = {}, LoopOptions options = {}) {
    setup.folder = demo_model();
    tokenizer = Tokenizer::load(setup.folder).value();
    engine = open_engine(setup);
    const Status started = engine->start(*tokenizer, options);
    TC_CHECK(started.ok(), started.ok() ? "" : started.error().message);
  }
  Request request(const std::string& question, int64_t max_tokens = 24) const {
    return request_of(*tokenizer, chat_prompt(question), max_tokens);
  }
  std::shared_ptr<RequestHandle> submit(Request request) {
    auto handle = engine->submit(std::move(request));
    TC_CHECK(handle.has_value(), handle ? "" : handle.error().message);
    return *handle;
  }
  /// Blocks the step thread at a layer until release(): "a step is running" without a clock.
  void hold_at_layer(int layer) {
    engine->step().set_observer([this, layer](int at, TensorView<const float, 3>) {
      if (at != layer) return;
      std::unique_lock lock(mutex);
      held = true;
      changed.notify_all();
      changed.wait(lock, [&] { return released; });
    });
  }
  void wait_until_held() {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return held; });
  }
  /// What the loop counted, once it has nothing more to do: answers are told before they are counted.
  EngineStats settled(int64_t choices) {
    EngineStats stats = engine->stats();
    for (; stats.finished + stats.cancelled + stats.failed < choices || stats.running > 0; stats = engine->stats())
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    return stats;
  }
  void release() {
    const std::lock_guard lock(mutex);
    released = true;
    changed.notify_all();
  }

  std::mutex mutex;
  std::condition_variable changed;
  bool held = false, released = false;
  std::unique_ptr<Tokenizer> tokenizer;
  std::unique_ptr<Engine> engine;  // ends first
};

}  // namespace thermocline::test
