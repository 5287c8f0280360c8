// What the prefix cache does with a disk: saves what it keeps, reads back what somebody asks for again.
#include <algorithm>
#include <cstring>
#include <unordered_map>
#include <utility>

#include "runtime/kv/prefix_cache.h"

namespace thermocline {
namespace {

constexpr int64_t kLeastFetched = 16;  // tokens: what is less is computed as soon
constexpr size_t kMostArriving = 8;
constexpr size_t kSavedTogether = 4 << 20;  // bytes: the disk writes them while the next are copied

}  // namespace

/// A prefix that the disk has: so many whole pages, and a tail.
struct PrefixCache::OnDisk {
  int64_t pages = 0, tail = 0;
  PrefixName name{};
  int64_t length() const { return pages * kPageTokens + tail; }
};

// The longest that is longer than what is kept. Its first pages may be those of what is kept; the others are there.
std::optional<PrefixCache::OnDisk> PrefixCache::longest_on_disk(PrefixKeys& keys, std::span<const int32_t> ids,
                                                                const Entry* kept) const {
  const NvmeTier& disk = *options_.disk;
  const int64_t have = kept ? kept->checkpoint.length() : 0;
  const bool paged = store_.layout().compressed_page_bytes() > 0;
  int64_t pages = have / kPageTokens;
  const int64_t all = static_cast<int64_t>(ids.size()) / kPageTokens;
  while (pages < all && (!paged || disk.has(keys.of(ids, pages + 1)))) ++pages;
  for (; pages >= have / kPageTokens; --pages) {
    const std::span rest = ids.subspan(static_cast<size_t>(pages * kPageTokens));
    OnDisk best;
    std::unordered_map<int64_t, PrefixName> names;  // of our own tails, by length
    for (const KvLog::Tail& tail : disk.checkpoints(keys.of(ids, pages))) {
      if (tail.tokens > static_cast<int64_t>(rest.size()) || tail.tokens >= kPageTokens ||
          pages * kPageTokens + tail.tokens <= std::max(have, best.length()))
        continue;
      const auto [name, is_new] = names.try_emplace(tail.tokens);
      if (is_new) name->second = secret_.with_tail(keys.of(ids, pages), rest.first(static_cast<size_t>(tail.tokens)));
      if (name->second == tail.name) best = {pages, tail.tokens, tail.name};
    }
    if (best.length() > 0) return best;
  }
  return {};
}

// Where the bytes of a page are read to: itself, or beside it.
Pieces<std::byte> PrefixCache::place(Arriving& arriving, int32_t page) const {
  const auto bytes = static_cast<size_t>(store_.layout().compressed_page_bytes());
  if (std::byte* const here = store_.memory().place(KvPool::compressed, page)) return {{here, bytes}};
  arriving.beside.emplace_back(page, std::vector<std::byte>(bytes));
  return {arriving.beside.back().second};
}

std::shared_ptr<const PrefixArrival> PrefixCache::fetch(PrefixKeys& keys, std::span<const int32_t> ids,
                                                        int64_t now_ns) {
  now_ns_ = std::max(now_ns_, now_ns);
  if (!enabled() || !options_.disk) return nullptr;
  const Entry* const kept = longest(keys, ids);
  const std::optional<OnDisk> found = longest_on_disk(keys, ids, kept);
  if (!found || found->length() < (kept ? kept->checkpoint.length() : 0) + kLeastFetched) return nullptr;
  for (const Arriving& arriving : arriving_)
    if (arriving.name == found->name) return arriving.arrival;
  // Blank pages are nobody else's until they are filled: a quarter of them at most, or one prefix.
  int64_t blank_pages = pages_of(found->length(), kPageTokens);
  for (const Arriving& arriving : arriving_) blank_pages += static_cast<int64_t>(arriving.checkpoint.pages().size());
  if (arriving_.size() >= kMostArriving || (!arriving_.empty() && blank_pages > store_.compressed_pages() / 4))
    return arriving_.front().arrival;
  std::vector<int32_t> first;  // pages that are kept
  if (kept) first = kept->checkpoint.pages();
  if (kept && !first.empty()) first.resize(static_cast<size_t>(kept->checkpoint.length() / kPageTokens));
  Result<KvCheckpoint> blank = store_.blank(found->length(), first);  // may let go of `kept`
  if (!blank || blank->bytes() > options_.bytes) return nullptr;
  Arriving arriving{.name = found->name,
                    .parent = keys.of(ids, found->pages),
                    .begun_ns = now_ns_,
                    .tail = {},
                    .checkpoint = std::move(*blank),
                    .beside = {}};
  const std::span tail = ids.subspan(static_cast<size_t>(found->pages * kPageTokens), static_cast<size_t>(found->tail));
  arriving.tail.assign(tail.begin(), tail.end());
  const std::vector<int32_t>& pages = arriving.checkpoint.pages();
  arriving.beside.reserve(pages.size());
  std::vector<KvRead> reads;
  std::vector<PrefixName> names;
  const int64_t whole = std::min(found->pages, static_cast<int64_t>(pages.size()));
  for (int64_t i = 0; i < whole; ++i) {
    names.push_back(keys.of(ids, i + 1));
    if (i >= static_cast<int64_t>(first.size()))
      reads.push_back({names.back(), place(arriving, pages[static_cast<size_t>(i)])});
  }
  names.push_back(found->name);
  Pieces<std::byte> own = {arriving.checkpoint.image()};
  if (whole < static_cast<int64_t>(pages.size())) own.push_back(place(arriving, pages.back())[0]);
  reads.push_back({found->name, std::move(own)});
  options_.disk->touch(std::move(names));
  const auto it = arriving_.insert(arriving_.end(), std::move(arriving));  // what is read into stays where it is
  options_.disk->read(std::move(reads), [this, it](bool read) {
    Arriving here = std::move(*it);
    arriving_.erase(it);
    arrive(here, read);
  });
  ++counted_.fetches;
  return it->arrival;
}

bool PrefixCache::holds_blank_pages(int64_t now_ns) const {
  return std::any_of(arriving_.begin(), arriving_.end(), [&](const Arriving& arriving) {
    return std::chrono::nanoseconds(now_ns - arriving.begun_ns) < kPatience;
  });
}

// It is kept like any other from now on, if all of it could be read.
void PrefixCache::arrive(Arriving& arriving, bool read) {
  arriving.arrival->done = true;
  for (const auto& [page, bytes] : arriving.beside)
    read = read && store_.memory().write(KvPool::compressed, page, bytes.data()).ok();
  if (!read) {
    ++counted_.failed_fetches;
    return;
  }
  const auto found = by_name_.find(arriving.parent);
  if (found != by_name_.end() && std::any_of(found->second.begin(), found->second.end(),
                                             [&](const auto& entry) { return entry->tail == arriving.tail; }))
    return;  // somebody has computed it meanwhile
  arriving.checkpoint.settle();
  counted_.fetched_tokens += arriving.checkpoint.length();
  const auto pages = static_cast<int64_t>(arriving.checkpoint.pages().size());
  insert({std::move(arriving.checkpoint), arriving.parent, std::move(arriving.tail), now_ns_, 0, pages, false});
}

void PrefixCache::poll(int64_t now_ns) {
  now_ns_ = std::max(now_ns_, now_ns);
  if (options_.disk) options_.disk->poll();
}

void PrefixCache::flush() {
  while (options_.disk && !arriving_.empty()) options_.disk->flush();
}

// A copy of every page that the disk does not have, and of the checkpoint if it is to outlive this process: a step may
// write on, and pages go to whoever needs them, before the disk has come to it.
Status PrefixCache::save(PrefixKeys& keys, std::span<const int32_t> ids, Entry& entry, bool durable) {
  if (!options_.disk) return {};
  NvmeTier& disk = *options_.disk;
  KvCheckpoint& checkpoint = entry.checkpoint;
  const auto page_bytes = static_cast<size_t>(store_.layout().compressed_page_bytes());
  const std::vector<int32_t>& pages = checkpoint.pages();
  const int64_t whole = std::min(checkpoint.length() / kPageTokens, static_cast<int64_t>(pages.size()));
  std::vector<KvItem> items;
  std::vector<PrefixName> names;
  const auto post = [&] {
    if (!items.empty()) disk.save(std::exchange(items, {}));
  };
  for (int64_t i = 0; i < whole; ++i) {
    const PrefixName& name = keys.of(ids, i + 1);
    if (disk.has(name)) {
      names.push_back(name);
      continue;
    }
    if (items.size() * page_bytes >= kSavedTogether) post();
    const std::span<std::byte> copy = disk.room(page_bytes);
    if (copy.empty()) break;
    TC_RETURN_IF_ERROR(store_.memory().read(KvPool::compressed, pages[static_cast<size_t>(i)], copy.data()));
    items.push_back({{.name = name, .kind = KvItemKind::page}, {copy}});
  }
  const PrefixName own = durable ? secret_.with_tail(entry.name, entry.tail) : PrefixName();
  if (durable && !disk.has(own)) {
    const std::span<const std::byte> image = checkpoint.image();
    const size_t tail_bytes = whole < static_cast<int64_t>(pages.size()) ? page_bytes : 0;
    if (const std::span<std::byte> copy = disk.room(image.size() + tail_bytes); !copy.empty()) {
      std::memcpy(copy.data(), image.data(), image.size());
      if (tail_bytes > 0)
        TC_RETURN_IF_ERROR(store_.memory().read(KvPool::compressed, pages.back(), copy.data() + image.size()));
      items.push_back({{.name = own,
                        .parent = entry.name,
                        .kind = KvItemKind::checkpoint,
                        .tail_tokens = static_cast<uint32_t>(entry.tail.size())},
                       {copy}});
    }
  }
  post();
  if (durable && !names.empty()) disk.touch(std::move(names));
  return {};
}

}  // namespace thermocline
