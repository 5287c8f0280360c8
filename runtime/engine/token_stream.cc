#include "runtime/engine/token_stream.h"

#include "runtime/base/check.h"

namespace thermocline {

bool TokenStream::room(size_t events) const {
  const std::lock_guard lock(mutex_);
  return events_.size() + events <= room_;
}

void TokenStream::push(TokenEvent event) { put(std::move(event), false); }

void TokenStream::finish(TokenEvent event) {
  event.kind = TokenEvent::Kind::finish;
  put(std::move(event), true);
}

void TokenStream::finish_all(const Error& error) {
  for (size_t choice = 0; choice < ended_.size(); ++choice) {
    TokenEvent event;
    event.choice = static_cast<int>(choice);
    event.reason = FinishReason::error;
    event.error = error;
    finish(std::move(event));
  }
}

void TokenStream::put(TokenEvent event, bool last) {
  std::function<void()> ready;
  {
    const std::lock_guard lock(mutex_);
    const size_t choice = static_cast<size_t>(event.choice);
    if (ended_[choice]) return;
    TC_CHECK(last || events_.size() < room_);
    ended_[choice] = last;
    open_ -= last;
    if (events_.empty()) ready = ready_;
    events_.push_back(std::move(event));
  }
  changed_.notify_all();
  if (ready) ready();
}

std::vector<TokenEvent> TokenStream::take() {
  const std::lock_guard lock(mutex_);
  std::vector<TokenEvent> taken(std::make_move_iterator(events_.begin()), std::make_move_iterator(events_.end()));
  events_.clear();
  return taken;
}

bool TokenStream::wait_for(std::chrono::milliseconds time) {
  std::unique_lock lock(mutex_);
  return changed_.wait_for(lock, time, [&] { return !events_.empty() || open_ == 0; });
}

bool TokenStream::ended() const {
  const std::lock_guard lock(mutex_);
  return open_ == 0;
}

bool TokenStream::finished() const {
  const std::lock_guard lock(mutex_);
  return open_ == 0 && events_.empty();
}

void TokenStream::on_ready(std::function<void()> ready) {
  std::function<void()> now;
  {
    const std::lock_guard lock(mutex_);
    ready_ = std::move(ready);
    if (!events_.empty()) now = ready_;
  }
  if (now) now();
}

}  // namespace thermocline
