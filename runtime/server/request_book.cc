#include "runtime/server/request_book.h"

namespace thermocline::server {
namespace {

constexpr size_t kMostRecent = 50;

bool is_probe(const std::string& path) {
  for (const char* probe : {"/health", "/v1/health", "/ping", "/livez", "/readyz", "/metrics"})
    if (path.starts_with(probe)) return true;
  return false;
}

}  // namespace

void RequestBook::began(const AccessEntry& entry, std::weak_ptr<const RequestInProgress> request) {
  const std::lock_guard lock(mutex_);
  active_.emplace(entry.id, Entry{entry.key, entry.path, Clock::now(), std::move(request)});
}

// Probes are not kept: they would be most of both.
void RequestBook::ended(const AccessEntry& entry) {
  if (observer_) observer_(entry);
  if (is_probe(entry.path)) return;
  log_.write(entry);
  const std::lock_guard lock(mutex_);
  const auto [begin, end] = active_.equal_range(entry.id);
  for (auto it = begin; it != end; ++it)
    if (it->second.path == entry.path) {
      active_.erase(it);
      break;
    }
  if (entry.method != "POST") return;  // a page that looks every second would be all there is
  recent_.push_front({entry, Clock::now()});
  if (recent_.size() > kMostRecent) recent_.pop_back();
}

std::vector<RequestBook::Active> RequestBook::active() const {
  std::vector<std::pair<Active, std::shared_ptr<const RequestInProgress>>> found;
  {
    const std::lock_guard lock(mutex_);
    for (const auto& [id, e] : active_)
      if (auto request = e.request.lock()) {
        const double seconds = std::chrono::duration<double>(Clock::now() - e.at).count();
        found.emplace_back(Active{id, e.key, e.path, seconds}, std::move(request));
      }
  }
  std::vector<Active> active;  // looked at without the lock: the last owner may end in here
  for (auto& [entry, request] : found) {
    entry.look = request->look();
    active.push_back(std::move(entry));
  }
  return active;
}

std::vector<RequestBook::Recent> RequestBook::recent() const {
  const std::lock_guard lock(mutex_);
  return {recent_.begin(), recent_.end()};
}

}  // namespace thermocline::server
