#include "runtime/kv/prefix_cache.h"

#include <algorithm>
#include <cmath>

namespace thermocline {
namespace {

// A conversation goes on from its end; what it grew from is asked for by others only.
constexpr double kSuperseded = 1.0 / 16;

}  // namespace

PrefixCache::PrefixCache(KvStore& store, Options options)
    : store_(store), options_(std::move(options)), secret_(options_.disk ? options_.disk->secret() : PrefixSecret()) {
  if (enabled()) store_.set_reclaim([this] { return evict(now_ns_); });
}

PrefixCache::~PrefixCache() {
  flush();  // it writes into pages
  if (enabled()) store_.set_reclaim(nullptr);
}

PrefixCache::Entry* PrefixCache::longest(PrefixKeys& keys, std::span<const int32_t> ids) const {
  if (entries_.empty()) return nullptr;
  for (int64_t pages = static_cast<int64_t>(ids.size()) / kPageTokens; pages >= 0; --pages) {
    const auto found = by_name_.find(keys.of(ids, pages));
    if (found == by_name_.end()) continue;
    const std::span rest = ids.subspan(static_cast<size_t>(pages * kPageTokens));
    Entry* best = nullptr;
    for (const Entries::iterator& entry : found->second) {
      const std::vector<int32_t>& tail = entry->tail;
      if (tail.size() <= rest.size() && std::equal(tail.begin(), tail.end(), rest.begin()) &&
          (!best || tail.size() > best->tail.size()))
        best = &*entry;
    }
    if (best) return best;
  }
  return nullptr;
}

int64_t PrefixCache::find(PrefixKeys& keys, std::span<const int32_t> ids) const {
  const Entry* const entry = longest(keys, ids);
  return entry ? entry->checkpoint.length() : 0;
}

Result<std::unique_ptr<SequenceKv>> PrefixCache::resume(PrefixKeys& keys, std::span<const int32_t> ids,
                                                        int64_t now_ns) {
  now_ns_ = std::max(now_ns_, now_ns);
  if (!enabled()) return std::unique_ptr<SequenceKv>();
  ++counted_.lookups;
  Entry* const entry = longest(keys, ids);
  if (!entry) return std::unique_ptr<SequenceKv>();
  TC_ASSIGN(std::unique_ptr<SequenceKv> sequence, store_.restore(entry->checkpoint));
  entry->used_ns = now_ns_;
  ++entry->hits;
  ++counted_.hits;
  counted_.saved_tokens += entry->checkpoint.length();
  return sequence;
}

Status PrefixCache::keep(PrefixKeys& keys, std::span<const int32_t> ids, const SequenceKv& sequence, int64_t length,
                         int64_t now_ns, bool durable) {
  now_ns_ = std::max(now_ns_, now_ns);
  if (!enabled() || length < 1) return {};
  const std::span<const int32_t> prefix = ids.first(static_cast<size_t>(length));
  Entry* const parent = longest(keys, prefix);
  if (parent && parent->checkpoint.length() == length) {
    parent->used_ns = now_ns_;
    return save(keys, prefix, *parent, durable);
  }
  TC_ASSIGN(KvCheckpoint checkpoint, store_.checkpoint(sequence, length));
  if (checkpoint.bytes() > options_.bytes) return {};
  const int64_t whole = length / kPageTokens;
  int64_t own = static_cast<int64_t>(checkpoint.pages().size());
  if (parent) {
    own -= std::min(own, parent->checkpoint.length() / kPageTokens);
    parent->superseded = true;
  }
  Entry entry{std::move(checkpoint),
              keys.of(prefix, whole),
              {prefix.begin() + whole * kPageTokens, prefix.end()},
              now_ns_,
              0,
              own,
              false};
  Status saved = save(keys, prefix, entry, durable);
  insert(std::move(entry));
  return saved;
}

void PrefixCache::insert(Entry entry) {
  bytes_ += entry.checkpoint.bytes();
  entries_.push_back(std::move(entry));
  by_name_[entries_.back().name].push_back(std::prev(entries_.end()));
  while (bytes_ > options_.bytes) evict(now_ns_);
}

double PrefixCache::worth(const Entry& entry, int64_t now_ns) const {
  const double age = static_cast<double>(now_ns - entry.used_ns) / static_cast<double>(options_.half_life_ns);
  const double again = std::exp2(-age) * static_cast<double>(1 + entry.hits) * (entry.superseded ? kSuperseded : 1);
  const int64_t bytes = entry.checkpoint.bytes() + entry.own_pages * store_.layout().compressed_page_bytes();
  return static_cast<double>(entry.checkpoint.length()) * again / static_cast<double>(bytes);
}

bool PrefixCache::evict(int64_t now_ns) {
  if (entries_.empty()) return false;
  auto least = entries_.begin();
  double least_worth = worth(*least, now_ns);
  for (auto entry = std::next(least); entry != entries_.end(); ++entry)
    if (const double w = worth(*entry, now_ns); w < least_worth) {
      least = entry;
      least_worth = w;
    }
  ++counted_.evictions;
  drop(least);
  return true;
}

PrefixCacheFlush PrefixCache::clear() {
  const PrefixCacheStats before = stats();
  while (!entries_.empty()) drop(entries_.begin());
  const int64_t pages = before.cached_pages - store_.cached_pages();
  return {before.checkpoints, before.checkpoint_bytes, pages, pages * store_.layout().compressed_page_bytes()};
}

void PrefixCache::drop(Entries::iterator entry) {
  const auto found = by_name_.find(entry->name);
  std::erase(found->second, entry);
  if (found->second.empty()) by_name_.erase(found);
  bytes_ -= entry->checkpoint.bytes();
  entries_.erase(entry);
}

PrefixCacheStats PrefixCache::stats() const {
  PrefixCacheStats stats = counted_;
  stats.checkpoints = static_cast<int64_t>(entries_.size());
  stats.checkpoint_bytes = bytes_;
  stats.cached_pages = store_.cached_pages();
  if (options_.disk) stats.disk = options_.disk->stats();
  return stats;
}

}  // namespace thermocline
