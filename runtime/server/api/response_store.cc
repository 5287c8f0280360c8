#include "runtime/server/api/response_store.h"

namespace thermocline::server {

void ResponseStore::put(const std::string& owner, const std::string& id, Kept kept) {
  const std::lock_guard lock(mutex_);
  put_locked(owner, id, std::move(kept));
}

void ResponseStore::update(const std::string& owner, const std::string& id, Kept kept) {
  const std::lock_guard lock(mutex_);
  if (find_locked(owner, id) != entries_.end()) put_locked(owner, id, std::move(kept));
}

void ResponseStore::put_locked(const std::string& owner, const std::string& id, Kept kept) {
  const size_t bytes = kept.response.size() + kept.messages.size();
  if (const auto old = find_locked(owner, id); old != entries_.end()) erase_locked(old);
  if (bytes > caps_.bytes || by_id_.contains(id)) return;
  entries_.push_front({owner, id, std::move(kept), bytes});
  by_id_[id] = entries_.begin();
  bytes_ += bytes;
  while (bytes_ > caps_.bytes || entries_.size() > caps_.responses) erase_locked(std::prev(entries_.end()));
}

std::optional<ResponseStore::Kept> ResponseStore::find(const std::string& owner, const std::string& id) {
  const std::lock_guard lock(mutex_);
  const auto entry = find_locked(owner, id);
  if (entry == entries_.end()) return std::nullopt;
  entries_.splice(entries_.begin(), entries_, entry);
  return entry->kept;
}

bool ResponseStore::erase(const std::string& owner, const std::string& id) {
  const std::lock_guard lock(mutex_);
  const auto entry = find_locked(owner, id);
  if (entry == entries_.end()) return false;
  erase_locked(entry);
  return true;
}

ResponseStore::Entries::iterator ResponseStore::find_locked(const std::string& owner, const std::string& id) {
  const auto found = by_id_.find(id);
  return found == by_id_.end() || found->second->owner != owner ? entries_.end() : found->second;
}

void ResponseStore::erase_locked(Entries::iterator entry) {
  bytes_ -= entry->bytes;
  by_id_.erase(entry->id);
  entries_.erase(entry);
}

}  // namespace thermocline::server
